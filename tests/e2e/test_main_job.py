"""The main job between real processes: sites of different size tune one model, and it works."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedra_server.runs import AssignmentState
from tests.support.edges import EdgeSite, wait_until
from tests.support.federation import NO_FRAMEWORK, Federation, running_federation
from tests.support.servers import run_server_command
from tests.support.sites import SiteData, write_folder, write_manifest

pytestmark = pytest.mark.e2e

LAYERS = {"assembly": 1, "foundry": 2, "press": 3}
ROUNDS = 3
DEPTHS = {"reduced": "inverse_chance", "full": "uniform"}
TRAINING = {"learning_rate": 0.02, "batch_size": 12, "local_epochs": 6}
PLAIN_PEFT = Path(__file__).parents[1] / "support" / "plain_peft.py"


@dataclass(frozen=True)
class Plant:
    """Three sites on one server, one of them with a CSV manifest."""

    federation: Federation
    data: Mapping[str, SiteData]

    @property
    def sites(self) -> list[EdgeSite]:
        return list(self.federation.sites.values())


@pytest.fixture(scope="module")
def plant(prepared_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    place = tmp_path_factory.mktemp("plant")
    data = {
        "assembly": write_folder(place / "data" / "assembly", seed=1),
        "foundry": write_folder(place / "data" / "foundry", seed=2),
        "press": write_manifest(place / "data" / "press", seed=3),
    }
    with running_federation(place / "server", prepared_home) as federation:
        for name, held in data.items():
            limit = f"--max-layers={LAYERS[name]}"
            federation.add_site(name, held.path, place, limit, poll_s="2", heartbeat_s="0.5")
        yield Plant(federation, data)


@pytest.fixture
def busy_plant(plant: Plant) -> Iterator[Plant]:
    """All clients run; no run is left behind."""
    plant.federation.have_running(plant.sites)
    yield plant
    plant.federation.end_runs()


@pytest.fixture(scope="module")
def statuses(plant: Plant) -> dict[str, Any]:
    """Tune to the end, as published and with full depth; give what the operator is shown."""
    federation = plant.federation
    federation.have_running(plant.sites)
    shown = {}
    for depth, weighting in DEPTHS.items():
        chosen = {"depth": depth, "merge_weighting": weighting, "rounds": ROUNDS, **TRAINING}
        federation.start_run(depth, min_participants=len(LAYERS), **chosen)
        wait_until(f"evaluations of {depth}'s end", partial(is_evaluated, federation, depth))
        shown[depth] = federation.operate("run", "status", depth)
    return shown


def is_evaluated(federation: Federation, run: str) -> bool:
    last = federation.report(run).accuracy[-1:]
    return any(it.revision == ROUNDS and len(it.sites) == len(LAYERS) for it in last)


def by_name(status: dict[str, Any]) -> dict[str, Any]:
    return {client["name"]: client for client in status["clients"]}


def test_the_server_has_no_training_framework(plant: Plant, tmp_path: Path) -> None:
    home = str(plant.federation.home.path)
    done = run_server_command(
        "model", "add", "other", str(tmp_path), "--home", home, check=False, without=NO_FRAMEWORK
    )
    assert (done.returncode, "needs torch" in done.stderr) == (3, True)


@pytest.mark.parametrize("depth", DEPTHS)
def test_all_rounds_are_published_with_every_layer_covered(
    plant: Plant, statuses: dict[str, Any], depth: str
) -> None:
    status = statuses[depth]
    assert (status["state"], status["rounds_published"]) == ("finished", ROUNDS)
    assert status["revision"] == ROUNDS
    for published in status["rounds"]:
        assert published["merged"] == published["participants"] == len(LAYERS)
        assert sum(published["coverage"]) == sum(LAYERS.values())
        assert min(published["coverage"]) >= 1
    total = [
        sum(column) for column in zip(*(it["coverage"] for it in status["rounds"]), strict=True)
    ]
    assert status["coverage"] == total
    held = {"reduced": LAYERS, "full": dict.fromkeys(LAYERS, 4)}[depth]
    for name, assignment in plant.federation.assignments(depth).items():
        assert assignment.manifest.depth == depth
        assert len(assignment.manifest.layer_ids) == held[name]
        assert len(assignment.manifest.trained_layer_ids) == LAYERS[name]


@pytest.mark.parametrize("depth", DEPTHS)
def test_accuracy_is_shown_per_site_and_pooled_and_tuning_works(
    plant: Plant, statuses: dict[str, Any], depth: str
) -> None:
    accuracy = statuses[depth]["accuracy"]
    clients = {client["client_id"]: client["name"] for client in statuses[depth]["clients"]}
    assert [row["revision"] for row in accuracy] == list(range(ROUNDS + 1))
    for row in accuracy:
        sizes = {clients[client]: site["num_examples"] for client, site in row["sites"].items()}
        assert sizes == {name: len(held.held_out) for name, held in plant.data.items()}
        right = sum(site["num_correct"] for site in row["sites"].values())
        assert (row["pooled"]["num_correct"], row["pooled"]["num_examples"]) == (
            right,
            sum(sizes.values()),
        )
    first, last = accuracy[0]["pooled"], accuracy[-1]["pooled"]
    assert last["mean_loss"] != first["mean_loss"]
    if depth == "full":  # reduced depth trains other, shallower models than the one evaluated
        assert last["accuracy"] > first["accuracy"] + 0.15
        assert last["mean_loss"] < first["mean_loss"]


@pytest.mark.parametrize("depth", DEPTHS)
def test_bytes_and_memory_are_shown_per_client(
    plant: Plant, statuses: dict[str, Any], depth: str
) -> None:
    federation = plant.federation
    [model] = federation.operate("model", "list")["models"]
    for name, client in by_name(statuses[depth]).items():
        baseline_bytes = federation.member(federation.sites[name]).profile.baseline_bytes
        assert client["rounds_merged"] == ROUNDS
        assert client["layers_trained"] == ROUNDS * LAYERS[name]
        assert baseline_bytes < client["peak_memory_bytes"] < 4 * 2**30
        assert client["predicted_peak_bytes"] > baseline_bytes
        first_delta = federation.home.delta_file(
            federation.assignments(depth, 1)[name].assignment_id
        )
        assert client["bytes_sent"] > first_delta.stat().st_size
        adapters_bytes = sum(
            ref.size_bytes for ref in federation.store.revision(depth, 1).manifest.layers
        )
        assert client["bytes_received"] > adapters_bytes
        if depth == "reduced":  # later runs find the weights in the cache
            assert client["bytes_received"] > model["weight_bytes"]


def test_every_revision_is_the_mean_of_its_deltas_on_disk(
    plant: Plant, statuses: dict[str, Any]
) -> None:
    assert statuses["full"]["spec"]["merge_weighting"] == "uniform"
    for number in range(1, ROUNDS + 1):
        plant.federation.check_merge("full", number)
    audited = plant.federation.operate("audit", "full")
    assert (audited["difference"], audited["broken"]) == (None, [])


def test_plain_peft_finds_what_the_server_shows(
    plant: Plant, statuses: dict[str, Any], tmp_path: Path
) -> None:
    sites = {
        name: [(str(path), label) for path, label in held.held_out]
        for name, held in plant.data.items()
    }
    wanted, shown = [], []
    for depth, number in (("reduced", ROUNDS), ("full", ROUNDS), ("full", 1)):
        out = tmp_path / f"{depth}-{number}"
        plant.federation.operate(
            "export", "--run", depth, "--revision", str(number), "--out", str(out)
        )
        wanted.append({"export": str(out), "sites": sites})
        clients = {client["client_id"]: client["name"] for client in statuses[depth]["clients"]}
        counts = statuses[depth]["accuracy"][number]["sites"]
        shown.append({clients[client]: site["num_correct"] for client, site in counts.items()})
    requests = tmp_path / "requests.json"
    requests.write_text(json.dumps(wanted), encoding="utf-8")
    command = [sys.executable, "-I", str(PLAIN_PEFT), str(requests)]
    done = subprocess.run(command, check=False, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fedra_modules"] == []
    assert found["right"] == shown


def test_a_run_is_paused_started_and_stopped_under_live_clients(busy_plant: Plant) -> None:
    federation, sites = busy_plant.federation, busy_plant.sites

    def wait_for_detail(text: str, since: list[int]) -> None:
        for site, mark in zip(sites, since, strict=True):
            site.client.wait_for(
                f"{text} at {site.name}", lambda event: text in event["detail"], since=mark
            )

    def marks() -> list[int]:
        return [len(site.client.events) for site in sites]

    federation.start_run("steered", rounds=10_000, min_participants=3, max_steps=2)
    federation.wait_for_rounds("steered", 1)
    assert federation.operate("run", "pause", "steered")["state"] == "paused"
    wait_for_detail("run steered is paused", since=[0, 0, 0])
    wait_until("the round ends", lambda: federation.report("steered").round is None)
    paused = federation.report("steered")
    federation.operate("run", "start", "steered")
    federation.wait_for_rounds("steered", paused.rounds_published + 1)
    before_stop = marks()
    federation.operate("run", "stop", "steered")
    wait_for_detail("no run is active", since=before_stop)
    stopped = federation.report("steered")
    assert stopped.state == "stopped"
    assert stopped.rounds_published > paused.rounds_published
    states = {record.state for record in federation.store.assignments("steered")}
    assert AssignmentState.PENDING not in states
    assert all(site.is_running for site in sites)


def test_a_client_told_to_stop_in_training_keeps_nobody_waiting(busy_plant: Plant) -> None:
    federation = busy_plant.federation
    leaving = federation.sites["press"]
    federation.start_run(
        "shrinking", rounds=1, min_participants=2, batch_size=6, local_epochs=1000, max_steps=150
    )
    leaving.client.wait_for_phase("training", "shrinking")
    assert leaving.client.ask_to_stop() == 0
    assert leaving.client.events[-1]["phase"] == "stopped"
    shown = {
        client["name"]: client["state"]
        for client in federation.operate("client", "list")["clients"]
    }
    assert shown == {"assembly": "online", "foundry": "online", "press": "offline"}
    merged = federation.wait_for_rounds("shrinking", 1).rounds[0].merged
    assert merged == 2
    assert federation.assignments("shrinking")["press"].state == AssignmentState.EXPIRED


def test_a_client_that_leaves_is_forgotten_on_both_sides(plant: Plant) -> None:
    federation = plant.federation
    site = federation.sites["press"]
    if site.identity_file.load() is None:
        federation.have_running([site])
    client_id = site.identity.client_id
    if site.is_running:
        assert site.client.ask_to_stop() == 0
    done = site.command("leave", "--json")
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["client_id"] == client_id
    states = {
        client["client_id"]: client["state"]
        for client in federation.operate("client", "list", "--all")["clients"]
    }
    assert states[client_id] == "left"
    asked = site.command("status", "--json")
    assert asked.returncode == 3
    assert "no client is enrolled" in json.loads(asked.stdout)["message"]
