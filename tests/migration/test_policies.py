"""The policies, on passes that were recorded and on guests that are a formula."""

import dataclasses
from collections.abc import Callable

import pytest

from sterna.migration.errors import ParameterError
from sterna.migration.parameters import PARAMETERS, POLICIES, Parameters, PolicyType
from sterna.migration.policies.adaptive import Adaptive
from sterna.migration.policies.deadline import Deadline
from sterna.migration.policies.fixed import Fixed
from sterna.migration.policy import (
    LAST_PASS_MS,
    Continue,
    ConvergenceState,
    Decision,
    GiveUp,
    Limits,
    PassProgress,
    Policy,
    SwitchOver,
)
from sterna.migration.statistics import DowntimeParts, Pass
from sterna.migration.verdict import explain, verdict

GIGABIT = 125e6
PAGE = 4104

PLAIN = [
    (458752, 424247110, 3.525, 90134),
    (90134, 369915600, 2.940, 76330),
    (76330, 313263120, 2.498, 64962),
    (64962, 266608112, 2.125, 55218),
    (55218, 226618128, 1.808, 46313),
    (46313, 190071464, 1.510, 39763),
    (39763, 163189848, 1.306, 33294),
    (33294, 136640688, 1.088, 28422),
    (28422, 116645680, 0.919, 24362),
    (24362, 99983184, 0.792, 20302),
    (20302, 83320688, 0.670, 17866),
    (17866, 73323184, 0.578, 14618),
    (14618, 59993200, 0.470, 12994),
    (12994, 53328208, 0.424, 10558),
    (10558, 43330704, 0.346, 9746),
    (9746, 39998224, 0.313, 8122),
]
"""Recorded: `dirtyram 102580 812 30`, 1792 MiB, 1 Gbit/s: pages, bytes, seconds, dirty pages."""
HOPELESS = [
    (458752, 1681494010, 13.787, 409602),
    (409602, 1681032240, 14.060, 409602),
    (409602, 1681032240, 14.011, 409602),
    (409602, 1681032240, 14.023, 409602),
]
"""Recorded: `dirtyram 409600 8192 5`, likewise."""


def state_after(
    passes: list[Pass],
    *,
    page_bytes: float = PAGE,
    rate: float = GIGABIT,
    fixed_ms: float = 10.0,
    limit: float = 0.3,
    throttle: int = 99,
    elapsed: float | None = None,
) -> ConvergenceState:
    """After the last of `passes`, on a link that is no faster when the guest is stopped."""
    rest = passes[-1].dirty_pages * page_bytes
    parts = DowntimeParts(last_pass=LAST_PASS_MS + rest / rate * 1000, destination_load=fixed_ms)
    seconds = sum(p.seconds for p in passes) if elapsed is None else elapsed
    whole = passes[-1].dirty_pages * PAGE / rate
    return ConvergenceState(passes, rest, rest / rate, whole, rate, parts, seconds, Limits(limit, throttle))


def replay(policy: Policy, recorded: list[tuple[int, int, float, int]], **options: float) -> list[Decision]:
    """What the policy says after each recorded pass, until it ends the migration."""
    passes: list[Pass] = []
    decisions: list[Decision] = []
    throttle = 0
    for number, (pages, size, seconds, dirty) in enumerate(recorded, 1):
        passes.append(Pass(number, pages, size, seconds, dirty, throttle))
        decisions.append(policy.after_pass(state_after(passes, **options)))  # type: ignore[arg-type]
        if not isinstance(decisions[-1], Continue):
            break
        throttle = decisions[-1].throttle_percent
    return decisions


