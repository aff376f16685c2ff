"""The records themselves: frozen values, one class per table."""

from __future__ import annotations

from dataclasses import dataclass

from fedra_edge.protocol.deltas import DeltaManifest
from fedra_edge.protocol.devices import DeviceProfile
from fedra_edge.protocol.ids import AssignmentId, ClientId, LayerId, ModelId, RunId, UploadId
from fedra_edge.protocol.layers import HEAD, layer_piece
from fedra_edge.protocol.models import BlobRef, ModelSpec
from fedra_edge.protocol.rounds import Evaluation
from fedra_edge.protocol.slices import RevisionManifest, SliceManifest
from fedra_server.runs import AssignmentState, RunSpec, RunState
from fedra_server.screening import Outcome, Verdict


@dataclass(frozen=True)
class ClientRecord:
    """A member of the population; times are seconds since the epoch by the server's clock."""

    client_id: ClientId
    name: str
    run: str | None
    profile: DeviceProfile
    enrolled_at: float
    last_seen_at: float
    is_online: bool
    has_left: bool

    def is_there(self, seen_since: float) -> bool:
        """Tell whether it is a member, said it is online, and has shown so since a moment."""
        return self.is_online and not self.has_left and self.last_seen_at >= seen_since


@dataclass(frozen=True)
class TokenRecord:
    """A join token without its secret; ``client_id`` is the one client that it enrols again."""

    token_id: str
    label: str
    client_id: ClientId | None
    created_at: float
    expires_at: float
    uses_allowed: int
    uses_left: int
    revoked_at: float | None = None

    def why_unusable(self, now: float) -> str:
        """Say in a word or two why it admits nobody; nothing when it does."""
        if self.revoked_at is not None:
            return "revoked"
        if self.uses_left == 0:
            return "used up"
        return "expired" if self.expires_at <= now else ""


@dataclass(frozen=True)
class ModelRecord:
    """A registered model."""

    model_id: ModelId
    spec: ModelSpec
    added_at: float


@dataclass(frozen=True)
class RunRecord:
    """A run and where it stands.

    Revisions up to ``pruned_through`` cannot be recomputed any more: deltas that were merged into
    these only, and blobs that only earlier ones name, may have been removed to free space.
    """

    run: RunId
    model_id: ModelId
    spec: RunSpec
    state: RunState
    created_at: float
    pruned_through: int = 0


@dataclass(frozen=True)
class RevisionRecord:
    """A published adapter state; ``last_trained`` has the last round of each layer, 0 for none.

    ``versions`` counts the merges of each layer and, last, of the head; ``moments`` has the
    server optimizer's state of each, None as long as it has none.
    """

    run: RunId
    manifest: RevisionManifest
    last_trained: tuple[int, ...]
    published_at: float
    versions: tuple[int, ...]
    moments: tuple[BlobRef | None, ...]

    @property
    def pieces(self) -> tuple[str, ...]:
        """The pieces in the order of ``versions`` and ``moments``: layers, then the head."""
        layers = range(len(self.manifest.layers))
        return (*(layer_piece(LayerId(layer_id)) for layer_id in layers), HEAD)

    @property
    def version_by_piece(self) -> dict[str, int]:
        """How often each piece was merged so far."""
        return dict(zip(self.pieces, self.versions, strict=True))

    @property
    def blobs(self) -> tuple[BlobRef, ...]:
        """The blobs of the pieces, in the same order."""
        return (*self.manifest.layers, self.manifest.head)


@dataclass(frozen=True, slots=True)
class MergeRecord:
    """A piece of a delta was merged into a revision; ``weight`` has the staleness in it.

    ``scale`` is what the piece was multiplied by, below 1 when it was clipped.
    """

    assignment_id: AssignmentId
    piece: str
    run: RunId
    revision: int
    weight: float
    staleness: int
    scale: float = 1.0


@dataclass(frozen=True)
class ScreeningRecord:
    """What was measured and decided of a piece of a delta when it was to be merged.

    Rows of one run and ``judgement`` were judged together, before ``revision`` was published;
    norm and cosine are None where nothing was measured.
    """

    assignment_id: AssignmentId
    piece: str
    run: RunId
    revision: int
    judgement: int
    norm: float | None
    cosine: float | None
    scale: float
    verdict: Verdict
    reason: str
    outcome: Outcome | None
    judged_at: float

    @property
    def is_held(self) -> bool:
        """Tell whether it is quarantined and nobody has decided on it."""
        return self.verdict is Verdict.QUARANTINED and self.outcome is None

    @property
    def may_merge(self) -> bool:
        """Tell whether it was judged and may be merged."""
        if self.verdict is Verdict.QUARANTINED:
            return self.outcome is Outcome.RELEASED
        return self.outcome is None


@dataclass(frozen=True)
class RoundRecord:
    """A round; ``draws`` counts the allocation matrices drawn for it, ``published_at`` ends it."""

    run: RunId
    number: int
    base_revision: int
    draws: int
    opened_at: float
    deadline_at: float
    published_at: float | None


@dataclass(frozen=True)
class AssignmentRecord:
    """One participant's work in a round; ``chance`` is its probability to hold any one layer."""

    assignment_id: AssignmentId
    run: RunId
    round_number: int
    client_id: ClientId
    manifest: SliceManifest
    chance: float
    reason: str
    state: AssignmentState
    detail: str
    delta: DeltaManifest | None
    issued_at: float
    settled_at: float | None


@dataclass(frozen=True)
class UploadRecord:
    """A delta on its way; its bytes so far are a file named by the upload."""

    upload_id: UploadId
    assignment_id: AssignmentId
    client_id: ClientId
    delta: DeltaManifest
    created_at: float


@dataclass(frozen=True)
class EvaluationRecord:
    """One client's counts on one revision."""

    client_id: ClientId
    evaluation: Evaluation
