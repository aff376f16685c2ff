"""What a run achieved so far, computed from its records: the one source of every display.

``RunReport.model_dump_json()`` is stable: fields may be added, none is renamed or removed.
Bytes are bytes, times ``*_s`` are seconds, times ``*_at`` are seconds since the epoch, layers
are global ids and ``coverage[i]`` belongs to layer i. In full:

    run, state, model, spec, num_layers, rounds_planned, rounds_published, revision
    round: null or {number, base_revision, draws, opened_at, deadline_at, participants: [
        {client_id, name, state, trained_layer_ids, depth, residency, micro_batch, steps,
         predicted_peak_bytes, reason, detail}]}; of a stopped run the round that it ended with,
        which is never published
    waiting: [{name, reason}], while the run is running: who is online and has no part in the
        open round, or in none because none is open; reason is "ready", or why it cannot take
        part: "not calibrated yet", "at work for another run", or what its machine lacks
    coverage: [how often each layer was trained, over all published rounds]
    rounds: [{number, published_at, coverage, participants, merged, num_examples, mean_loss}]
    accuracy: [{revision, pooled, sites: {client_id: ...}}] with, for pooled and each site,
        {num_examples, num_correct, accuracy, mean_loss}
    clients: [{client_id, name, has_left, rounds_merged, layers_trained, num_examples,
        bytes_received, bytes_sent, peak_memory_bytes, predicted_peak_bytes, train_s,
        last_delta: null or {round_number, residency, micro_batch, predicted_peak_bytes,
            peak_memory_bytes, step_downs}, how its latest delta was trained and what that took}]
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from pydantic import BaseModel, ConfigDict

from fedra_edge.protocol.deltas import DeltaManifest
from fedra_edge.protocol.ids import ClientId, LayerId
from fedra_edge.protocol.rounds import Evaluation
from fedra_edge.protocol.slices import Depth, Residency
from fedra_server.planning import find_unfit
from fedra_server.runs import AssignmentState, RunSpec, RunState
from fedra_server.storage.histories import RunHistory
from fedra_server.storage.records import AssignmentRecord, ClientRecord, RoundRecord

READY: Final = "ready"


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ParticipantReport(_Report):
    """One participant of the open round."""

    client_id: ClientId
    name: str
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


class WaitingReport(_Report):
    """A member that is there and has no part in the round; the reason says why."""

    name: str
    reason: str


class PublishedRoundReport(_Report):
    """A round that is over; ``mean_loss`` is over its merged deltas' last steps, by examples."""

    number: int
    published_at: float
    coverage: tuple[int, ...]
    participants: int
    merged: int
    num_examples: int
    mean_loss: float | None


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
    waiting: tuple[WaitingReport, ...]
    coverage: tuple[int, ...]
    rounds: tuple[PublishedRoundReport, ...]
    accuracy: tuple[RevisionReport, ...]
    clients: tuple[ClientReport, ...]


def report_run(history: RunHistory, seen_since: float = 0.0) -> RunReport:
    """Compute the report of a run; a client last seen before ``seen_since`` is not there."""
    num_layers = history.model.spec.num_layers
    names = {client.client_id: client.name for client in history.clients}
    by_round: dict[int, list[AssignmentRecord]] = defaultdict(list)
    for assignment in history.assignments:
        by_round[assignment.round_number].append(assignment)
    published = tuple(
        _published_round(record, record.published_at, by_round[record.number], num_layers)
        for record in history.rounds
        if record.published_at is not None
    )
    under_way = [record for record in history.rounds if record.published_at is None]
    return RunReport(
        run=history.run.run,
        state=history.run.state,
        model=history.model.spec.name,
        spec=history.run.spec,
        num_layers=num_layers,
        rounds_planned=history.run.spec.rounds,
        rounds_published=len(published),
        revision=max(record.manifest.number for record in history.revisions),
        round=_open_round(under_way[0], by_round, names) if under_way else None,
        waiting=_waiting(history, under_way, seen_since),
        coverage=_sum_per_layer((record.coverage for record in published), num_layers),
        rounds=published,
        accuracy=_accuracy(history),
        clients=_clients(history),
    )


def _open_round(
    record: RoundRecord,
    by_round: Mapping[int, Sequence[AssignmentRecord]],
    names: Mapping[ClientId, str],
) -> OpenRoundReport:
    return OpenRoundReport(
        number=record.number,
        base_revision=record.base_revision,
        draws=record.draws,
        opened_at=record.opened_at,
        deadline_at=record.deadline_at,
        participants=tuple(_participant(it, names) for it in by_round.get(record.number, ())),
    )


def _participant(record: AssignmentRecord, names: Mapping[ClientId, str]) -> ParticipantReport:
    manifest = record.manifest
    return ParticipantReport(
        client_id=record.client_id,
        name=names[record.client_id],
        state=record.state,
        trained_layer_ids=manifest.trained_layer_ids,
        depth=manifest.depth,
        residency=manifest.residency,
        micro_batch=manifest.micro_batch,
        steps=manifest.steps,
        predicted_peak_bytes=manifest.predicted_peak_bytes,
        reason=record.reason,
        detail=record.detail,
    )


