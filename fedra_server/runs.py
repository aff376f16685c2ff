"""What an operator may choose for a run, and the states a run and its work go through."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedra_edge.protocol.fitting import DepthPolicy, Terms
from fedra_edge.protocol.models import AdapterSpec, PieceGraphs
from fedra_edge.protocol.slices import TrainingSpec

AllocationScheme = Literal["balanced", "independent"]
MergeWeighting = Literal["uniform", "num_examples", "inverse_chance"]


class RunState(StrEnum):
    """created -> running <-> paused -> finished (all rounds done) or stopped (by the operator)."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"
    STOPPED = "stopped"


class AssignmentState(StrEnum):
    """pending -> admitted -> merged, or pending -> refused | failed | expired."""

    PENDING = "pending"
    ADMITTED = "admitted"
    MERGED = "merged"
    REFUSED = "refused"
    FAILED = "failed"
    EXPIRED = "expired"


class RunSpec(BaseModel):
    """Everything that defines a run; the defaults are the paper's where the paper has one.

    ``depth``: ``auto`` gives full depth to whoever it fits and reduced depth to the rest.
    ``allocation``: ``balanced`` draws with guaranteed coverage, ``independent`` draws each row
    uniformly as published. ``merge_weighting``: ``uniform`` as published, ``num_examples``, or
    ``inverse_chance``, the inverse of a participant's chance to hold a layer, capped at
    ``max_inverse_chance``. ``max_layers`` caps the layers that any participant trains. ``graphs``
    compute the pieces on clients without PyTorch, with adapters on this run's targets.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapter: AdapterSpec
    training: TrainingSpec = TrainingSpec()
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 100
    min_participants: Annotated[int, Field(ge=1, le=100_000)] = 2
    deadline_s: Annotated[float, Field(gt=0, le=7 * 86_400)] = 600.0
    depth: DepthPolicy = "auto"
    allocation: AllocationScheme = "balanced"
    merge_weighting: MergeWeighting = "inverse_chance"
    max_inverse_chance: Annotated[float, Field(ge=1, le=1e6)] = 4.0
    max_layers: Annotated[int, Field(ge=1, le=10_000)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    graphs: PieceGraphs | None = None

    @property
    def terms(self) -> Terms:
        """What of this run decides what a machine can do in it."""
        return Terms(
            adapter=self.adapter,
            training=self.training,
            deadline_s=self.deadline_s,
            depth=self.depth,
            max_layers=self.max_layers,
            has_graphs=self.graphs is not None,
        )
