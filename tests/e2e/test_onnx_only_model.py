"""A model that is only there as an ONNX file, tuned by two clients on ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.support.edges import EdgeSite, run_edge_command, wait_until
from tests.support.federation import MODEL, Federation, running_federation
from tests.support.onnx_models import build_model, export_model
from tests.support.servers import run_server_command
from tests.support.sites import write_folder
from tests.support.text_sites import write_text_folder
from tests.support.tiny_llama import LABELS as TEXT_LABELS
from tests.support.tiny_llama import MAX_TOKENS, build_tokenizer
from tests.support.tiny_vit import LABELS

pytestmark = pytest.mark.e2e

WITHOUT = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Plant:
    """Two sites whose server has a model from a file, registered without PyTorch."""

    federation: Federation
    added: dict[str, Any]
    place: Path

    def site(self, name: str, *options: str) -> EdgeSite:
        data = write_folder(self.place / "data" / name, seed=len(name)).path
        return self.federation.add_site(
            name, data, self.place, *options, poll_s="2", heartbeat_s="0.5"
        )


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    place = tmp_path_factory.mktemp("onnx_only")
    path = export_model(build_model("mixer"), place / "mixer.onnx", dynamo=True)
    home = place / "prepared"
    added = register(
        home, path, ",".join(LABELS), "--image-mean=0.5,0.5,0.5", "--image-std=0.5,0.5,0.5"
    )
    with running_federation(place / "server", home) as federation:
        yield Plant(federation, added, place)


def register(home: Path, path: Path, labels: str, *options: str) -> dict[str, Any]:
    """Make a home with a model from a file, without PyTorch; give what the command tells."""
    run_server_command("init", "--home", str(home))
    done = run_server_command(
        "model", "add", MODEL, "--onnx", str(path), "--labels", labels, *options,
        "--home", str(home), "--json", without=WITHOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    added: dict[str, Any] = json.loads(done.stdout)
    return added


def test_the_file_becomes_a_model(plant: Plant) -> None:
    assert plant.added["family"] == "onnx"
    assert plant.added["num_layers"] == 3
    assert plant.added["labels"] == list(LABELS)
    assert plant.federation.operate("model", "show", MODEL)["has_graphs"]


def test_two_clients_train_a_round_and_evaluate(plant: Plant) -> None:
    federation = plant.federation
    limits = {"press": "--max-layers=2", "foundry": "--max-layers=1"}
    sites = [plant.site(name, "--backend=onnx", limit) for name, limit in limits.items()]
    federation.have_running(sites)
    training = {"learning_rate": 0.05, "batch_size": 12, "local_epochs": 4}
    federation.start_run(
        "parts", rounds=1, min_participants=2, merge_weighting="uniform", **training
    )

    def is_evaluated() -> bool:
        accuracy = federation.report("parts").accuracy
        return any(it.revision == 1 and len(it.sites) == len(sites) for it in accuracy)

    wait_until(f"evaluations; {federation.server.log}", is_evaluated)
    report = federation.report("parts")
    assert min(report.rounds[0].coverage) >= 1
    federation.check_merge("parts", 1)
    before, after = (it.pooled for it in report.accuracy)
    assert after.mean_loss < 0.8 * before.mean_loss
    for site in sites:
        site.client.kill()


def test_what_was_tuned_is_exported_and_evaluated(plant: Plant) -> None:
    plain, whole = plant.place / "plain", plant.place / "whole"
    plant.federation.operate("export", "--run", "parts", "--format", "onnx", "--out", str(plain))
    tuned = onnxruntime.InferenceSession(plain / "model.onnx")
    (logits,) = tuned.run(None, {"inputs": np.zeros((5, 3, 16, 16), np.float32)})
    assert logits.shape == (5, len(LABELS))
    plant.federation.operate("export", "--run", "parts", "--out", str(whole))
    data = str(plant.federation.sites["press"].data)
    done = run_edge_command(
        "evaluate", "--export", str(whole), "--data", data, "--backend", "onnx", "--json"
    )
    assert done.returncode == 0, done.stderr
    accuracy = plant.federation.report("parts").accuracy[-1].pooled.accuracy
    assert json.loads(done.stdout)["accuracy"] == pytest.approx(accuracy, abs=0.1)


def test_a_client_with_pytorch_is_told_to_use_onnx(plant: Plant) -> None:
    site = plant.site("assembly", "--backend=torch")
    plant.federation.start_run("more", rounds=1, min_participants=1)
    site.join()
    wait_until(
        f"complaint; {site.log}",
        lambda: "--backend onnx" in site.complaints() + json.dumps(site.client.events),
    )
    plant.federation.end_runs()


def test_a_model_that_reads_texts_learns_what_they_mean(tmp_path: Path) -> None:
    path = export_model(build_model("bert"), tmp_path / "bert.onnx", dynamo=True)
    tokenizer, labels = tmp_path / "tokenizer.json", tmp_path / "labels.txt"
    build_tokenizer().save(str(tokenizer))
    labels.write_text("\n".join(TEXT_LABELS), encoding="utf-8")
    texts = f"--max-tokens={MAX_TOKENS}"
    register(tmp_path / "prepared", path, str(labels), f"--tokenizer={tokenizer}", texts)
    data = write_text_folder(tmp_path / "data", seed=1).path
    with running_federation(tmp_path / "server", tmp_path / "prepared") as federation:
        site = federation.add_site("mill", data, tmp_path, "--backend=onnx", poll_s="2")
        federation.have_running([site])
        training = {"optimizer": "adamw", "learning_rate": 0.01, "local_epochs": 6}
        federation.start_run("words", rounds=1, min_participants=1, batch_size=15, **training)
        wait_until(
            f"both evaluations; {site.log}", lambda: len(federation.report("words").accuracy) > 1
        )
        before, after = (it.pooled for it in federation.report("words").accuracy)
        assert after.mean_loss < 0.8 * before.mean_loss


@pytest.mark.parametrize(
    "options",
    [
        ("--onnx", "FILE"),
        ("--onnx", "FILE", "--labels", "a,b,c", "--weights-dtype", "float16"),
        ("--onnx", "FILE", "--labels", "a,b,c", "--image-mean", "half"),
        ("--onnx", "FILE", "--labels", "a,b,c", "saved"),
        ("saved", "--labels", "a,b,c"),
        (),
    ],
    ids=" ".join,
)
def test_options_that_do_not_belong_together_are_wrong_usage(
    plant: Plant, options: tuple[str, ...]
) -> None:
    home, file = str(plant.federation.home.path), str(plant.place / "mixer.onnx")
    given = [file if option == "FILE" else option for option in options]
    done = run_server_command("model", "add", "other", *given, "--home", home, check=False)
    assert done.returncode == 2, done.stderr


def test_without_the_packages_the_operator_is_told(plant: Plant) -> None:
    home, file = str(plant.federation.home.path), str(plant.place / "mixer.onnx")
    done = run_server_command(
        "model", "add", "other", "--onnx", file, "--labels", "a,b,c", "--home", home,
        check=False, without=("onnx",),
    )  # fmt: skip
    assert done.returncode == 3
    assert "needs onnx" in done.stderr