def _waiting(
    history: RunHistory, under_way: Sequence[RoundRecord], seen_since: float
) -> tuple[WaitingReport, ...]:
    run = history.run
    if run.state is not RunState.RUNNING:
        return ()
    numbers = {record.number for record in under_way}
    taking_part = {it.client_id for it in history.assignments if it.round_number in numbers}
    there = [
        client
        for client in history.clients
        if client.is_there(seen_since)
        and client.run in {None, run.run}
        and client.client_id not in taking_part
    ]
    population = replace(history.population(seen_since), clients=there)
    unfit = find_unfit(population.candidates(run.run), history.model.spec, run.spec)
    return tuple(
        WaitingReport(
            name=client.name,
            reason=population.obstacle(client, run.run) or unfit.get(client.client_id, READY),
        )
        for client in there
    )


def _published_round(
    record: RoundRecord,
    published_at: float,
    assignments: Sequence[AssignmentRecord],
    num_layers: int,
) -> PublishedRoundReport:
    merged = [it for it in assignments if it.state is AssignmentState.MERGED]
    deltas = [it.delta for it in merged if it.delta is not None]
    num_examples = sum(delta.num_examples for delta in deltas)
    loss_sum = sum(delta.report.last_loss * delta.num_examples for delta in deltas)
    return PublishedRoundReport(
        number=record.number,
        published_at=published_at,
        coverage=_coverage(merged, num_layers),
        participants=len({it.client_id for it in assignments}),
        merged=len(merged),
        num_examples=num_examples,
        mean_loss=loss_sum / num_examples if num_examples else None,
    )


def _coverage(merged: Iterable[AssignmentRecord], num_layers: int) -> tuple[int, ...]:
    counts = [0] * num_layers
    for assignment in merged:
        for layer_id in assignment.manifest.trained_layer_ids:
            counts[layer_id] += 1
    return tuple(counts)


def _sum_per_layer(rows: Iterable[tuple[int, ...]], num_layers: int) -> tuple[int, ...]:
    return tuple(map(sum, zip((0,) * num_layers, *rows, strict=True)))


def _accuracy(history: RunHistory) -> tuple[RevisionReport, ...]:
    by_revision: dict[int, dict[ClientId, Evaluation]] = defaultdict(dict)
    for record in history.evaluations:
        by_revision[record.evaluation.revision][record.client_id] = record.evaluation
    return tuple(
        RevisionReport(
            revision=revision,
            pooled=_pool(sites.values()),
            sites={client_id: _pool([counts]) for client_id, counts in sites.items()},
        )
        for revision, sites in sorted(by_revision.items())
    )


def _pool(evaluations: Iterable[Evaluation]) -> Accuracy:
    counts = list(evaluations)
    num_examples = sum(it.num_examples for it in counts)
    num_correct = sum(it.num_correct for it in counts)
    return Accuracy(
        num_examples=num_examples,
        num_correct=num_correct,
        accuracy=num_correct / num_examples,
        mean_loss=sum(it.loss_sum for it in counts) / num_examples,
    )


def _clients(history: RunHistory) -> tuple[ClientReport, ...]:
    by_client: dict[ClientId, list[AssignmentRecord]] = defaultdict(list)
    for assignment in history.assignments:
        by_client[assignment.client_id].append(assignment)
    evaluated = {record.client_id for record in history.evaluations}
    return tuple(
        _client(client, by_client[client.client_id])
        for client in history.clients
        if client.client_id in by_client or client.client_id in evaluated
    )


def _client(client: ClientRecord, assignments: Sequence[AssignmentRecord]) -> ClientReport:
    merged = [it for it in assignments if it.state is AssignmentState.MERGED]
    deltas: list[DeltaManifest] = [it.delta for it in assignments if it.delta is not None]
    reports = [delta.report for delta in deltas]
    return ClientReport(
        client_id=client.client_id,
        name=client.name,
        has_left=client.has_left,
        rounds_merged=len(merged),
        layers_trained=sum(len(it.manifest.trained_layer_ids) for it in merged),
        num_examples=sum(it.delta.num_examples for it in merged if it.delta is not None),
        bytes_received=sum(report.bytes_received for report in reports),
        bytes_sent=sum(report.bytes_sent for report in reports),
        peak_memory_bytes=max((report.peak_memory_bytes for report in reports), default=0),
        predicted_peak_bytes=max(
            (it.manifest.predicted_peak_bytes for it in assignments), default=0
        ),
        train_s=sum(report.train_s for report in reports),
        last_delta=_last_delta(assignments),
    )


def _last_delta(assignments: Sequence[AssignmentRecord]) -> DeltaReport | None:
    for assignment in sorted(assignments, key=lambda it: it.round_number, reverse=True):
        if assignment.delta is not None:
            report = assignment.delta.report
            return DeltaReport(
                round_number=assignment.round_number,
                residency=report.residency,
                micro_batch=report.micro_batch,
                predicted_peak_bytes=report.predicted_peak_bytes,
                peak_memory_bytes=report.peak_memory_bytes,
                step_downs=report.step_downs,
            )
    return None
