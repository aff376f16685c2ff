"""The forward walk gives what the plain model gives, in chunks that follow the memory there is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedra_edge.errors import MemoryShortError, SliceError, TrainingInterrupted
from fedra_edge.protocol.ids import ModelId
from fedra_edge.protocol.rounds import EvaluationTask
from fedra_edge.protocol.tensors import read_header
from fedra_edge.slicing import whole_model
from fedra_edge.training import PieceFile, WholeModel
from fedra_edge.training.forward_walk import forward_batches
from fedra_edge.training.torch_trainer import TorchTrainer
from fedra_edge.training.trainer import InputArray, UsableMemory
from tests.support.memory_floor import scarce
from tests.support.tiny_vit import ADAPTER, TinyVit, noise_data

CPU = torch.device("cpu")
MEGABYTE = 10**6


def plenty() -> int:
    return 2**50


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyVit:
    return TinyVit.register(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def trainer() -> TorchTrainer:
    return TorchTrainer(CPU)


def whole(tiny: TinyVit) -> WholeModel:
    model_id = ModelId(tiny.spec.model_id)
    task = EvaluationTask(run="run", model_id=model_id, revision=tiny.revision, adapter=ADAPTER)
    return whole_model(task, tiny.spec, tiny.files)


def plain_logits(tiny: TinyVit, images: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = tiny.reference(range(4))(torch.from_numpy(images)).logits
    return logits


def test_evaluation_counts_as_the_plain_model_does(tiny: TinyVit, trainer: TorchTrainer) -> None:
    data = noise_data(60)
    counts = trainer.evaluate(whole(tiny), data, lambda: False, plenty)
    images, label_ids = data.batch(data.held_out_indices, tiny.spec.input)
    logits, labels = plain_logits(tiny, images), torch.from_numpy(label_ids)
    assert counts.num_examples == len(data.held_out_indices) == 20
    assert counts.num_correct == int((logits.argmax(1) == labels).sum())
    expected = F.cross_entropy(logits, labels, reduction="sum").item()
    assert counts.loss_sum == pytest.approx(expected, rel=1e-5)


def test_evaluation_counts_the_same_one_example_at_a_time(
    tiny: TinyVit, trainer: TorchTrainer
) -> None:
    data = noise_data(60)
    at_once = trainer.evaluate(whole(tiny), data, lambda: False, plenty)
    one_by_one = trainer.evaluate(whole(tiny), data, lambda: False, scarce)
    assert one_by_one.num_correct == at_once.num_correct
    assert one_by_one.loss_sum == pytest.approx(at_once.loss_sum, rel=1e-6)


@pytest.mark.parametrize("usable_memory", [plenty, scarce])
def test_predicted_probabilities_are_those_of_the_plain_model(
    tiny: TinyVit, trainer: TorchTrainer, usable_memory: UsableMemory
) -> None:
    images, _ = noise_data(50).batch(range(50), tiny.spec.input)
    told = list(trainer.predict(whole(tiny), iter(images), lambda: False, usable_memory))
    expected = plain_logits(tiny, images).softmax(1).numpy()
    np.testing.assert_allclose(np.stack(told), expected, atol=1e-6)


def test_inputs_are_taken_as_memory_allows(tiny: TinyVit, trainer: TorchTrainer) -> None:
    images, _ = noise_data(50).batch(range(50), tiny.spec.input)
    taken = 0

    def inputs() -> Iterator[InputArray]:
        nonlocal taken
        for image in images:
            taken += 1
            yield image

    told = trainer.predict(whole(tiny), inputs(), lambda: False, scarce)
    next(told)
    assert taken == 1
    next(told)
    assert taken == 2


def test_nothing_in_nothing_out(tiny: TinyVit, trainer: TorchTrainer) -> None:
    assert list(trainer.predict(whole(tiny), iter(()), lambda: False, plenty)) == []


def test_the_walk_stops_when_asked(tiny: TinyVit, trainer: TorchTrainer) -> None:
    with pytest.raises(TrainingInterrupted):
        trainer.evaluate(whole(tiny), noise_data(), lambda: True, plenty)
    images, _ = noise_data().batch([0], tiny.spec.input)
    with pytest.raises(TrainingInterrupted):
        next(trainer.predict(whole(tiny), iter(images), lambda: True, plenty))


def test_running_out_of_memory_is_told_as_such(tiny: TinyVit, trainer: TorchTrainer) -> None:
    class TooLarge:
        def __iter__(self) -> Self:
            return self

        def __next__(self) -> InputArray:
            raise MemoryError

    with pytest.raises(MemoryShortError, match="memory ran out"):
        next(trainer.predict(whole(tiny), TooLarge(), lambda: False, plenty))


def test_tensors_of_a_larger_file_are_read_where_they_lie(
    tiny: TinyVit, trainer: TorchTrainer
) -> None:
    model = whole(tiny)
    by_place = {
        piece: PieceFile(held.path, read_header(held.path)) for piece, held in model.weights.items()
    }
    data = noise_data(30)
    expected = trainer.evaluate(model, data, lambda: False, plenty)
    placed = replace(model, weights=by_place)
    assert trainer.evaluate(placed, data, lambda: False, plenty) == expected


def test_a_file_that_shrank_is_an_error(
    tiny: TinyVit, trainer: TorchTrainer, tmp_path: Path
) -> None:
    model = whole(tiny)
    stem = model.weights["stem"].path
    (tmp_path / "short").write_bytes(stem.read_bytes()[:100])
    cut = PieceFile(tmp_path / "short", read_header(stem))
    weights = {piece: model.weights[piece] for piece in model.weights} | {"stem": cut}
    with pytest.raises(SliceError, match="stem"):
        trainer.evaluate(replace(model, weights=weights), noise_data(), lambda: False, plenty)


def test_more_memory_means_more_examples_at_once_up_to_a_bound(tiny: TinyVit) -> None:
    sizes = [forward_batches(tiny.spec, free) for free in (-MEGABYTE, 0, MEGABYTE, 2**40, 2**50)]
    assert sizes[0] == sizes[1] == (1, 1)
    assert sizes == sorted(sizes)
    assert sizes[3] == sizes[4]
    for free_bytes in (MEGABYTE, 8 * MEGABYTE):
        micro_batch, walk_batch = forward_batches(tiny.spec, free_bytes)
        layer = tiny.spec.layers[0].cost
        activations = micro_batch * layer.activation_bytes + walk_batch * layer.boundary_bytes
        assert activations <= free_bytes
