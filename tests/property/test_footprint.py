"""The memory model is monotone: more of anything never costs less, and plans are in order."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Final, Literal

from hypothesis import given
from hypothesis import strategies as st

from fedra_edge.protocol.devices import BlockMemory
from fedra_edge.protocol.footprint import Footprint, MemoryPlan, SliceShape, plans
from fedra_edge.protocol.slices import TrainingSpec
from tests.support.builders import make_adapter, make_block_memory, make_model_spec

OPTIMIZERS: Final[tuple[Literal["sgd", "adamw"], ...]] = ("sgd", "adamw")
NUM_LAYERS = 12
MODEL = make_model_spec(NUM_LAYERS)
sizes = st.integers(0, 10**9)
batch_sizes = st.integers(1, 512)


@st.composite
def block_memories(draw: st.DrawFn) -> BlockMemory:
    """Draw what a block may take; autograd keeps no more than what the work takes."""
    frozen, kept, working = sorted(draw(st.tuples(sizes, sizes, sizes)))
    return make_block_memory(
        idle_bytes=draw(sizes),
        fixed_bytes=draw(sizes),
        working_bytes=working,
        kept_bytes=kept,
        kept_frozen_bytes=frozen,
    )


@st.composite
def shapes(draw: st.DrawFn) -> SliceShape:
    trained, backward, held = sorted(draw(st.tuples(*[st.integers(1, NUM_LAYERS)] * 3)))
    return SliceShape(held, backward, trained)


@st.composite
def footprints(draw: st.DrawFn) -> Footprint:
    training = TrainingSpec(
        optimizer=draw(st.sampled_from(OPTIMIZERS)), batch_size=draw(batch_sizes)
    )
    adapter = make_adapter(rank=draw(st.integers(1, 64)))
    return Footprint(MODEL, adapter, training, draw(block_memories()), draw(shapes()), "torch")


@st.composite
def memory_plans(draw: st.DrawFn) -> MemoryPlan:
    walk_batch = draw(batch_sizes)
    if draw(st.booleans()):
        return MemoryPlan("resident", walk_batch, walk_batch)
    return MemoryPlan("streamed", draw(st.integers(1, walk_batch)), walk_batch)


@given(footprints(), memory_plans(), st.integers(0, 100))
def test_more_examples_never_cost_less(footprint: Footprint, plan: MemoryPlan, more: int) -> None:
    micro_batch = plan.micro_batch + (more if plan.residency == "resident" else 0)
    larger = replace(plan, micro_batch=micro_batch, walk_batch=plan.walk_batch + more)
    assert footprint.peak_bytes(larger) >= footprint.peak_bytes(plan)
    wider = replace(larger, micro_batch=larger.walk_batch)
    assert footprint.peak_bytes(wider) >= footprint.peak_bytes(larger)


@given(footprints(), memory_plans(), st.tuples(*[st.integers(0, 3)] * 3))
def test_more_layers_never_cost_less(
    footprint: Footprint, plan: MemoryPlan, more: tuple[int, int, int]
) -> None:
    shape, (held, backward, trained) = footprint.shape, sorted(more, reverse=True)
    grown = SliceShape(shape.held + held, shape.backward + backward, shape.trained + trained)
    larger = replace(footprint, shape=grown)
    assert larger.peak_bytes(plan) >= footprint.peak_bytes(plan)


@given(footprints(), memory_plans())
def test_a_larger_rank_and_a_costlier_optimizer_never_cost_less(
    footprint: Footprint, plan: MemoryPlan
) -> None:
    doubled = replace(footprint, adapter=make_adapter(rank=2 * footprint.adapter.rank))
    assert doubled.peak_bytes(plan) >= footprint.peak_bytes(plan)
    plain, moments = (
        replace(footprint, training=TrainingSpec(optimizer=name)).peak_bytes(plan)
        for name in OPTIMIZERS
    )
    assert moments >= plain


@given(footprints(), batch_sizes)
def test_weights_in_memory_cost_what_the_blocks_beside_the_passing_one_weigh(
    footprint: Footprint, batch_size: int
) -> None:
    without_heap = footprint.memory.model_copy(update={"fixed_bytes": 0, "working_bytes": 0})
    slice_alone = replace(footprint, memory=without_heap)
    streamed = slice_alone.peak_bytes(MemoryPlan("streamed", batch_size, batch_size))
    resident = slice_alone.peak_bytes(MemoryPlan("resident", batch_size, batch_size))
    held_beside = footprint.shape.held - 1
    assert resident - streamed >= held_beside * MODEL.layers[0].cost.parameter_bytes - 1


@given(footprints(), memory_plans())
def test_a_prediction_holds_the_idle_process_and_the_weights(
    footprint: Footprint, plan: MemoryPlan
) -> None:
    held = footprint.shape.held if plan.residency == "resident" else 1
    pieces = (MODEL.stem, MODEL.head, *MODEL.layers[:held])
    weights = sum(piece.cost.parameter_bytes for piece in pieces)
    assert footprint.peak_bytes(plan) >= footprint.memory.idle_bytes + weights


@given(footprints(), memory_plans())
def test_between_micro_batches_no_more_is_allowed_than_at_the_peak(
    footprint: Footprint, plan: MemoryPlan
) -> None:
    settled_bytes = footprint.settled_bytes(plan)
    assert footprint.memory.idle_bytes <= settled_bytes <= footprint.peak_bytes(plan)


@given(batch_sizes)
def test_plans_are_valid_and_each_comes_once(batch_size: int) -> None:
    given_plans = list(plans(TrainingSpec(batch_size=batch_size), "torch"))
    assert len(set(given_plans)) == len(given_plans)
    for plan in given_plans:
        assert 1 <= plan.micro_batch <= plan.walk_batch <= batch_size
        assert plan.residency == "streamed" or plan.micro_batch == plan.walk_batch
    assert given_plans[0] == MemoryPlan("resident", batch_size, batch_size)
    assert given_plans[-1] == MemoryPlan("streamed", 1, 1)


@given(batch_sizes)
def test_plans_in_memory_come_first_and_large_batches_before_small_ones(batch_size: int) -> None:
    given_plans = list(plans(TrainingSpec(batch_size=batch_size), "torch"))
    residencies = [plan.residency for plan in given_plans]
    assert residencies == sorted(residencies)  # "resident" before "streamed"
    for before, after in pairwise(given_plans):
        if before.residency == after.residency:
            assert (before.micro_batch, before.walk_batch) > (after.micro_batch, after.walk_batch)


@given(footprints())
def test_the_last_plan_takes_the_least_of_all_streamed_ones(footprint: Footprint) -> None:
    every = plans(footprint.training, footprint.backend)
    peaks = [footprint.peak_bytes(plan) for plan in every if plan.residency == "streamed"]
    assert peaks[-1] == min(peaks)
