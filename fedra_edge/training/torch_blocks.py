"""Builds the pieces of a model family as PyTorch modules and fills them, strictly, from tensors.

Modules are built without memory (on the meta device) and take the tensors they are filled with,
so a piece read from a memory-mapped file costs no copy unless it is stored in half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Generic, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from fedra_edge.errors import SliceError
from fedra_edge.protocol.families import ONNX_FAMILY
from fedra_edge.protocol.ids import LayerId
from fedra_edge.protocol.layers import HEAD, TensorKey, layer_piece
from fedra_edge.protocol.llama import LlamaSettings
from fedra_edge.protocol.models import AdapterSpec, ModelSpec
from fedra_edge.protocol.tensors import FloatArray, TensorInfo, map_stored, read_header
from fedra_edge.protocol.vit import VitSettings
from fedra_edge.training.torch_llama import LlamaBlock, LlamaHead, LlamaStem, real_tokens
from fedra_edge.training.torch_lora import attach_adapter
from fedra_edge.training.torch_pieces import Context, ResidualBlock, no_context
from fedra_edge.training.torch_vit import VitBlock, VitHead, VitStem

Module = TypeVar("Module", bound=nn.Module)
Settings = TypeVar("Settings", bound=BaseModel)


@dataclass(frozen=True)
class Builders(Generic[Settings]):
    """How to build a family's pieces from its settings."""

    settings: type[Settings]
    stem: Callable[[Settings], nn.Module]
    block: Callable[[Settings], ResidualBlock]
    head: Callable[[Settings, int], nn.Module]
    context: Callable[[Tensor], Context]


_BUILDERS: Final[Mapping[str, Builders[Any]]] = {
    "vit": Builders(VitSettings, VitStem, VitBlock, VitHead, no_context),
    "llama": Builders(LlamaSettings, LlamaStem, LlamaBlock, LlamaHead, real_tokens),
}
NO_PARAMETERS: Final[Mapping[str, nn.Parameter]] = MappingProxyType({})
_STORED_DTYPES: Final = frozenset({torch.float32, torch.float16, torch.bfloat16})
_COMPUTED_DTYPES: Final = frozenset({torch.float32})


def build_stem(spec: ModelSpec) -> nn.Module:
    """Build the stem, unfilled and frozen."""
    return _built(spec, _builders(spec).stem)


def build_head(spec: ModelSpec) -> nn.Module:
    """Build the head, unfilled and frozen."""
    head = _builders(spec).head
    return _built(spec, lambda config: head(config, len(spec.labels)))


def find_context(spec: ModelSpec, inputs: Tensor) -> Context:
    """Give what every layer and the head need to know of a batch beside its activations."""
    return _builders(spec).context(inputs)


def build_block(spec: ModelSpec, adapter: AdapterSpec) -> ResidualBlock:
    """Build one layer with adapters on exactly the targets, unfilled and frozen.

    Raises:
        SliceError: A target is no linear module of the block.
    """
    for target in adapter.targets:
        if target not in spec.block_linears:
            raise SliceError(f"{target!r} is no linear module of a block of model {spec.name}")

    def adapted(settings: BaseModel) -> ResidualBlock:
        block = _builders(spec).block(settings)
        attach_adapter(block, adapter)
        return block

    return _built(spec, adapted)


def read_piece(path: Path, device: torch.device) -> dict[str, Tensor]:
    """Open a piece's weights; on the CPU they stay in the file until they are used.

    Each tensor is a mapping of its own, so that a piece takes address space once.

    Raises:
        SliceError: The file is no safetensors file.
    """
    try:
        infos = read_header(path)
        return {name: _mapped(path, info).to(device) for name, info in infos.items()}
    except ValueError as error:
        raise SliceError(f"{path.name} is no file of weights: {error}") from error


def _mapped(path: Path, info: TensorInfo) -> Tensor:
    stored = torch.from_numpy(map_stored(path, info))
    return stored.view(torch.bfloat16) if info.dtype == "BF16" else stored


