"""Texts: a server and two real clients tune a decoder, and it learns what the words mean."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.support.edges import run_edge_command, wait_until
from tests.support.federation import MODEL, Federation, running_federation
from tests.support.servers import run_server_command
from tests.support.sites import SiteData, write_folder
from tests.support.text_sites import write_text_folder, write_text_manifest
from tests.support.tiny_llama import LABELS, MAX_TOKENS, save_llama

pytestmark = [
    pytest.mark.e2e,
    # peft asks transformers for a name that transformers renamed
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
]

RUN = "words"
ROUNDS = 4
LAYERS = {"mill": 3, "yard": 2}
TRAINING = {"optimizer": "adamw", "learning_rate": 0.01, "batch_size": 20, "local_epochs": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


@pytest.fixture(scope="module")
def folder(place: Path) -> SiteData:
    return write_text_folder(place / "data" / "mill", seed=1)


@pytest.fixture(scope="module")
def federation(place: Path, folder: SiteData) -> Iterator[Federation]:
    """Two sites that have tuned a model on their texts, one of them with streamed weights."""
    home, saved = place / "prepared", place / "saved"
    save_llama(saved, initializer_range=0.02)
    tokens = f"--max-tokens={MAX_TOKENS}"
    run_server_command("init", "--home", str(home))
    run_server_command("model", "add", MODEL, str(saved), tokens, "--home", str(home))
    manifest = place / "data" / "yard.csv"
    write_text_manifest(manifest, seed=2)
    data = {"mill": folder.path, "yard": manifest}
    with running_federation(place / "server", home) as running:
        for name, path in data.items():
            limit = f"--max-layers={LAYERS[name]}"
            running.add_site(name, path, place, limit, poll_s="2", heartbeat_s="0.5")
        running.have_running(list(running.sites.values()))
        running.start_run(RUN, depth="full", rounds=ROUNDS, min_participants=2, **TRAINING)
        wait_until("the last evaluation", lambda: is_evaluated(running))
        yield running


def is_evaluated(federation: Federation) -> bool:
    last = federation.report(RUN).accuracy[-1:]
    return any(it.revision == ROUNDS and len(it.sites) == len(LAYERS) for it in last)


@pytest.fixture(scope="module")
def exported(federation: Federation, place: Path) -> Path:
    out = place / "tuned"
    federation.operate("export", "--run", RUN, "--out", str(out))
    return out


def test_sites_learn_what_words_mean(federation: Federation) -> None:
    accuracy = federation.operate("run", "status", RUN)["accuracy"]
    first, last = accuracy[0]["pooled"], accuracy[-1]["pooled"]
    assert last["num_examples"] == 2 * 30
    assert first["accuracy"] < 0.5
    assert last["accuracy"] > 0.6  # chance is a third
    assert last["mean_loss"] < first["mean_loss"]


def test_the_operator_sees_what_the_model_reads(federation: Federation) -> None:
    home = str(federation.home.path)
    shown = run_server_command("model", "show", MODEL, "--home", home).stdout
    assert f"texts of up to {MAX_TOKENS} tokens" in shown


def test_the_export_judges_texts_as_the_site_did(
    federation: Federation, exported: Path, folder: SiteData
) -> None:
    done = run_edge_command(
        "evaluate", "--export", str(exported), "--data", str(folder.path), "--json"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    client_id = federation.sites["mill"].identity.client_id
    last = federation.operate("run", "status", RUN)["accuracy"][-1]["sites"][client_id]
    assert (told["num_correct"], told["num_examples"]) == (last["num_correct"], 30)

    tokenizer = AutoTokenizer.from_pretrained(exported / "base")
    base = AutoModelForSequenceClassification.from_pretrained(exported / "base")
    model = PeftModel.from_pretrained(base, exported / "adapter").eval()
    num_correct = 0
    with torch.no_grad():
        for path, label in folder.held_out:
            text = path.read_text(encoding="utf-8")
            prepared = tokenizer(text, truncation=True, return_tensors="pt")
            logits = model(input_ids=prepared["input_ids"], use_cache=False).logits
            num_correct += LABELS[int(logits.argmax())] == label
    assert num_correct == told["num_correct"]


def test_the_export_predicts_what_it_judged(exported: Path, folder: SiteData) -> None:
    out = exported.with_name("told.csv")
    common = ("--export", str(exported), "--data")
    told = run_edge_command("predict", *common, str(folder.path / "test"), "--output", str(out))
    assert told.returncode == 0, told.stdout + told.stderr
    with out.open(encoding="utf-8", newline="") as file:
        labels = {row["key"]: row["label"] for row in csv.DictReader(file)}
    right = [labels[f"{label}/{path.name}"] == label for path, label in folder.held_out]
    judged = run_edge_command("evaluate", *common, str(folder.path), "--json")
    assert sum(right) == json.loads(judged.stdout)["num_correct"]


def test_a_site_with_images_is_told_that_the_model_reads_texts(
    federation: Federation, place: Path
) -> None:
    federation.start_run("further", rounds=1, min_participants=3)
    data = write_folder(place / "data" / "pictures", seed=3)
    site = federation.add_site("pictures", data.path, place)
    site.join()
    wait_until("a word", lambda: "the model reads texts" in site.complaints())
    assert site.is_running  # it serves any run, and another may be of images
    assert site.client.ask_to_stop() == 0
    assert site.join("--run", "further").wait_for_end() != 0
    assert (
        "the model reads texts, but the local data are images" in site.client.events[-1]["message"]
    )
    federation.end_runs()
