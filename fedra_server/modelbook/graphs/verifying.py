"""Holds a model's graphs against PyTorch: every result and every gradient, on random examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedra_edge.protocol.families import Family
from fedra_edge.protocol.graphs import (
    GRADIENT,
    GRADIENT_SUFFIX,
    HIDDEN,
    INPUTS,
    LOGITS,
    LORA_SCALE,
    OUT,
)
from fedra_edge.protocol.ids import LayerId
from fedra_edge.protocol.layers import HEAD, LORA_A, LORA_B, STEM, TensorKey, layer_piece
from fedra_edge.protocol.models import ModelInput, TokenInput
from fedra_server.errors import ConfigurationError
from fedra_server.modelbook.graphs.making import FinishedGraphs
from fedra_server.modelbook.graphs.running import run_graph
from fedra_server.modelbook.splitting import Arrays

Values = dict[str, NDArray[Any]]

_TOLERANCE: Final = 1e-4
_LENGTHS: Final = (7, 4)
"""Tokens of the two random texts, where the model takes that many."""
_SEED: Final = 0
_PADDING: Final = -1
_ADAPTER_SCALE: Final = 0.5
_ADAPTER_STD: Final = 0.1
_PEFT_NAME: Final = "default"


@dataclass(frozen=True)
class _Reference:
    """What PyTorch computes with the stem, the first layer and the head of a model.

    ``given`` are the values that graphs start from, ``block`` and ``head`` the gradients of what
    the two can train and of what enters them. ``is_real`` is 0 where a text is padded.
    """

    given: Values
    hidden: NDArray[Any]
    out: NDArray[Any]
    logits: NDArray[Any]
    out_gradient: NDArray[Any]
    logits_gradient: NDArray[Any]
    block: Values
    head: Values
    is_real: NDArray[Any]


def verify_graphs(
    model: PreTrainedModel,
    family: Family,
    wanted: ModelInput,
    pieces: Mapping[str, Arrays],
    graphs: FinishedGraphs,
) -> None:
    """Compute two random examples with stem, first layer and head, in PyTorch and on onnxruntime.

    The model has adapters attached, as ``measure_costs`` leaves it; they are given random values
    and all layers but the first are dropped, so the model should not be used afterwards.

    Raises:
        ConfigurationError: A result or a gradient differs, or a graph cannot be run.
    """
    generator = torch.Generator().manual_seed(_SEED)
    reference = _compute(model, family, _examples(wanted, generator), generator)
    is_real = reference.is_real
    stem = run_graph(graphs.stem, {**pieces[STEM], **reference.given})
    _compare("hidden", stem.pop(HIDDEN), reference.hidden)
    layer = {**stem, **reference.given, **pieces[layer_piece(LayerId(0))], HIDDEN: reference.hidden}
    out = run_graph(graphs.block, layer)[OUT]
    _compare("out", out * is_real, reference.out * is_real)
    pulled = run_graph(graphs.block_vjp, {**layer, GRADIENT: reference.out_gradient})
    _compare_all("block", pulled, reference.block)
    head = {**stem, **pieces[HEAD], HIDDEN: reference.out}
    _compare("logits", run_graph(graphs.head, head)[LOGITS], reference.logits)
    pulled = run_graph(graphs.head_vjp, {**head, GRADIENT: reference.logits_gradient})
    _compare_all("head", pulled, reference.head)


def _examples(wanted: ModelInput, generator: torch.Generator) -> Tensor:
    """Make two random examples as a client feeds them; of texts, one is padded."""
    if not isinstance(wanted, TokenInput):
        size = wanted.size_px
        return torch.randn(2, wanted.channels, size, size, generator=generator)
    lengths = torch.tensor([[min(length, wanted.max_tokens)] for length in _LENGTHS])
    shape = (2, int(lengths.max()))
    tokens = torch.randint(1, max(2, wanted.vocabulary_size), shape, generator=generator)
    return tokens.where(torch.arange(shape[1]) < lengths, _PADDING)


def _compute(
    model: PreTrainedModel, family: Family, inputs: Tensor, generator: torch.Generator
) -> _Reference:
    adapters = _fill_adapters(model.get_submodule(f"{family.layers}.0"), generator)
    _keep_first_layer(model, family)
    is_real = torch.ones(1) if inputs.is_floating_point() else (inputs >= 0).float().unsqueeze(2)
    with _observing(model, family) as seen:
        logits: Tensor = model(**_by_name(inputs)).logits
    hidden, out = seen["hidden"], seen["out"]
    out_gradient = torch.randn(out.shape, generator=generator) * is_real
    logits_gradient = torch.randn(logits.shape, generator=generator)
    trained = {
        name: model.get_parameter(family.full_name(TensorKey(HEAD, name)))
        for name in family.head_parameters
    }
    given = {name: _array(tensor) for name, tensor in adapters.items()}
    return _Reference(
        given={
            **given,
            INPUTS: _array(inputs),
            LORA_SCALE: np.array(_ADAPTER_SCALE, dtype=np.float32),
        },
        hidden=_array(hidden),
        out=_array(out),
        logits=_array(logits),
        out_gradient=_array(out_gradient),
        logits_gradient=_array(logits_gradient),
        head=_pull(logits, {HIDDEN: out, **trained}, logits_gradient),
        block=_pull(out, {HIDDEN: hidden, **adapters}, out_gradient),
        is_real=_array(is_real),
    )


def _fill_adapters(block: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Give peft's adapters of a layer random values; name them as graphs do."""
    adapters: dict[str, Tensor] = {}
    for name, module in block.named_modules():
        if hasattr(module, "lora_A"):
            module.scaling[_PEFT_NAME] = _ADAPTER_SCALE
            adapters[f"{name}.{LORA_A}"] = module.lora_A[_PEFT_NAME].weight
            adapters[f"{name}.{LORA_B}"] = module.lora_B[_PEFT_NAME].weight
    for parameter in adapters.values():
        nn.init.normal_(parameter, std=_ADAPTER_STD, generator=generator)
    return adapters


