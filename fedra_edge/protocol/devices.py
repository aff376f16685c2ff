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


class Calibration(WireModel):
    """Measured cost of one block of a model on this machine, and the local data for it.

    Times are per example and per layer. ``train_examples`` and ``held_out_examples`` count the
    usable local examples after label matching; nothing else of the data is told.
    """

    model_id: HexDigest
    forward_s: BlockTime
    backward_s: BlockTime
    train_examples: Annotated[int, Field(ge=1, lt=2**31)]
    held_out_examples: Count
