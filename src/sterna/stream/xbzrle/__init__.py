"""XBZRLE: a page as what changed in it, the cache of what was sent before, and what becomes of a batch of pages with it."""
