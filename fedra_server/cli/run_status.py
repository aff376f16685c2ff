"""A run's report as text for people."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from fedra_server.cli.output import format_bytes, format_layers, format_time, tell_table
from fedra_server.reporting import READY, DeltaReport, OpenRoundReport, RunReport
from fedra_server.runs import RunState


def tell_report(report: RunReport) -> None:
    """Print where a run stands, what it reached and what it cost."""
    done = f"{report.rounds_published} of {report.rounds_planned} rounds published"
    typer.echo(f"Run {report.run} on {report.model}: {report.state}, {done}")
    typer.echo(f"Latest revision: {report.revision}")
    typer.echo(f"Coverage per layer: {' '.join(str(count) for count in report.coverage)}")
    if report.round is not None:
        _tell_round(report.round, is_over=report.state is RunState.STOPPED)
    _tell_waiting(report)
    _tell_accuracy(report)
    _tell_clients(report)


def _tell_round(current: OpenRoundReport, *, is_over: bool) -> None:
    until = f"open until {format_time(current.deadline_at)}"
    ended = "ended unpublished: the run was stopped"
    typer.echo(f"\nRound {current.number}, {ended if is_over else until}")
    tell_table(
        ["CLIENT", "STATE", "LAYERS", "DEPTH", "STEPS", "PROMISE", "WHY"],
        [
            [
                it.name,
                it.state,
                format_layers(it.trained_layer_ids),
                it.depth,
                it.steps,
                format_bytes(it.predicted_peak_bytes),
                it.detail or it.reason,
            ]
            for it in current.participants
        ],
        empty="No participants yet.",
    )


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
        rows = [[it.name, it.reason] for it in report.waiting]
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
