"""What a machine is promised before it joins is what the server then plans, and what it takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedra_server.reports import ClientReport
from tests.support.edges import run_edge_command
from tests.support.federation import MODEL, Federation, running_federation
from tests.support.servers import run_server_command
from tests.support.sites import write_folder
from tests.support.tiny_vit import build_vit

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

TRAINING = {"batch_size": 2, "local_epochs": 2, "rank": 4, "optimizer": "adamw", "max_steps": 4}
AMPLE_BYTES = 3 * 10**9
MESSAGES_BYTES = 50_000
"""More than all JSON that a client exchanges in a round or two."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a model of 16 MB a layer, its description beside it, and a site's data."""
    place = tmp_path_factory.mktemp("promise")
    build_vit(hidden_size=1024).save_pretrained(place / "saved")
    home = str(place / "home")
    run_server_command("init", "--home", home)
    run_server_command("model", "add", MODEL, str(place / "saved"), "--home", home)
    told = run_server_command("model", "show", MODEL, "--spec", "--home", home).stdout
    (place / "model.json").write_text(told, encoding="utf-8")
    write_folder(place / "images", seed=1)
    return place


def promised(place: Path, memory_bytes: int, *options: str) -> dict[str, Any]:
    """Ask for the promise as a site does before it joins."""
    training = [f"--{name.replace('_', '-')}={value}" for name, value in TRAINING.items()]
    done = run_edge_command(
        "profile", "--model", str(place / "model.json"), "--data", str(place / "images"),
        "--memory", str(memory_bytes), "--home", str(place / "home-of-none"), "--json",
        *training, *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    promise: dict[str, Any] = json.loads(done.stdout)
    return promise


@pytest.fixture(scope="module")
def ample(place: Path) -> dict[str, Any]:
    """The promise to a machine with memory to spare."""
    return promised(place, AMPLE_BYTES)


@pytest.fixture
def federation(place: Path, tmp_path: Path) -> Iterator[Federation]:
    with running_federation(tmp_path / "server", place / "home") as federation:
        yield federation


def check_traffic(done: ClientReport, promise: dict[str, Any]) -> None:
    """Hold two rounds against what was promised, files and no more than messages beside them."""
    down_bytes = promise["first_round_down_bytes"] + promise["later_round_down_bytes"]
    assert 0 < done.bytes_received - down_bytes < MESSAGES_BYTES
    up_bytes = promise["round_up_bytes"]  # a delta's report cannot count its own bytes
    assert 0 < done.bytes_sent - up_bytes < MESSAGES_BYTES


@pytest.mark.parametrize(
    "way", [("torch", "resident"), ("torch", "streamed"), ("onnx", "streamed")], ids="-".join
)
def test_the_server_plans_what_the_machine_was_promised_and_it_takes_no_more(
    way: tuple[str, str],
    place: Path,
    ample: dict[str, Any],
    federation: Federation,
    tmp_path: Path,
) -> None:
    backend, residency = way
    memory_bytes, runtime = AMPLE_BYTES, f"--backend={backend}"
    if (backend, residency) == ("torch", "streamed"):  # far from where either plan begins to fit
        memory_bytes = (ample["needs_at_least_bytes"] + ample["predicted_peak_bytes"]) // 2
    promise = promised(place, memory_bytes, runtime)
    assert (promise["residency"], promise["depth"]) == (residency, "full")

    limit = f"--memory={memory_bytes}"
    federation.start_run("line", rounds=2, min_participants=2, **TRAINING)
    site = federation.add_site("one", place / "images", tmp_path, limit, runtime)
    federation.have_running([site])
    site.client.wait_for("the measurement", lambda it: "until 2 participants" in it["detail"])
    [planned] = federation.operate("run", "plan", "line")["clients"]
    assert (planned["reason"], planned["is_online"]) == ("ready", True)
    work, same = planned["work"], ("depth", "residency", "micro_batch", "walk_batch", "steps")
    assert work["num_layers"] == promise["trained_layers"]
    assert [work[name] for name in same] == [promise[name] for name in same]
    assert ("streamed" in work["why_not_more"]) == (memory_bytes != AMPLE_BYTES)
    peak_bytes = promise["predicted_peak_bytes"]
    assert work["predicted_peak_bytes"] == pytest.approx(peak_bytes, rel=0.05)
    assert planned["calibration"]["train_examples"] == promise["train_examples"]

    other = federation.add_site("two", place / "images", tmp_path)
    federation.have_running([other])
    federation.wait_for_rounds("line", 2)
    [done] = [it for it in federation.report("line").clients if it.name == "one"]
    assert done.last_delta
    assert (done.last_delta.residency, done.last_delta.step_downs) == (residency, ())
    assert done.peak_memory_bytes < 1.05 * peak_bytes
    check_traffic(done, promise)


def test_a_machine_that_does_not_fit_learns_what_it_lacks(
    place: Path, ample: dict[str, Any]
) -> None:
    done = run_edge_command(
        "profile", "--model", str(place / "model.json"), "--memory", "100MB"
    )  # fmt: skip
    assert done.returncode == 3
    assert "this process may use 100 MB" in done.stderr
    assert ample["needs_at_least_bytes"] > 10**8


def test_the_promise_is_told_to_people_with_units(place: Path) -> None:
    done = run_edge_command(
        "profile", "--model", str(place / "model.json"), "--examples", "500", "--memory", "3GB"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    shown = {name: value.strip() for name, value in told.items()}
    assert shown["memory"] == "3.0 GB"
    assert shown["predicted peak"].endswith(" MB")
    assert shown["step"].endswith(" s")
    assert (shown["train examples"], shown["steps"]) == ("500", "4")
    assert shown["why not more"] == "none"


def test_a_description_whose_graphs_were_altered_is_refused(place: Path, tmp_path: Path) -> None:
    description = json.loads((place / "model.json").read_text(encoding="utf-8"))
    contents = description["graph_contents"]
    contents["block"] = contents["head"]
    altered = tmp_path / "altered.json"
    altered.write_text(json.dumps(description), encoding="utf-8")
    done = run_edge_command("profile", "--model", str(altered), "--backend", "onnx")
    assert done.returncode == 3
    assert "block.onnx in graphs is not what model.json names" in done.stderr
    assert "model show" in done.stderr
