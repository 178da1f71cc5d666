"""What is learnt of the link and the destination, and what is predicted from it."""

import pytest

from sterna.migration.forecast import DIGEST_MS, LOAD_MS, Forecast, LinkMeter
from sterna.migration.transport.sender import Sent

LINK = 125_000_000
SOCKET = 2_500_000


def carry(meter, *, piece, interval, count, rate=LINK, room=SOCKET):
    """Hand pieces to a socket in front of a link, one each `interval` if there is room, and look after each."""
    now = handed = arrived = waited = 0.0
    for _ in range(count):
        arrived = min(handed, arrived + interval * rate)
        now += interval
        if handed + piece - arrived > room:
            pause = (handed + piece - arrived - room) / rate
            now, waited, arrived = now + pause, waited + pause, arrived + pause * rate
        handed += piece
        meter.observe(now, int(handed), int(handed - arrived), waited)


def test_a_full_link_is_measured():
    meter = LinkMeter()
    carry(meter, piece=512 * 4104, interval=0.001, count=40)
    assert meter.bytes_per_second == pytest.approx(LINK, rel=0.1)


def test_a_full_link_is_measured_with_small_pieces():
    meter = LinkMeter()
    carry(meter, piece=200_000, interval=0.001, count=200)
    assert meter.bytes_per_second == pytest.approx(LINK, rel=0.1)


def test_pieces_that_wait_for_a_moment_are_no_full_link():
    """One piece each 2 ms on a link that carries it in a tenth of that: each look finds what was just handed over."""
    meter = LinkMeter()
    carry(meter, piece=1000, interval=0.002, count=200)
    assert meter.bytes_per_second is None


def test_a_slow_link_is_measured() -> None:
    meter = LinkMeter()
    carry(meter, piece=20_000, interval=0.01, count=200, rate=500_000)
    assert meter.bytes_per_second == pytest.approx(500_000, rel=0.1)


def test_a_destination_that_is_kept_from_its_processor_is_no_slow_link() -> None:
    """Short passes, whose bytes wait until the destination may read them: they arrive within no time then."""
    meter = LinkMeter()
    carry(meter, piece=512 * 4104, interval=0.001, count=40)
    handed, now = 40 * 512 * 4104, 1.0
    for _ in range(100):
        handed += 20_000
        for unsent in (20_000, 20_000, 20_000, 10_000, 0):
            now += 0.01
            meter.observe(now, handed, unsent, 0.0)
    assert meter.bytes_per_second == pytest.approx(LINK, rel=0.1)


def test_digests_are_no_part_of_what_the_destination_needs_for_a_page():
    forecast = Forecast(round_trip_seconds=0.004)
    forecast.sent(Sent(4_104_000, pages=1000, seconds=0.01))
    forecast.drained(0.054, 0, digest_seconds=0.03)
    forecast.finish_pass(0.0, 0.0)
    parts = forecast.downtime(1000, 4_104_000, 0, 0.03, commits=True)
    assert parts.destination_load == pytest.approx(LOAD_MS + 20 + 30 + 1)
    assert parts.last_pass + parts.digest == pytest.approx(2.5 + 10 + DIGEST_MS + 30 - 2.5 - 10 - 6.0)


def test_the_last_pass_has_the_processor_to_itself() -> None:
    """While the guest runs, encoding takes as long as it took; afterwards what the processor had to do."""
    forecast = Forecast()
    forecast.sent(Sent(8_000, pages=1000, seconds=0.1, encode_seconds=0.1, encode_cpu_seconds=0.04))
    forecast.finish_pass(0.0, 0.0)
    assert forecast.next_pass_seconds(500, 0, 0) == pytest.approx(0.05)
    assert forecast.downtime(500, 0, 0, None, commits=True).last_pass == pytest.approx(2.5 + 20)


def test_the_last_pass_has_the_caches_to_itself() -> None:
    """A page will take what it took in the batches with which the guest interfered least, of the last passes."""
    forecast = Forecast()
    for costs in ([0.3, 0.2], [0.08, 0.04], [0.1], [0.07], [0.06]):
        for seconds in costs:
            forecast.sent(Sent(8_000, pages=1000, encode_seconds=seconds, encode_cpu_seconds=seconds))
        # Too few pages to tell.
        forecast.sent(Sent(80, pages=10, encode_seconds=0.0001, encode_cpu_seconds=0.0001))
        forecast.finish_pass(0.0, 0.0)
    assert forecast.downtime(500, 0, 0, None, commits=True).last_pass == pytest.approx(2.5 + 20)
    forecast.sent(Sent(8_000, pages=1000, encode_seconds=0.09, encode_cpu_seconds=0.09))
    forecast.finish_pass(0.0, 0.0)
    assert forecast.downtime(500, 0, 0, None, commits=True).last_pass == pytest.approx(2.5 + 30)


def test_the_cheapest_of_many_batches_is_an_accident() -> None:
    forecast = Forecast()
    for seconds in [0.001, *[0.04] * 31]:
        forecast.sent(Sent(8_000, pages=1000, encode_seconds=seconds, encode_cpu_seconds=seconds))
    forecast.finish_pass(0.0, 0.0)
    assert forecast.downtime(500, 0, 0, None, commits=True).last_pass == pytest.approx(2.5 + 20)