def _keep_first_layer(model: PreTrainedModel, family: Family) -> None:
    path, _, name = family.layers.rpartition(".")
    first = model.get_submodule(f"{family.layers}.0")
    setattr(model.get_submodule(path), name, nn.ModuleList([first]))
    model.config.num_hidden_layers = 1


@contextmanager
def _observing(model: nn.Module, family: Family) -> Iterator[dict[str, Tensor]]:
    """Catch what the stem and the first layer give, while the context is open."""
    seen: dict[str, Tensor] = {}

    def after_stem(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        seen["hidden"] = output.detach().requires_grad_()
        return seen["hidden"]

    def after_layer(_module: nn.Module, _inputs: object, output: Any) -> None:  # noqa: ANN401 (some layers give a tensor, some a tuple)
        seen["out"] = output[0] if isinstance(output, tuple) else output

    hooks = [
        model.get_submodule(family.stem).register_forward_hook(after_stem),
        model.get_submodule(f"{family.layers}.0").register_forward_hook(after_layer),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _by_name(inputs: Tensor) -> dict[str, Tensor | bool]:
    """Name inputs as transformers does; the model's padding token is 0, as for its costs."""
    if inputs.is_floating_point():
        return {"pixel_values": inputs}
    is_real = inputs >= 0
    return {
        "input_ids": inputs.clamp(min=0),
        "attention_mask": is_real.long(),
        "use_cache": False,
    }


def _pull(output: Tensor, inputs: Mapping[str, Tensor], gradient: Tensor) -> Values:
    pulled = torch.autograd.grad(output, list(inputs.values()), gradient, retain_graph=True)
    return {
        f"{name}{GRADIENT_SUFFIX}": _array(tensor)
        for name, tensor in zip(inputs, pulled, strict=True)
    }


def _compare_all(piece: str, found: Values, expected: Values) -> None:
    if found.keys() != expected.keys():
        raise ConfigurationError(f"the {piece}'s graph gives {sorted(found)}")
    for name, value in expected.items():
        _compare(f"{piece}'s {name}", found[name], value)


def _compare(what: str, found: NDArray[Any], expected: NDArray[Any]) -> None:
    largest = float(np.abs(expected).max())
    differs_by = float(np.abs(found - expected).max()) if found.shape == expected.shape else np.inf
    if not differs_by <= _TOLERANCE * largest:
        raise ConfigurationError(
            f"{what} of the ONNX graphs differs from PyTorch's by {differs_by:.1e}, "
            f"where its largest value is {largest:.1e}"
        )


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().numpy()
    return array
