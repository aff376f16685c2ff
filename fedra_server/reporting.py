"""What a run achieved so far, computed from its records: the one source of every display."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from fedra_edge.protocol.deltas import DeltaManifest
from fedra_edge.protocol.ids import ClientId, LayerId
from fedra_edge.protocol.layers import layer_piece
from fedra_edge.protocol.rounds import Evaluation
from fedra_server.choosing import resting
from fedra_server.planning import find_unfit
from fedra_server.reports import (
    Accuracy,
    BufferReport,
    ClientReport,
    DeltaReport,
    OpenRoundReport,
    ParticipantReport,
    PublishedRoundReport,
    RestingReport,
    RevisionReport,
    RunReport,
    WaitingReport,
)
from fedra_server.rounds import WaitingDelta
from fedra_server.runs import AssignmentState, RunState
from fedra_server.storage.histories import RunHistory
from fedra_server.storage.progress import MergeSummary
from fedra_server.storage.records import AssignmentRecord, ClientRecord, RoundRecord

READY: Final = "ready"
_COUNTING: Final = frozenset({AssignmentState.PENDING, AssignmentState.ADMITTED})


def report_run(history: RunHistory, seen_since: float = 0.0, now: float = 0.0) -> RunReport:
    """Compute the report of a run at a moment; who was last seen before another is not there."""
    num_layers = history.model.spec.num_layers
    names = {client.client_id: client.name for client in history.clients}
    published = _published_rounds(history)
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
        round=_open_round(under_way[0], history.assignments, names) if under_way else None,
        buffer=_buffer(history.waiting),
        resting=_resting(history, names, now),
        waiting=_waiting(history, under_way, seen_since, now),
        coverage=_sum_per_layer((record.coverage for record in published), num_layers),
        rounds=published,
        accuracy=_accuracy(history),
        clients=_clients(history),
    )


def _open_round(
    record: RoundRecord,
    assignments: Iterable[AssignmentRecord],
    names: Mapping[ClientId, str],
) -> OpenRoundReport:
    """Tell of a round's participants, and of earlier ones whose work or delta still counts."""
    return OpenRoundReport(
        number=record.number,
        base_revision=record.base_revision,
        draws=record.draws,
        opened_at=record.opened_at,
        deadline_at=record.deadline_at,
        participants=tuple(
            _participant(it, names)
            for it in assignments
            if it.round_number == record.number or it.state in _COUNTING
        ),
    )


def _participant(record: AssignmentRecord, names: Mapping[ClientId, str]) -> ParticipantReport:
    manifest = record.manifest
    return ParticipantReport(
        client_id=record.client_id,
        name=names[record.client_id],
        round_number=record.round_number,
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
    history: RunHistory, under_way: Sequence[RoundRecord], seen_since: float, now: float
) -> tuple[WaitingReport, ...]:
    run = history.run
    if run.state is not RunState.RUNNING:
        return ()
    numbers = {record.number for record in under_way}
    is_buffered = run.spec.mode == "buffered"
    taking_part = {
        it.client_id
        for it in history.assignments
        if it.state is AssignmentState.PENDING or (it.round_number in numbers and not is_buffered)
    }
    there = [
        client
        for client in history.clients
        if client.is_there(seen_since)
        and client.run in {None, run.run}
        and client.client_id not in taking_part
    ]
    population = replace(history.population(seen_since, now), clients=there)
    unfit = find_unfit(population.candidates(run.run), history.model.spec, run.spec)
    return tuple(
        WaitingReport(
            name=client.name,
            reason=population.obstacle(client, run.run) or unfit.get(client.client_id, READY),
        )
        for client in there
    )


def _buffer(waiting: Iterable[WaitingDelta]) -> tuple[BufferReport, ...]:
    since: dict[str, list[float]] = defaultdict(list)
    for delta in waiting:
        for piece in delta.pieces:
            since[piece].append(delta.admitted_at)
    return tuple(
        BufferReport(piece=piece, deltas=len(since[piece]), oldest_at=min(since[piece]))
        for piece in sorted(since, key=lambda piece: (len(piece), piece))
    )


def _resting(
    history: RunHistory, names: Mapping[ClientId, str], now: float
) -> tuple[RestingReport, ...]:
    return tuple(
        RestingReport(
            client_id=client_id,
            name=names[client_id],
            failures=history.setbacks[client_id].failures,
            until_at=history.setbacks[client_id].rests_until,
            reason=history.setbacks[client_id].detail,
        )
        for client_id in resting(history.setbacks, now)
    )


def _published_rounds(history: RunHistory) -> tuple[PublishedRoundReport, ...]:
    participants: dict[int, set[ClientId]] = defaultdict(set)
    deltas: dict[int, list[DeltaManifest]] = defaultdict(list)
    for assignment in history.assignments:
        participants[assignment.round_number].add(assignment.client_id)
        merged_in = history.merged_in.get(assignment.assignment_id)
        if merged_in is not None and assignment.delta is not None:
            deltas[merged_in].append(assignment.delta)
    merges: dict[int, list[MergeSummary]] = defaultdict(list)
    for summary in history.merges:
        merges[summary.revision].append(summary)
    return tuple(
        PublishedRoundReport(
            number=record.number,
            published_at=record.published_at,
            coverage=_coverage(merges[record.number], history.model.spec.num_layers),
            participants=len(participants[record.number]),
            merged=len(deltas[record.number]),
            num_examples=sum(delta.num_examples for delta in deltas[record.number]),
            mean_loss=_mean_loss(deltas[record.number]),
            mean_staleness=_mean_staleness(merges[record.number]),
            max_staleness=max((it.max_staleness for it in merges[record.number]), default=0),
        )
        for record in history.rounds
        if record.published_at is not None
    )


def _mean_loss(deltas: Sequence[DeltaManifest]) -> float | None:
    num_examples = sum(delta.num_examples for delta in deltas)
    loss_sum = sum(delta.report.last_loss * delta.num_examples for delta in deltas)
    return loss_sum / num_examples if num_examples else None


def _mean_staleness(merges: Sequence[MergeSummary]) -> float:
    pieces = sum(it.deltas for it in merges)
    return sum(it.total_staleness for it in merges) / pieces if pieces else 0.0


def _coverage(merges: Iterable[MergeSummary], num_layers: int) -> tuple[int, ...]:
    counts = {it.piece: it.deltas for it in merges}
    return tuple(counts.get(layer_piece(LayerId(layer)), 0) for layer in range(num_layers))


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
