"""A run's report as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import typer

from fedra_server.cli.output import (
    format_bytes,
    format_layers,
    format_time,
    shorten,
    tell_table,
)
from fedra_server.reporting import READY
from fedra_server.reports import DeltaReport, OpenRoundReport, RunReport
from fedra_server.runs import RunState

_LATEST: Final = 10
"""How many rounds are listed where only the latest matter."""


def tell_report(report: RunReport) -> None:
    """Print where a run stands, what it reached and what it cost."""
    done = f"{report.rounds_published} of {report.rounds_planned} rounds published"
    typer.echo(f"Run {report.run} on {report.model}: {report.state}, {done}")
    typer.echo(f"Mode: {_mode(report)}")
    typer.echo(f"Latest revision: {report.revision}")
    typer.echo(f"Coverage per layer: {' '.join(str(count) for count in report.coverage)}")
    if report.round is not None:
        _tell_round(report, report.round)
    _tell_buffer(report)
    _tell_resting(report)
    _tell_waiting(report)
    _tell_staleness(report)
    _tell_accuracy(report)
    _tell_clients(report)


def _tell_round(report: RunReport, current: OpenRoundReport) -> None:
    until = f"open until {format_time(current.deadline_at)}"
    is_synchronous = report.spec.mode == "synchronous"
    if is_synchronous and current.deadline_at > current.opened_at + report.spec.deadline_s:
        until += f", extended beyond {_due(report, current)} for want of deltas"
    if report.state is RunState.STOPPED:
        until = "ended unpublished: the run was stopped"
    typer.echo(f"\nRound {current.number}, {until}")
    tell_table(
        ["CLIENT", "OF ROUND", "STATE", "LAYERS", "DEPTH", "STEPS", "PROMISE", "WHY"],
        [
            [
                it.name,
                it.round_number,
                it.state,
                format_layers(it.trained_layer_ids),
                it.depth,
                it.steps,
                format_bytes(it.predicted_peak_bytes),
                shorten(it.detail or it.reason),
            ]
            for it in current.participants
        ],
        empty="No participants yet.",
    )


def _due(report: RunReport, current: OpenRoundReport) -> str:
    return format_time(current.opened_at + report.spec.deadline_s)


def _mode(report: RunReport) -> str:
    """Say in a few words when deltas are merged, and how late ones may be."""
    spec = report.spec
    size = "all that are there" if spec.cohort_size is None else f"cohorts of {spec.cohort_size}"
    if spec.over_provisioning:
        size += f" and {spec.over_provisioning:.0%} to spare"
    if spec.mode == "buffered":
        size = f"{spec.buffer_size} clients or {spec.deadline_s:g} s for each piece, {size}"
    optimizer = spec.server_optimizer.kind
    return f"{spec.mode}, {size}, staleness up to {spec.staleness_limit}, {optimizer}"


def _tell_buffer(report: RunReport) -> None:
    """Say which pieces have deltas that wait to be merged."""
    if report.buffer and report.spec.mode == "buffered":
        typer.echo("\nDeltas that wait for a merge")
        rows = [[it.piece, it.deltas, format_time(it.oldest_at)] for it in report.buffer]
        tell_table(["PIECE", "DELTAS", "OLDEST SINCE"], rows, empty="")


def _tell_resting(report: RunReport) -> None:
    """Say who gets no work for a while, and why."""
    if report.resting:
        typer.echo("\nClients that failed again and again, and rest")
        rows = [
            [it.name, it.failures, format_time(it.until_at), shorten(it.reason)]
            for it in report.resting
        ]
        tell_table(["CLIENT", "FAILURES", "RESTS UNTIL", "LAST WITH"], rows, empty="")


def _tell_staleness(report: RunReport) -> None:
    """Say how stale the deltas of the latest rounds were, if any was."""
    stale = [it for it in report.rounds if it.max_staleness]
    if stale:
        typer.echo("\nStaleness of merged deltas")
        rows = [
            [it.number, it.merged, f"{it.mean_staleness:.2f}", it.max_staleness]
            for it in stale[-_LATEST:]
        ]
        tell_table(["ROUND", "DELTAS", "MEAN", "MOST"], rows, empty="")


def _tell_waiting(report: RunReport) -> None:
    """Say what a running run waits for, and who of those online is left out and why."""
    if report.state is not RunState.RUNNING:
        return
    if report.round is None:
        ready = sum(it.reason == READY for it in report.waiting)
        needed = report.spec.min_participants
        typer.echo(f"\nRound {report.rounds_published + 1} is not open yet")
        typer.echo(f"waits for participants: {ready} of {needed} ready")
    elif report.waiting:
        typer.echo("\nOnline, but not in this round")
    if report.waiting:
        rows = [[it.name, shorten(it.reason)] for it in report.waiting]
        tell_table(["CLIENT", "WHY"], rows, empty="")


def _tell_accuracy(report: RunReport) -> None:
    names = {client.client_id: client.name for client in report.clients}
    typer.echo("\nAccuracy on held-out examples")
    tell_table(
        ["REVISION", "POOLED", "EXAMPLES", "PER SITE"],
        [
            [
                row.revision,
                f"{row.pooled.accuracy:.1%}",
                row.pooled.num_examples,
                ", ".join(f"{names[it]} {site.accuracy:.1%}" for it, site in row.sites.items()),
            ]
            for row in report.accuracy
        ],
        empty="None measured yet.",
    )


def _tell_clients(report: RunReport) -> None:
    typer.echo("\nClients")
    tell_table(
        ["CLIENT", "ROUNDS", "LAYERS TRAINED", "RECEIVED", "SENT", "PEAK MEMORY"],
        [
            [
                it.name,
                it.rounds_merged,
                it.layers_trained,
                format_bytes(it.bytes_received),
                format_bytes(it.bytes_sent),
                format_bytes(it.peak_memory_bytes),
            ]
            for it in report.clients
        ],
        empty="None took part yet.",
    )
    latest = [(it.name, it.last_delta) for it in report.clients if it.last_delta is not None]
    if latest:
        typer.echo("\nLatest deltas")
        _tell_deltas(latest)


def _tell_deltas(latest: Sequence[tuple[str, DeltaReport]]) -> None:
    """Print the memory that was promised beside what was measured, and where a plan shrank."""
    tell_table(
        ["CLIENT", "ROUND", "RESIDENCY", "AT ONCE", "PROMISE", "PEAK MEMORY", "STEPPED DOWN"],
        [
            [
                name,
                it.round_number,
                it.residency,
                it.micro_batch,
                format_bytes(it.predicted_peak_bytes),
                format_bytes(it.peak_memory_bytes),
                "; ".join(it.step_downs) or "no",
            ]
            for name, it in latest
        ],
        empty="",
    )
