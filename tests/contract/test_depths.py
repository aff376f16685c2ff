"""What a slice of either depth computes, against plain transformers and peft."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedra_edge.protocol.layers import TensorKey
from fedra_edge.training.torch_slice import TorchSlice
from fedra_edge.training.torch_walk import StreamedSlice
from fedra_edge.training.trainer import SliceWork
from tests.support.tiny_vit import NUM_LAYERS, TinyVit, noise_data, reference_parameter

CPU = torch.device("cpu")
SUBSETS = [
    subset
    for size in range(1, NUM_LAYERS + 1)
    for subset in itertools.combinations(range(NUM_LAYERS), size)
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyVit:
    return TinyVit.register(tmp_path_factory.mktemp("tiny"))


def examples(work: SliceWork) -> tuple[torch.Tensor, torch.Tensor]:
    data = noise_data()
    images, label_ids = data.batch(data.train_indices[:6], work.spec.input)
    return torch.from_numpy(images), torch.from_numpy(label_ids)


def slice_and_reference(
    tiny: TinyVit, trained: tuple[int, ...], depth: str
) -> tuple[TorchSlice, torch.nn.Module, SliceWork, dict[int, int]]:
    work = tiny.work(trained, depth=depth)
    held = work.manifest.layer_ids
    positions = {int(layer_id): index for index, layer_id in enumerate(held)}
    return TorchSlice.load(work, CPU), tiny.reference(held), work, positions


@pytest.mark.parametrize("depth", ["full", "reduced"])
@pytest.mark.parametrize("trained", SUBSETS, ids=str)
def test_logits_and_gradients_are_those_of_the_plain_model(
    tiny: TinyVit, trained: tuple[int, ...], depth: str
) -> None:
    loaded, reference, work, positions = slice_and_reference(tiny, trained, depth)
    images, label_ids = examples(work)
    logits, expected = loaded(images), reference(images).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)

    F.cross_entropy(logits, label_ids).backward()  # type: ignore[no-untyped-call]  # unannotated
    F.cross_entropy(expected, label_ids).backward()  # type: ignore[no-untyped-call]  # unannotated
    wanted = work.spec.delta_shapes(work.manifest.adapter, work.manifest.trained_layer_ids)
    assert loaded.trained.keys() == wanted.keys()
    for name, parameter in loaded.trained.items():
        same = reference_parameter(reference, TensorKey.parse(name), positions)
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, same.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", ["full", "reduced"])
@pytest.mark.parametrize("trained", SUBSETS, ids=str)
@pytest.mark.parametrize("micro_batch", [6, 2])
def test_a_streamed_slice_has_the_gradients_of_a_resident_one(
    tiny: TinyVit, trained: tuple[int, ...], depth: str, micro_batch: int
) -> None:
    work = tiny.work(trained, depth=depth)
    images, label_ids = examples(work)
    resident, streamed = TorchSlice.load(work, CPU), StreamedSlice(work, CPU)
    whole_loss = resident.accumulate([images], [label_ids], len(images))
    parts = torch.split(images, micro_batch), torch.split(label_ids, micro_batch)
    loss = streamed.accumulate(*parts, num_examples=len(images))
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert streamed.trained.keys() == resident.trained.keys()
    for name, parameter in resident.trained.items():
        gradient = streamed.trained[name].grad
        assert gradient is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-6)


def test_a_full_slice_without_adapter_effect_gives_the_registered_model(tiny: TinyVit) -> None:
    work = tiny.work([0])
    silent = {
        name: np.zeros_like(value) if name.endswith("lora_b") else value
        for name, value in work.adapters.items()
    }
    own = tiny.model.state_dict()
    silent |= {
        f"head/classifier.{last}": own[f"classifier.{last}"].numpy() for last in ("weight", "bias")
    }
    loaded = TorchSlice.load(SliceWork(work.spec, work.manifest, work.weights, silent), CPU)
    images, _ = examples(work)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), tiny.model(images).logits, rtol=0, atol=1e-6)


def test_depth_decides_what_a_slice_computes(tiny: TinyVit) -> None:
    images, _ = examples(tiny.work([1]))
    with torch.no_grad():
        full = TorchSlice.load(tiny.work([1]), CPU)(images)
        reduced = TorchSlice.load(tiny.work([1], depth="reduced"), CPU)(images)
    assert (full - reduced).abs().max() > 1e-2


@pytest.mark.parametrize("depth", ["full", "reduced"])
@pytest.mark.parametrize("trained", SUBSETS, ids=str)
def test_positions_and_layer_ids_map_to_each_other(
    tiny: TinyVit, trained: tuple[int, ...], depth: str
) -> None:
    work = tiny.work(trained, depth=depth)
    positions = TorchSlice.load(work, CPU).positions
    for layer_id in work.manifest.layer_ids:
        assert positions.layer_at(positions.position_of(layer_id)) == layer_id
