"""What a client says of an adapter delta before it sends the bytes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedra_edge.protocol.ids import AssignmentId
from fedra_edge.protocol.slices import Residency
from fedra_edge.protocol.wire import (
    ByteCount,
    Count,
    Detail,
    Finite,
    HexDigest,
    Seconds,
    Token,
    WireModel,
)


class TrainingReport(WireModel):
    """What local training did and what it took; losses are means per example of a step.

    ``peak_memory_bytes`` is the most that the whole process occupied while it worked on the
    assignment. ``step_downs`` says, in words, where a plan had to shrink on the way; the other
    fields of the plan are those that training ended with.
    """

    steps: Count
    first_loss: Finite
    last_loss: Finite
    train_s: Seconds
    peak_memory_bytes: ByteCount
    predicted_peak_bytes: ByteCount
    residency: Residency
    micro_batch: Annotated[int, Field(ge=1, le=65_536)]
    step_downs: Annotated[tuple[Detail, ...], Field(max_length=100)] = ()
    bytes_received: ByteCount
    bytes_sent: ByteCount


class DeltaManifest(WireModel):
    """Announces a delta: the safetensors file that follows, by digest and size."""

    assignment_id: Token
    sha256: HexDigest
    size_bytes: Annotated[int, Field(ge=1, le=2**40)]
    num_examples: Annotated[int, Field(ge=1, le=2**31)]
    report: TrainingReport

    @property
    def id(self) -> AssignmentId:
        """The assignment this delta answers."""
        return AssignmentId(self.assignment_id)