def fill_block(
    block: nn.Module,
    weights: Mapping[str, Tensor],
    adapters: Mapping[str, FloatArray],
    layer_id: LayerId,
    trained: Mapping[str, nn.Parameter] = NO_PARAMETERS,
) -> None:
    """Give a block a layer's weights and its adapters, by their global names.

    Args:
        block: A block with adapters, as ``build_block`` makes it.
        weights: The layer's frozen weights by their names inside the piece.
        adapters: Adapters of this and any other layers.
        layer_id: The layer.
        trained: Parameters that stand in for the adapters of the same name.

    Raises:
        SliceError: A tensor is missing, extra, or of another shape or dtype.
    """
    own = _own_tensors(adapters, layer_piece(layer_id), trained)
    _fill(block, weights, own, f"layer {layer_id}")


def restore(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Put parameters back that a module had before it was filled, which lets go of its weights."""
    for name, parameter in parameters.items():
        _set_parameter(module, name, parameter)


def fill_stem(stem: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a stem its weights.

    Raises:
        SliceError: A tensor is missing, extra, or of another shape or dtype.
    """
    _fill(stem, weights, {}, "the stem")


def fill_head(
    head: nn.Module,
    weights: Mapping[str, Tensor],
    adapters: Mapping[str, FloatArray],
    trained: Mapping[str, nn.Parameter] = NO_PARAMETERS,
) -> None:
    """Give a head its weights, the trained ones from the adapter state.

    Raises:
        SliceError: A tensor is missing, extra, or of another shape or dtype.
    """
    own = _own_tensors(adapters, HEAD, trained)
    frozen = {name: tensor for name, tensor in weights.items() if name not in own}
    _fill(head, frozen, own, "the head")


def allocate(module: nn.Module, device: torch.device) -> nn.Module:
    """Give an unfilled module memory with arbitrary content.

    ``Module.to_empty`` would do, but imports PyTorch's symbolic shapes, some 40 MB.
    """
    for name, parameter in list(module.named_parameters()):
        _set_parameter(module, name, torch.empty(parameter.shape, device=device))
    return module


def _builders(spec: ModelSpec) -> Builders[Any]:
    if spec.family not in _BUILDERS:
        known = ", ".join(_BUILDERS)
        raise SliceError(
            f"this client cannot build models of family {spec.family!r}, only: {known}",
            remedy="This model is only there as ONNX: use --backend onnx."
            if spec.family == ONNX_FAMILY
            else "Update fedra on this machine.",
        )
    return _BUILDERS[spec.family]


def _built(spec: ModelSpec, build: Callable[[Any], Module]) -> Module:
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


def _fill(
    module: nn.Module, weights: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str
) -> None:
    """Check all tensors, then set one after the other, each in place of the one before."""
    if repeated := weights.keys() & own.keys():
        raise SliceError(f"{what} has an adapter among its weights: {min(repeated)}")
    _check_tensors(module, weights, _STORED_DTYPES, what)
    _check_tensors(module, own, _COMPUTED_DTYPES, what)
    missing = {name for name, _ in module.named_parameters()} - weights.keys() - own.keys()
    if missing:
        raise SliceError(f"{what} has missing tensors: {', '.join(sorted(missing)[:5])}")
    device = next(iter(weights.values())).device
    for name, tensor in (*weights.items(), *own.items()):
        _set_parameter(module, name, tensor.to(device))


def _check_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], dtypes: AbstractSet[torch.dtype], what: str
) -> None:
    expected = dict(module.named_parameters())
    if extra := sorted(tensors.keys() - expected.keys()):
        raise SliceError(f"{what} has extra tensors: {', '.join(extra[:5])}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or tensor.dtype not in dtypes:
            raise SliceError(
                f"{what}: {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"not {torch.float32} {tuple(expected[name].shape)}"
            )


def _own_tensors(
    adapters: Mapping[str, FloatArray], piece: str, trained: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Give a piece's tensors of the adapter state, by their names inside the piece."""
    keys = [key for key in map(TensorKey.parse, adapters) if key.piece == piece]
    return {key.name: trained.get(str(key), torch.from_numpy(adapters[str(key)])) for key in keys}


def _set_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in place of a parameter; one stored in half precision is widened."""
    parent, _, last = name.rpartition(".")
    if not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor.to(torch.float32), requires_grad=False)
    setattr(module.get_submodule(parent), last, tensor)
