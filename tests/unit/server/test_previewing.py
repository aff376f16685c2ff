"""The preview of a round is what the coordinator then opens; it says who is left out and why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedra_edge.protocol.ids import ClientId
from fedra_server.cli import main
from fedra_server.previewing import ClientPreview, RoundPreview, preview_round
from fedra_server.runs import AssignmentState, RunState
from tests.support.builders import NOW, RUN, make_client
from tests.support.headless import Headless


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Headless]:
    headless = Headless(tmp_path / "home")
    yield headless
    headless.store.close()


def previewed(server: Headless) -> RoundPreview:
    seen_since = server.clock.now() - server.config.heartbeat_timeout_s
    return preview_round(server.store.run_history(RUN), seen_since)


def by_id(preview: RoundPreview) -> dict[str, ClientPreview]:
    return {client.client_id: client for client in preview.clients}


def agrees_with_the_round(server: Headless, preview: RoundPreview) -> bool:
    """Tell whether the round that is open now was previewed exactly."""
    assert preview.round is not None
    planned = {it.client_id: it.work for it in preview.clients if it.reason == "ready"}
    opened = server.assignments(preview.round)
    assert planned.keys() == opened.keys()
    for client_id, record in opened.items():
        manifest, work = record.manifest, planned[ClientId(client_id)]
        assert work is not None
        assert manifest.trained_layer_ids == work.trained_layer_ids
        assert (manifest.depth, manifest.residency) == (work.depth, work.residency)
        assert (manifest.micro_batch, manifest.walk_batch) == (work.micro_batch, work.walk_batch)
        assert manifest.steps == work.steps
        assert manifest.predicted_peak_bytes == work.predicted_peak_bytes
        assert work.why_not_more in record.reason
    return True


def test_the_preview_is_what_the_coordinator_then_opens(server: Headless) -> None:
    server.create_run(rounds=2, min_participants=2, max_layers=3)
    for name, layers in (("one", 2), ("two", 3), ("three", None)):
        server.enrol(name, max_layers=layers)
    preview = previewed(server)
    assert (preview.round, preview.num_ready) == (1, 3)
    assert preview.coverage == (2, 2, 2, 2)
    server.coordinator.advance()
    assert agrees_with_the_round(server, preview)


def test_the_round_after_the_open_one_is_previewed_as_if_that_ended_well(server: Headless) -> None:
    """One layer each of four: who waited longest is known only with the open round counted."""
    server.create_run(rounds=2, min_participants=2, max_layers=1)
    server.enrol("one")
    server.enrol("two")
    server.coordinator.advance()
    preview = previewed(server)
    assert preview.round == 2
    trained = {it.manifest.trained_layer_ids[0] for it in server.assignments(1).values()}
    assert {layer for layer, count in enumerate(preview.coverage) if count == 0} == trained
    for assignment in server.assignments(1).values():
        server.deliver(assignment)
    server.coordinator.advance()
    assert agrees_with_the_round(server, preview)


def test_work_of_the_open_round_that_was_given_up_does_not_count_as_trained(
    server: Headless,
) -> None:
    server.create_run(rounds=2, min_participants=1, max_layers=1)
    server.enrol("one")
    server.coordinator.advance()
    [given] = server.assignments(1).values()
    server.store.settle(given.assignment_id, AssignmentState.FAILED, "lost power", NOW)
    counted = previewed(server)
    history = server.store.run_history(RUN)
    assert counted == preview_round(replace(history, assignments=[]), NOW - 60)


def test_who_is_left_out_is_told_why_and_what_it_would_get(server: Headless) -> None:
    server.create_run(min_participants=1)
    server.enrol("ready")
    server.store.set_offline(server.enrol("away"), NOW)
    server.enrol("small", memory_bytes=1)
    server.store.add_client(make_client("new"), "n" * 64)
    bound = replace(make_client("bound"), run="other")
    server.store.add_client(bound, "b" * 64)
    server.store.leave(server.enrol("gone"), NOW)
    preview = previewed(server)
    clients = by_id(preview)
    assert clients.keys() == {"ready", "away", "small", "new", "bound"}
    assert {name: it.reason for name, it in clients.items() if name != "small"} == {
        "ready": "ready",
        "away": "offline",
        "new": "not calibrated yet",
        "bound": "joined for run other only",
    }
    assert "needs" in clients["small"].reason
    assert {name for name, it in clients.items() if it.work is None} == {"bound", "new", "small"}
    away, ready = clients["away"], clients["ready"]
    assert (away.is_online, ready.is_online) == (False, True)
    assert away.work is not None
    assert ready.work is not None
    assert away.work.trained_layer_ids is None
    assert away.work == ready.work.model_copy(update={"trained_layer_ids": None})
    assert preview.num_ready == 1


def test_who_works_for_another_run_is_not_ready(server: Headless) -> None:
    server.create_run(min_participants=1)
    busy = server.enrol("one")
    history = replace(server.store.run_history(RUN), busy_elsewhere=frozenset({busy}))
    [client] = preview_round(history, 0.0).clients
    assert client.reason == "at work for another run"
    assert client.work is not None
    assert client.work.trained_layer_ids is None


@pytest.mark.parametrize("state", [RunState.STOPPED, RunState.FINISHED])
def test_a_run_that_is_over_has_no_next_round_but_says_what_each_would_get(
    server: Headless, state: RunState
) -> None:
    server.create_run(state)
    server.enrol("one")
    preview = previewed(server)
    assert (preview.round, preview.coverage) == (None, (0, 0, 0, 0))
    assert preview.clients[0].work is not None


def test_no_round_follows_the_last(server: Headless) -> None:
    server.create_run(rounds=1, min_participants=1)
    server.enrol("one")
    assert previewed(server).round == 1
    server.coordinator.advance()
    assert previewed(server).round is None


def test_the_json_form_has_exactly_the_documented_fields(server: Headless) -> None:
    server.create_run()
    server.enrol("one")
    told = json.loads(previewed(server).model_dump_json())
    assert set(told) == {
        "run", "state", "model", "spec", "num_layers", "round", "training_s", "coverage",
        "holders_needed", "clients",
    }  # fmt: skip
    [client] = told["clients"]
    assert set(client) == {
        "client_id", "name", "is_online", "reason", "work", "profile", "calibration",
    }  # fmt: skip
    assert set(client["work"]) == {
        "depth", "residency", "num_layers", "trained_layer_ids", "micro_batch", "walk_batch",
        "steps", "step_s", "predicted_peak_bytes", "why_not_more",
    }  # fmt: skip


def test_the_command_shows_a_table_and_explains_on_demand(
    server: Headless, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--home", str(server.home.path)])
        assert not ended.value.code
        return capsys.readouterr().out

    told("init")
    server.create_run(min_participants=2, deadline_s=100.0)
    server.enrol("one", max_layers=3)
    server.enrol("small", memory_bytes=1)
    short = told("run", "plan", RUN)
    assert "next is round 1" in short
    assert "plant one" in short
    assert "site's cap" not in short
    explained = told("run", "plan", RUN, "--explain")
    assert short in explained
    for fact in (
        "4.3 GB usable, 314.6 MB idle",
        "1.0 MB, and 5.0 MB for each example; 3.0 MB of that is kept for the way back",
        "1.00 ms forward, 2.00 ms back",
        "100 to train on, 25 held out",
        "4; the site's cap is 3, the run's none",
        "it may take 70 s of the deadline of 100 s",
        "not more  at most 3 of 4 layers, by the site's own limit",
        "left out  training a single layer needs",
    ):
        assert fact in explained
    document = json.loads(told("run", "plan", RUN, "--json"))
    assert [client["name"] for client in document["clients"]] == ["plant one", "plant small"]
