"""The client inside another program: steered from outside, in nobody's way."""

from __future__ import annotations

import itertools
import logging
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedra_edge
from fedra_edge.client import EdgeClient
from fedra_edge.config import EdgeConfig, load_config
from fedra_edge.errors import ConfigurationError, ServerRefusedError
from fedra_edge.progress import ClientProgress, Phase
from fedra_edge.protocol.ids import RunId
from fedra_server.config import ServerConfig
from tests.support.edge_site import (
    PATIENCE_S,
    CountingTrainer,
    MemoryDataset,
    eventually,
    with_solid_model,
)
from tests.support.headquarters import Headquarters, headquarters, home_in
from tests.support.wire_server import unused_port

_NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def hq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Headquarters]:
    config = ServerConfig(max_enrolments_per_minute=10_000)
    with headquarters(home_in(tmp_path_factory.mktemp("hq")), config) as running:
        yield with_solid_model(running)


@pytest.fixture
def run(hq: Headquarters) -> Iterator[RunId]:
    training = {"batch_size": 2, "local_epochs": 50}
    name = f"run-{next(_NUMBERS)}"
    with hq.run(name, rounds=1, min_participants=1, training=training) as record:
        yield record.run


def settings(hq: Headquarters, home: Path, run: str | None = None) -> EdgeConfig:
    return load_config({"server": hq.url, "home": home, "run": run, "heartbeat_s": 0.05})


def idle_client(hq: Headquarters, home: Path) -> EdgeClient:
    return EdgeClient(settings(hq, home), dataset=MemoryDataset(), trainer=CountingTrainer())


def is_online(hq: Headquarters, client: EdgeClient) -> bool:
    known = {record.client_id: record for record in hq.services.store.clients()}
    return any(record.is_online for key, record in known.items() if key == client.status.client_id)


def test_starting_returns_at_once_and_stopping_wakes_the_long_poll(
    hq: Headquarters, tmp_path: Path
) -> None:
    started = time.monotonic()
    client = idle_client(hq, tmp_path).start()
    assert time.monotonic() - started < 1
    eventually(lambda: client.status.phase is Phase.WAITING and is_online(hq, client))
    asked = time.monotonic()
    assert client.stop()
    assert time.monotonic() - asked < 5
    assert client.status.phase is Phase.STOPPED
    assert not is_online(hq, client)


def test_the_host_program_keeps_its_signals_logging_and_threads(
    hq: Headquarters, tmp_path: Path
) -> None:
    before = (
        signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGTERM),
        list(logging.getLogger().handlers),
        logging.getLogger("fedra_edge").level,
        set(threading.enumerate()),
    )
    with idle_client(hq, tmp_path) as client:
        eventually(lambda: client.status.client_id is not None)
        own = [thread for thread in threading.enumerate() if thread.name == "fedra-edge"]
        assert [thread.daemon for thread in own] == [False]
    after = (
        signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGTERM),
        list(logging.getLogger().handlers),
        logging.getLogger("fedra_edge").level,
        set(threading.enumerate()),
    )
    assert before[:4] == after[:4]
    assert not [thread for thread in after[4] if thread.name.startswith("fedra-edge")]


def test_a_client_starts_only_once(hq: Headquarters, tmp_path: Path) -> None:
    with idle_client(hq, tmp_path) as client, pytest.raises(ConfigurationError, match="once"):
        client.start()


def test_stopping_what_never_started_is_harmless(hq: Headquarters, tmp_path: Path) -> None:
    client = idle_client(hq, tmp_path)
    assert client.stop()
    assert client.wait()


def test_a_client_can_be_stopped_before_its_server_exists(tmp_path: Path) -> None:
    config = load_config({"server": f"http://127.0.0.1:{unused_port()}", "home": tmp_path})
    client = EdgeClient(config, dataset=MemoryDataset(), trainer=CountingTrainer()).start()
    eventually(lambda: "trying again" in client.status.detail)
    assert client.status.phase is Phase.CONNECTING
    assert client.stop(5)
    assert client.error is None


def test_one_home_serves_one_client_at_a_time(hq: Headquarters, tmp_path: Path) -> None:
    with idle_client(hq, tmp_path) as first:
        eventually(lambda: first.status.client_id is not None)
        second = idle_client(hq, tmp_path).start()
        with pytest.raises(ConfigurationError, match="another client is running"):
            second.wait(PATIENCE_S)
        assert second.status.phase is Phase.FAILED
        assert first.error is None


