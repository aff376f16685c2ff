"""A real server with its sites, all of them processes, and what its operator does and sees."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fedra_edge.protocol.tensors import FloatArray, read_tensors
from fedra_server.config import ServerHome
from fedra_server.reporting import report_run
from fedra_server.reports import RunReport
from fedra_server.runs import AssignmentState, RunState
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.records import AssignmentRecord, ClientRecord
from fedra_server.storage.store import Store
from tests.support.edges import EdgeSite, wait_until
from tests.support.servers import run_server_command, start_server
from tests.support.tiny_vit import build_vit

MODEL = "tiny"
NO_FRAMEWORK = ("torch", "transformers", "peft", "onnxruntime", "tokenizers")
_ACTIVE = {RunState.CREATED, RunState.RUNNING, RunState.PAUSED}


def prepare_home(directory: Path, *options: str) -> Path:
    """Make a server home with the tiny model registered, by the commands an operator uses.

    ``options`` are further ones of ``fedra-server model add``.
    """
    home, saved = directory / "home", directory / "saved"
    build_vit().save_pretrained(saved)
    run_server_command("init", "--home", str(home))
    run_server_command("model", "add", MODEL, str(saved), "--home", str(home), *options)
    return home


class Federation:
    """A server that cannot import a training framework, and the sites that join it."""

    def __init__(
        self, home: Path, prepared: Path, variables: Mapping[str, str] | None = None
    ) -> None:
        shutil.copytree(prepared, home, dirs_exist_ok=True)
        self.home = ServerHome(home)
        self.store = Store.open(home)
        self.blobs = BlobStore(self.home.blobs)
        self._variables = variables
        self.server = start_server(home, without=NO_FRAMEWORK, variables=variables)
        self.sites: dict[str, EdgeSite] = {}

    @property
    def url(self) -> str:
        return self.server.url

    def add_site(
        self,
        name: str,
        data: Path,
        directory: Path,
        *options: str,
        home: Path | None = None,
        python: Path | None = None,
        **settings: str,
    ) -> EdgeSite:
        """Set up a machine; its client is not started."""
        self.sites[name] = EdgeSite(
            name=name,
            url=self.url,
            home=home or directory / name,
            data=data,
            log=directory / f"{name}.log",
            options=options,
            settings=settings,
            python=python,
        )
        return self.sites[name]

    def have_running(self, sites: Sequence[EdgeSite]) -> None:
        """Start the clients that do not run, and wait until the server knows all of them."""
        fresh = [site for site in sites if not site.is_running]
        for site in fresh:
            site.join()
        for site in fresh:
            site.client.wait_for_phase("waiting")

    def operate(self, *arguments: str) -> Any:  # noqa: ANN401 (whatever a command tells)
        """Run a fedra-server command on the home of the running server."""
        home = str(self.home.path)
        done = run_server_command(*arguments, "--json", "--home", home, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def start_run(self, name: str, **options: object) -> None:
        """Create a run and set it going; options are those of the command."""
        given = [f"--{option.replace('_', '-')}={value}" for option, value in options.items()]
        self.operate("run", "create", name, "--model", MODEL, "--start", *given)

    def report(self, run: str) -> RunReport:
        """See what ``run status`` shows, without starting a process."""
        return report_run(self.store.run_history(run))

    def wait_for_rounds(self, run: str, number: int) -> RunReport:
        """Wait until so many rounds of a run are published."""
        what = f"{number} rounds of run {run}; {self.server.log}"
        wait_until(what, lambda: self.report(run).rounds_published >= number)
        return self.report(run)

    def assignments(self, run: str, round_number: int = 1) -> dict[str, AssignmentRecord]:
        """Give a round's latest assignment of each site, by the site's name."""
        names = {it.client_id: it.name for it in self.store.clients(include_left=True)}
        records = self.store.assignments(run, round_number)
        return {names[record.client_id]: record for record in records}

    def check_merge(self, run: str, number: int) -> None:
        """Check that a revision is its base plus the plain mean of its deltas on disk."""
        merged = [
            self.home.delta_file(record.assignment_id)
            for record in self.store.assignments(run, number)
            if record.state is AssignmentState.MERGED
        ]
        deltas = [read_tensors(file) for file in merged]
        base, found = self._adapters(run, number - 1), self._adapters(run, number)
        assert base.keys() == found.keys()
        changed = False
        for name, value in found.items():
            held = [delta[name].astype(np.float64) for delta in deltas if name in delta]
            expected = base[name] + (sum(held) / len(held) if held else 0.0)
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6, err_msg=name)
            changed = changed or not np.allclose(value, base[name], rtol=0, atol=1e-5)
        assert changed, f"revision {number} of {run} changes nothing"

    def _adapters(self, run: str, number: int) -> dict[str, FloatArray]:
        manifest = self.store.revision(run, number).manifest
        tensors: dict[str, FloatArray] = {}
        for ref in (*manifest.layers, manifest.head):
            tensors |= read_tensors(self.blobs.path(ref.sha256))
        return tensors

    def member(self, site: EdgeSite) -> ClientRecord:
        """See what the server knows of a site."""
        return self.store.client(site.identity.client_id)

    def kill_server(self) -> None:
        """End the server at whatever instruction it is."""
        self.server.kill()

    def start_server_again(self) -> None:
        """Start it on the same home and port."""
        port = int(self.url.rpartition(":")[2])
        self.server = start_server(
            self.home.path, port=port, without=NO_FRAMEWORK, variables=self._variables
        )

    def have_server(self) -> None:
        """Start the server again if it does not run."""
        if self.server.process.poll() is not None:
            self.start_server_again()

    def end_runs(self) -> None:
        """Stop every run that is not over."""
        for run in self.store.runs():
            if run.state in _ACTIVE:
                self.store.set_run_state(run.run, RunState.STOPPED, _ACTIVE)

    def shut_down(self) -> None:
        """End every process."""
        for site in self.sites.values():
            if site.is_running:
                site.client.kill()
        self.server.kill()
        self.store.close()


@contextmanager
def running_federation(
    home: Path, prepared: Path, variables: Mapping[str, str] | None = None
) -> Iterator[Federation]:
    """Have a server and its sites for the length of a block.

    ``variables`` are further ones of the server's environment.
    """
    federation = Federation(home, prepared, variables)
    try:
        yield federation
    finally:
        federation.shut_down()
