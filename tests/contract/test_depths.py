"""What a slice of either depth computes, against plain transformers and peft."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedra_edge.protocol.layers import TensorKey
from fedra_edge.protocol.models import AdapterSpec
from fedra_edge.training.torch_slice import (
    ResidentSlice,
    TrainableSlice,
    trained_parameters,
)
from fedra_edge.training.torch_walk import StreamedSlice
from fedra_edge.training.trainer import SliceWork
from tests.support.tiny_vit import (
    NUM_LAYERS,
    TinyVit,
    noise_data,
    put_revision,
    random_tensors,
    reference_parameter,
)

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


Gradients = dict[str, torch.Tensor]


def logits_of(work: SliceWork, images: torch.Tensor) -> torch.Tensor:
    loaded = ResidentSlice(work, trained_parameters(work, CPU), CPU)
    return loaded.leave(loaded.enter([images])[0])


def step(
    kind: Callable[[SliceWork, dict[str, nn.Parameter], torch.device], TrainableSlice],
    work: SliceWork,
    micro_batch: int,
) -> tuple[float, Gradients]:
    """Take one step's loss and gradients, over all of six examples."""
    images, label_ids = examples(work)
    parameters = trained_parameters(work, CPU)
    loaded = kind(work, parameters, CPU)
    entering = loaded.enter(torch.split(images, micro_batch))
    loss = loaded.accumulate(entering, torch.split(label_ids, micro_batch), len(images))
    gradients: Gradients = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        gradients[name] = parameter.grad
    return loss, gradients


@pytest.mark.parametrize("depth", ["full", "reduced"])
@pytest.mark.parametrize("trained", SUBSETS, ids=str)
def test_logits_and_gradients_are_those_of_the_plain_model(
    tiny: TinyVit, trained: tuple[int, ...], depth: str
) -> None:
    work = tiny.work(trained, depth=depth)
    positions = {int(layer_id): index for index, layer_id in enumerate(work.manifest.layer_ids)}
    reference = tiny.reference(work.manifest.layer_ids)
    images, label_ids = examples(work)
    expected = reference(images).logits
    torch.testing.assert_close(logits_of(work, images), expected, rtol=0, atol=1e-6)

    _, gradients = step(ResidentSlice, work, micro_batch=6)
    F.cross_entropy(expected, label_ids).backward()  # type: ignore[no-untyped-call]  # unannotated
    wanted = work.spec.delta_shapes(work.manifest.adapter, work.manifest.trained_layer_ids)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        same = reference_parameter(reference, TensorKey.parse(name), positions)
        torch.testing.assert_close(gradient, same.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", ["full", "reduced"])
@pytest.mark.parametrize("trained", SUBSETS, ids=str)
@pytest.mark.parametrize("micro_batch", [6, 2])
def test_a_streamed_slice_has_the_gradients_of_a_resident_one(
    tiny: TinyVit, trained: tuple[int, ...], depth: str, micro_batch: int
) -> None:
    work = tiny.work(trained, depth=depth)
    whole_loss, expected = step(ResidentSlice, work, micro_batch=6)
    loss, gradients = step(StreamedSlice, work, micro_batch)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "targets", [("attention.q_proj",), ("attention.o_proj",), ("mlp.fc1",), ("mlp.fc2",)], ids=str
)
def test_adapters_may_sit_anywhere_in_a_block(tiny: TinyVit, targets: tuple[str, ...]) -> None:
    adapter = AdapterSpec(rank=2, alpha=4.0, targets=targets)
    values = random_tensors(tiny.spec.delta_shapes(adapter, tiny.spec.layer_ids))
    revision = put_revision(tiny.spec, values, tiny.blobs)
    work = tiny.work([1, 3], adapter=adapter, revision=revision)
    _, expected = step(ResidentSlice, work, micro_batch=6)
    _, gradients = step(StreamedSlice, work, micro_batch=2)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6)


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
    images, _ = examples(work)
    logits = logits_of(replace(work, adapters=silent), images)
    torch.testing.assert_close(logits, tiny.model(images).logits, rtol=0, atol=1e-6)


def test_depth_decides_what_a_slice_computes(tiny: TinyVit) -> None:
    images, _ = examples(tiny.work([1]))
    full = logits_of(tiny.work([1]), images)
    reduced = logits_of(tiny.work([1], depth="reduced"), images)
    assert (full - reduced).abs().max() > 1e-2


@pytest.mark.parametrize("depth", ["full", "reduced"])
@pytest.mark.parametrize("trained", SUBSETS, ids=str)
def test_positions_and_layer_ids_map_to_each_other(
    tiny: TinyVit, trained: tuple[int, ...], depth: str
) -> None:
    work = tiny.work(trained, depth=depth)
    positions = ResidentSlice(work, trained_parameters(work, CPU), CPU).positions
    for layer_id in work.manifest.layer_ids:
        assert positions.layer_at(positions.position_of(layer_id)) == layer_id
