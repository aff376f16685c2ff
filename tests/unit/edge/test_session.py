"""The client loop against a real server: whole runs, and everything that goes wrong in one."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedra_edge.client import EdgeClient
from fedra_edge.config import EdgeConfig, load_config
from fedra_edge.errors import DataError, NotAuthenticatedError, NotFoundError
from fedra_edge.identity import Identity, IdentityFile
from fedra_edge.outbox import Outbox
from fedra_edge.progress import Phase
from fedra_edge.protocol.ids import AssignmentId, ClientId, RunId
from fedra_edge.protocol.tensors import serialize_tensors
from fedra_server.config import ServerConfig
from fedra_server.runs import AssignmentState
from tests.support.builders import make_report
from tests.support.edge_site import (
    PATIENCE_S,
    CountingTrainer,
    MemoryDataset,
    eventually,
    with_solid_model,
)
from tests.support.headquarters import Headquarters, headquarters, home_in

_NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def hq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Headquarters]:
    config = ServerConfig(max_enrolments_per_minute=10_000)
    with headquarters(home_in(tmp_path_factory.mktemp("hq")), config) as running:
        yield with_solid_model(running)


@pytest.fixture
def run(hq: Headquarters) -> RunId:
    return hq.create_run(f"run-{next(_NUMBERS)}", rounds=2, min_participants=1).run


def settings(hq: Headquarters, home: Path, run: str | None) -> EdgeConfig:
    return load_config(
        {"server": hq.url, "home": home, "run": run, "heartbeat_s": 0.05, "poll_s": 5}
    )


def test_a_client_takes_part_until_its_run_is_over(
    hq: Headquarters, run: RunId, tmp_path: Path
) -> None:
    trainer = CountingTrainer()
    config = settings(hq, tmp_path, run)
    with EdgeClient(config, dataset=MemoryDataset(), trainer=trainer) as client:
        assert client.wait(PATIENCE_S)
    assert client.status.phase is Phase.STOPPED
    assert client.status.rounds_contributed == 2
    assert trainer.calibrated == ["solid"]
    assert len(trainer.trained) == 2
    store = hq.services.store
    assert [record.manifest.number for record in store.revisions(run)] == [0, 1, 2]
    told = {record.evaluation.revision for record in store.evaluations(run)}
    assert told == {0, 1, 2}
    for number in (1, 2):
        (assignment,) = store.assignments(run, number)
        assert assignment.state is AssignmentState.MERGED
        assert assignment.delta is not None
        assert assignment.delta.num_examples == 24
        assert assignment.delta.report.bytes_received > 0
        assert assignment.delta.report.peak_memory_bytes > 0
    assert Outbox(config.outbox).num_waiting == 0


def test_frozen_weights_are_fetched_only_once(hq: Headquarters, run: RunId, tmp_path: Path) -> None:
    config = settings(hq, tmp_path, run)
    with EdgeClient(config, dataset=MemoryDataset(), trainer=CountingTrainer()) as client:
        client.wait(PATIENCE_S)
    first, second = (
        assignment.delta.report.bytes_received
        for number in (1, 2)
        for assignment in hq.services.store.assignments(run, number)
        if assignment.delta is not None
    )
    assert second < first


def test_training_that_fails_is_told_and_the_client_goes_on(
    hq: Headquarters, tmp_path: Path
) -> None:
    run = hq.create_run(f"run-{next(_NUMBERS)}", rounds=2, min_participants=1).run
    failed: list[int] = []

    def explode(step: int) -> None:
        if not failed:
            failed.append(step)
            raise MemoryError("an array of /secret/place")

    clumsy = CountingTrainer(before_step=explode)
    one = EdgeClient(settings(hq, tmp_path / "a", run), dataset=MemoryDataset(), trainer=clumsy)
    with one:
        eventually(lambda: failed)
        two = EdgeClient(
            settings(hq, tmp_path / "b", run), dataset=MemoryDataset(), trainer=CountingTrainer()
        )
        hq.services.coordinator.wake()
        (assignment,) = (
            item
            for item in hq.services.store.assignments(run, 1)
            if item.client_id == one.status.client_id
        )
        eventually(
            lambda: (
                hq.services.store.assignment(assignment.assignment_id).state
                is AssignmentState.FAILED
            )
        )
        told = hq.services.store.assignment(assignment.assignment_id).detail
        assert "MemoryError" in told
        assert "secret" not in told
        assert one.error is None
        assert one.status.phase is not Phase.FAILED
        two.stop()


def test_data_that_vanishes_ends_the_client_with_the_reason(
    hq: Headquarters, run: RunId, tmp_path: Path
) -> None:
    dataset = MemoryDataset()
    trainer = CountingTrainer(before_step=lambda _step: dataset.lose())
    client = EdgeClient(settings(hq, tmp_path, run), dataset=dataset, trainer=trainer).start()
    with pytest.raises(DataError):
        client.wait(PATIENCE_S)
    (assignment,) = hq.services.store.assignments(run, 1)
    assert assignment.state is AssignmentState.FAILED
    assert "DataError" in assignment.detail


def test_data_that_the_model_does_not_know_ends_the_client(
    hq: Headquarters, run: RunId, tmp_path: Path
) -> None:
    dataset = MemoryDataset(labels=("cat", "dog"))
    trainer = CountingTrainer()
    client = EdgeClient(settings(hq, tmp_path, run), dataset=dataset, trainer=trainer).start()
    with pytest.raises(DataError, match="unknown to the model"):
        client.wait(PATIENCE_S)


def test_a_delta_that_was_not_sent_is_sent_by_the_next_process(
    hq: Headquarters, run: RunId, tmp_path: Path
) -> None:
    config = settings(hq, tmp_path, run)
    asked = []

    def stop_in_the_last_step(step: int) -> None:
        if step > 1 or not asked:
            asked.append(step)

    first = CountingTrainer(before_step=stop_in_the_last_step)
    with EdgeClient(config, dataset=MemoryDataset(), trainer=first) as client:
        eventually(lambda: first.trained or client.error)
        assignment_id = AssignmentId(first.trained[0])
    outbox = Outbox(config.outbox)
    manifest = hq.services.store.assignment(assignment_id).manifest
    if hq.services.store.assignment(assignment_id).state is not AssignmentState.MERGED:
        tensors = serialize_tensors(hq.delta_tensors(manifest))
        outbox.put(assignment_id, tensors, num_examples=3, report=make_report())
    second = CountingTrainer()
    with EdgeClient(config, dataset=MemoryDataset(), trainer=second) as client:
        assert client.wait(PATIENCE_S)
    assert assignment_id not in second.trained
    assert hq.services.store.assignment(assignment_id).state is AssignmentState.MERGED


def test_a_delta_that_nobody_waits_for_is_kept_apart(
    hq: Headquarters, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(hq, tmp_path, None)
    outbox = Outbox(config.outbox)
    outbox.put(AssignmentId("long-gone"), b"x" * 100, num_examples=1, report=make_report())
    with (
        caplog.at_level(logging.WARNING),
        EdgeClient(config, dataset=MemoryDataset(), trainer=CountingTrainer()),
    ):
        eventually(lambda: (config.outbox / "refused" / "long-gone.safetensors").exists())
    assert "refused the delta of long-gone" in caplog.text
    assert outbox.num_waiting == 0


def test_a_credential_that_the_server_does_not_know_says_how_to_leave(
    hq: Headquarters, tmp_path: Path
) -> None:
    config = settings(hq, tmp_path, None)
    identity = Identity(ClientId("c1"), "not-the-credential")
    IdentityFile(config.membership, config.server).save(identity)
    client = EdgeClient(config, dataset=MemoryDataset(), trainer=CountingTrainer()).start()
    with pytest.raises(NotAuthenticatedError) as refusal:
        client.wait(PATIENCE_S)
    assert "fedra-edge leave" in refusal.value.remedy
    assert "not-the-credential" not in str(refusal.value)


def test_a_run_that_does_not_exist_is_told(hq: Headquarters, tmp_path: Path) -> None:
    config = settings(hq, tmp_path, "no-such-run")
    client = EdgeClient(config, dataset=MemoryDataset(), trainer=CountingTrainer()).start()
    with pytest.raises(NotFoundError, match="no-such-run"):
        client.wait(PATIENCE_S)


def test_a_returning_client_is_the_same_client(hq: Headquarters, tmp_path: Path) -> None:
    config = settings(hq, tmp_path, None)
    names = []
    for _ in range(2):
        client = EdgeClient(config, dataset=MemoryDataset(), trainer=CountingTrainer())
        with client:
            eventually(lambda client=client: client.status.client_id)
            names.append(client.status.client_id)
    assert names[0] == names[1]


def test_work_that_is_not_wanted_any_more_is_dropped(
    hq: Headquarters, run: RunId, tmp_path: Path
) -> None:
    stopped = []

    def end_the_assignment(_step: int) -> None:
        if stopped:
            eventually(lambda: not stopped, timeout_s=0.1) if len(stopped) < 0 else None
            return
        (assignment,) = hq.services.store.assignments(run, 1)
        stopped.append(assignment.assignment_id)
        hq.services.store.settle(
            assignment.assignment_id, AssignmentState.EXPIRED, "test", hq.services.clock.now()
        )

    trainer = CountingTrainer(before_step=end_the_assignment)
    config = settings(hq, tmp_path, run)
    with EdgeClient(config, dataset=MemoryDataset(), trainer=trainer) as client:
        eventually(lambda: stopped)
        assert client.error is None
