"""What a client keeps of a training: as long as its assignment is wanted, and no longer."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from typing_extensions import override

from fedra_edge.client import EdgeClient
from fedra_edge.config import EdgeConfig, load_config
from fedra_edge.data.matching import MatchedDataset
from fedra_edge.progress import Phase
from fedra_edge.protocol.ids import RunId
from fedra_edge.training.trainer import SliceWork, Surroundings, TrainedSlice
from fedra_server.config import ServerConfig
from fedra_server.runs import AssignmentState
from tests.support.edge_site import (
    PATIENCE_S,
    CountingTrainer,
    MemoryDataset,
    eventually,
    with_solid_model,
)
from tests.support.headquarters import Headquarters, headquarters, home_in

_NUMBERS = itertools.count(1)


@dataclass
class KeepingTrainer(CountingTrainer):
    """Leaves a checkpoint at its first step and notes what it finds there when it begins."""

    found: list[bool] = field(default_factory=list)
    rooms: list[Surroundings] = field(default_factory=list)

    @override
    def train(
        self, work: SliceWork, data: MatchedDataset, surroundings: Surroundings
    ) -> TrainedSlice:
        checkpoint = surroundings.checkpoint
        assert checkpoint is not None
        self.found.append(checkpoint.exists())
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_bytes(work.manifest.assignment_id.encode())
        self.rooms.append(surroundings)
        if self.found[-1]:
            surroundings.on_resume(3, work.manifest.steps)
        return super().train(work, data, surroundings)


@pytest.fixture(scope="module")
def hq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Headquarters]:
    config = ServerConfig(max_enrolments_per_minute=10_000)
    with headquarters(home_in(tmp_path_factory.mktemp("hq")), config) as running:
        yield with_solid_model(running)


@pytest.fixture
def run(hq: Headquarters) -> Iterator[RunId]:
    training = {"batch_size": 2, "local_epochs": 100}
    name = f"run-{next(_NUMBERS)}"
    with hq.run(name, rounds=1, min_participants=1, training=training) as record:
        yield record.run


def settings(hq: Headquarters, home: Path, run: RunId) -> EdgeConfig:
    values = {"server": hq.url, "home": home, "run": run, "heartbeat_s": 0.05, "poll_s": 5}
    return load_config(values)


def dawdle(_step: int) -> None:
    threading.Event().wait(0.05)


def kept(config: EdgeConfig) -> list[str]:
    return [path.stem for path in config.checkpoints.glob("*")]


def test_nothing_is_kept_of_what_is_in_the_outbox(
    hq: Headquarters, run: RunId, tmp_path: Path
) -> None:
    config, trainer = settings(hq, tmp_path, run), KeepingTrainer()
    config.checkpoints.mkdir(parents=True)
    for name in ("other.safetensors", "other.safetensors.new"):
        (config.checkpoints / name).write_bytes(b"of an assignment long settled")
    trainer.when_trained = lambda: left.extend(kept(config))
    left: list[str] = []
    with EdgeClient(config, dataset=MemoryDataset(), trainer=trainer) as client:
        assert client.wait(PATIENCE_S)
    assert left == trainer.trained
    assert trainer.found == [False]
    assert kept(config) == []


def test_a_stopped_client_comes_back_to_its_assignment_and_finds_what_it_kept(
    hq: Headquarters, run: RunId, tmp_path: Path
) -> None:
    config, trainer = settings(hq, tmp_path, run), KeepingTrainer(before_step=dawdle)
    with EdgeClient(config, dataset=MemoryDataset(), trainer=trainer) as client:
        eventually(lambda: client.status.steps_done > 2)
        assert not trainer.rooms[0].is_to_rest()
    assert trainer.rooms[0].is_to_rest()
    [assignment] = hq.services.store.assignments(run)
    assert assignment.state is AssignmentState.PENDING
    assert kept(config) == trainer.interrupted == [assignment.assignment_id]

    trainer.before_step = lambda _: None
    shown: list[str] = []
    again = EdgeClient(
        config,
        dataset=MemoryDataset(),
        trainer=trainer,
        on_progress=lambda progress: shown.append(progress.detail),
    )
    with again:
        assert again.wait(PATIENCE_S)
    assert any("going on after step 3 of" in detail for detail in shown)
    assert trainer.found == [False, True]
    assert trainer.trained == [assignment.assignment_id]
    assert kept(config) == []


def test_a_pause_is_a_moment_to_keep_what_was_reached(
    hq: Headquarters, run: RunId, tmp_path: Path
) -> None:
    config, trainer = settings(hq, tmp_path, run), KeepingTrainer(before_step=dawdle)
    with EdgeClient(config, dataset=MemoryDataset(), trainer=trainer) as client:
        eventually(lambda: client.status.steps_done > 2)
        client.pause()
        eventually(lambda: client.status.phase is Phase.PAUSED)
        assert trainer.rooms[0].is_to_rest()
        client.resume()
        assert not trainer.rooms[0].is_to_rest()


def test_nothing_is_kept_of_what_nobody_wants_any_more_and_that_is_told(
    hq: Headquarters, run: RunId, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shown: list[str] = []
    config, trainer = settings(hq, tmp_path, run), KeepingTrainer(before_step=dawdle)
    store = hq.services.store
    client = EdgeClient(
        config,
        dataset=MemoryDataset(),
        trainer=trainer,
        on_progress=lambda progress: shown.append(progress.detail),
    )
    with client:
        eventually(lambda: client.status.steps_done > 2)
        [assignment] = store.assignments(run)
        now = hq.services.clock.now()
        store.settle(assignment.assignment_id, AssignmentState.EXPIRED, "test", now)
        eventually(lambda: trainer.interrupted)
        eventually(lambda: assignment.assignment_id not in kept(config))
    assert any("no longer waits for this slice" in detail for detail in shown)
    told = [record for record in caplog.records if "no longer waits" in record.getMessage()]
    assert [record.levelno for record in told] == [logging.WARNING] * len(trainer.interrupted)


def test_nothing_is_kept_of_what_failed(hq: Headquarters, run: RunId, tmp_path: Path) -> None:
    config, trainer = settings(hq, tmp_path, run), KeepingTrainer()

    def fail(step: int) -> None:
        if step == 3:
            raise RuntimeError("the machine is on fire")

    trainer.before_step = fail
    with EdgeClient(config, dataset=MemoryDataset(), trainer=trainer):
        eventually(lambda: trainer.found)
        [assignment] = hq.services.store.assignments(run)
        eventually(lambda: assignment.assignment_id not in kept(config))
