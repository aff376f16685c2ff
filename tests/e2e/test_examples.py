"""Every example runs as its first lines say, and the demo's main job does on an untrained model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedra_server.exporting import export_revision
from sdk_examples.demo.following import Standing
from sdk_examples.demo.pretraining import Pretraining, Stage, pretrained_model
from sdk_examples.demo.processes import run_command
from sdk_examples.demo.running import Workplace, run_cohort
from sdk_examples.demo.sites import make_sites
from tests.support.federation import Federation, running_federation
from tests.support.sites import draw_image, write_folder
from tests.support.tiny_vit import ADAPTER, LABELS, TinyVit, build_vit

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
ROUNDS = 2


@pytest.fixture(scope="module")
def federation(
    prepared_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Federation]:
    with running_federation(tmp_path_factory.mktemp("examples"), prepared_home) as federation:
        yield federation


def run_example(name: str, *arguments: object, run: str = "", home: Path | None = None) -> str:
    """Run an example to its end, bound to a run, and give what it printed."""
    settings = {"FEDRA_EDGE_RUN": run, "FEDRA_EDGE_HOME": str(home or "")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "sdk_examples" / name), *map(str, arguments)],
        env={**os.environ, **settings, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        encoding="utf-8",
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start_run(federation: Federation, name: str) -> None:
    federation.start_run(name, min_participants=1, rounds=ROUNDS, batch_size=12)


def test_joining_takes_a_few_lines(federation: Federation, tmp_path: Path) -> None:
    start_run(federation, "join")
    data = write_folder(tmp_path / "data", seed=1)
    run_example("join.py", federation.url, data.path, run="join", home=tmp_path / "home")
    assert federation.report("join").rounds_published == ROUNDS


def test_own_dataset_takes_part(federation: Federation, tmp_path: Path) -> None:
    start_run(federation, "own-dataset")
    generator = np.random.default_rng(0)
    labels = [LABELS[index % len(LABELS)] for index in range(30)]
    images = np.stack([draw_image(label, generator) for label in labels])
    np.savez(tmp_path / "arrays.npz", images=images, labels=np.array(labels))
    arguments = (federation.url, tmp_path / "arrays.npz")
    told = run_example("own_dataset.py", *arguments, run="own-dataset", home=tmp_path / "home")
    assert "training" in told
    [accuracy] = federation.report("own-dataset").accuracy[-1:]
    assert (accuracy.revision, accuracy.pooled.num_examples) == (ROUNDS, 6)


def test_plant_program_keeps_its_control_loop(federation: Federation, tmp_path: Path) -> None:
    start_run(federation, "plant")
    data = write_folder(tmp_path / "data", seed=2)
    arguments = (federation.url, data.path)
    told = run_example("plant_program.py", *arguments, run="plant", home=tmp_path / "home")
    found = re.search(r"(\d+) cycles, worst delay (\d+) ms", told)
    assert found is not None, told
    assert int(found[1]) > 50
    assert int(found[2]) < 2000
    assert f"client stopped, {ROUNDS} rounds contributed" in told


def test_a_tuned_model_predicts_inside_a_program(tmp_path: Path) -> None:
    tiny = TinyVit.register(tmp_path)
    export_revision(tiny.spec, ADAPTER, tiny.revision, tiny.blobs, tmp_path / "export")
    data = write_folder(tmp_path / "data", seed=3)
    (tmp_path / "data" / "broken.png").write_bytes(b"no image")
    *told, skipped = run_example("predict.py", tmp_path / "export", data.path).splitlines()
    assert len(told) == len(list(data.path.rglob("*.png"))) - 1
    assert all(re.fullmatch(rf"\S+\.png: ({'|'.join(LABELS)}) \(\d+%\).*", line) for line in told)
    assert any("for a person to check" in line for line in told)
    assert skipped == "skipped: unreadable image: 1 (broken.png)"


def test_a_cohort_runs_on_one_machine(tmp_path: Path) -> None:
    build_vit().save_pretrained(tmp_path / "model")
    for number, name in enumerate(("left", "right")):
        write_folder(tmp_path / "sites" / name, seed=number)
    told = run_example("cohort.py", tmp_path / "model", tmp_path / "sites", tmp_path / "home")
    assert "finished, 3 of 3 rounds published" in told
    assert "left" in told
    assert "right" in told


def test_the_demo_tunes_exports_and_agrees_with_plain_peft(tmp_path: Path) -> None:
    settings = Pretraining(stages=(Stage(3, 2, 1e-3), Stage(12, 2, 1e-3)), batch_size=4)
    model = pretrained_model(tmp_path / "cache", settings, lambda *_: None)
    sites = make_sites(tmp_path / "sites")
    seen: list[Standing] = []
    outcome = run_cohort(Workplace(tmp_path / "work"), model, sites, 1, seen.append)
    last = outcome.report.accuracy[-1]
    names = {client.client_id: client.name for client in outcome.report.clients}
    reported = {
        names[client_id]: {"num_examples": site.num_examples, "num_correct": site.num_correct}
        for client_id, site in last.sites.items()
    }
    told = run_command("sdk_examples.demo.checking", outcome.export, tmp_path / "sites")
    assert json.loads(told) == reported
    assert min(outcome.report.coverage) >= 3
    assert seen[-1].revision in {0, 1}
    assert outcome.plans.keys() == reported.keys()
