"""Server and clients are killed at every fault point: rounds go on, each delta counts once."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import select

from fedra_edge.protocol.fault_points import FAULT_POINTS, FAULT_VARIABLE
from fedra_server.auditing import AuditReport, audit
from fedra_server.chain import Head
from fedra_server.http.receiving import BLOCK_BYTES
from fedra_server.publishing import trained_pieces
from fedra_server.runs import AssignmentState, RunState
from fedra_server.storage import migrating, tables
from tests.support.edges import EdgeSite, wait_until
from tests.support.federation import MODEL, NO_FRAMEWORK, Federation, running_federation
from tests.support.headquarters import create_run
from tests.support.servers import run_server_command, serve_until_killed
from tests.support.sites import write_folder

pytestmark = pytest.mark.e2e

ROUNDS = 2
NAMES = ("north", "south")
QUICK = {"batch_size": 6, "max_steps": 2}
MUCH = 1024
"""An adapter rank that makes a delta take several writes, each of a block and a chunk at most."""
LONG = {"batch_size": 6, "local_epochs": 1000, "max_steps": 500}
"""Seconds of training, so that there is a middle to be stopped in."""
IN_A_ROUND = (
    "assign.decided", "assign.recorded",
    "upload.created", "upload.received", "upload.synced", "upload.complete",
    "admission.checked", "admission.moved", "admission.recorded", "admission.recorded:2",
    "merge.piece:3", "publish.decided", "publish.written", "publish.recorded",
)  # fmt: skip
AT_A_SITE = ("download.part", "outbox.tensors", "outbox.kept", "send.received")
IN_TRAINING = ("checkpoint.begun", "checkpoint.saved")
ON_ITS_OWN = {
    "upload.written", "migrate.step", "collect.aside", "collect.deleted", "prune.recorded"
}  # fmt: skip
OF_A_MEMBERSHIP = {
    "enrol.made", "enrol.received", "enrol.recorded", "rotate.made", "rotate.told", "key.changed",
}  # fmt: skip
"""Killed there in `test_joining.py` and `test_server_trust.py`."""


@dataclass
class Pair:
    """A server and two sites that have measured the model."""

    federation: Federation
    runs: int = 0

    @property
    def north(self) -> EdgeSite:
        return self.federation.sites["north"]

    def create_run(
        self,
        training: Mapping[str, object] = QUICK,
        *,
        rank: int = 2,
        rounds: int = ROUNDS,
        **settings: object,
    ) -> str:
        """Create a run whose first adapters no site has seen."""
        self.runs += 1
        model = self.federation.store.model_by_name(MODEL).spec
        return create_run(
            self.federation.store,
            self.federation.blobs,
            model,
            f"run-{self.runs}",
            adapter={"rank": rank, "alpha": 4.0, "targets": model.default_targets},
            training=training,
            graphs=model.graphs,
            rounds=rounds,
            merge_weighting="uniform",
            seed=self.runs,
            **settings,
        ).run

    def kill_server_at(self, fault_point: str) -> None:
        """Serve until the server kills itself there."""
        home, port = self.federation.home.path, int(self.federation.url.rpartition(":")[2])
        self.federation.kill_server()
        serve_until_killed(home, fault_point, port=port, without=NO_FRAMEWORK)

    @contextmanager
    def north_armed(self, fault_point: str) -> Iterator[None]:
        """Let a client that is started in the block kill itself there."""
        self.north.variables = {FAULT_VARIABLE: fault_point}
        try:
            yield
        finally:
            self.north.variables = {}

    def work_of(self, run: str) -> dict[str, AssignmentState]:
        """See who has what work in the first round, and how far it is."""
        records = self.federation.store.assignments(run, 1)
        return {record.assignment_id: record.state for record in records}

    def check_run(self, run: str, begun: dict[str, AssignmentState]) -> None:
        """The round that had begun went on, and all that was trained is merged exactly once."""
        rounds = self.federation.store.run(run).spec.rounds
        self.federation.wait_for_rounds(run, rounds)
        assert [record.draws for record in self.federation.store.rounds(run)] == [1] * rounds
        done = self.work_of(run)
        assert len(done) == len(NAMES)
        assert not begun or done.keys() == begun.keys()
        records = self.federation.store.assignments(run)
        assert {record.state for record in records} == {AssignmentState.MERGED}
        assert merged_pieces(self.federation, run) == sorted(
            (record.assignment_id, piece, record.round_number)
            for record in records
            for piece in trained_pieces(record.manifest.trained_layer_ids)
        )
        for number in range(1, rounds + 1):
            self.federation.check_merge(run, number)
        for site in self.federation.sites.values():
            wait_until(f"an empty outbox at {site.name}", partial(has_empty_outbox, site))
            assert done.keys().isdisjoint(site.deltas_refused)
        found = self.audited(run)
        assert found.is_clean, found

    def audited(self, run: str) -> AuditReport:
        """Compute every revision of a run again."""
        store = self.federation.store
        assert isinstance(store.verify_journal(), Head)
        assert store.first_contradiction() is None
        return audit(store, self.federation.blobs, self.federation.home, run=run)


def merged_pieces(federation: Federation, run: str) -> list[tuple[str, str, int]]:
    columns = tables.merges.c
    query = select(columns.assignment_id, columns.piece, columns.revision)
    with federation.store.reading() as connection:
        rows = connection.execute(query.where(columns.run == run)).all()
    return sorted((row.assignment_id, row.piece, row.revision) for row in rows)


def has_empty_outbox(site: EdgeSite) -> bool:
    return site.deltas_waiting == 0


@pytest.fixture(scope="module")
def lasting_pair(prepared_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    place = tmp_path_factory.mktemp("faults")
    with running_federation(place / "server", prepared_home) as federation:
        for seed, name in enumerate(NAMES):
            data = write_folder(place / "data" / name, seed).path
            federation.add_site(name, data, place, "--backend", "onnx")
        pair = Pair(federation)
        federation.have_running(list(federation.sites.values()))
        pair.check_run(pair.create_run(), {})
        yield pair


@pytest.fixture
def pair(lasting_pair: Pair) -> Iterator[Pair]:
    """Server and clients are there before each test, and no run is left behind."""
    lasting_pair.federation.have_server()
    lasting_pair.federation.have_running(list(lasting_pair.federation.sites.values()))
    yield lasting_pair
    lasting_pair.federation.end_runs()


def test_every_fault_point_is_tested_here() -> None:
    tested = {point.partition(":")[0] for point in (*IN_A_ROUND, *AT_A_SITE, *IN_TRAINING)}
    assert tested | ON_ITS_OWN | OF_A_MEMBERSHIP == FAULT_POINTS


@pytest.mark.parametrize("fault_point", IN_A_ROUND)
def test_a_round_goes_on_after_its_server_was_killed(pair: Pair, fault_point: str) -> None:
    run = pair.create_run()
    pair.kill_server_at(fault_point)
    begun = pair.work_of(run)
    assert (begun == {}) == (fault_point == "assign.decided")
    pair.federation.start_server_again()
    pair.check_run(run, begun)


@pytest.mark.parametrize(
    "fault_point", ["admission.recorded:2", "publish.written:2", "publish.recorded"]
)
def test_a_buffered_run_goes_on_after_its_server_was_killed(pair: Pair, fault_point: str) -> None:
    run = pair.create_run(mode="buffered", max_layers=2)
    pair.kill_server_at(fault_point)
    pair.federation.start_server_again()
    wait_until("the end", lambda: pair.federation.store.run(run).state is RunState.FINISHED)
    found = pair.audited(run)
    assert found.is_clean, found
    assert found.runs[0].recomputed == ROUNDS + 1


def test_an_upload_goes_on_in_the_middle_of_a_file(pair: Pair) -> None:
    run = pair.create_run(rank=MUCH)
    pair.kill_server_at("upload.written")
    begun = pair.work_of(run)
    parts = list(pair.federation.home.uploads.glob("*.part"))
    received_bytes = max(part.stat().st_size for part in parts)
    assert received_bytes > 0
    pair.federation.start_server_again()
    pair.check_run(run, begun)
    deltas = [pair.federation.home.deltas / f"{name}.safetensors" for name in begun]
    assert all(delta.stat().st_size > max(received_bytes, 2 * BLOCK_BYTES) for delta in deltas)


@pytest.mark.parametrize("fault_point", AT_A_SITE)
def test_a_round_goes_on_after_a_client_was_killed(pair: Pair, fault_point: str) -> None:
    pair.north.client.kill()
    run = pair.create_run()
    with pair.north_armed(fault_point):
        assert pair.north.join().wait_for_end() == -signal.SIGKILL
    begun = pair.work_of(run)
    assert len(begun) == len(NAMES)
    pair.north.join()
    pair.check_run(run, begun)


@pytest.mark.parametrize("fault_point", IN_TRAINING)
def test_training_goes_on_after_a_client_was_killed_as_it_saved(
    pair: Pair, fault_point: str
) -> None:
    pair.north.client.kill()
    run = pair.create_run(LONG, rounds=1)
    with pair.north_armed(fault_point):
        client = pair.north.join()
        client.wait_for("a step", lambda event: event["run"] == run and event["steps_done"])
        assert client.ask_to_stop() == -signal.SIGKILL  # a client that is stopped saves
    begun = pair.work_of(run)
    assert len(begun) == len(NAMES)
    pair.north.join()
    pair.check_run(run, begun)


@pytest.mark.parametrize("fault_point", ["collect.aside", "collect.deleted"])
def test_a_killed_collector_loses_nothing_and_leaves_nothing(pair: Pair, fault_point: str) -> None:
    federation = pair.federation
    orphans = [federation.blobs.put_bytes(os.urandom(16)) for _ in range(3)]
    for orphan in orphans:
        os.utime(federation.blobs.path(orphan.sha256), (1.0, 1.0))
    needed = {blob.sha256 for blob in federation.blobs.stored()} - {it.sha256 for it in orphans}
    run = pair.create_run()
    pair.kill_server_at(fault_point)
    pair.federation.start_server_again()
    wait_until(
        "no orphan is left",
        lambda: not any(federation.blobs.has(orphan.sha256) for orphan in orphans),
    )
    pair.check_run(run, {})
    assert {blob.sha256 for blob in federation.blobs.stored()} >= needed
    assert list((federation.home.blobs / "incoming").glob("*.aside")) == []


def test_a_killed_prune_is_finished_by_the_next(pair: Pair) -> None:
    run = pair.create_run()
    pair.check_run(run, {})
    files = [pair.federation.home.deltas / f"{name}.safetensors" for name in pair.work_of(run)]
    prune = ["prune", run, "--keep-revisions", "1", "--home", str(pair.federation.home.path)]
    killed = run_server_command(*prune, variables={FAULT_VARIABLE: "prune.recorded"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert all(file.exists() for file in files)
    done = run_server_command(*prune, "--json")
    assert json.loads(done.stdout)["deltas"] == ROUNDS * len(NAMES)
    assert not any(file.exists() for file in files)
    export = ["export", "--run", run, "--home", str(pair.federation.home.path), "--out"]
    pruned = run_server_command(*export, "pruned", "--revision", "1", check=False)
    assert pruned.returncode == 4
    assert "oldest revision that is kept is 2" in pruned.stderr
    found = pair.audited(run)
    assert found.is_clean, found
    assert (found.runs[0].pruned, found.runs[0].recomputed) == (ROUNDS + 1, 0)


def test_a_killed_migration_is_taken_again_with_a_round_on_its_way(pair: Pair) -> None:
    federation = pair.federation
    before = pair.create_run()
    pair.check_run(before, {})
    run = pair.create_run()
    pair.kill_server_at("upload.created")
    begun = pair.work_of(run)
    merges = merged_pieces(federation, before)
    _take_steps_back(federation)
    serve_until_killed(federation.home.path, "migrate.step", without=NO_FRAMEWORK)
    federation.start_server_again()
    assert merged_pieces(federation, before) == merges
    pair.check_run(run, begun)


def _take_steps_back(federation: Federation) -> None:
    """Make the database what the first version wrote."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrating.__file__).parent / "migrations"))
    with federation.store.writing() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0001")
