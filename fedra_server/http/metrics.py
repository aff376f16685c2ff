"""Figures for a Prometheus scraper, counted from the records when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from fedra_edge.protocol import routes
from fedra_server.http.mounting import mount
from fedra_server.http.operators import FOR_OPERATORS, Scraper
from fedra_server.http.services import Services, ServicesHere

if TYPE_CHECKING:
    from prometheus_client.core import Metric

router = APIRouter(tags=["operators"])


@mount(router, routes.METRICS, *FOR_OPERATORS, response_class=PlainTextResponse)
def scrape(services: ServicesHere, _operator: Scraper) -> Response:
    """Give the figures in Prometheus' text format."""
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(services))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _Figures:
    """A collector of prometheus_client's own kind."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def collect(self) -> Iterator[Metric]:
        """Give every figure once."""
        yield from self._from_records()
        yield from self._from_process()

    def _from_records(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        services = self._services
        seen_since = services.clock.now() - services.config.heartbeat_timeout_s
        tally = services.store.tally(seen_since)
        rounds = CounterMetricFamily(
            "fedra_rounds_published", "Revisions published after the first.", labels=["run"]
        )
        for run, number in tally.revisions.items():
            rounds.add_metric([run], number)
        yield rounds
        work = GaugeMetricFamily(
            "fedra_assignments",
            "Assignments by state: admitted and merged deltas, refused ones, pending work.",
            labels=["run", "state"],
        )
        for (run, state), count in tally.assignments.items():
            work.add_metric([run, state], count)
        yield work
        states = GaugeMetricFamily(
            "fedra_run_state", "1 for a run's state.", labels=["run", "state"]
        )
        for run, state in tally.runs.items():
            states.add_metric([run, state], 1)
        yield states
        yield GaugeMetricFamily("fedra_clients", "Clients enrolled.", value=tally.clients)
        yield GaugeMetricFamily(
            "fedra_clients_online", "Clients seen of late.", value=tally.clients_online
        )
        yield CounterMetricFamily(
            "fedra_journal_entries", "Entries of the journal.", value=tally.journal_entries
        )

    def _from_process(self) -> Iterator[Metric]:
        from prometheus_client.core import (
            GaugeMetricFamily,
            SummaryMetricFamily,
        )

        services = self._services
        merging = services.coordinator.merging
        yield SummaryMetricFamily(
            "fedra_merge_seconds",
            "Merges of this process and the time they took.",
            count_value=merging.times,
            sum_value=merging.total_s,
        )
        yield GaugeMetricFamily(
            "fedra_stored_bytes",
            "Weights, adapters, deltas and uploads, as measured within the last minute.",
            value=services.quota.used_bytes(services.clock.now()),
        )
        yield GaugeMetricFamily(
            "fedra_disk_free_bytes",
            "Space left on the disk of the home.",
            value=services.free_bytes(services.home.uploads),
        )
