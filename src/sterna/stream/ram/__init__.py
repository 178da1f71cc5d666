"""The body of the ``ram`` section, version 4: pages of guest RAM as records.

A record begins with a 64-bit word: the page's offset in its block, and flags in the bits below the page size.
A PAGE record carries the page, a ZERO record one zero byte. Without CONTINUE, the block's name (one byte of
length before it) stands between word and data. An XBZRLE record carries what changed in a page that came
before (`sterna.stream.xbzrle.coding`), after the byte 1 and a 16-bit length. EOS ends the part.

Page data is never copied to be sent: `encode_pages` makes a list of addresses for a vectored system call.
Received records are taken apart by a compiled kernel that copies pages from the staging buffer into guest
RAM.
"""
