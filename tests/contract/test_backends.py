"""Both backends compute the same: losses, gradients, rounds, evaluations and predictions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from fedra_edge.data.matching import MatchedDataset
from fedra_edge.protocol.ids import ModelId
from fedra_edge.protocol.rounds import EvaluationTask
from fedra_edge.protocol.slices import TrainingSpec
from fedra_edge.protocol.tensors import FloatArray
from fedra_edge.slicing import whole_model
from fedra_edge.training import EvaluationCounts, SliceWork, TrainedSlice, Trainer, WholeModel
from fedra_edge.training.onnx_interface import Interface
from fedra_edge.training.onnx_sessions import Graphs, SessionCache
from fedra_edge.training.onnx_trainer import OnnxTrainer
from fedra_edge.training.onnx_walk import OnnxSlice
from fedra_edge.training.torch_slice import ResidentSlice, trained_parameters
from fedra_edge.training.torch_trainer import TorchTrainer
from fedra_edge.training.trainer import InputArray
from tests.support.surroundings import room_for
from tests.support.tiny_llama import TinyLlama, word_data
from tests.support.tiny_vit import TinyVit, noise_data

Tensors = Mapping[str, FloatArray]
Parts = list[tuple[InputArray, InputArray]]
CPU = torch.device("cpu")
NUM_EXAMPLES = 6
TRAINING = {"batch_size": 4, "learning_rate": 0.05, "weight_decay": 0.01, "clip_norm": 0.5}
SUBSETS = [
    (model, subset)
    for model, num_layers in (("vit", 4), ("llama", 3))
    for size in (1, 2, num_layers)
    for subset in itertools.combinations(range(num_layers), size)
]


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, TinyVit]:
    return {
        "vit": TinyVit.register(tmp_path_factory.mktemp("vit")),
        "llama": TinyLlama.register(tmp_path_factory.mktemp("llama")),
    }


@pytest.fixture(scope="module")
def sessions() -> SessionCache:
    return SessionCache(threads=1)


@pytest.fixture(scope="module")
def trainers() -> tuple[Trainer, Trainer]:
    return TorchTrainer(CPU), OnnxTrainer(threads=1)


def data_of(tiny: TinyVit) -> MatchedDataset:
    if isinstance(tiny, TinyLlama):
        return word_data(tiny, size=30)
    return noise_data(30)


def work_of(tiny: TinyVit, trained: tuple[int, ...], **values: object) -> SliceWork:
    return tiny.work(trained, graphs=tiny.spec.graphs, **values)


def torch_step(work: SliceWork, parts: Parts) -> tuple[float, Tensors]:
    parameters = trained_parameters(work, CPU)
    loaded = ResidentSlice(work, parameters, CPU)
    entering = loaded.enter([torch.from_numpy(inputs) for inputs, _ in parts])
    labels = [torch.from_numpy(label_ids) for _, label_ids in parts]
    loss = loaded.accumulate(entering, labels, NUM_EXAMPLES)
    return loss, {
        name: parameter.grad.numpy()
        for name, parameter in parameters.items()
        if parameter.grad is not None
    }


def onnx_step(work: SliceWork, parts: Parts, sessions: SessionCache) -> tuple[float, Tensors]:
    assert work.graphs is not None
    trained = trained_parameters(work, CPU)
    values = {name: parameter.detach().numpy() for name, parameter in trained.items()}
    loaded = OnnxSlice(
        work,
        Graphs(work.graphs, sessions, Interface(work.spec, work.manifest.adapter.targets)),
        values,
    )
    entering = loaded.enter([inputs for inputs, _ in parts])
    loss = loaded.accumulate(entering, [label_ids for _, label_ids in parts], NUM_EXAMPLES)
    return loss, loaded.gradients


def assert_close(found: Tensors, expected: Tensors, part: float) -> None:
    """Compare every tensor by how far it is off, as a part of its own size."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = np.linalg.norm(found[name] - value) / np.linalg.norm(value)
        assert error < part, f"{name}: {error:.1e}"