def test_without_data_there_is_no_client(hq: Headquarters, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no local data"):
        EdgeClient(settings(hq, tmp_path), trainer=CountingTrainer())


def test_a_pause_between_rounds_tells_the_server(hq: Headquarters, tmp_path: Path) -> None:
    config = load_config({"server": hq.url, "home": tmp_path, "poll_s": 0.1})
    with EdgeClient(config, dataset=MemoryDataset(), trainer=CountingTrainer()) as client:
        eventually(lambda: is_online(hq, client))
        client.pause()
        eventually(lambda: client.status.phase is Phase.PAUSED)
        assert not is_online(hq, client)
        client.resume()
        eventually(lambda: is_online(hq, client))


def test_a_pause_holds_training_at_a_step_and_a_resume_goes_on(
    hq: Headquarters, run: RunId, tmp_path: Path
) -> None:
    trainer = CountingTrainer()
    config = settings(hq, tmp_path, run)
    client = EdgeClient(config, dataset=MemoryDataset(), trainer=trainer)
    trainer.before_step = lambda step: client.pause() if step == 5 else None
    with client:
        eventually(lambda: client.status.phase is Phase.PAUSED)
        held_at = trainer.steps_done
        threading.Event().wait(0.3)
        assert trainer.steps_done == held_at == 4
        client.resume()
        assert client.wait(PATIENCE_S)
    assert client.status.rounds_contributed == 1


def test_a_stop_ends_training_at_the_next_step(
    hq: Headquarters, run: RunId, tmp_path: Path
) -> None:
    def dawdle(_step: int) -> None:
        threading.Event().wait(0.05)

    trainer = CountingTrainer(before_step=dawdle)
    config = settings(hq, tmp_path, run)
    with EdgeClient(config, dataset=MemoryDataset(), trainer=trainer) as client:
        eventually(lambda: client.status.steps_done > 2)
        asked = time.monotonic()
        assert client.stop()
        assert time.monotonic() - asked < 5
    assert trainer.trained == []


def test_progress_tells_the_whole_story_in_order(
    hq: Headquarters, run: RunId, tmp_path: Path
) -> None:
    told: list[ClientProgress] = []
    config = settings(hq, tmp_path, run)
    client = EdgeClient(
        config, dataset=MemoryDataset(), trainer=CountingTrainer(), on_progress=told.append
    )
    with client:
        client.wait(PATIENCE_S)
    phases = [phase for phase, _ in itertools.groupby(progress.phase for progress in told)]
    for phase in (Phase.CALIBRATING, Phase.EVALUATING, Phase.TRAINING, Phase.SENDING):
        assert phase in phases
    assert phases[-1] is Phase.STOPPED
    steps = [progress.steps_done for progress in told if progress.phase is Phase.TRAINING]
    assert steps == sorted(steps)
    assert told[-1].accuracy == 0.5
    assert told[-1].loss is not None


def test_a_callback_that_fails_stops_nothing(
    hq: Headquarters, run: RunId, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_progress: ClientProgress) -> None:
        raise RuntimeError("the plant's own bug")

    config = settings(hq, tmp_path, run)
    client = EdgeClient(
        config, dataset=MemoryDataset(), trainer=CountingTrainer(), on_progress=fail
    )
    with caplog.at_level(logging.ERROR), client:
        assert client.wait(PATIENCE_S)
    assert client.status.rounds_contributed == 1
    assert "the plant's own bug" in caplog.text


def test_five_lines_are_enough(hq: Headquarters, run: RunId, tmp_path: Path) -> None:
    client = fedra_edge.join(
        hq.url, dataset=MemoryDataset(), trainer=CountingTrainer(), home=tmp_path, run=run
    )
    assert client.wait(PATIENCE_S)
    assert client.status.rounds_contributed == 1


def test_a_misspelt_option_is_told(hq: Headquarters) -> None:
    with pytest.raises(ConfigurationError, match="memory"):
        fedra_edge.join(hq.url, data="images", memory="1GB")  # type: ignore[call-arg]  # on purpose


def test_a_refusal_is_raised_where_it_is_waited_for(hq: Headquarters, tmp_path: Path) -> None:
    client = fedra_edge.join(
        hq.url, dataset=MemoryDataset(), trainer=CountingTrainer(), home=tmp_path, run="nowhere"
    )
    with pytest.raises(ServerRefusedError):
        client.wait(PATIENCE_S)
    assert client.status.phase is Phase.FAILED


def test_what_the_package_promises_exists() -> None:
    assert sorted(fedra_edge.__all__) == list(fedra_edge.__all__)
    for name in fedra_edge.__all__:
        assert getattr(fedra_edge, name) is not None
    with pytest.raises(AttributeError):
        fedra_edge.__getattr__("no_such_name")
