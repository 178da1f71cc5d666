"""Stage-2 translation: page tables in memory, write protection, dirty logging, TLB maintenance.

Generic algorithms, and one module per architecture for what differs. All of it works on memory that the emulated CPU's own MMU
walks.
"""
