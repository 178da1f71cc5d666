"""Analysis of migration streams: what is in one, how two differ; `proxy/` analyses a live one on its way.

Nothing here is needed to migrate.
"""
