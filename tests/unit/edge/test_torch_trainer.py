"""The PyTorch trainer: what a training changes, and that it is repeatable and interruptible."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from typing_extensions import override

from fedra_edge.data.dataset import Example
from fedra_edge.data.matching import match_labels
from fedra_edge.errors import MemoryShortError, SliceError, TrainingInterrupted
from fedra_edge.protocol.footprint import MemoryPlan
from fedra_edge.protocol.slices import Residency, TrainingSpec
from fedra_edge.training import TrainedSlice, load_trainer
from fedra_edge.training.memory_shortage import is_memory_shortage
from fedra_edge.training.sampling import draw_batches
from fedra_edge.training.torch_engine import TorchEngine
from fedra_edge.training.torch_trainer import TorchTrainer
from tests.support.surroundings import guard_of, room_for
from tests.support.tiny_vit import ADAPTER, LABELS, NoiseImages, TinyVit, noise_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyVit:
    return TinyVit.register(tmp_path_factory.mktemp("tiny"))


def train(tiny: TinyVit, trained: Iterable[int], **values: object) -> TrainedSlice:
    work = tiny.work(trained, **values)
    return TorchTrainer(CPU).train(work, noise_data(), room_for(work))


def plain_gradients(tiny: TinyVit, batch_size: int) -> dict[str, np.ndarray]:
    """One step of plain SGD with rate 1 and no clipping leaves minus the gradient as delta."""
    training = TrainingSpec(
        learning_rate=1.0, momentum=0.0, weight_decay=0.0, clip_norm=1e6, batch_size=12
    )
    result = train(tiny, [0, 2], training=training, micro_batch=batch_size)
    return {name: tiny.adapters[name] - value for name, value in result.adapters.items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("depth", ["full", "reduced"])
def test_training_changes_exactly_the_assigned_adapters_and_the_head(
    tiny: TinyVit, depth: str, optimizer: str
) -> None:
    training = TrainingSpec.model_validate({"optimizer": optimizer, "batch_size": 5})
    received = {name: value.copy() for name, value in tiny.adapters.items()}
    files = {path: path.read_bytes() for path in tiny.work([1, 3]).weights.values()}
    result = train(tiny, [1, 3], depth=depth, training=training, steps=4)

    layer_ids = tuple(tiny.spec.layer_ids[i] for i in (1, 3))
    shapes = tiny.spec.delta_shapes(ADAPTER, layer_ids)
    assert {name: value.shape for name, value in result.adapters.items()} == shapes
    assert all(value.dtype == np.float32 for value in result.adapters.values())
    for name, value in result.adapters.items():
        assert (value != tiny.adapters[name]).any(), name
    for name, value in tiny.adapters.items():
        np.testing.assert_array_equal(value, received[name])
    assert files == {path: path.read_bytes() for path in files}


def test_training_lowers_the_loss_and_reports_it(tiny: TinyVit) -> None:
    seen: list[tuple[int, int, float]] = []
    training = TrainingSpec(batch_size=12, learning_rate=0.05)
    work = tiny.work([0, 1, 2, 3], training=training, steps=20)
    surroundings = room_for(work, on_step=lambda *step: seen.append(step))
    result = TorchTrainer(CPU).train(work, noise_data(), surroundings)
    assert [step[:2] for step in seen] == [(done, 20) for done in range(1, 21)]
    assert (result.first_loss, result.last_loss) == (seen[0][2], seen[-1][2])
    assert result.last_loss < 0.5 * result.first_loss
    assert (result.steps, result.num_examples) == (20, 12)
    assert result.train_s > 0


@pytest.mark.parametrize(("steps", "expected"), [(1, 5), (2, 10), (3, 12), (4, 12)])
def test_only_examples_that_were_drawn_count(tiny: TinyVit, steps: int, expected: int) -> None:
    training = TrainingSpec(batch_size=5)
    assert train(tiny, [0], training=training, steps=steps).num_examples == expected


@pytest.mark.parametrize("micro_batch", [1, 5, 7])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(tiny: TinyVit, micro_batch: int) -> None:
    whole_batch, in_parts = plain_gradients(tiny, 12), plain_gradients(tiny, micro_batch)
    for name, gradient in whole_batch.items():
        np.testing.assert_allclose(in_parts[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_same_seed_trains_the_same_and_another_seed_does_not(tiny: TinyVit) -> None:
    first, again, other = (train(tiny, [2], steps=3, seed=seed).adapters for seed in (5, 5, 6))
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
    assert any((other[name] != value).any() for name, value in first.items())


def test_training_does_not_touch_global_randomness(tiny: TinyVit) -> None:
    before = torch.get_rng_state()
    train(tiny, [1], steps=2)
    TorchTrainer(CPU).calibrate(tiny.spec, lambda: 2**40)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_gradient_is_clipped(tiny: TinyVit) -> None:
    training = TrainingSpec(
        learning_rate=1.0, momentum=0.0, weight_decay=0.0, clip_norm=1e-3, batch_size=6
    )
    result = train(tiny, [0], training=training)
    moved = [value - tiny.adapters[name] for name, value in result.adapters.items()]
    norm = np.sqrt(sum(float(np.square(part).sum()) for part in moved))
    assert norm == pytest.approx(1e-3, rel=1e-2)


def test_training_stops_between_steps(tiny: TinyVit) -> None:
    steps: list[int] = []
    work = tiny.work([0], steps=50)
    surroundings = room_for(
        work, on_step=lambda done, *_: steps.append(done), should_stop=lambda: len(steps) == 2
    )
    with pytest.raises(TrainingInterrupted):
        TorchTrainer(CPU).train(work, noise_data(), surroundings)
    assert steps == [1, 2]


@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_weights_are_let_go_with_the_engine(tiny: TinyVit, residency: Residency) -> None:
    """A cycle of references would keep them until the collector of cycles comes by."""
    engine = TorchEngine(tiny.work([0, 1]), CPU)
    engine.load(MemoryPlan(residency, micro_batch=1, walk_batch=1))
    leftover = weakref.ref(engine)
    gc.disable()
    try:
        del engine
        assert leftover() is None
    finally:
        gc.enable()


def test_a_diverged_training_is_an_error(tiny: TinyVit) -> None:
    work = tiny.work([0])
    huge = {name: np.float32(1e30) * value for name, value in work.adapters.items()}
    with pytest.raises(SliceError, match="diverged"):
        TorchTrainer(CPU).train(replace(work, adapters=huge), noise_data(), room_for(work))


@pytest.mark.parametrize("walk_batch", [2, 4, 6])
def test_a_streamed_slice_trains_to_the_same_adapters(tiny: TinyVit, walk_batch: int) -> None:
    resident = train(tiny, [0, 2], steps=3)
    streamed = train(
        tiny, [0, 2], steps=3, residency="streamed", micro_batch=2, walk_batch=walk_batch
    )
    assert streamed.first_loss == pytest.approx(resident.first_loss, rel=1e-5)
    for name, value in resident.adapters.items():
        np.testing.assert_allclose(streamed.adapters[name], value, rtol=1e-4, atol=1e-5)


def test_a_training_that_steps_down_gives_the_same_adapters(tiny: TinyVit) -> None:
    training = TrainingSpec(batch_size=6, learning_rate=0.05)
    work = tiny.work([0, 2], training=training, steps=6)
    small_bytes = guard_of(work)._footprint.peak_bytes(MemoryPlan("streamed", 1, 3))
    usable = {"bytes": 2**50}
    guard = guard_of(work, lambda: usable["bytes"])

    def shrink(done: int, *_: object) -> None:
        if done == 2:
            usable["bytes"] = small_bytes

    stepped = TorchTrainer(CPU).train(
        work, noise_data(), room_for(work, on_step=shrink, guard=guard)
    )
    plain = TorchTrainer(CPU).train(work, noise_data(), room_for(work))
    assert (plain.plan.residency, stepped.plan) == ("resident", MemoryPlan("streamed", 1, 3))
    assert len(guard.step_downs) == 1
    assert stepped.first_loss == plain.first_loss
    assert_same_adapters(stepped, plain)


class ShortOfMemory(NoiseImages):
    """Images of which some cannot be read at first, because an allocation fails."""

    def __init__(self, failing: Iterable[int]) -> None:
        super().__init__()
        self._failing = set(failing)

    @override
    def __getitem__(self, index: int) -> Example:
        if index in self._failing:
            self._failing.remove(index)
            raise MemoryError
        return super().__getitem__(index)


def test_a_step_whose_allocations_fail_is_taken_again_with_less(tiny: TinyVit) -> None:
    training = TrainingSpec(batch_size=6, learning_rate=0.05)
    work = tiny.work([0, 2], training=training, steps=4, micro_batch=3)
    guard = guard_of(work)
    matched = match_labels(NoiseImages(), LABELS)
    failing = replace(matched, dataset=ShortOfMemory(matched.train_indices[-2:]))
    stepped = TorchTrainer(CPU).train(work, failing, room_for(work, guard=guard))
    plain = TorchTrainer(CPU).train(work, matched, room_for(work))
    assert len(guard.step_downs) == 2
    assert all(told.endswith("an allocation failed") for told in guard.step_downs)
    assert (stepped.steps, stepped.num_examples) == (plain.steps, plain.num_examples)
    assert_same_adapters(stepped, plain)


def test_a_training_that_nothing_fits_ends_with_a_remedy(tiny: TinyVit) -> None:
    work = tiny.work([0], steps=3)
    with pytest.raises(MemoryShortError) as caught:
        TorchTrainer(CPU).train(work, noise_data(), room_for(work, guard=guard_of(work, lambda: 1)))
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("error", "is_shortage"),
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"), True),
        (RuntimeError("unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("could not create a primitive"), True),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), True),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
    ids=str,
)
def test_errors_for_want_of_memory_are_told_from_others(
    error: Exception, is_shortage: bool
) -> None:
    assert is_memory_shortage(error) is is_shortage


def assert_same_adapters(found: TrainedSlice, expected: TrainedSlice) -> None:
    for name, value in expected.adapters.items():
        np.testing.assert_allclose(found.adapters[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_calibration_times_one_block(tiny: TinyVit) -> None:
    trainer = load_trainer()
    assert trainer.backend == "torch"
    timing = trainer.calibrate(tiny.spec, lambda: 2**40)
    assert 0 < timing.forward_s < 1
    assert 0 < timing.backward_s < 1


def test_each_epoch_draws_every_example_once() -> None:
    batches = list(draw_batches(range(10), batch_size=4, steps=6, seed=1))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    for epoch in (batches[:3], batches[3:]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(10))
    assert np.concatenate(batches[:3]).tolist() != np.concatenate(batches[3:]).tolist()


def test_no_example_is_an_error() -> None:
    with pytest.raises(ValueError, match="no example"):
        next(draw_batches([], batch_size=4, steps=1, seed=1))
