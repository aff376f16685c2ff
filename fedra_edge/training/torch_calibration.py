"""Measures how long one block of a model takes on this machine, forward and backward."""

from __future__ import annotations

import statistics
import time
from typing import Final

import torch
from torch import Tensor, nn

from fedra_edge.protocol.models import AdapterSpec, ModelSpec
from fedra_edge.training.torch_blocks import build_block, build_stem
from fedra_edge.training.trainer import BlockTiming

_BUDGET_S: Final = 0.8
_MAX_REPEATS: Final = 5
_MAX_EXAMPLES: Final = 16
_SPREAD: Final = 0.02


def time_block(spec: ModelSpec, device: torch.device) -> BlockTiming:
    """Time a block with random weights: the median of a few runs, per example.

    The number of examples at once adapts to the machine, so that the whole takes about a second.
    """
    generator = torch.Generator(device).manual_seed(0)
    block = _random_block(spec, device, generator)
    shape = _hidden_shape(spec)
    started = time.perf_counter()
    _time_once(block, _random((1, *shape), device, generator))  # warms caches and thread pools
    single_s = max(1e-6, sum(_time_once(block, _random((1, *shape), device, generator))))
    affordable = _BUDGET_S / _MAX_REPEATS / single_s
    examples = max(1, min(_MAX_EXAMPLES, int(affordable)))
    hidden = _random((examples, *shape), device, generator)
    timings = [_time_once(block, hidden)]
    while len(timings) < _MAX_REPEATS and time.perf_counter() - started < _BUDGET_S:
        timings.append(_time_once(block, hidden))
    return BlockTiming(
        forward_s=statistics.median(forward for forward, _ in timings) / examples,
        backward_s=statistics.median(backward for _, backward in timings) / examples,
    )


def _random_block(spec: ModelSpec, device: torch.device, generator: torch.Generator) -> nn.Module:
    adapter = AdapterSpec(targets=spec.default_targets)
    block = build_block(spec, adapter).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.uniform_(-_SPREAD, _SPREAD, generator=generator)
            parameter.requires_grad = ".lora_" in name
    return block


def _hidden_shape(spec: ModelSpec) -> tuple[int, ...]:
    """Ask the stem for the shape of its output, without computing it."""
    size_px = spec.input.size_px
    image = torch.empty(1, spec.input.channels, size_px, size_px, device="meta")
    hidden: Tensor = build_stem(spec)(image)
    return tuple(hidden.shape[1:])


def _random(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, device=device, generator=generator, requires_grad=True)


def _time_once(block: nn.Module, hidden: Tensor) -> tuple[float, float]:
    _wait_for(hidden.device)
    started = time.perf_counter()
    output: Tensor = block(hidden)
    _wait_for(hidden.device)
    middle = time.perf_counter()
    output.backward(torch.ones_like(output))  # type: ignore[no-untyped-call]  # unannotated
    _wait_for(hidden.device)
    return middle - started, time.perf_counter() - middle


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
