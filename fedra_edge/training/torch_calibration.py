"""Measures what one block of a model takes on this machine: time and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from fedra_edge.errors import MemoryShortError
from fedra_edge.memory_meter import measured_peak, resident_bytes
from fedra_edge.protocol.devices import BlockMemory
from fedra_edge.protocol.models import AdapterSpec, ModelSpec, TokenInput
from fedra_edge.training.allocator import trim_heap
from fedra_edge.training.torch_blocks import allocate, build_block, build_stem
from fedra_edge.training.torch_pulling import pull
from fedra_edge.training.torch_training import is_memory_shortage
from fedra_edge.training.torch_vit import VitBlock, VitHead, VitSettings, VitStem
from fedra_edge.training.trainer import BlockCost, UsableMemory

_BUDGET_S: Final = 0.8
_MAX_REPEATS: Final = 5
_MAX_EXAMPLES: Final = 16
_PROBE_BYTES: Final = 64 * 2**20
"""About what a measurement takes at most beside the weights of a block."""

_SPREAD: Final = 0.02
_MEGABYTE: Final = 10**6


def measure_block(spec: ModelSpec, usable_memory: UsableMemory, device: torch.device) -> BlockCost:
    """Measure time and memory of a block with random weights.

    Times are medians of a few runs, per example. The number of examples at once adapts to the
    machine, so that the whole takes a second or two and little memory.

    Raises:
        MemoryShortError: Memory does not even suffice for one example.
    """
    usable_bytes = usable_memory()
    need_bytes = resident_bytes() + spec.layers[0].cost.parameter_bytes
    if need_bytes > usable_bytes:
        raise _too_little_memory(
            f"needs {need_bytes / _MEGABYTE:.0f} MB, "
            f"this process may use {usable_bytes / _MEGABYTE:.0f} MB"
        )
    probe = _BlockProbe(spec, min(usable_bytes - need_bytes, _PROBE_BYTES), device)
    (forward_s, backward_s), memory = probe.measure()
    del probe
    trim_heap()
    return BlockCost(
        forward_s=forward_s,
        backward_s=backward_s,
        memory=memory.model_copy(update={"idle_bytes": resident_bytes()}),
    )


class _BlockProbe:
    """A block with random weights and what it needs to be run."""

    def __init__(self, spec: ModelSpec, free_bytes: int, device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)
        self._block = allocate(build_block(spec, AdapterSpec(targets=spec.default_targets)), device)
        with torch.no_grad():
            for parameter in self._block.parameters():
                parameter.uniform_(-_SPREAD, _SPREAD, generator=self._generator)
        self._shape = _hidden_shape(spec, device)
        kept_bytes = max(1, spec.layers[0].cost.activation_bytes)
        self._most_examples = max(1, min(_MAX_EXAMPLES, free_bytes // (2 * kept_bytes)))

    def measure(self) -> tuple[tuple[float, float], BlockMemory]:
        """Give times and memory, from fewer examples when memory runs out."""
        while True:
            try:
                return self.times(), self.memory()
            except (MemoryError, RuntimeError) as error:
                if not is_memory_shortage(error):
                    raise
                if self._most_examples == 1:
                    raise _too_little_memory("failed for want of memory") from error
            self._most_examples //= 2

    def times(self) -> tuple[float, float]:
        """Give seconds per example, forward and backward."""
        self._train_adapters(are_trained=True)
        started = time.perf_counter()
        self._time_once(1)  # warms caches and thread pools
        single_s = max(1e-6, sum(self._time_once(1)))
        affordable = int(_BUDGET_S / _MAX_REPEATS / single_s)
        examples = max(1, min(self._most_examples, affordable))
        timings = [self._time_once(examples)]
        while len(timings) < _MAX_REPEATS and time.perf_counter() - started < _BUDGET_S:
            timings.append(self._time_once(examples))
        return (
            statistics.median(forward for forward, _ in timings) / examples,
            statistics.median(backward for _, backward in timings) / examples,
        )

    def memory(self) -> BlockMemory:
        """Give what running the block takes, from a run with one example and one with more."""
        most = self._most_examples
        self._train_adapters(are_trained=True)
        single, several = self._working_bytes(1), self._working_bytes(most)
        working = (several - single) // (most - 1) if most > 1 else single
        kept = self._kept_bytes(most)
        self._train_adapters(are_trained=False)
        return BlockMemory(
            idle_bytes=0,
            fixed_bytes=max(0, single - working),
            working_bytes=max(0, working),
            kept_bytes=kept // most,
            kept_frozen_bytes=self._kept_bytes(most) // most,
        )

    def _train_adapters(self, *, are_trained: bool) -> None:
        for name, parameter in self._block.named_parameters():
            parameter.requires_grad = are_trained and ".lora_" in name

    def _working_bytes(self, examples: int) -> int:
        hidden, gradient = self._random(examples), self._random(examples).detach()
        return _growth(lambda: pull((self._run(hidden),), (gradient,)))

    def _kept_bytes(self, examples: int) -> int:
        """Weigh what is alive between forward and backward, the output not counted."""
        hidden = self._random(examples)
        trim_heap()
        before = resident_bytes()
        output = self._run(hidden)
        return max(0, resident_bytes() - before - output.nbytes)

    def _time_once(self, examples: int) -> tuple[float, float]:
        hidden, gradient = self._random(examples), self._random(examples).detach()
        _wait_for(self._device)
        started = time.perf_counter()
        output = self._run(hidden)
        _wait_for(self._device)
        middle = time.perf_counter()
        pull((output,), (gradient,))
        _wait_for(self._device)
        return middle - started, time.perf_counter() - middle

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


def _too_little_memory(problem: str) -> MemoryShortError:
    return MemoryShortError(
        f"measuring one block of the model {problem}",
        remedy="Free memory on this machine, or raise the limit it runs under.",
    )


def _growth(work: Callable[[], object]) -> int:
    """Give by how much the process grows at the highest while something runs, warmed up."""
    work()
    trim_heap()
    before = resident_bytes()
    with measured_peak() as meter:
        work()
    return max(0, meter.peak_bytes - before)


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
