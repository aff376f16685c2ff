"""The guard keeps plans that fit, steps down when memory shrinks, and says when nothing fits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from fedra_edge.errors import MemoryShortError
from fedra_edge.guard import PromiseGuard
from fedra_edge.protocol.footprint import Footprint, MemoryPlan, SliceShape, plans
from fedra_edge.protocol.slices import TrainingSpec
from tests.support.builders import make_adapter, make_block_memory, make_model_spec

FOOTPRINT = Footprint(
    make_model_spec(),
    make_adapter(),
    TrainingSpec(batch_size=16),
    make_block_memory(),
    SliceShape(held=4, backward=4, trained=2),
    "torch",
)
PLANS = tuple(plans(FOOTPRINT.training, FOOTPRINT.backend))
FIRST, LAST = PLANS[0], PLANS[-1]
LEAST_BYTES = FOOTPRINT.peak_bytes(LAST)


@dataclass
class Memory:
    """How much may be used at the moment."""

    usable_bytes: int

    def __call__(self) -> int:
        return self.usable_bytes


@pytest.fixture
def memory() -> Memory:
    return Memory(FOOTPRINT.peak_bytes(FIRST))


@pytest.fixture
def guard(memory: Memory) -> PromiseGuard:
    return PromiseGuard(FOOTPRINT, memory)


def test_a_plan_that_just_fits_is_kept(guard: PromiseGuard) -> None:
    assert guard.fitting(FIRST) is FIRST
    assert guard.step_downs == []
    assert guard.promised_bytes == FOOTPRINT.peak_bytes(FIRST)


def test_what_may_be_occupied_between_micro_batches_follows_the_plan(
    guard: PromiseGuard, memory: Memory
) -> None:
    assert guard.settled_bytes() == math.inf  # nothing has been planned
    guard.fitting(FIRST)
    assert guard.settled_bytes() == FOOTPRINT.settled_bytes(FIRST)
    memory.usable_bytes = LEAST_BYTES
    smaller = guard.fitting(FIRST)
    assert guard.settled_bytes() == FOOTPRINT.settled_bytes(smaller)


def test_a_byte_too_few_gives_the_fastest_plan_that_fits(
    guard: PromiseGuard, memory: Memory
) -> None:
    memory.usable_bytes -= 1
    assert guard.fitting(FIRST) == PLANS[1]
    [told] = guard.step_downs
    assert told.startswith("resident, 16 at once -> resident, 8 at once: only ")


def test_a_slice_steps_down_further_as_memory_shrinks(guard: PromiseGuard, memory: Memory) -> None:
    plan, seen = FIRST, []
    while memory.usable_bytes >= LEAST_BYTES:
        plan = guard.fitting(plan)
        assert FOOTPRINT.peak_bytes(plan) <= memory.usable_bytes
        seen.append(plan)
        memory.usable_bytes -= 10**6
    assert seen[0] == FIRST
    assert {plan.residency for plan in seen} == {"resident", "streamed"}
    assert len(guard.step_downs) == len(set(seen)) - 1
    assert guard.promised_bytes == FOOTPRINT.peak_bytes(FIRST)  # the most there was


def test_memory_that_comes_back_does_not_change_a_plan(guard: PromiseGuard, memory: Memory) -> None:
    memory.usable_bytes = LEAST_BYTES
    smallest = guard.fitting(FIRST)
    memory.usable_bytes = 2**50
    assert guard.fitting(smallest) is smallest
    assert guard.promised_bytes == LEAST_BYTES


def test_when_nothing_fits_it_is_said_how_much_would(guard: PromiseGuard, memory: Memory) -> None:
    memory.usable_bytes = LEAST_BYTES - 1
    with pytest.raises(MemoryShortError, match=f"needs {LEAST_BYTES / 1e6:.0f} MB") as caught:
        guard.fitting(FIRST)
    assert "limit" in caught.value.remedy
    assert guard.step_downs == []


def test_after_a_failed_allocation_a_clearly_smaller_plan_comes(guard: PromiseGuard) -> None:
    smaller = guard.smaller(FIRST)
    assert FOOTPRINT.peak_bytes(smaller) <= 0.85 * FOOTPRINT.peak_bytes(FIRST)
    assert guard.step_downs[0].endswith("an allocation failed")


def test_failed_allocations_lead_to_the_smallest_plan_and_no_further(guard: PromiseGuard) -> None:
    seen = [FIRST]
    while seen[-1] != LAST:
        seen.append(guard.smaller(seen[-1]))
    peaks = [FOOTPRINT.peak_bytes(plan) for plan in seen]
    assert peaks == sorted(set(peaks), reverse=True)
    with pytest.raises(MemoryShortError, match="an allocation failed") as caught:
        guard.smaller(LAST)
    assert caught.value.remedy


def test_what_is_told_of_a_streamed_plan_names_both_batches(
    guard: PromiseGuard, memory: Memory
) -> None:
    wide = MemoryPlan("streamed", 2, 16)
    memory.usable_bytes = LEAST_BYTES
    assert guard.fitting(wide) == LAST
    assert guard.step_downs[0].startswith("streamed, 2 of 16 at once -> streamed, 1 at once")