def simulate(
    policy: Policy, working_set: int, pages_per_second: float, *, seconds: float = 120.0, **options: float
) -> tuple[Decision, list[Pass]]:
    """A guest that writes its working set round and round; throttling slows it down in proportion."""
    rate, page_bytes = options.get("rate", GIGABIT), options.get("page_bytes", PAGE)
    passes: list[Pass] = []
    to_send, throttle, elapsed = float(working_set), 0, 0.0
    while elapsed < seconds:
        duration = to_send * page_bytes / rate + 0.002
        elapsed += duration
        dirty = round(min(working_set, pages_per_second * (100 - throttle) / 100 * duration))
        passes.append(
            Pass(len(passes) + 1, round(to_send), round(to_send * page_bytes), duration, dirty, throttle)
        )
        decision = policy.after_pass(state_after(passes, **options))  # type: ignore[arg-type]
        if not isinstance(decision, Continue):
            return decision, passes
        to_send, throttle = dirty, decision.throttle_percent
    return Continue(throttle), passes


def fixed(auto_converge: bool = False, **changes: object) -> Fixed:
    parameters = Parameters()
    parameters.set_capabilities({"auto-converge": auto_converge})
    parameters.set({name.replace("_", "-"): value for name, value in changes.items()})
    return Fixed(parameters)


# -- fixed -----------------------------------------------------------------------------------------------------


def test_fixed_stops_when_full_pages_fit_the_limit_at_the_bandwidth() -> None:
    decisions = replay(fixed(), PLAIN)
    assert len(decisions) == 16
    assert decisions[-1] == SwitchOver(), "8122 pages are 266 ms, 9746 are 319 ms"
    assert all(isinstance(decision, Continue) for decision in decisions[:-1])


def test_fixed_knows_nothing_of_encodings_and_of_what_else_takes_time() -> None:
    assert len(replay(fixed(), PLAIN, page_bytes=20.0)) == 16
    assert len(replay(fixed(), PLAIN, fixed_ms=500.0)) == 16


def test_fixed_never_gives_up_and_throttles_only_when_told() -> None:
    off, on = replay(fixed(), HOPELESS), replay(fixed(auto_converge=True), HOPELESS)
    assert [d.throttle_percent for d in off if isinstance(d, Continue)] == [0, 0, 0, 0]
    assert [d.throttle_percent for d in on if isinstance(d, Continue)] == [0, 20, 20, 30]
    assert all(isinstance(d, Continue) and d.verdict for d in off[1:])


# -- adaptive --------------------------------------------------------------------------------------------------


def test_adaptive_counts_everything_that_the_downtime_holds() -> None:
    assert len(replay(Adaptive(), PLAIN)) == 16
    assert len(replay(Adaptive(), PLAIN, limit=0.5)) == 13
    assert len(replay(Adaptive(), PLAIN, limit=0.5, fixed_ms=150.0)) == 15


def test_adaptive_counts_what_pages_cost_as_they_are_encoded() -> None:
    decisions = replay(Adaptive(), [*HOPELESS[:1], (409602, 6476001, 2.16, 409602)], page_bytes=16.0)
    assert decisions[0] == Continue(), "52 ms, and a further pass would be cheap"
    assert len(decisions) == 2


def test_adaptive_throttles_only_when_passes_do_not_get_shorter() -> None:
    assert all(d == Continue() for d in replay(Adaptive(), PLAIN)[:-1])
    throttles = [d.throttle_percent for d in replay(Adaptive(), HOPELESS) if isinstance(d, Continue)]
    assert throttles[0] == 0, "pass 1 sends all of RAM"
    assert throttles[1:] == sorted(throttles[1:])
    assert 30 <= throttles[1] <= 50
    assert throttles[3] > throttles[2] > throttles[1], "as long as it does not help"


@pytest.mark.parametrize("most", [0, 30])
def test_adaptive_respects_the_limit_of_its_throttle_and_says_what_would_help(most: int) -> None:
    decisions = replay(Adaptive(), HOPELESS, throttle=most)
    last = decisions[-1]
    assert isinstance(last, Continue)
    assert last.throttle_percent == most
    assert "a bandwidth above" in last.verdict
    assert "a downtime limit of 14000 ms" in last.verdict


