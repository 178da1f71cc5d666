"""Every page is dirty in the current log or write-protected, and no table is used again while a CPU may be in a walk through it:
whatever happens, in whatever order.
"""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.stage2.support import (
    GEOMETRIES,
    RAM_PA,
    Geometry,
    read,
    write,
)

from sterna.memory.address import Ipa
from sterna.memory.bitmap import new_bitmap, page_numbers
from sterna.stage2.dirtylog import DirtyLog
from sterna.stage2.walk import find_leaf
from sterna.testing.flush import RecordingFlush

RAM = Ipa(0x4000_0000)
PAGES = 1024 + 77
pages = st.integers(0, PAGES - 1)
meanwhile = st.lists(pages, max_size=3)


class Stage2Machine(RuleBasedStateMachine):
    """A slot, and a model of its log: the set of pages written since they were last cleared.

    While a flush is awaited the guest goes on, and writes to the pages `meanwhile`.
    """

    geometry: Geometry

    def __init__(self):
        super().__init__()
        self.stage2 = self.geometry.make(max_leaf=self.geometry.large)
        self.stage2.insert_slot(0, RAM, PAGES * self.geometry.page, RAM_PA, readonly=False)
        self.log = None
        self.manual = False
        self.dirty = set()
        self.flush = RecordingFlush(self.go_on)
        self.meanwhile = ()
        self.tables = {}
        self.taken_out = set()

    def watch_tables(self):
        """No table that a walk may be in has become another's."""
        now = self.geometry.tables_in_use(self.stage2)
        for table, entry in now.items():
            assert table not in self.taken_out, f"the table at {table} is used again before a flush"
            assert self.tables.get(table, entry) == entry, f"the table at {table} has moved"
        self.taken_out |= self.tables.keys() - now.keys()
        self.tables = now

    def at(self, page):
        return Ipa(RAM + page * self.geometry.page)

    def go_on(self):
        self.watch_tables()
        flushed = set(self.taken_out)
        for page in self.meanwhile:
            write(self.stage2, self.at(page))
            self.watch_tables()
        self.dirty.update(self.meanwhile)
        self.meanwhile = ()
        self.taken_out -= flushed

    @rule(page=pages)
    def write(self, page):
        write(self.stage2, self.at(page))
        if self.log is not None:
            self.dirty.add(page)

    @rule(page=pages)
    def read(self, page):
        read(self.stage2, self.at(page))

    @rule(page=pages)
    def spurious_fault(self, page):
        self.stage2.fault(self.at(page))
        # A fault on a page that is mapped read-only can only be a write.
        if self.log is not None and self.geometry.writable(self.stage2, self.at(page)):
            self.dirty.add(page)

    @rule(page=pages, count=st.integers(1, 600))
    def age(self, page, count):
        self.stage2.age(self.at(page), min(count, PAGES - page) * self.geometry.page)

    @rule(page=pages, count=st.integers(1, 600), meanwhile=meanwhile)
    def unmap(self, page, count, meanwhile):
        self.meanwhile = meanwhile
        self.stage2.unmap(self.at(page), min(count, PAGES - page) * self.geometry.page)
        self.stage2.flush_tlbs(self.flush)

    @precondition(lambda self: self.log is None)
    @rule(manual=st.booleans(), initially_set=st.booleans(), meanwhile=meanwhile)
    def enable(self, manual, initially_set, meanwhile):
        self.manual = manual
        self.dirty = set(range(PAGES)) if manual and initially_set else set()
        self.meanwhile = meanwhile
        self.log = DirtyLog(
            self.stage2,
            self.flush,
            0,
            RAM,
            PAGES,
            manual_protect=manual,
            initially_set=manual and initially_set,
        )

    @precondition(lambda self: self.log is not None)
    @rule()
    def disable(self):
        self.log.disable()
        self.log = None
        self.dirty = set()

    @precondition(lambda self: self.log is not None)
    @rule(meanwhile=meanwhile)
    def get(self, meanwhile):
        dirty = set(self.dirty)
        if not self.manual:
            self.dirty = set()
        self.meanwhile = meanwhile
        assert set(page_numbers(self.log.get()).tolist()) == dirty

    @precondition(lambda self: self.log is not None and self.manual)
    @rule(first=st.integers(0, PAGES // 64), wanted=st.sets(st.integers(0, 255)), meanwhile=meanwhile)
    def clear(self, first, wanted, meanwhile):
        first *= 64
        count = min(256, PAGES - first)
        words = new_bitmap(256)
        for bit in wanted:
            words[bit // 64] |= np.uint64(1 << bit % 64)
        self.dirty -= {first + bit for bit in wanted if bit < count}
        self.meanwhile = meanwhile
        self.log.clear(first, count, words)

    @precondition(lambda self: self.log is not None)
    @rule(page=pages, count=st.integers(1, 200))
    def host_write(self, page, count):
        count = min(count, PAGES - page)
        self.log.mark(page, count)
        self.dirty.update(range(page, page + count))

    @invariant()
    def dirty_or_protected(self):
        if self.log is None:
            return
        for page in range(PAGES):
            if page not in self.dirty:
                entry = self.stage2.tables[find_leaf(self.stage2.state, self.stage2.tables, self.at(page))[0]]
                assert not entry & self.geometry.format.write, f"page {page} is clean and writable"

    @invariant()
    def tables_are_walkable(self):
        self.watch_tables()

    @invariant()
    def accounts_agree(self):
        self.stage2.validate()

    @invariant()
    def mappings_are_right(self):
        for page in (0, 1, 511, 512, PAGES - 1):
            entry, level = self.stage2.entry(self.at(page))
            if entry:
                size = {3: self.geometry.page, 2: self.geometry.block, 1: self.geometry.large}[level]
                pa = RAM_PA + page * self.geometry.page
                assert entry & self.geometry.format.address == pa & ~(size - 1)


for geometry in GEOMETRIES:
    case = type(f"Stage2Machine_{geometry.name}", (Stage2Machine,), {"geometry": geometry}).TestCase
    case.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
    globals()[f"TestInvariant_{geometry.name}"] = pytest.mark.slow(case)
del case, geometry
