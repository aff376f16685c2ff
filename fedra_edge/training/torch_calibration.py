"""Measures how long one block of a model takes on this machine, forward and backward."""

from __future__ import annotations

import statistics
import time
from typing import Final

import torch
from torch import Tensor, nn

from fedra_edge.protocol.models import AdapterSpec, ModelSpec
from fedra_edge.training.torch_blocks import allocate, build_block, build_stem
from fedra_edge.training.torch_vit import VitBlock, VitHead, VitSettings, VitStem
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
    shape = _hidden_shape(spec, device)
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


def warm_up(device: torch.device) -> None:
    """Make PyTorch load what it loads at first use, so that a measured idle process has it."""
    settings = VitSettings(
        hidden_size=16, num_attention_heads=2, intermediate_size=16, image_size=4, patch_size=2,
        num_channels=3,
    )  # fmt: skip
    with torch.device("meta"):  # without drawing random numbers
        pieces = nn.Sequential(VitStem(settings), VitBlock(settings), VitHead(settings, 2))
    for parameter in allocate(pieces, device).parameters():
        nn.init.zeros_(parameter)
    images = torch.zeros(2, 3, 4, 4, device=device)
    loss = nn.functional.cross_entropy(
        pieces(images), torch.zeros(2, dtype=torch.long, device=device)
    )
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    nn.utils.clip_grad_norm_(pieces.parameters(), 1.0)


def _random_block(spec: ModelSpec, device: torch.device, generator: torch.Generator) -> nn.Module:
    adapter = AdapterSpec(targets=spec.default_targets)
    block = allocate(build_block(spec, adapter), device)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.uniform_(-_SPREAD, _SPREAD, generator=generator)
            parameter.requires_grad = ".lora_" in name
    return block


@torch.no_grad()
def _hidden_shape(spec: ModelSpec, device: torch.device) -> tuple[int, ...]:
    """Ask an unfilled stem for the shape of its output for one example."""
    size_px = spec.input.size_px
    image = torch.zeros(1, spec.input.channels, size_px, size_px, device=device)
    hidden: Tensor = allocate(build_stem(spec), device)(image)
    return tuple(hidden.shape[1:])


def _random(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, device=device, generator=generator, requires_grad=True)


def _time_once(block: nn.Module, hidden: Tensor) -> tuple[float, float]:
    _wait_for(hidden.device)
    started = time.perf_counter()
    output: Tensor = block(hidden)
    _wait_for(hidden.device)
    middle = time.perf_counter()
    output.sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    _wait_for(hidden.device)
    return middle - started, time.perf_counter() - middle


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