def test_adaptive_polishes_while_it_is_cheap() -> None:
    decision, passes = simulate(Adaptive(), 100_000, 2000.0)
    assert decision == SwitchOver()
    assert passes[-2].dirty_pages > passes[-1].dirty_pages
    assert passes[-1].dirty_pages * PAGE / GIGABIT < 0.005, "a downtime that could be had for nothing"
    decision, passes = simulate(Adaptive(), 100_000, 26_000.0)
    assert decision == SwitchOver()
    assert 0.2 < passes[-1].dirty_pages * PAGE / GIGABIT <= 0.3, (
        "each further pass would take as long as the last"
    )


def test_adaptive_converges_whatever_the_guest_does() -> None:
    for speed in (1e3, 2.7e4, 1e5, 1e6):
        decision, passes = simulate(Adaptive(), 409_600, speed, seconds=300)
        assert decision == SwitchOver(), speed
        assert passes[-1].dirty_pages * PAGE / GIGABIT <= 0.29
        assert (passes[-1].throttle_percent > 0) == (speed > 3e4)


def test_a_limit_below_what_everything_else_takes_still_ends() -> None:
    decision, passes = simulate(Adaptive(), 10_000, 1000.0, limit=0.02, fixed_ms=50.0)
    assert decision == SwitchOver()
    assert passes[-1].dirty_pages * PAGE / GIGABIT <= 0.002
    assert simulate(Adaptive(), 10_000, 1000.0, limit=0.0, seconds=5)[0] == Continue()


# -- deadline --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [10, 20, 40])
def test_deadline_throttles_as_much_as_the_time_needs(seconds: int) -> None:
    decision, passes = simulate(Deadline(seconds), 100_000, 27_000.0)
    assert decision == SwitchOver()
    assert sum(p.seconds for p in passes) <= seconds
    assert (passes[-1].throttle_percent > 0) == (seconds < 40)


def test_deadline_gives_up_with_the_reason() -> None:
    decision, passes = simulate(Deadline(20), 409_600, 1e6)
    assert isinstance(decision, GiveUp)
    assert "the deadline of 20 s cannot be kept: the guest dirties" in decision.reason
    assert len(passes) == 1


def test_deadline_without_throttle_stops_a_guest_that_fits_before_time_runs_out() -> None:
    decision, _ = simulate(Deadline(4), 100_000, 2000.0, throttle=0)
    assert decision == SwitchOver()
    decision, _ = simulate(Deadline(10), 100_000, 29_000.0, throttle=0)
    assert isinstance(decision, GiveUp)


def test_deadline_gives_up_within_a_pass_that_cannot_be_in_time() -> None:
    policy = Deadline(10)
    progress = PassProgress(1, 1.0, 1e9, GIGABIT)
    assert policy.during_pass(progress) is None, "8 s to go, 9 left"
    assert policy.during_pass(dataclasses.replace(progress, bytes_per_second=0.0)) is None
    late = policy.during_pass(dataclasses.replace(progress, remaining_bytes=2e9))
    assert late is not None
    assert "pass 1 has 2000 MB to go at 125.0 MB/s" in late.reason
    assert policy.during_pass(dataclasses.replace(progress, remaining_bytes=0, elapsed_seconds=10.0))
    for other in (Adaptive(), fixed()):
        assert other.during_pass(dataclasses.replace(progress, elapsed_seconds=1e6)) is None


# -- verdicts --------------------------------------------------------------------------------------------------


def test_the_verdict_says_what_would_do() -> None:
    passes = [Pass(1, 400_000, 1_600_000_000, 13.0, 400_000), Pass(2, 400_000, 1_600_000_000, 13.0, 380_000)]
    text = verdict(state_after(passes))
    assert text == (
        "the guest dirties 119.7 MB/s (29231 pages/s), and 125.0 MB/s go through; what would do: a downtime limit "
        "of 13000 ms, a bandwidth above 133.3 MB/s or a throttle of 7 %"
    )
    assert "as encoded" in explain(state_after(passes, page_bytes=1000.0))
    assert verdict(state_after(passes, page_bytes=1000.0)) == ""


