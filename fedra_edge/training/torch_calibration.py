"""A block of a model on PyTorch with random weights, to be measured."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedra_edge.memory_meter import resident_bytes
from fedra_edge.protocol.models import AdapterSpec, ModelSpec, TokenInput
from fedra_edge.protocol.vit import VitSettings
from fedra_edge.training.allocator import trim_heap
from fedra_edge.training.calibrating import SPREAD
from fedra_edge.training.torch_blocks import allocate, build_block, build_stem
from fedra_edge.training.torch_pulling import pull
from fedra_edge.training.torch_vit import VitBlock, VitHead, VitStem


class TorchBlockProbe:
    """Implements ``BlockProbe``."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)
        self._block = allocate(build_block(spec, AdapterSpec(targets=spec.default_targets)), device)
        with torch.no_grad():
            for parameter in self._block.parameters():
                parameter.uniform_(-SPREAD, SPREAD, generator=self._generator)
        self._shape = _hidden_shape(spec, device)
        self._train_adapters(are_trained=True)

    def time_once(self, examples: int) -> tuple[float, float]:
        """Give the seconds of a forward and of a backward pass."""
        hidden, gradient = self._random(examples), self._random(examples).detach()
        _wait_for(self._device)
        started = time.perf_counter()
        output = self._run(hidden)
        _wait_for(self._device)
        middle = time.perf_counter()
        pull((output,), (gradient,))
        _wait_for(self._device)
        return middle - started, time.perf_counter() - middle

    def prepare(self, examples: int) -> Callable[[], object]:
        """Draw what enters and the gradient, and give what runs forward and backward on it."""
        hidden, gradient = self._random(examples), self._random(examples).detach()
        return lambda: pull((self._run(hidden),), (gradient,))

    def kept_bytes(self, examples: int, *, are_trained: bool) -> int:
        """Weigh what is alive between forward and backward, the output not counted."""
        self._train_adapters(are_trained=are_trained)
        try:
            hidden = self._random(examples)
            trim_heap()
            before = resident_bytes()
            output = self._run(hidden)
            return max(0, resident_bytes() - before - output.nbytes)
        finally:
            self._train_adapters(are_trained=True)

    def _train_adapters(self, *, are_trained: bool) -> None:
        for name, parameter in self._block.named_parameters():
            parameter.requires_grad = are_trained and ".lora_" in name

    def _run(self, hidden: Tensor) -> Tensor:
        output: Tensor = self._block(hidden)
        return output

    def _random(self, examples: int) -> Tensor:
        return torch.randn(
            (examples, *self._shape),
            device=self._device,
            generator=self._generator,
            requires_grad=True,
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
        parameter.requires_grad = True
    images = torch.zeros(2, 3, 4, 4, device=device)
    loss = nn.functional.cross_entropy(
        pieces(images), torch.zeros(2, dtype=torch.long, device=device)
    )
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    nn.utils.clip_grad_norm_(pieces.parameters(), 1.0)


@torch.no_grad()
def _hidden_shape(spec: ModelSpec, device: torch.device) -> tuple[int, ...]:
    """Ask an unfilled stem for the shape of its output for one example, the largest there is."""
    wanted = spec.input
    if isinstance(wanted, TokenInput):
        example = torch.zeros(1, wanted.max_tokens, dtype=torch.int64, device=device)
    else:
        example = torch.zeros(1, wanted.channels, wanted.size_px, wanted.size_px, device=device)
    hidden: Tensor = allocate(build_stem(spec), device)(example)
    return tuple(hidden.shape[1:])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
