"""Some of `python -m tests.handover`: each thing that is done, in the moment of the hand-over, at each kind of address."""

from collections.abc import Iterator

import pytest
from tests.handover.__main__ import Table
from tests.handover.case import (
    Call,
    Case,
    Done,
    Ends,
    Lengths,
    Second,
    Verdict,
    a_second,
    measure,
    run_case,
)
from tests.handover.relay import Address, Direction, Place
from tests.handover.vms import run_vms

pytestmark = pytest.mark.slow

STARTS = Call(True, "advance_counter")
"""COMMIT has come, and the guest has not started."""
LEAVES = Call(False, "save_devices")
"""The guest has stopped, and COMMIT is not sent."""
ALL_OF_COMMIT = Place(Direction.AFTER_READY, 80)
HALF_OF_COMMIT = Place(Direction.AFTER_READY, 20)


@pytest.fixture(scope="module")
def second() -> Iterator[Second]:
    with a_second() as made:
        yield made


@pytest.fixture(scope="module")
def lengths(second: Second) -> Lengths:
    return measure(second)


def check(case: Case, second: Second, first: Ends, last: Ends | None = None) -> None:
    verdict = run_case(case, second)
    assert verdict.wrong == [], case
    assert (verdict.first, verdict.last) == (first, last or first), case


@pytest.mark.parametrize("address", Address)
def test_a_destination_stopped_before_its_start(address: Address, second: Second) -> None:
    case = Case(Done.STOP_DESTINATION, address, STARTS, unix=address is Address.GONE, cut_too=True, long=True)
    check(case, second, Ends.IN_DOUBT, Ends.DESTINATION)


@pytest.mark.parametrize("address", [Address.NOTHING, Address.REFUSES, Address.SECOND])
def test_a_destination_killed_before_its_start(address: Address, second: Second) -> None:
    check(Case(Done.KILL_DESTINATION, address, STARTS), second, Ends.SOURCE)


@pytest.mark.parametrize("address", [Address.GONE, Address.GARBAGE])
def test_a_destination_killed_where_nobody_sees_it(root: None, address: Address, second: Second) -> None:
    case = Case(Done.KILL_DESTINATION, address, STARTS, unix=address is Address.GONE, alone=True)
    check(case, second, Ends.IN_DOUBT)


@pytest.mark.parametrize("address", [Address.REFUSES, Address.MUTE])
@pytest.mark.parametrize(
    ("place", "ends"), [(LEAVES, Ends.NONE), (HALF_OF_COMMIT, Ends.DESTINATION), (STARTS, Ends.DESTINATION)]
)
def test_a_source_killed(address: Address, place: Place | Call, ends: Ends, second: Second) -> None:
    check(Case(Done.KILL_SOURCE, address, place, unix=True), second, ends)


@pytest.mark.parametrize(
    ("place", "ends"), [(LEAVES, Ends.SOURCE), (HALF_OF_COMMIT, Ends.SOURCE), (STARTS, Ends.NONE)]
)
def test_a_destination_told_to_end(root: None, place: Place | Call, ends: Ends, second: Second) -> None:
    """Its process is not seen to end, so what it says decides."""
    check(Case(Done.QUIT_DESTINATION, Address.REFUSES, place, unix=True, alone=True), second, ends)


@pytest.mark.parametrize("done", [Done.CUT, Done.HALF_FORWARD])
@pytest.mark.parametrize(
    ("address", "ends"),
    [
        (Address.NOTHING, (Ends.SOURCE, Ends.SOURCE)),
        (Address.RESETS, None),
    ],
)
def test_half_of_commit(done: Done, address: Address, ends: tuple[Ends, Ends] | None, second: Second) -> None:
    doubt = (Ends.IN_DOUBT, Ends.SOURCE) if done is Done.CUT else (Ends.SOURCE, Ends.SOURCE)
    check(Case(done, address, HALF_OF_COMMIT, moving=True), second, *(ends or doubt))


@pytest.mark.parametrize("done", [Done.RESET, Done.HALF_BACK])
@pytest.mark.parametrize("address", [Address.NOTHING, Address.SECOND, Address.GARBAGE])
def test_running_is_lost(done: Done, address: Address, second: Second, lengths: Lengths) -> None:
    case = Case(done, address, STARTS, silent=done is Done.HALF_BACK)
    if address is Address.NOTHING:
        check(case, second, Ends.DESTINATION)
    else:
        check(case, second, Ends.IN_DOUBT, Ends.DESTINATION)


@pytest.mark.parametrize("place", [Place(Direction.FORWARD, 3000), LEAVES, ALL_OF_COMMIT, STARTS])
def test_a_source_stopped_for_a_moment(place: Place | Call, second: Second) -> None:
    check(Case(Done.STOP_SOURCE, Address.REFUSES, place), second, Ends.DESTINATION)


def test_with_real_machines(second: Second) -> None:
    verdict = run_vms(Case(Done.CUT, Address.REFUSES, HALF_OF_COMMIT), second)
    assert (verdict.first, verdict.last, verdict.wrong) == (Ends.IN_DOUBT, Ends.SOURCE, [])


def test_a_real_machine_told_to_end_while_a_monitor_holds_it_up(second: Second) -> None:
    verdict = run_vms(Case(Done.QUIT_DESTINATION, Address.NOTHING, HALF_OF_COMMIT), second)
    assert (verdict.first, verdict.last, verdict.wrong) == (Ends.SOURCE, Ends.SOURCE, [])


def test_the_table_shows_what_must_not_be() -> None:
    table = Table()
    case = Case(Done.CUT, Address.MUTE, STARTS)
    table.add(case, Verdict(Ends.IN_DOUBT, Ends.BOTH, ["both run after asking"]))
    assert table.wrong == [f"both run after asking: {case}"]
    [row] = [line for line in str(table).splitlines() if line.startswith("cut               never answers")]
    assert row.split()[-8:] == [".", ".", "1", ".", ".", ".", ".", "."]
