"""The meter sees memory that was there only for a moment, and starts anew each time."""

from __future__ import annotations

import mmap
import threading

import numpy as np
import pytest

from fedra_edge.memory_meter import PeakMeter, measured_peak, resident_bytes
from tests.support.edges import wait_until

BIG_BYTES = 64 * 2**20
SLACK_BYTES = 8 * 2**20


def occupy() -> None:
    """Use and free memory at once, past the heap, which may have room left from other tests."""
    with mmap.mmap(-1, BIG_BYTES) as mapping:
        mapping[::4096] = b"x" * (BIG_BYTES // 4096)


def test_memory_that_was_freed_again_is_seen() -> None:
    before = resident_bytes()
    with measured_peak() as meter:
        occupy()
    assert abs(meter.peak_bytes - before - BIG_BYTES) < SLACK_BYTES


def test_a_peak_can_be_read_while_it_is_measured() -> None:
    with measured_peak() as meter:
        first = meter.peak_bytes
        occupy()
        assert meter.peak_bytes > first + BIG_BYTES - SLACK_BYTES


def test_an_earlier_peak_does_not_count() -> None:
    occupy()
    with measured_peak() as meter:
        pass
    assert meter.peak_bytes < resident_bytes() + SLACK_BYTES


def test_a_peak_stays_what_it_was_when_the_measurement_is_over() -> None:
    with measured_peak() as meter:
        pass
    over = meter.peak_bytes
    with measured_peak():
        assert meter.peak_bytes < over + SLACK_BYTES


def test_the_measurement_ends_with_an_error_inside() -> None:
    threads = threading.active_count()
    with pytest.raises(KeyError), measured_peak():
        raise KeyError
    assert threading.active_count() == threads


def test_samples_do_where_the_system_keeps_no_mark() -> None:
    meter, ended = PeakMeter(), threading.Event()
    meter._has_high_water_mark = False
    sampler = threading.Thread(target=meter.sample_until, args=(ended,))
    sampler.start()
    before = resident_bytes()
    try:
        held = np.ones(BIG_BYTES, dtype=np.uint8)
        wait_until("a sample", lambda: meter.peak_bytes > before + BIG_BYTES - SLACK_BYTES)
        del held
    finally:
        ended.set()
        sampler.join()
