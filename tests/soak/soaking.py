"""Kills a server and its clients at random moments for a while, then audits what they made."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from fedra_server.auditing import AuditReport, audit
from fedra_server.runs import AssignmentState, ServerOptimizerSpec
from tests.support.edges import EdgeSite, wait_until
from tests.support.federation import MODEL, Federation
from tests.support.headquarters import create_run
from tests.support.sites import write_folder

RUN_OF = {"north": "in-rounds", "south": "in-rounds", "west": "buffered", "east": "buffered"}
_SERVER = "server"
_QUIET_S = 2.5
_DOWN_S = 1.0
_LONG_DOWN_S = 6.0
_ROUNDS = 100_000
_QUICK = {"batch_size": 6, "local_epochs": 1000, "max_steps": 20}


@dataclass
class Soak:
    """A federation with two runs, one that waits for cohorts and one that waits for nobody."""

    federation: Federation
    generator: np.random.Generator
    kills: Counter[str] = field(default_factory=Counter)
    runs: tuple[str, ...] = ()

    def begin(self, place: Path) -> None:
        """Start the clients and the runs."""
        model = self.federation.store.model_by_name(MODEL).spec
        settings: dict[str, dict[str, object]] = {
            "in-rounds": {
                "max_staleness": 2,
                "min_participants": 1,
                "server_optimizer": ServerOptimizerSpec(kind="fedadam"),
            },
            "buffered": {"mode": "buffered", "max_layers": 2},
        }
        self.runs = tuple(settings)
        for name, chosen in settings.items():
            create_run(
                self.federation.store, self.federation.blobs, model, name,
                rounds=_ROUNDS, deadline_s=5.0, graphs=model.graphs, training=_QUICK,
                adapter={"rank": 2, "alpha": 4.0, "targets": model.default_targets}, **chosen,
            )  # fmt: skip
        for seed, (name, run) in enumerate(RUN_OF.items()):
            data = write_folder(place / "data" / name, seed).path
            options = ("--backend", "onnx", "--run", run)
            self.federation.add_site(name, data, place, *options, heartbeat_s="1").join()
        for name in self.runs:
            self.federation.wait_for_rounds(name, 1)

    def shake(self, seconds: float) -> None:
        """Kill one or several processes again and again, and start them again."""
        pause = threading.Event()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pause.wait(self.generator.uniform(0.0, _QUIET_S))
            count = 1 + self.generator.binomial(len(RUN_OF), 0.2)
            victims = self.generator.choice([_SERVER, *RUN_OF], size=count, replace=False)
            for victim in victims:
                self._kill(str(victim))
            is_long = self.generator.random() < 0.1
            pause.wait(self.generator.uniform(0.0, _LONG_DOWN_S if is_long else _DOWN_S))
            for victim in self.generator.permutation(victims):
                self._start(str(victim))

    def settle(self) -> AuditReport:
        """Let everything run again, see both runs go on, stop them, and audit the home."""
        for name in self.runs:
            published = self.federation.report(name).rounds_published
            self.federation.wait_for_rounds(name, published + 2)
        self.federation.end_runs()
        for site in self.federation.sites.values():
            wait_until(f"an empty outbox at {site.name}", partial(_has_empty_outbox, site))
        return audit(self.federation.store, self.federation.blobs, self.federation.home)

    def lost(self) -> list[str]:
        """Name what a client set aside as damaged, which no kill may cause."""
        folders = [site.config.outbox / "damaged" for site in self.federation.sites.values()]
        return [str(path) for folder in folders for path in folder.glob("*")]

    def merged(self) -> int:
        """Count the deltas that made it into a revision."""
        records = [it for run in self.runs for it in self.federation.store.assignments(run)]
        return sum(record.state is AssignmentState.MERGED for record in records)

    def _kill(self, name: str) -> None:
        self.kills[name] += 1
        if name == _SERVER:
            self.federation.kill_server()
        else:
            self._site(name).client.kill()

    def _start(self, name: str) -> None:
        if name == _SERVER:
            self.federation.start_server_again()
        else:
            self._site(name).join()

    def _site(self, name: str) -> EdgeSite:
        return self.federation.sites[name]


def _has_empty_outbox(site: EdgeSite) -> bool:
    return site.deltas_waiting == 0
