"""A resident slice: what it trains, what it keeps, and what it refuses to load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from fedra_edge.errors import SliceError
from fedra_edge.protocol.models import AdapterSpec
from fedra_edge.training.torch_blocks import build_block, build_stem
from fedra_edge.training.torch_lora import LoraLinear
from fedra_edge.training.torch_slice import ResidentSlice, parameter_values, trained_parameters
from fedra_edge.training.trainer import SliceWork
from tests.support.tiny_vit import ADAPTER, TinyVit, noise_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyVit:
    return TinyVit.register(tmp_path_factory.mktemp("tiny"))


def load(work: SliceWork) -> ResidentSlice:
    return ResidentSlice(work, trained_parameters(work, CPU), CPU)


def parameters_of(loaded: ResidentSlice) -> list[nn.Parameter]:
    modules = (loaded.stem, *loaded.layers, loaded.head)
    return [parameter for module in modules for parameter in module.parameters()]


def kept_bytes(work: SliceWork) -> int:
    """Add up the distinct storages that autograd keeps during a forward pass."""
    loaded = load(work)
    parameters = {tensor.untyped_storage().data_ptr() for tensor in parameters_of(loaded)}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    data = noise_data()
    images, _ = data.batch(data.train_indices[:4], work.spec.input)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loaded.leave(loaded.enter([torch.from_numpy(images)])[0])
    return sum(
        tensor.untyped_storage().nbytes()
        for address, tensor in kept.items()
        if address not in parameters
    )


def test_only_assigned_adapters_and_the_head_require_gradients(tiny: TinyVit) -> None:
    work = tiny.work([1, 3])
    trained = trained_parameters(work, CPU)
    loaded = ResidentSlice(work, trained, CPU)
    wanted = {id(parameter) for parameter in trained.values()}
    assert (
        trained.keys()
        == tiny.spec.delta_shapes(ADAPTER, tuple(tiny.spec.layer_ids[i] for i in (1, 3))).keys()
    )
    assert {id(p) for p in parameters_of(loaded) if p.requires_grad} == wanted


def test_received_values_come_back_by_their_global_names(tiny: TinyVit) -> None:
    work = tiny.work([0, 2], depth="reduced")
    values = parameter_values(trained_parameters(work, CPU))
    for name, value in values.items():
        np.testing.assert_array_equal(value, tiny.adapters[name])


def test_nothing_below_the_lowest_trained_layer_keeps_activations(tiny: TinyVit) -> None:
    per_example = tiny.spec.layers[0].cost.activation_bytes
    bottom, top = kept_bytes(tiny.work([0])), kept_bytes(tiny.work([3]))
    assert top < 4 * 1.2 * (per_example + tiny.spec.head.cost.activation_bytes)
    assert bottom > 1.5 * top


def test_adapters_never_hit_the_patch_embedding(tiny: TinyVit) -> None:
    for block in load(tiny.work([0, 1, 2, 3])).layers:
        wrapped = {name for name, module in block.named_modules() if isinstance(module, LoraLinear)}
        assert wrapped == set(ADAPTER.targets)
    projection = build_stem(tiny.spec).get_submodule("patch_embeddings.projection")
    assert type(projection) is nn.Conv2d


@pytest.mark.parametrize("target", ["proj", "o_proj", "fc2", "attention.o.proj"])
def test_a_target_must_be_the_full_name_of_a_linear_module(tiny: TinyVit, target: str) -> None:
    with pytest.raises(SliceError, match="no linear module"):
        build_block(tiny.spec, AdapterSpec(targets=(target,)))


def test_an_unknown_family_is_refused(tiny: TinyVit) -> None:
    with pytest.raises(SliceError, match="family 'later'"):
        build_stem(tiny.spec.model_copy(update={"family": "later"}))


@pytest.mark.parametrize("piece", ["stem", "layers.2", "head"])
@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "dtype", "bytes"])
def test_loading_is_strict(tiny: TinyVit, tmp_path: Path, piece: str, damage: str) -> None:
    work = tiny.work([2])
    tensors = load_file(work.weights[piece])
    name = "layernorm.weight" if piece == "head" else min(tensors)
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        tensors["other.weight"] = np.zeros(2, dtype=np.float32)
    elif damage == "shape":
        tensors[name] = np.zeros((1, 2, 3), dtype=np.float32)
    elif damage == "dtype":
        tensors[name] = tensors[name].astype(np.float64)
    path = tmp_path / "piece.safetensors"
    save_file(tensors, path)
    if damage == "bytes":
        path.write_bytes(b"no tensors")
    with pytest.raises(SliceError):
        load(replace(work, weights={**work.weights, piece: path}))


def test_a_missing_adapter_tensor_is_refused(tiny: TinyVit) -> None:
    work = tiny.work([2])
    fewer = dict(work.adapters)
    del fewer["layers.1/mlp.fc2.lora_b"]
    with pytest.raises(SliceError, match="layer 1"):
        load(replace(work, adapters=fewer))
