"""Planning: machines get work that fits, by memory and by time, and plans can be repeated."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedra_edge.protocol.devices import Calibration
from fedra_edge.protocol.fitting import DepthPolicy, Machine, Unfit, Work, fit_work
from fedra_edge.protocol.footprint import MemoryPlan, SliceShape
from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.models import AdapterSpec
from fedra_edge.protocol.slices import Residency
from fedra_server.planning import Candidate, plan_round, round_generator
from tests.support.builders import make_block_memory, make_model_spec, make_profile, make_run_spec

SPEC = make_model_spec(num_layers=6)
BASELINE = 10**8


def calibration(seconds: float = 0.0001, examples: int = 256) -> Calibration:
    return Calibration(
        model_id=SPEC.model_id,
        forward_s=seconds,
        backward_s=2 * seconds,
        memory=make_block_memory(idle_bytes=BASELINE),
        train_examples=examples,
        held_out_examples=10,
    )


def need(
    held: int, micro_batch: int, residency: Residency = "resident", trained: int | None = None
) -> int:
    """The memory that holding ``held`` layers, and training all or some, takes here."""
    profile = make_profile(memory_bytes=2**40, baseline_bytes=BASELINE)
    machine = Machine(profile, calibration(), SPEC, make_run_spec().terms)
    footprint = machine.footprint(SliceShape(held, held, held if trained is None else trained))
    return footprint.peak_bytes(MemoryPlan(residency, micro_batch, micro_batch))


def fit(memory_bytes: int, depth: DepthPolicy = "auto", **overrides: float) -> Work | Unfit:
    profile = make_profile(memory_bytes=memory_bytes, baseline_bytes=BASELINE)
    return fit_work(profile, calibration(**overrides), SPEC, make_run_spec(depth=depth).terms)  # type: ignore[arg-type] # float covers int


def test_ample_memory_gives_all_layers_at_full_depth_and_the_whole_batch() -> None:
    work = fit(2**40)
    assert isinstance(work, Work)
    assert (work.depth, work.plan.residency, work.num_layers) == ("full", "resident", 6)
    assert (work.plan.micro_batch, work.steps) == (128, 2)


def test_less_memory_shrinks_the_micro_batch_before_anything_else() -> None:
    work = fit(need(6, 128) - 1)
    assert isinstance(work, Work)
    assert (work.depth, work.plan.residency, work.num_layers) == ("full", "resident", 6)
    assert work.plan.micro_batch == 64


def test_too_little_memory_for_all_weights_streams_them_at_full_depth() -> None:
    work = fit(need(6, 1) - 1)
    assert isinstance(work, Work)
    assert (work.depth, work.plan.residency, work.num_layers) == ("full", "streamed", 6)


def test_a_machine_too_small_for_streaming_is_told_what_it_lacks() -> None:
    unfit = fit(BASELINE)
    assert isinstance(unfit, Unfit)
    assert "a single layer needs" in unfit.reason
    unfit = fit(need(6, 1, "streamed", trained=1) - 1, depth="full")
    assert isinstance(unfit, Unfit)
    assert "6 layers needs" in unfit.reason


def test_a_run_as_published_skips_layers() -> None:
    """Streaming is tried only when not even one layer fits resident."""
    work = fit(need(5, 1), depth="reduced")
    assert isinstance(work, Work)
    assert (work.depth, work.plan.residency, work.num_layers) == ("reduced", "resident", 5)


@given(st.integers(0, 2 * need(6, 128)), st.sampled_from(["auto", "full", "reduced"]))
def test_work_never_exceeds_the_memory(memory_bytes: int, depth: DepthPolicy) -> None:
    work = fit(memory_bytes, depth)
    if isinstance(work, Work):
        assert work.predicted_peak_bytes <= memory_bytes
        assert 1 <= work.num_layers <= 6
        assert 1 <= work.plan.micro_batch <= work.plan.walk_batch <= 128


def test_a_short_deadline_means_fewer_steps() -> None:
    """600 s of deadline, 115 s a step of six layers: three steps fit 70 % of it."""
    work = fit(2**40, seconds=0.05, examples=1280)
    assert isinstance(work, Work)
    assert (work.depth, work.steps) == ("full", 3)


def test_a_machine_too_slow_for_full_depth_gets_fewer_layers() -> None:
    """A layer takes 192 s a step: two of them fit, six do not."""
    work = fit(2**40, seconds=0.5)
    assert isinstance(work, Work)
    assert (work.depth, work.num_layers, work.steps) == ("reduced", 2, 1)


def test_a_machine_too_slow_for_one_layer_is_left_out() -> None:
    assert isinstance(fit(2**40, seconds=5.0), Unfit)


def test_a_small_disk_holds_fewer_layers_or_none() -> None:
    ends = SPEC.stem.weights.size_bytes + SPEC.head.weights.size_bytes
    layer = SPEC.layers[0].weights.size_bytes
    outcomes = {}
    for held in (6, 2, 0):
        profile = make_profile(
            memory_bytes=2**40, baseline_bytes=BASELINE, disk_free_bytes=ends + held * layer
        )
        outcomes[held] = fit_work(profile, calibration(), SPEC, make_run_spec().terms)
    full, reduced, unfit = outcomes.values()
    assert isinstance(full, Work)
    assert isinstance(reduced, Work)
    assert isinstance(unfit, Unfit)
    assert full.depth == "full"
    assert (reduced.depth, reduced.num_layers) == ("reduced", 2)
    assert "of disk" in reduced.reason
    assert "of disk" in unfit.reason


def test_a_sites_own_cap_counts() -> None:
    profile = make_profile(memory_bytes=2**40, baseline_bytes=BASELINE, max_layers=3)
    work = fit_work(profile, calibration(), SPEC, make_run_spec(max_layers=4).terms)
    assert isinstance(work, Work)
    assert (work.depth, work.num_layers) == ("full", 3)


def why_not_more(work: Work | Unfit) -> list[str]:
    assert isinstance(work, Work)
    assert work.reason == "; ".join(filter(None, (work.facts, work.why_not_more)))
    return work.why_not_more.split("; ")


def test_a_machine_that_can_do_everything_is_told_nothing_of_limits() -> None:
    assert why_not_more(fit(2**40)) == [""]


def test_what_stood_against_more_is_told() -> None:
    assert why_not_more(fit(need(6, 1) - 1)) == [
        f"streamed, because weights that stay in memory need {need(6, 1) / 1e6:.0f} MB"
    ]
    assert why_not_more(fit(2**40, seconds=0.05, examples=1280)) == [
        "3 of 10 steps, because of the deadline"
    ]
    assert why_not_more(fit(2**40, seconds=0.5)) == [
        "no full depth, because one step through 6 layers does not fit the deadline of 600.0 s",
        "2 of 6 layers, because more take too long",
        "1 of 2 steps, because of the deadline",
    ]
    fewer, *_ = why_not_more(fit(need(6, 1, "streamed", trained=6) - 1))
    assert fewer == (
        f"5 of 6 layers, because one more needs {need(6, 1, 'streamed', trained=6) / 1e6:.0f} MB"
    )


@pytest.mark.parametrize(
    ("site", "run", "whose"), [(3, None, "site"), (None, 3, "run"), (3, 5, "site")]
)
def test_whose_limit_on_layers_holds_is_told(site: int | None, run: int | None, whose: str) -> None:
    profile = make_profile(memory_bytes=2**40, baseline_bytes=BASELINE, max_layers=site)
    work = fit_work(profile, calibration(), SPEC, make_run_spec(max_layers=run).terms)
    assert why_not_more(work) == [f"at most 3 of 6 layers, by the {whose}'s own limit"]


def test_a_drawn_slice_is_told_of_its_own_steps_only() -> None:
    """Training the last layer alone takes less time than the costliest draw of one layer."""
    profile = make_profile(memory_bytes=2**40, baseline_bytes=BASELINE)
    terms = make_run_spec(max_layers=1).terms
    machine = Machine(profile, calibration(seconds=0.05, examples=640), SPEC, terms)
    work = machine.work("full")
    assert work is not None
    assert "3 of 5 steps, because of the deadline" in work.why_not_more
    drawn = machine.drawn(work, SliceShape(held=6, backward=1, trained=1))
    assert drawn.steps == 5
    assert "deadline" not in drawn.why_not_more


def candidates(memories: list[int]) -> list[Candidate]:
    return [
        Candidate(
            ClientId(f"client-{index}"),
            make_profile(memory_bytes=memory, baseline_bytes=BASELINE, max_layers=index + 1),
            calibration(),
        )
        for index, memory in enumerate(memories)
    ]


def test_a_plan_gives_every_fitting_machine_a_slice_and_can_be_repeated() -> None:
    run = make_run_spec()
    small = need(6, 1, trained=4) - 1
    present = candidates([2**40, 2**40, 2**40, small, BASELINE])
    plan = plan_round(present, SPEC, run, [0] * 6, round_generator(run, 1, 0))
    again = plan_round(present[::-1], SPEC, run, [0] * 6, round_generator(run, 1, 0))
    assert plan == again
    assert [planned.client_id for planned in plan] == [f"client-{index}" for index in range(4)]
    for index, planned in enumerate(plan):
        trained = [layer for layer in planned.layers if layer.role == "train"]
        assert len(trained) == index + 1
        assert planned.chance == pytest.approx((index + 1) / 6)
        assert len(planned.layers) == 6
    assert plan[3].work.plan.residency == "streamed"
    covered = {item.layer_id for planned in plan for item in planned.layers if item.role == "train"}
    assert covered == set(range(6))


def test_another_round_or_draw_is_another_plan() -> None:
    run = make_run_spec()
    present = candidates([2**40] * 4)
    plans = [
        plan_round(present, SPEC, run, [0] * 6, round_generator(run, number, draw))
        for number, draw in ((1, 0), (2, 0), (1, 1))
    ]
    assert plans[0] != plans[1] != plans[2] != plans[0]


def test_no_batch_is_planned_larger_than_the_local_data() -> None:
    work = fit(2**40, examples=30)
    assert isinstance(work, Work)
    assert (work.plan.micro_batch, work.plan.walk_batch) == (30, 30)


def test_a_module_cannot_be_adapted_twice() -> None:
    with pytest.raises(ValueError, match="named twice"):
        AdapterSpec(targets=("mlp.fc2", "mlp.fc2"))
