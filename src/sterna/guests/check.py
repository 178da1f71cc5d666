"""Whether the content of a guest's RAM is what its program must have written, told from the RAM alone.

`dirtyram` and `random` write what follows from their arguments and the number of writes done, which their status page
holds. Each function computes that content anew and compares every page, so a page that is stale, lost or from another
place shows. At most one write per CPU may be ahead of its count: RAM can be taken between any two instructions, but it
must not change while it is checked (stop the guest first).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sterna.guests.layout import (
    PAGE_BYTES,
    WORK_OFFSET,
    CpuState,
    DirtyramWord,
    GuestState,
    ProgramId,
    RandomError,
    RandomWord,
    Status,
    StatusError,
    read_status_of_ram,
)

Words = NDArray[np.uint64]

PAGE_WORDS = 512
_REPORTED = 8  # pages named per CPU; the rest is counted
_MASK = (1 << 64) - 1
_G = 0x9E3779B97F4A7C15
_TAG_MASK = (1 << 32) - 1
_BLOCK_PAGES = 1 << 15  # pages whose content is computed at a time: 128 MiB
_RANDOM_PAGES = 1 << 10  # pages whose random words are compared at a time: 4 MiB, which stays in a cache
_DIRTYRAM_WORDS = 3  # which argument tells how many
_CHUNK_STEPS = 1 << 18  # steps computed at a time
_MAX_STEPS = 1 << 32  # more are not replayed: the count comes from the guest


def check_ram(ram: NDArray[np.uint8]) -> list[str]:
    """Problems with the content of `ram`, the whole of a guest's RAM; empty when there are none.

    :param ram: `shape (bytes,)`
    """
    try:
        status = read_status_of_ram(ram)
    except StatusError as error:
        return [str(error)]
    problems = check_state(status)
    if status.state is not GuestState.RUNNING:
        return problems
    if status.program in (ProgramId.DIRTYRAM, ProgramId.NET):
        problems += check_dirtyram(ram, status)
    elif status.program is ProgramId.RANDOM:
        problems += check_random(ram, status)
    return problems


def check_state(status: Status) -> list[str]:
    """What the status page alone tells: errors, and a counter that went back."""
    problems = []
    if status.state is GuestState.ERROR:
        problems.append(f"{status.program.name.lower()} stopped: {status.error.name}")
    for index in range(status.cpus):
        cpu = status.cpu(index)
        if int(cpu["state"]) == CpuState.STOPPED:
            problems.append(
                f"cpu {index} took the exception of vector {int(cpu['fault_vector']):#x} at pc {int(cpu['fault_pc']):#x}, "
                f"address {int(cpu['fault_address']):#x}"
            )
        if int(cpu["backward_steps"]):
            problems.append(
                f"cpu {index} saw the counter go back {int(cpu['backward_steps'])} times, "
                f"lately by {status.milliseconds(int(cpu['backward_ticks'])):.3f} ms"
            )
    return problems


def check_dirtyram(ram: NDArray[np.uint8], status: Status) -> list[str]:
    """Compare every page that `dirtyram` or `net` wrote with the value that the count of writes calls for.

    :param ram: the whole of the guest's RAM, `shape (bytes,)`
    """
    return [problem for cpu in _started_cpus(status) for problem in _check_dirtyram_share(ram, status, cpu)]


def _check_dirtyram_share(ram: NDArray[np.uint8], status: Status, cpu: int) -> list[str]:
    first = status.word(cpu, DirtyramWord.FIRST)
    pages = status.word(cpu, DirtyramWord.PAGES)
    writes = status.word(cpu, DirtyramWord.WRITES)
    passes = status.word(cpu, DirtyramWord.PASSES)
    if pages == 0 and writes == 0:
        return []  # it has only just come up
    if problem := _outside(ram, first, pages):
        return [f"cpu {cpu}: {problem}"]
    # A pass is counted after the write that completes it.
    if pages == 0 or passes not in (writes // pages, (writes - 1) // pages):
        return [f"cpu {cpu}: {passes} passes do not go with {writes} writes to {pages} pages"]
    start = WORK_OFFSET + first * PAGE_BYTES
    content = ram[start : start + pages * PAGE_BYTES].view(np.uint64).reshape(pages, -1)
    found = content.view(np.uint32)[:, 0]
    touched = min(writes, pages)
    numbers = np.arange(touched, dtype=np.uint64)
    last = np.uint64((writes - 1) & _MASK)
    latest = last - (last - numbers) % np.uint64(pages)  # the latest write to each page
    number = latest + np.uint64(1)
    expected = number.astype(np.uint32)
    wrong = found[:touched] != expected
    ahead = writes % pages
    if ahead < touched and found[ahead] == (writes + 1) & 0xFFFFFFFF:
        wrong[ahead] = False
    who = f"cpu {cpu}, {writes} writes"
    problems = _name_pages(
        who, first, np.flatnonzero(wrong), lambda page: f"holds {found[page]}, not {expected[page]}"
    )
    words = status.args[_DIRTYRAM_WORDS] if status.program is ProgramId.DIRTYRAM else 0
    if not words:
        return problems
    if words >= PAGE_WORDS:
        return [*problems, f"cpu {cpu}: {words} random words are more than a page has"]
    other = _other_random_words(content[:touched], number, words) & ~wrong
    if ahead < touched and other[ahead]:
        begun = list(_random_words(np.array([number[ahead], writes + 1], dtype=np.uint64), words))
        other[ahead] = any(content[ahead, 1 + i] not in either for i, either in enumerate(begun))
    return problems + _name_pages(
        who,
        first,
        np.flatnonzero(other),
        lambda page: f"has other random words than write {expected[page]} put there",
    )


def _other_random_words(content: Words, number: Words, words: int) -> NDArray[np.bool_]:
    """Of which pages the random words are not those of their latest write.

    :param content: `shape (pages, PAGE_WORDS)`
    :param number: of the write, `shape (pages,)`
    """
    wrong = np.zeros(len(content), dtype=np.bool_)
    for low in range(0, len(content), _RANDOM_PAGES):
        some = slice(low, low + _RANDOM_PAGES)
        for i, expected in enumerate(_random_words(number[some], words)):
            wrong[some] |= content[some, 1 + i] != expected
    return wrong


def _random_words(number: Words, words: int) -> Iterator[Words]:
    """What write `number` puts into word 1, 2, and so on of its page: xorshift64 (Marsaglia 2003)."""
    x = _mix(number)
    for _ in range(words):
        x = x ^ x << np.uint64(13)
        x ^= x >> np.uint64(7)
        x ^= x << np.uint64(17)
        yield x


@dataclass(frozen=True)
class _Share:
    """What one CPU of `random` works on."""

    first: int
    table_pages: int
    pages: int
    seed: int
    steps: int


def check_random(ram: NDArray[np.uint8], status: Status) -> list[str]:
    """Compare every page, tag and the checksum of `random` with what its seed and count of steps call for.

    Also tells the errors that the guest has found itself.

    :param ram: the whole of the guest's RAM, `shape (bytes,)`
    """
    problems = []
    for cpu in _started_cpus(status):
        share = _Share(
            status.word(cpu, RandomWord.FIRST),
            status.word(cpu, RandomWord.TABLE_PAGES),
            status.word(cpu, RandomWord.PAGES),
            status.word(cpu, RandomWord.SEED),
            status.word(cpu, RandomWord.STEPS),
        )
        if errors := status.word(cpu, RandomWord.ERRORS):
            problems.append(_guest_error(status, cpu, errors))
        if problem := _outside(ram, share.first, share.table_pages + share.pages):
            problems.append(f"cpu {cpu}: {problem}")
            continue
        if share.table_pages * 1024 < share.pages or share.steps > _MAX_STEPS:
            problems.append(f"cpu {cpu}: its status is not random's: {share}")
            continue
        ready = status.word(cpu, RandomWord.READY)
        if ready < share.pages:
            problems += _check_share(ram, cpu, share, pages=ready, checksum=None)
        else:
            checksum = status.word(cpu, RandomWord.CHECKSUM)
            problems += _check_share(ram, cpu, share, pages=share.pages, checksum=checksum)
    return problems


def _check_share(
    ram: NDArray[np.uint8], cpu: int, share: _Share, pages: int, checksum: int | None
) -> list[str]:
    start = WORK_OFFSET + share.first * PAGE_BYTES
    table = ram[start : start + 4 * pages].view(np.uint32)
    start += share.table_pages * PAGE_BYTES
    found = ram[start : start + pages * PAGE_BYTES].view(np.uint64).reshape(pages, PAGE_WORDS)
    # The next step may be done in part: its word, its tag, its table entry, the checksum, in this order.
    ahead_page, ahead_word, ahead_value = (int(value[0]) for value in _steps(share, share.steps, 1))
    ahead_tag = share.steps + 1
    wrong: list[NDArray[np.intp]] = []
    total = ahead_change = 0
    for low in range(0, pages, _BLOCK_PAGES):
        high = min(pages, low + _BLOCK_PAGES)
        expected = _content(share, low, high)
        sums = expected.sum(axis=1, dtype=np.uint64)
        weights = np.arange(low, high, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        total += int((sums * weights).sum(dtype=np.uint64))
        tags = (expected[:, 0] & np.uint64(_TAG_MASK)).astype(np.uint32)
        here = found[low:high]
        if low <= ahead_page < high:
            row = expected[ahead_page - low]
            ahead_change = (ahead_value - int(row[ahead_word]) + ahead_tag - int(row[0])) * (
                2 * ahead_page + 1
            )
            if here[ahead_page - low, ahead_word] == ahead_value:
                row[ahead_word] = ahead_value
            if here[ahead_page - low, 0] == ahead_tag:
                row[0] = ahead_tag
            if table[ahead_page] == ahead_tag & _TAG_MASK:
                tags[ahead_page - low] = ahead_tag & _TAG_MASK
        bad = (here != expected).any(axis=1) | (table[low:high] != tags)
        wrong.append(np.flatnonzero(bad) + low)
    numbers = np.concatenate(wrong) if wrong else np.empty(0, dtype=np.intp)
    problems = _name_pages(
        f"cpu {cpu}, {share.steps} steps",
        share.first + share.table_pages,
        numbers,
        lambda page: (
            f"is not what its seed calls for; its tag is {found[page, 0]}, the table's {table[page]}"
        ),
    )
    if checksum is not None and checksum not in (total & _MASK, (total + ahead_change) & _MASK):
        problems.append(
            f"cpu {cpu}, {share.steps} steps: checksum {checksum:#018x}, not {total & _MASK:#018x}"
        )
    return problems


def _content(share: _Share, low: int, high: int) -> Words:
    """The data pages `low` to `high` (half open) after all steps, `shape (high - low, 512)`."""
    pages = np.arange(low, high, dtype=np.uint64) + np.uint64(1)
    starts = _mix(pages ^ np.uint64(share.seed))
    content: Words = starts[:, None] + np.arange(PAGE_WORDS, dtype=np.uint64)[None, :] * np.uint64(_G)
    content[:, 0] = 0
    flat = content.reshape(-1)
    for begin in range(0, share.steps, _CHUNK_STEPS):
        count = min(_CHUNK_STEPS, share.steps - begin)
        page, word, value = _steps(share, begin, count)
        tag = np.arange(begin + 1, begin + 1 + count, dtype=np.uint64)
        if low or high < share.pages:
            mine = (page >= low) & (page < high)
            page, word, value, tag = page[mine], word[mine], value[mine], tag[mine]
        row = (page - np.uint64(low)).astype(np.intp) * PAGE_WORDS
        # Of repeated indices the last assignment stays, which is the order of the steps.
        flat[row + word.astype(np.intp)] = value
        flat[row] = tag
    return content


def _steps(share: _Share, begin: int, count: int) -> tuple[Words, Words, Words]:
    """Page, word and value of steps `begin` to `begin + count`."""
    numbers = np.arange(begin + 1, begin + 1 + count, dtype=np.uint64)
    draws = _mix(np.uint64(share.seed) + numbers * np.uint64(_G))
    page = (draws >> np.uint64(32)) * np.uint64(share.pages) >> np.uint64(32)
    word = np.uint64(1) + ((draws & np.uint64(0xFFFF)) * np.uint64(PAGE_WORDS - 1) >> np.uint64(16))
    return page, word, _mix(draws)


def _mix(z: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


def _guest_error(status: Status, cpu: int, errors: int) -> str:
    kind = status.word(cpu, RandomWord.ERROR_KIND)
    name = RandomError(kind).name if kind in list(RandomError) else str(kind)
    page = status.word(cpu, RandomWord.ERROR_PAGE)
    where = "" if page == _MASK else f" at data page {page}"
    step = status.word(cpu, RandomWord.ERROR_STEP)
    return f"cpu {cpu}: the guest itself found {errors} errors, the latest {name}{where} after step {step}"


def _started_cpus(status: Status) -> Iterator[int]:
    return (index for index in range(status.cpus) if int(status.cpu(index)["state"]) != CpuState.OFF)


def _outside(ram: NDArray[np.uint8], first: int, pages: int) -> str | None:
    """What is wrong with a share of work pages, if anything: its place comes from the guest."""
    room = max(0, ram.size - WORK_OFFSET) // PAGE_BYTES
    if first + pages > room:
        return f"pages {first} to {first + pages} of its work are outside RAM, which has room for {room}"
    return None


def _name_pages(who: str, first: int, wrong: NDArray[np.intp], tell: Callable[[int], str]) -> list[str]:
    """A line for each of the first few wrong pages (counted in the share that starts at work page `first`)."""
    problems = [
        f"{who}: page {page} of its share (RAM offset {WORK_OFFSET + (first + int(page)) * PAGE_BYTES:#x}) {tell(int(page))}"
        for page in wrong[:_REPORTED]
    ]
    if len(wrong) > _REPORTED:
        problems.append(f"{who}: and {len(wrong) - _REPORTED} more pages")
    return problems