@pytest.mark.parametrize("depth", ["full", "reduced"])
@pytest.mark.parametrize(("model", "trained"), SUBSETS, ids=str)
def test_losses_and_gradients_are_the_same(
    registered: Mapping[str, TinyVit],
    sessions: SessionCache,
    model: str,
    trained: tuple[int, ...],
    depth: str,
) -> None:
    tiny = registered[model]
    work, data = work_of(tiny, trained, depth=depth), data_of(tiny)
    chosen = data.train_indices[:NUM_EXAMPLES]
    whole = [data.batch(chosen, tiny.spec.input)]
    split = [data.batch(part, tiny.spec.input) for part in (chosen[:4], chosen[4:])]
    expected_loss, expected = torch_step(work, whole)
    for parts in (whole, split):
        loss, gradients = onnx_step(work, parts, sessions)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert_close(gradients, expected, 1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("depth", ["full", "reduced"])
@pytest.mark.parametrize("model", ["vit", "llama"])
def test_a_local_round_ends_with_the_same_deltas(
    registered: Mapping[str, TinyVit],
    trainers: tuple[Trainer, Trainer],
    model: str,
    depth: str,
    optimizer: str,
) -> None:
    tiny = registered[model]
    training = TrainingSpec.model_validate(TRAINING | {"optimizer": optimizer})
    work = work_of(
        tiny, (1, 2), depth=depth, training=training, steps=9, residency="streamed",
        micro_batch=2, walk_batch=3,
    )  # fmt: skip
    by_torch, by_onnx = (_deltas(trainer, tiny, work) for trainer in trainers)
    assert by_onnx[0].num_examples == by_torch[0].num_examples
    assert by_onnx[0].first_loss == pytest.approx(by_torch[0].first_loss, rel=1e-5)
    assert by_onnx[0].last_loss == pytest.approx(by_torch[0].last_loss, rel=1e-3)
    assert_close(by_onnx[1], by_torch[1], 1e-3)


def _deltas(trainer: Trainer, tiny: TinyVit, work: SliceWork) -> tuple[TrainedSlice, Tensors]:
    result = trainer.train(work, data_of(tiny), room_for(work))
    return result, {name: value - tiny.adapters[name] for name, value in result.adapters.items()}


@pytest.mark.parametrize("model", ["vit", "llama"])
def test_evaluations_and_predictions_are_the_same(
    registered: Mapping[str, TinyVit], trainers: tuple[Trainer, Trainer], model: str
) -> None:
    tiny = registered[model]
    whole, data = _whole(tiny), data_of(tiny)
    by_torch, by_onnx = (_counts(trainer, whole, data) for trainer in trainers)
    assert by_torch.num_examples == len(data.held_out_indices) > 0
    assert (by_onnx.num_examples, by_onnx.num_correct) == (
        by_torch.num_examples,
        by_torch.num_correct,
    )
    assert by_onnx.loss_sum == pytest.approx(by_torch.loss_sum, rel=1e-5)

    inputs = [data.batch([index], tiny.spec.input)[0][0] for index in data.train_indices]
    told, expected = (
        np.stack(list(trainer.predict(whole, iter(inputs), lambda: False, lambda: 2**40)))
        for trainer in reversed(trainers)
    )
    np.testing.assert_allclose(told, expected, atol=1e-5)


def _whole(tiny: TinyVit) -> WholeModel:
    adapter = tiny.manifest([0]).adapter
    task = EvaluationTask(
        run="run", model_id=ModelId(tiny.spec.model_id), revision=tiny.revision, adapter=adapter,
        graphs=tiny.spec.graphs,
    )  # fmt: skip
    return whole_model(task, tiny.spec, tiny.files)


def _counts(trainer: Trainer, model: WholeModel, data: MatchedDataset) -> EvaluationCounts:
    return trainer.evaluate(model, data, lambda: False, lambda: 2**40)
