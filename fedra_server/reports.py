"""What is reported of a run, field by field.

``RunReport.model_dump_json()`` is stable: fields may be added, none is renamed or removed.
Bytes are bytes, times ``*_s`` are seconds, times ``*_at`` are seconds since the epoch, layers
are global ids and ``coverage[i]`` belongs to layer i. In full:

    run, state, model, spec, num_layers, rounds_planned, rounds_published, revision
    round: null or {number, base_revision, draws, opened_at, deadline_at, participants: [
        {client_id, name, round_number, state, trained_layer_ids, depth, residency, micro_batch,
         steps, predicted_peak_bytes, reason, detail}]}; of a stopped run the round that it ended
        with, which is never published; participants of earlier rounds are those whose work or
        delta still counts
    buffer: [{piece, deltas, oldest_at}], the admitted deltas that wait for each piece's merge
    resting: [{client_id, name, failures, until_at, reason}], who failed so many times in a row
        that it gets no work until then, and how it failed last
    waiting: [{name, reason}], while the run is running: who is online and has no part in the
        open round, or in none because none is open; reason is "ready", or why it cannot take
        part: "not calibrated yet", "at work for another run", or what its machine lacks
    coverage: [how often each layer was trained, over all published rounds]
    rounds: [{number, published_at, coverage, participants, merged, num_examples, mean_loss,
        mean_staleness, max_staleness}], staleness being that of all pieces of deltas it merged
    accuracy: [{revision, pooled, sites: {client_id: ...}}] with, for pooled and each site,
        {num_examples, num_correct, accuracy, mean_loss}
    clients: [{client_id, name, has_left, rounds_merged, layers_trained, num_examples,
        bytes_received, bytes_sent, peak_memory_bytes, predicted_peak_bytes, train_s,
        last_delta: null or {round_number, residency, micro_batch, predicted_peak_bytes,
            peak_memory_bytes, step_downs}, how its latest delta was trained and what that took}]
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from fedra_edge.protocol.ids import ClientId, LayerId
from fedra_edge.protocol.slices import Depth, Residency
from fedra_server.runs import AssignmentState, RunSpec, RunState


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ParticipantReport(_Report):
    """One participant of the open round."""

    client_id: ClientId
    name: str
    round_number: int
    state: AssignmentState
    trained_layer_ids: tuple[LayerId, ...]
    depth: Depth
    residency: Residency
    micro_batch: int
    steps: int
    predicted_peak_bytes: int
    reason: str
    detail: str


class OpenRoundReport(_Report):
    """The round that is under way."""

    number: int
    base_revision: int
    draws: int
    opened_at: float
    deadline_at: float
    participants: tuple[ParticipantReport, ...]


class BufferReport(_Report):
    """How many deltas wait for a piece to be merged, and since when the oldest does."""

    piece: str
    deltas: int
    oldest_at: float


class RestingReport(_Report):
    """A client that gets no work for a while; the reason is how it failed last."""

    client_id: ClientId
    name: str
    failures: int
    until_at: float
    reason: str


class WaitingReport(_Report):
    """A member that is there and has no part in the round; the reason says why."""

    name: str
    reason: str


class PublishedRoundReport(_Report):
    """A round that is over; ``mean_loss`` is over its merged deltas' last steps, by examples.

    A delta counts in the round that merged its head, and for the coverage of each layer in the
    one that merged the layer.
    """

    number: int
    published_at: float
    coverage: tuple[int, ...]
    participants: int
    merged: int
    num_examples: int
    mean_loss: float | None
    mean_staleness: float
    max_staleness: int


class Accuracy(_Report):
    """Counts on held-out examples, and what follows from them."""

    num_examples: int
    num_correct: int
    accuracy: float
    mean_loss: float


class RevisionReport(_Report):
    """The accuracy of a revision: at each site that reported, and over all their examples."""

    revision: int
    pooled: Accuracy
    sites: dict[ClientId, Accuracy]


class DeltaReport(_Report):
    """How a delta was trained in the end; its peak was promised, then measured."""

    round_number: int
    residency: Residency
    micro_batch: int
    predicted_peak_bytes: int
    peak_memory_bytes: int
    step_downs: tuple[str, ...]


class ClientReport(_Report):
    """What a client contributed and what it cost; its peak is the highest it ever reported."""

    client_id: ClientId
    name: str
    has_left: bool
    rounds_merged: int
    layers_trained: int
    num_examples: int
    bytes_received: int
    bytes_sent: int
    peak_memory_bytes: int
    predicted_peak_bytes: int
    train_s: float
    last_delta: DeltaReport | None


class RunReport(_Report):
    """A run so far; the module says what each field holds."""

    run: str
    state: RunState
    model: str
    spec: RunSpec
    num_layers: int
    rounds_planned: int
    rounds_published: int
    revision: int
    round: OpenRoundReport | None
    buffer: tuple[BufferReport, ...]
    resting: tuple[RestingReport, ...]
    waiting: tuple[WaitingReport, ...]
    coverage: tuple[int, ...]
    rounds: tuple[PublishedRoundReport, ...]
    accuracy: tuple[RevisionReport, ...]
    clients: tuple[ClientReport, ...]
