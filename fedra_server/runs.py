"""What an operator may choose for a run, and the states a run and its work go through."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedra_edge.protocol.fitting import DepthPolicy, Terms
from fedra_edge.protocol.models import AdapterSpec, PieceGraphs
from fedra_edge.protocol.slices import TrainingSpec

AllocationScheme = Literal["balanced", "independent"]
MergeWeighting = Literal["uniform", "num_examples", "inverse_chance"]
RunMode = Literal["synchronous", "buffered"]
MergeKind = Literal["mean", "norm-clipped-mean", "trimmed-mean", "coordinate-median"]
ServerOptimizerKind = Literal["fedavg", "fedavgm", "fedadam", "fedyogi"]

_BUFFERED_STALENESS: Final = 20
_ADAPTIVE_RATE: Final = 0.01
_CLIP_FACTOR: Final = 3.0
_ROUNDING: Final = 1e-9
"""Keeps fractions from losing a whole number: 0.29 * 100 is below 29."""


class RunState(StrEnum):
    """created -> running <-> paused -> finished (all rounds done) or stopped (by the operator)."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"
    STOPPED = "stopped"


class AssignmentState(StrEnum):
    """pending -> admitted -> merged, or pending -> refused | failed | expired.

    A delta of which nothing waits and something is quarantined is quarantined; the operator lets
    it be admitted again, or discards it.
    """

    PENDING = "pending"
    ADMITTED = "admitted"
    MERGED = "merged"
    QUARANTINED = "quarantined"
    DISCARDED = "discarded"
    REFUSED = "refused"
    FAILED = "failed"
    EXPIRED = "expired"


class ServerOptimizerSpec(BaseModel):
    """How a merged mean of deltas moves a piece (arXiv 2003.00295, Algorithm 2).

    ``fedavg`` adds it, ``fedavgm`` with momentum; ``fedadam`` and ``fedyogi`` divide by the root
    of a running variance plus ``tau``. ``momentum`` is their beta 1. ``learning_rate`` None is
    1 for the first two and 0.01 for the others, whose steps do not shrink with the deltas.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ServerOptimizerKind = "fedavg"
    learning_rate: Annotated[float, Field(gt=0, le=1000)] | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(ge=1e-8, le=1)] = 1e-3

    @property
    def is_adaptive(self) -> bool:
        """Tell whether steps are divided by a running variance."""
        return self.kind in {"fedadam", "fedyogi"}

    @property
    def rate(self) -> float:
        """The learning rate that holds."""
        if self.learning_rate is not None:
            return self.learning_rate
        return _ADAPTIVE_RATE if self.is_adaptive else 1.0


class ScreeningSpec(BaseModel):
    """How each piece of a delta is held against the other holders of the piece.

    One longer than ``clip_factor`` times their median norm is scaled down to that; None is 1 with
    a norm-clipped mean and 3 otherwise. One longer than ``quarantine_factor`` times the median is
    quarantined, and so is a delta that points away from the others by more than ``cosine_floor``
    (``screening.py`` has the rule). A claim of more than ``examples_factor`` times the
    median of examples weighs no more than that.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = True
    clip_factor: Annotated[float, Field(ge=0.01, le=1000)] | None = None
    quarantine_factor: Annotated[float, Field(ge=1, le=1e6)] = 8.0
    cosine_floor: Annotated[float, Field(ge=-1, lt=0)] = -0.25
    examples_factor: Annotated[float, Field(ge=1, le=1e6)] = 10.0


