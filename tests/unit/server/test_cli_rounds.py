"""What the operator sees of runs that wait for nobody, and of clients that fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedra_server.cli import main
from fedra_server.clock import SystemClock
from fedra_server.runs import AssignmentState, RunState
from tests.support.builders import RUN
from tests.support.headless import HandClock, Headless


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Headless]:
    """A buffered run at which a quick client has delivered and another has failed twice."""
    headless = Headless(tmp_path, HandClock(SystemClock().now()))
    headless.create_run(
        RunState.RUNNING, mode="buffered", min_participants=2, buffer_size=3, max_layers=1
    )
    quick, broken = headless.enrol("quick"), headless.enrol("broken")
    for client_id in (quick, broken):
        headless.store.touch(client_id, headless.clock.now())
    headless.coordinator.advance()
    work = headless.assignments(1)
    headless.deliver(work[quick])
    assert headless.coordinator.advance()
    failed = work[broken].assignment_id
    headless.store.settle(failed, AssignmentState.FAILED, "out of memory", headless.clock.now())
    yield headless
    headless.store.close()


@pytest.fixture
def command(server: Headless, capsys: pytest.CaptureFixture[str]) -> Any:  # noqa: ANN401
    def run(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--home", str(server.path)])
        assert ended.value.code == 0
        return capsys.readouterr().out

    run("init")
    return run


def test_status_shows_mode_buffer_and_who_rests(command: Any) -> None:  # noqa: ANN401
    text = command("run", "status", RUN)
    assert "Mode: buffered, 3 clients or 600 s for each piece, all that are there" in text
    assert "staleness up to 20, fedavg" in text
    assert "Deltas that wait for a merge" in text
    assert "out of memory" in text
    report = json.loads(command("run", "status", RUN, "--json"))
    assert {it["piece"]: it["deltas"] for it in report["buffer"]}["head"] == 1
    [resting] = report["resting"]
    assert (resting["name"], resting["failures"]) == ("plant broken", 1)
    assert resting["reason"] == "out of memory"
    [waiting] = report["waiting"]
    assert "rests until" in waiting["reason"]


def test_a_long_reason_breaks_no_table_and_is_whole_in_json(
    server: Headless,
    command: Any,  # noqa: ANN401
) -> None:
    reason = "; ".join(f"layers.{it}: norm 3.1 is far above the median" for it in range(12))
    client = server.enrol("wordy")
    server.store.touch(client, server.clock.now())
    server.coordinator.advance()
    work = server.assignments(1)[client]
    server.store.settle(
        work.assignment_id, AssignmentState.FAILED, reason, server.clock.now()
    )  # fmt: skip
    for arguments in (("client", "list"), ("run", "status", RUN)):
        assert max(map(len, command(*arguments).splitlines())) < 300
        assert reason in command(*arguments, "--json")


def test_clients_are_listed_with_their_rests(command: Any) -> None:  # noqa: ANN401
    assert "it failed once, last with: out of memory" in command("client", "list")
    listed = json.loads(command("client", "list", "--json"))["clients"]
    rests = {it["name"]: it["rests"] for it in listed}
    assert rests["plant quick"] == []
    [rest] = rests["plant broken"]
    assert (rest["run"], rest["failures"], rest["reason"]) == (RUN, 1, "out of memory")
    assert rest["until_at"] > 0


def test_a_round_that_was_extended_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Headless(tmp_path, HandClock(SystemClock().now()))
    server.create_run(RunState.RUNNING, deadline_s=100.0)
    for name in ("one", "two"):
        server.store.touch(server.enrol(name), server.clock.now())
    shown = []
    for waited_s in (0, 100):
        server.clock.time += waited_s
        server.coordinator.advance()
        server.home.config_file.touch()
        with pytest.raises(SystemExit):
            main(["run", "status", RUN, "--home", str(tmp_path)])
        shown.append(capsys.readouterr().out)
    server.store.close()
    assert ["for want of deltas" in it for it in shown] == [False, True]
