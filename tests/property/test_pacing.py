"""Pacing: nobody gets more than its rate and burst, nobody less, in bounded memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedra_server.http.fairness import network_of
from fedra_server.http.pacing import Allowances, AtOnce, Buckets, Rate, Recent

RATE = Rate(per_s=2.0, burst=5.0)
GAPS = st.lists(st.floats(min_value=0, max_value=3), max_size=60)


@given(GAPS)
def test_a_bucket_gives_its_burst_and_its_rate_and_no_more(gaps: list[float]) -> None:
    buckets: Buckets[str] = Buckets(RATE)
    now, taken = 0.0, 0
    for gap in gaps:
        now += gap
        taken += buckets.take("one", now) == 0.0
    assert taken <= RATE.burst + RATE.per_s * now + 1e-6


@given(GAPS)
def test_who_waits_as_told_is_served(gaps: list[float]) -> None:
    buckets: Buckets[str] = Buckets(RATE)
    now = 0.0
    for gap in gaps:
        now += gap
        wait_s = buckets.take("one", now)
        if wait_s:
            now += wait_s + 1e-9
            assert buckets.take("one", now) == 0.0


@given(GAPS)
def test_callers_do_not_share(gaps: list[float]) -> None:
    alone: Buckets[str] = Buckets(RATE)
    crowded: Buckets[str] = Buckets(RATE)
    now = 0.0
    for gap in gaps:
        now += gap
        for _ in range(3):
            crowded.take("other", now)
        assert alone.take("one", now) == crowded.take("one", now)


@given(st.integers(min_value=1, max_value=200))
def test_places_in_a_queue_come_at_the_rate(number: int) -> None:
    buckets: Buckets[str] = Buckets(RATE)
    waits = [buckets.reserve("one", 0.0, 10.0) for _ in range(number)]
    assert waits == sorted(waits)
    assert waits[: int(RATE.burst)] == [0.0] * min(number, int(RATE.burst))
    assert max(waits) <= 10.0


@given(st.lists(st.integers(0, 30)), st.integers(min_value=1, max_value=10))
def test_no_more_is_remembered_than_said(keys: list[int], most: int) -> None:
    recent: Recent[int, int] = Recent(most)
    for key in keys:
        recent.put(key, key)
        assert recent.get(key) == key
        assert len(recent) <= most
    latest = list(dict.fromkeys(reversed(keys)))[:most]
    assert [recent.get(key) for key in latest] == latest


def test_so_many_at_once_and_all_are_counted_off() -> None:
    doors: AtOnce[str] = AtOnce(2)
    with doors.enter("one") as first, doors.enter("one") as second, doors.enter("one") as third:
        assert (first, second, third) == (True, True, False)
        with doors.enter("other") as other:
            assert other
    with doors.enter("one") as again, doors.enter("one") as both:
        assert (again, both) == (True, True)


@given(st.lists(st.integers(1, 400), max_size=40))
def test_an_allowance_ends_with_its_stage_or_its_hour(sizes: list[int]) -> None:
    allowances: Allowances[str] = Allowances(forgiven_s=3600)
    for size in sizes:
        allowances.spend("one", "round 1", size, 1000, now=0.0)
    wait_s = allowances.wait_s("one", "round 1", 1000, now=0.0)
    assert (wait_s > 0) == (sum(sizes) > 1000)
    assert allowances.wait_s("one", "round 2", 1000, now=0.0) == 0
    assert allowances.wait_s("other", "round 1", 1000, now=0.0) == 0
    assert allowances.wait_s("one", "round 1", 1000, now=wait_s + 1e-6) == 0


def test_a_site_has_one_name_whatever_address_it_takes() -> None:
    assert network_of("203.0.113.7") == network_of("::ffff:203.0.113.7") == "203.0.113.7"
    assert network_of("2001:db8:1:2::1") == network_of("2001:db8:1:2:ffff::9%eth0")
    assert network_of("2001:db8:1:2::1") != network_of("2001:db8:1:3::1")
    assert network_of("unix") == "unix"
    assert network_of("no:address") == "no:address"
