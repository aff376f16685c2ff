"""Kept activations are what was computed, stay in bounds, and change nothing of a training."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typing_extensions import override

from fedra_edge.protocol.slices import TrainingSpec
from fedra_edge.protocol.tensors import FloatArray
from fedra_edge.training import TrainedSlice
from fedra_edge.training.local_training import LocalTraining
from fedra_edge.training.prefix_cache import PrefixCache
from fedra_edge.training.torch_engine import TorchEngine
from fedra_edge.training.torch_trainer import TorchTrainer
from tests.support.surroundings import guard_of, room_for
from tests.support.tiny_vit import TinyVit, noise_data

CPU = torch.device("cpu")
ROW_SHAPE = (5, 8)
ROW_BYTES = 4 * 5 * 8
SLOW_S = math.inf
"""Computing took so long that keeping is worthwhile."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyVit:
    return TinyVit.register(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[PrefixCache]:
    with PrefixCache.opened(tmp_path, 100 * ROW_BYTES) as cache:
        yield cache


def draw_rows(count: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).normal(size=(count, *ROW_SHAPE)).astype(np.float32)


def test_rows_come_back_bit_for_bit_in_any_order(cache: PrefixCache) -> None:
    rows = draw_rows(4)
    cache.store([7, 3, 11, 5], rows, SLOW_S)
    loaded = cache.load([5, 7, 7])
    assert loaded is not None
    np.testing.assert_array_equal(loaded, rows[[3, 0, 0]])
    assert loaded.dtype == np.float32


def test_rows_that_were_never_stored_are_not_there(cache: PrefixCache) -> None:
    assert cache.load([1]) is None
    cache.store([1, 2], draw_rows(2), SLOW_S)
    assert cache.load([2, 3]) is None
    assert cache.load([2, 1]) is not None


def test_a_row_that_is_there_is_not_stored_again(cache: PrefixCache) -> None:
    first, second = draw_rows(1), draw_rows(2, seed=1)
    cache.store([4], first, SLOW_S)
    cache.store([4, 5], second, SLOW_S)
    loaded = cache.load([4, 5])
    assert loaded is not None
    np.testing.assert_array_equal(loaded, np.stack([first[0], second[1]]))


def test_rows_of_a_transposed_array_are_kept_as_they_look(cache: PrefixCache) -> None:
    rows = np.ascontiguousarray(draw_rows(3).transpose(0, 2, 1)).transpose(0, 2, 1)
    cache.store([0, 1, 2], rows, SLOW_S)
    loaded = cache.load([0, 1, 2])
    assert loaded is not None
    np.testing.assert_array_equal(loaded, rows)


def test_the_file_does_not_grow_beyond_its_quota(tmp_path: Path) -> None:
    with (tmp_path / "kept").open("w+b", buffering=0) as file:
        cache = PrefixCache(file, 3 * ROW_BYTES - 1)
        cache.store([0, 1, 2], draw_rows(3), SLOW_S)
        cache.store([3], draw_rows(1), SLOW_S)
        assert (tmp_path / "kept").stat().st_size == 2 * ROW_BYTES
    assert cache.load([2]) is None
    assert cache.load([3]) is None


def test_nothing_is_kept_when_writing_takes_longer_than_computing(cache: PrefixCache) -> None:
    cache.store([0], draw_rows(1), computed_s=0.0)
    cache.store([1], draw_rows(1), SLOW_S)
    assert cache.load([1]) is None


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is a device of Linux")
def test_a_full_disk_only_ends_the_keeping() -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        cache = PrefixCache(full, 100 * ROW_BYTES)
        cache.store([0], draw_rows(1), SLOW_S)
        cache.store([1], draw_rows(1), SLOW_S)
        assert cache.load([0]) is None
        assert cache.load([1]) is None


def test_a_file_that_was_cut_is_an_error(tmp_path: Path) -> None:
    with (tmp_path / "kept").open("w+b", buffering=0) as file:
        cache = PrefixCache(file, 100 * ROW_BYTES)
        cache.store([0, 1], draw_rows(2), SLOW_S)
        file.truncate(ROW_BYTES + 1)
        assert cache.load([0]) is not None
        with pytest.raises(OSError, match="shorter"):
            cache.load([1])


def test_nothing_stays_on_the_disk(tmp_path: Path) -> None:
    with PrefixCache.opened(tmp_path, 100 * ROW_BYTES) as cache:
        cache.store([0], draw_rows(1), SLOW_S)
    assert list(tmp_path.iterdir()) == []


class CountingCache(PrefixCache):
    """Keeps rows however long writing them takes, and counts who found what they needed."""

    hits = misses = 0

    @override
    def load(self, indices: Sequence[int]) -> FloatArray | None:
        rows = super().load(indices)
        self.hits += rows is not None
        self.misses += rows is None
        return rows

    @override
    def store(self, indices: Sequence[int], rows: FloatArray, computed_s: float) -> None:
        super().store(indices, rows, SLOW_S)


def train_upper(tiny: TinyVit, cache: PrefixCache | None, **values: object) -> TrainedSlice:
    """Train two upper layers for four epochs of twelve examples."""
    training = TrainingSpec(batch_size=4, learning_rate=0.05)
    work = tiny.work([2, 3], training=training, steps=12, micro_batch=1, **values)
    room = room_for(work, guard=guard_of(work))
    engine = TorchEngine(work, CPU)
    return LocalTraining(engine, work, noise_data(), room, cache).run()


@pytest.mark.parametrize("residency", ["resident", "streamed"])
@pytest.mark.parametrize("kept", [12, 5], ids=["all", "some"])
def test_training_from_kept_activations_is_the_same_bit_for_bit(
    tiny: TinyVit, residency: str, kept: int
) -> None:
    row_bytes = tiny.spec.layers[0].cost.boundary_bytes
    with tempfile.TemporaryFile(buffering=0) as file:
        cache = CountingCache(file, kept * row_bytes)
        cached = train_upper(tiny, cache, residency=residency)
    plain = train_upper(tiny, None, residency=residency)
    assert (cache.hits, cache.misses) == (3 * kept, 48 - 3 * kept)  # one example at a time
    assert (cached.first_loss, cached.last_loss) == (plain.first_loss, plain.last_loss)
    for name, value in plain.adapters.items():
        np.testing.assert_array_equal(cached.adapters[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("trained", "steps"),
    [([2, 3], 3), ([0, 3], 12)],
    ids=["examples come by once", "no layer below is frozen"],
)
def test_nothing_is_kept_that_is_not_needed_again(
    tiny: TinyVit, tmp_path: Path, trained: list[int], steps: int
) -> None:
    work = tiny.work(trained, training=TrainingSpec(batch_size=4), steps=steps, micro_batch=2)
    without_a_disk = replace(room_for(work), scratch=tmp_path / "missing")
    result = TorchTrainer(CPU).train(work, noise_data(), without_a_disk)
    assert result.steps == steps


def test_a_trainer_keeps_activations_in_the_scratch_directory(
    tiny: TinyVit, tmp_path: Path
) -> None:
    work = tiny.work([2, 3], training=TrainingSpec(batch_size=4), steps=12, micro_batch=2)
    with pytest.raises(FileNotFoundError):
        TorchTrainer(CPU).train(
            work, noise_data(), replace(room_for(work), scratch=tmp_path / "missing")
        )
    TorchTrainer(CPU).train(work, noise_data(), replace(room_for(work), scratch=tmp_path))
    assert list(tmp_path.iterdir()) == []
