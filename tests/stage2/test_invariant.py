"""Every page is dirty in the current log or write-protected: whatever happens, in whatever order."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stage2.support import RAM_PA, WRITE, RecordingFlush, make, read, write
from sterna.memory.address import PAGE_SIZE, PMD_SIZE, PUD_SIZE, Ipa
from sterna.memory.bitmap import new_bitmap, page_numbers
from sterna.stage2.dirtylog import DirtyLog

RAM = Ipa(0x4000_0000)
PAGES = 1024 + 77
pages = st.integers(0, PAGES - 1)


class Stage2Machine(RuleBasedStateMachine):
    """A slot, and a model of its log: the set of pages written since they were last cleared."""

    def __init__(self):
        super().__init__()
        self.stage2 = make(max_leaf=PUD_SIZE)
        self.stage2.insert_slot(0, RAM, PAGES * PAGE_SIZE, RAM_PA, readonly=False)
        self.log = None
        self.manual = False
        self.dirty = set()

    @rule(page=pages)
    def write(self, page):
        write(self.stage2, RAM + page * PAGE_SIZE)
        if self.log is not None:
            self.dirty.add(page)

    @rule(page=pages)
    def read(self, page):
        read(self.stage2, RAM + page * PAGE_SIZE)

    @rule(page=pages)
    def spurious_fault(self, page):
        self.stage2.fault(Ipa(RAM + page * PAGE_SIZE))
        # A fault on a page that is mapped read-only can only be a write.
        if self.log is not None and self.stage2.entry(Ipa(RAM + page * PAGE_SIZE))[0] & WRITE:
            self.dirty.add(page)

    @rule(page=pages, count=st.integers(1, 600))
    def age(self, page, count):
        self.stage2.age(Ipa(RAM + page * PAGE_SIZE), min(count, PAGES - page) * PAGE_SIZE)

    @rule(page=pages, count=st.integers(1, 600))
    def unmap(self, page, count):
        self.stage2.unmap(Ipa(RAM + page * PAGE_SIZE), min(count, PAGES - page) * PAGE_SIZE)

    @precondition(lambda self: self.log is None)
    @rule(manual=st.booleans(), initially_set=st.booleans())
    def enable(self, manual, initially_set):
        self.manual = manual
        self.log = DirtyLog(
            self.stage2,
            RecordingFlush(),
            0,
            RAM,
            PAGES,
            manual_protect=manual,
            initially_set=manual and initially_set,
        )
        self.dirty = set(range(PAGES)) if manual and initially_set else set()

    @precondition(lambda self: self.log is not None)
    @rule()
    def disable(self):
        self.log.disable()
        self.log = None
        self.dirty = set()

    @precondition(lambda self: self.log is not None)
    @rule()
    def get(self):
        assert set(page_numbers(self.log.get()).tolist()) == self.dirty
        if not self.manual:
            self.dirty = set()

    @precondition(lambda self: self.log is not None and self.manual)
    @rule(first=st.integers(0, PAGES // 64), wanted=st.sets(st.integers(0, 255)))
    def clear(self, first, wanted):
        first *= 64
        count = min(256, PAGES - first)
        words = new_bitmap(256)
        for bit in wanted:
            words[bit // 64] |= np.uint64(1 << bit % 64)
        self.log.clear(first, count, words)
        self.dirty -= {first + bit for bit in wanted if bit < count}

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
                entry, _ = self.stage2.entry(Ipa(RAM + page * PAGE_SIZE))
                assert not entry & WRITE, f"page {page} is clean and writable"

    @invariant()
    def accounts_agree(self):
        self.stage2.validate()

    @invariant()
    def mappings_are_right(self):
        for page in (0, 1, 511, 512, PAGES - 1):
            entry, level = self.stage2.entry(Ipa(RAM + page * PAGE_SIZE))
            if entry:
                size = {3: PAGE_SIZE, 2: PMD_SIZE, 1: PUD_SIZE}[level]
                assert entry & 0xFF_FFFF_F000 == (RAM_PA + page * PAGE_SIZE) & ~(size - 1)


TestInvariant = Stage2Machine.TestCase
TestInvariant.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
