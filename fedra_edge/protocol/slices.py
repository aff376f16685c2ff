"""One row of the allocation matrix made downloadable: what to hold, what to train, and how."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedra_edge.protocol.ids import AssignmentId, LayerId, RevisionNumber, RoundNumber
from fedra_edge.protocol.models import MAX_LAYERS, AdapterSpec, BlobRef, PieceGraphs
from fedra_edge.protocol.wire import (
    ByteCount,
    HexDigest,
    Seconds,
    ShortText,
    Token,
    WireModel,
)

Depth = Literal["reduced", "full"]
Residency = Literal["resident", "streamed"]
Role = Literal["train", "frozen"]


class TrainingSpec(WireModel):
    """How a participant trains; the defaults are those of the FedRA reference code."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-5
    clip_norm: Annotated[float, Field(gt=0, le=1e6)] = 10.0
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 128
    local_epochs: Annotated[int, Field(ge=1, le=1000)] = 1
    max_steps: Annotated[int, Field(ge=1, le=10**6)] | None = None


class RevisionManifest(WireModel):
    """One published adapter state: a blob per layer and one for the head.

    ``versions`` counts how often each layer and, last, the head has been merged so far.
    """

    number: Annotated[RevisionNumber, Field(ge=0, lt=2**31)]
    layers: Annotated[tuple[BlobRef, ...], Field(min_length=1, max_length=MAX_LAYERS)]
    head: BlobRef
    versions: (
        Annotated[
            tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(max_length=MAX_LAYERS + 1)
        ]
        | None
    ) = None


class LayerRole(WireModel):
    """A layer of the slice: trained, or passed through with its current adapters frozen."""

    layer_id: Annotated[LayerId, Field(ge=0, lt=MAX_LAYERS)]
    role: Role


class SliceManifest(WireModel):
    """Everything a participant needs to know of its work in a round.

    ``depth`` is ``reduced`` when layers not listed are skipped (FedRA as published) and
    ``full`` when every layer is listed. ``residency`` says whether the slice's weights stay in
    memory or pass through it block by block. ``steps`` is how many optimizer steps to take,
    ``micro_batch`` how many examples go through a block at once; a streamed slice takes up to
    ``walk_batch`` examples through a block before it loads the next. ``remaining_s`` is how
    long the round stays open, counted from the moment the server answered, so that wrong
    clocks do not matter. ``predicted_peak_bytes`` is the memory promise. ``graphs`` compute the
    pieces on ONNX Runtime, with adapters on the targets of ``adapter``.
    """

    assignment_id: Token
    run: ShortText
    round_number: Annotated[RoundNumber, Field(ge=1, lt=2**31)]
    model_id: HexDigest
    revision: RevisionManifest
    adapter: AdapterSpec
    training: TrainingSpec
    layers: Annotated[tuple[LayerRole, ...], Field(min_length=1, max_length=MAX_LAYERS)]
    depth: Depth
    residency: Residency
    micro_batch: Annotated[int, Field(ge=1, le=65_536)]
    walk_batch: Annotated[int, Field(ge=1, le=65_536)] = 1
    steps: Annotated[int, Field(ge=1, le=10**6)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    remaining_s: Seconds
    predicted_peak_bytes: ByteCount
    graphs: PieceGraphs | None = None

    @model_validator(mode="after")
    def _layers_ascend_and_one_is_trained(self) -> Self:
        layer_ids = [layer.layer_id for layer in self.layers]
        if layer_ids != sorted(set(layer_ids)):
            raise ValueError("layers of a slice must ascend without repeats")
        if not self.trained_layer_ids:
            raise ValueError("a slice trains at least one layer")
        return self

    @property
    def id(self) -> AssignmentId:
        """The assignment this slice belongs to."""
        return AssignmentId(self.assignment_id)

    @property
    def layer_ids(self) -> tuple[LayerId, ...]:
        """All layers of the slice, ascending."""
        return tuple(layer.layer_id for layer in self.layers)

    @property
    def trained_layer_ids(self) -> tuple[LayerId, ...]:
        """The layers whose adapters are trained, ascending."""
        return tuple(layer.layer_id for layer in self.layers if layer.role == "train")
