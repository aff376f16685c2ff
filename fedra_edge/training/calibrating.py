"""Measures what one block of a model takes on this machine, time and memory, on any framework."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol

from fedra_edge.errors import MORE_MEMORY, MemoryShortError
from fedra_edge.memory_meter import measured_peak, resident_bytes
from fedra_edge.protocol.devices import BlockMemory
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.training.allocator import trim_heap
from fedra_edge.training.memory_shortage import is_memory_shortage
from fedra_edge.training.trainer import BlockCost, UsableMemory

_BUDGET_S: Final = 0.8
_MIN_REPEATS: Final = 3
_MAX_REPEATS: Final = 5
_MAX_EXAMPLES: Final = 16
_PROBE_BYTES: Final = 64 * 2**20
"""About what a measurement takes at most beside the weights of a block."""

SPREAD: Final = 0.02
"""How far random weights lie from zero."""

_MEGABYTE: Final = 10**6


class BlockProbe(Protocol):
    """A block with random weights that can be run on random activations."""

    def time_once(self, examples: int) -> tuple[float, float]:
        """Give the seconds of a forward and of a backward pass."""
        ...

    def prepare(self, examples: int) -> Callable[[], object]:
        """Draw what enters and the gradient, and give what runs forward and backward on it."""
        ...

    def kept_bytes(self, examples: int, *, are_trained: bool) -> int:
        """Weigh what is alive between forward and backward, the output not counted."""
        ...


def measure_block(
    spec: ModelSpec, usable_memory: UsableMemory, build_probe: Callable[[], BlockProbe]
) -> BlockCost:
    """Measure time and memory of a block with random weights.

    Times are those of the shortest of a few runs, per example. The number of examples at once
    adapts to the machine, so that the whole takes a second or two and little memory.

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
    free_bytes = min(usable_bytes - need_bytes, _PROBE_BYTES)
    kept_bytes = max(1, spec.layers[0].cost.activation_bytes)
    most_examples = max(1, min(_MAX_EXAMPLES, free_bytes // (2 * kept_bytes)))
    (forward_s, backward_s), memory = _measure(build_probe(), most_examples)
    trim_heap()
    return BlockCost(
        forward_s=forward_s,
        backward_s=backward_s,
        memory=memory.model_copy(update={"idle_bytes": resident_bytes()}),
    )


def _measure(probe: BlockProbe, most_examples: int) -> tuple[tuple[float, float], BlockMemory]:
    """Give times and memory, from fewer examples when memory runs out."""
    while True:
        try:
            return _times(probe, most_examples), _memory(probe, most_examples)
        except (MemoryError, RuntimeError) as error:
            if not is_memory_shortage(error):
                raise
            if most_examples == 1:
                raise _too_little_memory("failed for want of memory") from error
        most_examples //= 2


def _times(probe: BlockProbe, most_examples: int) -> tuple[float, float]:
    """Give seconds per example, forward and backward.

    The shortest of some runs each: whatever else the machine does only ever adds to a time.
    """
    started = time.perf_counter()
    probe.time_once(1)  # warms caches and thread pools
    single_s = max(1e-6, sum(probe.time_once(1)))
    affordable = int(_BUDGET_S / _MAX_REPEATS / single_s)
    examples = max(1, min(most_examples, affordable))
    timings = [probe.time_once(examples)]
    while len(timings) < _MIN_REPEATS or (
        len(timings) < _MAX_REPEATS and time.perf_counter() - started < _BUDGET_S
    ):
        timings.append(probe.time_once(examples))
    return (
        min(forward for forward, _ in timings) / examples,
        min(backward for _, backward in timings) / examples,
    )


def _memory(probe: BlockProbe, most_examples: int) -> BlockMemory:
    """Give what running the block takes, from a run with one example and one with more."""
    single, several = _growth(probe.prepare(1)), _growth(probe.prepare(most_examples))
    working = (several - single) // (most_examples - 1) if most_examples > 1 else single
    kept = probe.kept_bytes(most_examples, are_trained=True)
    return BlockMemory(
        idle_bytes=0,
        fixed_bytes=max(0, single - working),
        working_bytes=max(0, working),
        kept_bytes=kept // most_examples,
        kept_frozen_bytes=probe.kept_bytes(most_examples, are_trained=False) // most_examples,
    )


def _growth(work: Callable[[], object]) -> int:
    """Give by how much the process grows at the highest while something runs, warmed up."""
    work()
    trim_heap()
    before = resident_bytes()
    with measured_peak() as meter:
        work()
    return max(0, meter.peak_bytes - before)


def _too_little_memory(problem: str) -> MemoryShortError:
    return MemoryShortError(
        f"measuring one block of the model {problem}",
        remedy=MORE_MEMORY,
    )
