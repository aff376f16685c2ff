"""Builds the pieces of a model family as PyTorch modules and fills them, strictly, from tensors.

Modules are built without memory (on the meta device) and take the tensors they are filled with,
so a piece read from a memory-mapped file costs no copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedra_edge.errors import SliceError
from fedra_edge.protocol.ids import LayerId
from fedra_edge.protocol.layers import HEAD, TensorKey
from fedra_edge.protocol.models import AdapterSpec, ModelSpec
from fedra_edge.protocol.tensors import FloatArray
from fedra_edge.training.torch_lora import attach_adapter
from fedra_edge.training.torch_vit import VitBlock, VitHead, VitSettings, VitStem


@dataclass(frozen=True)
class Builders:
    """How to build a family's pieces from its settings."""

    settings: type[VitSettings]
    stem: Callable[[VitSettings], nn.Module]
    block: Callable[[VitSettings], nn.Module]
    head: Callable[[VitSettings, int], nn.Module]


_BUILDERS: Final = {"vit": Builders(VitSettings, VitStem, VitBlock, VitHead)}


def build_stem(spec: ModelSpec) -> nn.Module:
    """Build the stem, unfilled and frozen."""
    return _built(spec, _builders(spec).stem)


def build_head(spec: ModelSpec) -> nn.Module:
    """Build the head, unfilled and frozen."""
    head = _builders(spec).head
    return _built(spec, lambda config: head(config, len(spec.labels)))


def build_block(spec: ModelSpec, adapter: AdapterSpec) -> nn.Module:
    """Build one layer with adapters on exactly the targets, unfilled and frozen.

    Raises:
        SliceError: A target is no linear module of the block.
    """
    for target in adapter.targets:
        if target not in spec.block_linears:
            raise SliceError(f"{target!r} is no linear module of a block of model {spec.name}")

    def adapted(settings: VitSettings) -> nn.Module:
        block = _builders(spec).block(settings)
        attach_adapter(block, adapter)
        return block

    return _built(spec, adapted)


def read_piece(path: Path, device: torch.device) -> dict[str, Tensor]:
    """Open a piece's weights; on the CPU they stay in the file until they are used.

    Raises:
        SliceError: The file is no safetensors file.
    """
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise SliceError(f"{path.name} is no file of weights: {error}") from error


def fill_block(
    block: nn.Module,
    weights: Mapping[str, Tensor],
    adapters: Mapping[str, FloatArray],
    layer_id: LayerId,
    device: torch.device,
) -> None:
    """Give a block a layer's weights and its adapters, by their global names.

    Raises:
        SliceError: A tensor is missing, extra, or of another shape or dtype.
    """
    held = {
        name: torch.tensor(value, device=device)
        for name, value in adapters.items()
        if TensorKey.parse(name).layer_id == layer_id
    }
    block.load_state_dict(block_state(block, weights, held, layer_id), strict=True, assign=True)


def block_state(
    block: nn.Module,
    weights: Mapping[str, Tensor],
    adapters: Mapping[str, Tensor],
    layer_id: LayerId,
) -> dict[str, Tensor]:
    """Name a layer's weights and adapters as the block's parameters.

    Args:
        block: A block with adapters, as ``build_block`` makes it.
        weights: The layer's frozen weights by their names inside the piece.
        adapters: The layer's adapters by global name.
        layer_id: The layer, for error messages.

    Raises:
        SliceError: A tensor is missing, extra, or of another shape or dtype.
    """
    own = {TensorKey.parse(name).name: value for name, value in adapters.items()}
    state = dict(weights) | own
    _check_state(block, state, f"layer {layer_id}")
    return state


def fill_stem(stem: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a stem its weights.

    Raises:
        SliceError: A tensor is missing, extra, or of another shape or dtype.
    """
    _fill(stem, weights, "the stem")


def fill_head(
    head: nn.Module,
    weights: Mapping[str, Tensor],
    adapters: Mapping[str, FloatArray],
    device: torch.device,
) -> None:
    """Give a head its weights, the trained ones from the adapter state.

    Raises:
        SliceError: A tensor is missing, extra, or of another shape or dtype.
    """
    trained = {
        key.name: torch.tensor(adapters[str(key)], device=device)
        for key in map(TensorKey.parse, adapters)
        if key.piece == HEAD
    }
    _fill(head, dict(weights) | trained, "the head")


def allocate(module: nn.Module, device: torch.device) -> nn.Module:
    """Give an unfilled module memory with arbitrary content.

    ``Module.to_empty`` would do, but imports PyTorch's symbolic shapes, some 40 MB.
    """
    state = {
        name: torch.empty(tensor.shape, device=device)
        for name, tensor in module.state_dict().items()
    }
    module.load_state_dict(state, strict=True, assign=True)
    return module


def _builders(spec: ModelSpec) -> Builders:
    if spec.family not in _BUILDERS:
        known = ", ".join(_BUILDERS)
        raise SliceError(
            f"this client cannot build models of family {spec.family!r}, only: {known}",
            remedy="Update fedra on this machine.",
        )
    return _BUILDERS[spec.family]


def _built(spec: ModelSpec, build: Callable[[VitSettings], nn.Module]) -> nn.Module:
    try:
        settings = _builders(spec).settings.model_validate(spec.config)
    except ValidationError as error:
        raise SliceError(
            f"this client cannot build model {spec.name}: {error.errors()[0]['msg']}",
            remedy="Update fedra on this machine.",
        ) from error
    with torch.device("meta"):
        module = build(settings)
    return module.eval().requires_grad_(requires_grad=False)


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    _check_state(module, tensors, what)
    module.load_state_dict(tensors, strict=True, assign=True)


def _check_state(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    expected = module.state_dict()
    if expected.keys() != tensors.keys():
        odd = ", ".join(sorted(expected.keys() ^ tensors.keys())[:5])
        raise SliceError(f"{what} has missing or extra tensors: {odd}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise SliceError(
                f"{what}: {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"not {expected[name].dtype} {tuple(expected[name].shape)}"
            )