class RunSpec(BaseModel):
    """Everything that defines a run; the defaults are the paper's where the paper has one.

    ``depth``: ``auto`` gives full depth to whoever it fits and reduced depth to the rest.
    ``allocation``: ``balanced`` draws with guaranteed coverage, ``independent`` draws each row
    uniformly as published. ``merge_weighting``: ``uniform`` as published, ``num_examples``, or
    ``inverse_chance``, the inverse of a participant's chance to hold a layer, capped at
    ``max_inverse_chance``. ``max_layers`` caps the layers that any participant trains. ``graphs``
    compute the pieces on clients without PyTorch, with adapters on this run's targets.

    ``mode``: ``synchronous`` merges a round's deltas together; ``buffered`` waits for nobody: a
    piece merges when deltas of ``buffer_size`` different clients wait for it or the oldest has
    waited ``deadline_s``.
    A delta weighs ``(1 + staleness) ** -staleness_exponent`` as much (FedBuff, arXiv 2106.06639)
    and is refused beyond ``max_staleness``; None is 0 when synchronous and 20 when buffered.
    ``cohort_size`` None draws all that are there; else ``over_provisioning`` is the fraction
    drawn beyond it, and a round merges as soon as ``cohort_size`` deltas are admitted.

    ``merge`` combines the deltas of a piece; all but ``mean`` need enough holders to bear
    ``tolerated_attackers`` among them, of which a piece with fewer stays as it is.
    ``trim_fraction`` of the values is cut off at either end by a trimmed mean.
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
    mode: RunMode = "synchronous"
    buffer_size: Annotated[int, Field(ge=1, le=100_000)] = 2
    max_staleness: Annotated[int, Field(ge=0, le=100_000)] | None = None
    staleness_exponent: Annotated[float, Field(ge=0, le=10)] = 0.5
    cohort_size: Annotated[int, Field(ge=1, le=100_000)] | None = None
    over_provisioning: Annotated[float, Field(ge=0, le=10)] = 0.0
    server_optimizer: ServerOptimizerSpec = ServerOptimizerSpec()
    merge: MergeKind = "mean"
    trim_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    tolerated_attackers: Annotated[int, Field(ge=1, le=10_000)] = 1
    screening: ScreeningSpec = ScreeningSpec()

    @model_validator(mode="after")
    def _numbers_of_participants_agree(self) -> Self:
        if self.cohort_size is not None and self.cohort_size < self.min_participants:
            raise ValueError("--cohort-size must not be below --min-participants")
        if self.cohort_size is None and self.over_provisioning:
            raise ValueError("--over-provisioning needs --cohort-size")
        return self

    @model_validator(mode="after")
    def _there_can_be_enough_holders(self) -> Self:
        needed, merge = self.holders_needed, f"--merge {self.merge}"
        attackers = "1 attacker"
        if self.tolerated_attackers > 1:
            attackers = f"{self.tolerated_attackers} attackers"
        bears = f"to bear {attackers} a layer needs {needed} holders"
        if needed > self.min_participants:
            raise ValueError(f"{merge}: {bears}; give --min-participants {needed} or more")
        if self.mode == "buffered" and needed > self.buffer_size:
            raise ValueError(f"{merge}: {bears}; give --buffer-size {needed} or more")
        if needed > 1 and self.allocation == "independent":
            raise ValueError(f"{merge}: {bears}, which only --allocation balanced sees to")
        return self

    @property
    def holders_needed(self) -> int:
        """How many clients must hold a piece for it to be merged.

        A median of 2a + 1 values lies between honest ones whatever a of them are, and so does a
        mean of what is left of n when a values are cut off at either end (arXiv 1803.01498).
        """
        attackers = self.tolerated_attackers
        match self.merge:
            case "mean":
                return 1
            case "norm-clipped-mean" | "coordinate-median":
                return 2 * attackers + 1
            case "trimmed-mean":
                enough = math.ceil(attackers / self.trim_fraction - _ROUNDING)
                return max(2 * attackers + 1, enough)

    def trimmed(self, holders: int) -> int:
        """How many values of so many holders a trimmed mean cuts off at either end."""
        return min(math.floor(self.trim_fraction * holders + _ROUNDING), (holders - 1) // 2)

    @property
    def clip_factor(self) -> float | None:
        """How many times the median norm a delta may be long; None for any length."""
        if self.merge == "norm-clipped-mean":
            return self.screening.clip_factor or 1.0
        if not self.screening.enabled:
            return None
        return self.screening.clip_factor or _CLIP_FACTOR

    @property
    def staleness_limit(self) -> int:
        """The greatest staleness of a piece with which a delta is still taken."""
        if self.max_staleness is not None:
            return self.max_staleness
        return _BUFFERED_STALENESS if self.mode == "buffered" else 0

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
