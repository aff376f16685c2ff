"""What a client says of its machine, so that the server can give it work that fits."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field

from fedra_edge.protocol.wire import ByteCount, Count, HexDigest, Seconds, ShortText, WireModel

_SHORTEST_S: Final = 1e-9


def _check_measurable(seconds: float) -> float:
    """Refuse times that no clock can have measured; a ratio of two would have no bounds."""
    if 0 < seconds < _SHORTEST_S:
        raise ValueError(f"a measured time is 0 or at least {_SHORTEST_S} seconds")
    return seconds


BlockTime = Annotated[Seconds, AfterValidator(_check_measurable)]
Backend = Literal["torch", "onnx"]


class Accelerator(WireModel):
    """A GPU the process may use."""

    name: ShortText
    memory_bytes: ByteCount
    free_bytes: ByteCount


class DeviceProfile(WireModel):
    """What this process may really use, after container limits, affinity and the site's own caps.

    ``memory_bytes`` is the most the whole process may occupy; ``baseline_bytes`` is what it
    occupies with its training runtime loaded and nothing else. ``max_layers`` is the site's own
    cap on layers trained in a round.
    """

    platform: ShortText
    python: ShortText
    backend: Backend
    cpu_count: Annotated[float, Field(gt=0, le=4096)]
    memory_bytes: ByteCount
    baseline_bytes: ByteCount
    disk_free_bytes: ByteCount
    accelerators: Annotated[tuple[Accelerator, ...], Field(max_length=256)] = ()
    max_layers: Annotated[int, Field(ge=1, le=10_000)] | None = None


class BlockMemory(WireModel):
    """Measured memory of one block of a model with adapters on this machine.

    ``idle_bytes`` is what the whole process occupies after the measurement with nothing at work.
    The rest is what comes on top of weights and of what enters the block: ``fixed_bytes`` once,
    ``working_bytes`` per example of a forward and a backward pass, of which autograd keeps
    ``kept_bytes`` in between, and ``kept_frozen_bytes`` where the adapters are not trained.
    """

    idle_bytes: ByteCount
    fixed_bytes: ByteCount
    working_bytes: ByteCount
    kept_bytes: ByteCount
    kept_frozen_bytes: ByteCount


class Calibration(WireModel):
    """Measured cost of one block of a model on this machine, and the local data for it.

    Times are per example and per layer. ``train_examples`` and ``held_out_examples`` count the
    usable local examples after label matching; nothing else of the data is told.
    """

    model_id: HexDigest
    forward_s: BlockTime
    backward_s: BlockTime
    memory: BlockMemory
    train_examples: Annotated[int, Field(ge=1, lt=2**31)]
    held_out_examples: Count
