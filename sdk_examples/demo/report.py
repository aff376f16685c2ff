"""What the demo shows at its end: accuracy before and after, coverage, traffic and memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from fedra_server.reports import Accuracy, ClientReport, ParticipantReport, RunReport
from sdk_examples.demo.running import Budget

_MEBIBYTE: Final = 2**20


def accuracy_table(report: RunReport, budgets: Mapping[str, Budget]) -> Table:
    """Compare the untrained revision with the last one, per site and over all examples."""
    first, last = report.accuracy[0], report.accuracy[-1]
    table = Table(
        title=f"Accuracy on held-out images, revision {first.revision} to {last.revision}"
    )
    for heading in ("site", "layers", "images", "before", "after", "gain"):
        table.add_column(heading, justify="left" if heading == "site" else "right")
    for client in _by_name(report, budgets):
        before, after = first.sites[client.client_id], last.sites[client.client_id]
        table.add_row(client.name, str(budgets[client.name].max_layers), *_compared(before, after))
    table.add_section()
    table.add_row("all", "", *_compared(first.pooled, last.pooled), style="bold")
    return table


def coverage_table(report: RunReport) -> Table:
    """Tell how often each layer was trained, over all rounds and clients."""
    table = Table(title="Coverage: deltas merged per layer")
    table.add_column("layer", justify="right")
    for layer_id in range(report.num_layers):
        table.add_column(str(layer_id), justify="right")
    table.add_row("total", *map(str, report.coverage))
    per_round = [record.coverage for record in report.rounds]
    table.add_row(
        "least in a round", *(str(min(column)) for column in zip(*per_round, strict=True))
    )
    table.add_row("most in a round", *(str(max(column)) for column in zip(*per_round, strict=True)))
    return table


def cost_table(
    report: RunReport, plans: Mapping[str, ParticipantReport], budgets: Mapping[str, Budget]
) -> Table:
    """Tell how each client worked and what taking part cost it."""
    table = Table(
        title="How each client worked, and what it cost; sizes in MiB",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("site")
    table.add_column("runtime")
    table.add_column("slice", no_wrap=True)
    for heading in ("batch", "down", "up", "peak", "promise", "trained"):
        table.add_column(heading, justify="right")
    for client in _by_name(report, budgets):
        plan = plans.get(client.name)
        table.add_row(
            client.name,
            budgets[client.name].backend,
            f"{plan.depth}, {plan.residency}" if plan else "",
            str(plan.micro_batch) if plan else "",
            f"{client.bytes_received / _MEBIBYTE:.1f}",
            f"{client.bytes_sent / _MEBIBYTE:.1f}",
            f"{client.peak_memory_bytes / _MEBIBYTE:.0f}",
            f"{client.predicted_peak_bytes / _MEBIBYTE:.0f}",
            f"{client.train_s:.0f} s",
        )
    return table


def all_tables(
    report: RunReport, plans: Mapping[str, ParticipantReport], budgets: Mapping[str, Budget]
) -> Group:
    """Put the tables below each other."""
    return Group(
        accuracy_table(report, budgets),
        coverage_table(report),
        cost_table(report, plans, budgets),
    )


def _by_name(report: RunReport, budgets: Mapping[str, Budget]) -> list[ClientReport]:
    order = list(budgets)
    return sorted(report.clients, key=lambda client: order.index(client.name))


def _compared(before: Accuracy, after: Accuracy) -> tuple[str, str, str, str]:
    gain = 100 * (after.accuracy - before.accuracy)
    return (
        str(after.num_examples),
        f"{before.accuracy:.1%}",
        f"{after.accuracy:.1%}",
        f"{gain:+.1f}",
    )
