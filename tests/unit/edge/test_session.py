"""The client loop against a real server: whole runs, and everything that goes wrong in one."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from typing_extensions import override

from fedra_edge import session
from fedra_edge.client import EdgeClient
from fedra_edge.config import EdgeConfig, load_config
from fedra_edge.errors import DataError, NotAuthenticatedError, NotFoundError, SliceError
from fedra_edge.outbox import Outbox
from fedra_edge.progress import ClientProgress, Phase
from fedra_edge.protocol.ids import AssignmentId, RunId
from fedra_edge.protocol.messages import ClientStatus, RejoinRequest
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.rounds import Wait
from fedra_edge.retrying import RetryPolicy
from fedra_edge.training.trainer import BlockCost, GraphFiles, UsableMemory
from fedra_server.config import ServerConfig
from fedra_server.runs import AssignmentState
from tests.support.builders import make_training_report
from tests.support.disks import fill, small_disk
from tests.support.edge_site import (
    PATIENCE_S,
    CountingTrainer,
    MemoryDataset,
    eventually,
    with_solid_model,
)
from tests.support.gate import Gate, make_member
from tests.support.headquarters import Headquarters, headquarters, home_in
from tests.support.servers import running_server
from tests.support.wire_server import Received, Reply, serving, unused_port

_NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def hq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Headquarters]:
    config = ServerConfig(max_enrolments_per_minute=10_000)
    with headquarters(home_in(tmp_path_factory.mktemp("hq")), config) as running:
        yield with_solid_model(running)


@pytest.fixture
def run(hq: Headquarters) -> Iterator[RunId]:
    with hq.run(f"run-{next(_NUMBERS)}", rounds=2, min_participants=1) as record:
        yield record.run


@pytest.fixture
def long_run(hq: Headquarters) -> Iterator[RunId]:
    training = {"batch_size": 2, "local_epochs": 100}
    name = f"run-{next(_NUMBERS)}"
    with hq.run(name, rounds=2, min_participants=1, training=training) as record:
        yield record.run


@pytest.fixture
def hasty_run(hq: Headquarters) -> Iterator[RunId]:
    name = f"run-{next(_NUMBERS)}"
    with hq.run(name, rounds=1, min_participants=1, deadline_s=2.0) as record:
        yield record.run


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


def failures(hq: Headquarters, run: RunId) -> list[str]:
    """Give what the server was told of assignments that failed in the first round."""
    assignments = hq.services.store.assignments(run, 1)
    return [item.detail for item in assignments if item.state is AssignmentState.FAILED]


def test_training_that_fails_is_told_and_the_client_goes_on(
    hq: Headquarters, hasty_run: RunId, tmp_path: Path
) -> None:
    failed: list[int] = []

    def explode_once(step: int) -> None:
        if not failed:
            failed.append(step)
            raise MemoryError("an array of /secret/place")

    trainer = CountingTrainer(before_step=explode_once)
    config = settings(hq, tmp_path, hasty_run)
    with EdgeClient(config, dataset=MemoryDataset(), trainer=trainer) as client:
        assert client.wait(PATIENCE_S)
    told = failures(hq, hasty_run)[0]
    assert "MemoryError" in told
    assert "secret" not in told
    assert client.status.rounds_contributed == 1


@dataclass
class UnwellTrainer(CountingTrainer):
    """Cannot measure a block at first."""

    @override
    def calibrate(
        self, spec: ModelSpec, usable_memory: UsableMemory, graphs: GraphFiles | None = None
    ) -> BlockCost:
        cost = super().calibrate(spec, usable_memory, graphs)
        if len(self.calibrated) == 1:
            raise SliceError("the block does not fit", remedy="Free memory.")
        return cost


def test_a_calibration_that_fails_is_shown_and_tried_again(
    hq: Headquarters, run: RunId, tmp_path: Path
) -> None:
    shown: list[str] = []
    client = EdgeClient(
        settings(hq, tmp_path, run),
        dataset=MemoryDataset(),
        trainer=UnwellTrainer(),
        on_progress=lambda progress: shown.append(progress.detail),
    )
    with client:
        assert client.wait(PATIENCE_S)
    assert any("the block does not fit (Free memory.)" in detail for detail in shown)
    assert client.status.rounds_contributed == 2


def test_a_full_disk_is_told_and_the_round_goes_on_when_there_is_space(
    hq: Headquarters, tmp_path: Path
) -> None:
    name = f"run-{next(_NUMBERS)}"
    with small_disk(tmp_path / "disk", size_bytes=400_000) as disk:
        config = settings(hq, disk / "home", None)
        with EdgeClient(config, dataset=MemoryDataset(), trainer=CountingTrainer()) as client:
            eventually(lambda: client.status.client_id is not None)
            filler = fill(disk)
            with hq.run(name, rounds=1, min_participants=1, deadline_s=2.0) as record:
                eventually(lambda: failures(hq, record.run))
                assert "disk or cache quota is full" in failures(hq, record.run)[0]
                assert client.error is None
                filler.unlink()
                eventually(lambda: client.status.rounds_contributed == 1)


@pytest.mark.parametrize("has_cache", [True, False])
def test_a_finished_delta_outlives_a_full_disk(
    hq: Headquarters, tmp_path: Path, has_cache: bool
) -> None:
    with small_disk(tmp_path / "disk", size_bytes=400_000) as disk:
        fillers: list[Path] = []

        def fill_disk() -> None:
            for path in () if has_cache else (disk / "home").rglob("blobs/*/*"):
                path.unlink()
            fillers.append(fill(disk))

        trainer = CountingTrainer(when_trained=fill_disk)
        config = settings(hq, disk / "home", None)
        with EdgeClient(config, dataset=MemoryDataset(), trainer=trainer) as client:
            eventually(lambda: client.status.client_id is not None)
            name = f"run-{next(_NUMBERS)}"
            with hq.run(name, rounds=1, min_participants=1) as record:
                if not has_cache:
                    eventually(lambda: client.status.detail.endswith("waits for disk space"))
                    fillers[0].unlink()
                eventually(lambda: client.status.rounds_contributed == 1)
                assert failures(hq, record.run) == []
                assert len(trainer.trained) == 1


def test_who_stops_while_a_delta_waits_for_space_is_not_held(
    hq: Headquarters, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", size_bytes=400_000) as disk:

        def fill_disk() -> None:
            for path in (disk / "home").rglob("blobs/*/*"):
                path.unlink()
            fill(disk)

        trainer = CountingTrainer(when_trained=fill_disk)
        config = settings(hq, disk / "home", None)
        with EdgeClient(config, dataset=MemoryDataset(), trainer=trainer) as client:
            eventually(lambda: client.status.client_id is not None)
            name = f"run-{next(_NUMBERS)}"
            with hq.run(name, rounds=1, min_participants=1) as record:
                eventually(lambda: client.status.detail.endswith("waits for disk space"))
                client.stop()
                (assignment,) = hq.services.store.assignments(record.run, 1)
                assert assignment.state is AssignmentState.PENDING  # to be gone on with
                assert client.status.phase is Phase.STOPPED


def test_data_that_vanishes_ends_the_client_with_the_reason(
    hq: Headquarters, run: RunId, tmp_path: Path
) -> None:
    dataset = MemoryDataset()
    trainer = CountingTrainer(before_step=lambda _step: dataset.lose())
    client = EdgeClient(settings(hq, tmp_path, run), dataset=dataset, trainer=trainer).start()
    with pytest.raises(DataError):
        client.wait(PATIENCE_S)
    assert any("DataError" in told for told in failures(hq, run))


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
    first = CountingTrainer()
    client = EdgeClient(config, dataset=MemoryDataset(), trainer=first)

    def stop_before_it_is_sent() -> None:
        client.stop(0)

    first.when_trained = stop_before_it_is_sent
    client.start().wait(PATIENCE_S)
    (assignment_id,) = first.trained
    assert Outbox(config.outbox).num_waiting == 1
    second = CountingTrainer()
    with EdgeClient(config, dataset=MemoryDataset(), trainer=second) as client:
        assert client.wait(PATIENCE_S)
    assert assignment_id not in second.trained
    state = hq.services.store.assignment(AssignmentId(assignment_id)).state
    assert state is AssignmentState.MERGED


def test_a_delta_at_which_the_server_fails_holds_up_no_other_work(
    hq: Headquarters, run: RunId, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_DELIVERY", RetryPolicy(max_attempts=2, max_wait_s=0.1))

    def curse_the_first(_step: int) -> None:
        assigned = hq.services.store.assignments(run)
        if len(assigned) == 1:  # nothing can be put where a directory is
            hq.services.home.delta_file(assigned[0].assignment_id).mkdir(exist_ok=True)

    config = settings(hq, tmp_path, run)
    trainer = CountingTrainer(before_step=curse_the_first)
    with EdgeClient(config, dataset=MemoryDataset(), trainer=trainer) as client:
        assert client.wait(PATIENCE_S)
    assert client.status.rounds_contributed == 2
    first, *others = hq.services.store.assignments(run)
    assert first.state is AssignmentState.FAILED
    assert "the server fails" in first.detail
    assert [it.state for it in others].count(AssignmentState.MERGED) == 2


def test_a_delta_that_nobody_waits_for_is_kept_apart(
    hq: Headquarters, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(hq, tmp_path, None)
    outbox = Outbox(config.outbox)
    outbox.put(
        AssignmentId("long-gone"), [b"x" * 100], num_examples=1, report=make_training_report()
    )
    with (
        caplog.at_level(logging.WARNING),
        EdgeClient(config, dataset=MemoryDataset(), trainer=CountingTrainer()),
    ):
        eventually((config.outbox / "refused" / "long-gone.safetensors").exists)
    assert "refused the delta of long-gone" in caplog.text
    assert outbox.num_waiting == 0


def test_a_client_that_the_server_does_not_know_says_how_to_leave(
    hq: Headquarters, tmp_path: Path
) -> None:
    config = settings(hq, tmp_path, None)
    make_member(config, "stranger")
    client = EdgeClient(config, dataset=MemoryDataset(), trainer=CountingTrainer()).start()
    with pytest.raises(NotAuthenticatedError) as refusal:
        client.wait(PATIENCE_S)
    assert "fedra-edge leave" in refusal.value.remedy


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
            eventually(lambda: client.status.client_id is not None)  # noqa: B023 (asked at once)
            names.append(client.status.client_id)
    assert names[0] == names[1]


def test_work_that_is_not_wanted_any_more_is_dropped(
    hq: Headquarters, long_run: RunId, tmp_path: Path
) -> None:
    expired: list[AssignmentId] = []

    def expire(_step: int) -> None:
        if not expired:
            (assignment,) = hq.services.store.assignments(long_run, 1)
            expired.append(assignment.assignment_id)
            now = hq.services.clock.now()
            hq.services.store.settle(expired[0], AssignmentState.EXPIRED, "test", now)
        threading.Event().wait(0.05)

    trainer = CountingTrainer(before_step=expire)
    config = settings(hq, tmp_path, long_run)
    with EdgeClient(config, dataset=MemoryDataset(), trainer=trainer) as client:
        eventually(lambda: trainer.interrupted)
        assert client.error is None
    assert trainer.interrupted[0] == expired[0]


def test_why_there_is_no_work_is_shown_at_once_and_stays_shown(
    hq: Headquarters, tmp_path: Path
) -> None:
    shown: list[ClientProgress] = []
    config = settings(hq, tmp_path, None)
    dataset, trainer = MemoryDataset(), CountingTrainer()
    with EdgeClient(config, dataset=dataset, trainer=trainer, on_progress=shown.append) as client:
        eventually(lambda: client.status.phase is Phase.WAITING, timeout_s=2.0)
        reason = client.status.detail
        assert "no run is active" in reason
    assert {it.detail for it in shown if it.phase is Phase.WAITING} == {reason}


def test_only_the_first_question_after_work_is_answered_at_once(
    tmp_path: Path,
) -> None:
    """A server that holds nothing back must not be asked in a tight loop either."""
    asked: list[str] = []
    idle = Reply.of(Wait(reason="too small"))
    back = ClientStatus(
        client_id="c1", name="plant", run=None, is_online=True, rounds_contributed=0,
        open_assignment=None,
    )  # fmt: skip

    def answer(received: Received) -> Reply:
        if received.path.startswith("/v1/assignment"):
            asked.append(parse_qs(urlsplit(received.path).query)["wait_s"][0])
            return idle
        return Reply.of(back) if received.method == "PUT" else Reply(204)

    gate = Gate(behind=answer)
    with serving(gate) as server:
        config = load_config({"server": server.url, "home": tmp_path, "poll_s": 5})
        gate.public_key = make_member(config)
        with EdgeClient(config, dataset=MemoryDataset(), trainer=CountingTrainer()) as client:
            eventually(lambda: len(asked) > 4)
            assert client.status.detail == "too small"
    assert [float(wait_s) for wait_s in asked] == [0.0] + [5.0] * (len(asked) - 1)


@pytest.mark.parametrize("name", [None, "new name"])
def test_a_name_is_sent_again_only_when_it_was_given(name: str | None, tmp_path: Path) -> None:
    told: list[RejoinRequest] = []

    def answer(received: Received) -> Reply:
        if received.method == "PUT":
            told.append(RejoinRequest.model_validate_json(received.body))
        return Reply.problem(ProblemCode.NOT_FOUND, 404)

    gate = Gate(behind=answer)
    with serving(gate) as server:
        config = load_config({"server": server.url, "home": tmp_path, "name": name})
        gate.public_key = make_member(config)
        client = EdgeClient(config, dataset=MemoryDataset(), trainer=CountingTrainer()).start()
        with pytest.raises(NotFoundError):
            client.wait(PATIENCE_S)
    assert [request.name for request in told] == [name]


@pytest.mark.slow
def test_a_client_survives_that_its_server_is_killed_and_comes_back(tmp_path: Path) -> None:
    home, port = tmp_path / "server", unused_port()
    with running_server(home, port=port) as server:
        config = load_config({"server": server.url, "home": tmp_path / "edge"})
        client = EdgeClient(config, dataset=MemoryDataset(), trainer=CountingTrainer()).start()
        try:
            eventually(lambda: client.status.phase is Phase.WAITING)
            before = client.status.client_id
            server.kill()
            eventually(lambda: client.status.phase is Phase.CONNECTING)
            assert "trying again" in client.status.detail
            with running_server(home, port=port):
                eventually(lambda: client.status.phase is Phase.WAITING)
                assert client.error is None
                assert client.status.client_id == before
                client.stop()
        finally:
            client.stop()