@pytest.mark.parametrize("remedy", ["bandwidth", "throttle", "downtime"])
def test_what_the_verdict_recommends_does_help(remedy: str) -> None:
    passes = [Pass(1, 100_000, 410_400_000, 3.3, 100_000), Pass(2, 100_000, 410_400_000, 3.3, 99_000)]
    text = verdict(state_after(passes))
    words = text.replace(",", "").split()
    value = {
        "bandwidth": lambda: float(words[words.index("above") + 1]) * 1e6,
        "throttle": lambda: float(words[words.index("throttle") + 2]),
        "downtime": lambda: float(words[words.index("limit") + 2]) / 1000,
    }[remedy]()
    speed = 30_000.0
    make: Callable[[], Policy] = Adaptive
    options: dict[str, float] = {"throttle": 0}
    if remedy == "bandwidth":
        options["rate"] = value * 1.02
    elif remedy == "throttle":
        speed *= (100 - value) / 100
    else:
        options["limit"] = value
    assert simulate(make(), 100_000, speed, seconds=300, **options)[0] == SwitchOver()
    assert simulate(make(), 100_000, 31_000.0, seconds=300, throttle=0)[0] == Continue()


# -- choosing --------------------------------------------------------------------------------------------------


def test_the_parameter_names_the_policy() -> None:
    parameters = Parameters()
    for changes, kind in (
        ({}, Adaptive),
        ({"x-sterna-policy": "fixed"}, Fixed),
        ({"x-sterna-policy": "deadline", "x-sterna-deadline": 30}, Deadline),
    ):
        parameters.set(changes)
        assert isinstance(parameters.policy.make(parameters), kind)


def test_each_policy_says_its_name_and_its_parameter() -> None:
    assert list(POLICIES) == ["adaptive", "deadline", "fixed"]
    for name in POLICIES:
        policy = POLICIES.get(name)
        assert policy.name == name
        assert not policy.argument or isinstance(PARAMETERS[policy.argument].default, int)
        assert bool(policy.argument) == bool(policy.unit)


@pytest.mark.parametrize(("policy", "own"), [("adaptive", True), ("deadline", True), ("fixed", False)])
def test_only_a_policy_of_our_own_chooses_xbzrle(policy: str, own: bool) -> None:
    parameters = Parameters()
    parameters.set({"x-sterna-policy": policy})
    assert parameters.may_choose_xbzrle is own


def test_a_policy_of_ones_own_is_named_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    class AtOnce:
        def after_pass(self, state: ConvergenceState) -> Decision:
            return SwitchOver()

        def during_pass(self, progress: PassProgress) -> GiveUp | None:
            return None

    parameters = Parameters()
    with pytest.raises(ParameterError, match="takes adaptive, deadline, fixed; not 'at-once'"):
        parameters.set({"x-sterna-policy": "at-once"})
    monkeypatch.setitem(
        POLICIES._items, "at-once", PolicyType("at-once", lambda parameters: AtOnce(), own=False)
    )
    parameters.set({"x-sterna-policy": "at-once"})
    assert isinstance(parameters.policy.make(parameters), AtOnce)
    assert not parameters.may_choose_xbzrle


def test_what_the_user_said_of_capabilities_holds() -> None:
    parameters = Parameters()
    assert parameters.most_throttle == 99
    assert parameters.may_choose_xbzrle
    parameters.set({"x-sterna-max-throttle": 0})
    assert parameters.most_throttle == 0
    parameters.set_capabilities({"auto-converge": True})
    parameters.set({"max-cpu-throttle": 70})
    assert parameters.most_throttle == 70
    parameters.set_capabilities({"auto-converge": False})
    assert parameters.most_throttle == 0
    parameters.set_capabilities({"xbzrle": False})
    assert not parameters.may_choose_xbzrle
