"""Machines without PyTorch take part beside others, and use what was tuned."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

from fedra_edge.protocol.files import sha256_of_file
from fedra_edge.protocol.models import BlobRef, ModelSpec
from fedra_edge.protocol.tensors import FloatArray, read_tensors
from tests.support.edges import EdgeSite, run_edge_command, wait_until
from tests.support.environments import Environment, environment
from tests.support.federation import MODEL, Federation, running_federation
from tests.support.servers import run_server_command
from tests.support.sites import SiteData, write_folder
from tests.support.text_sites import write_text_folder
from tests.support.tiny_llama import MAX_TOKENS, save_llama

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

ROUNDS = 3
EXTRAS = {"assembly": "onnx", "foundry": "onnx-training", "press": None}
"""What each site has installed; None is the environment of these tests, which has PyTorch."""

WHOLE_BATCHES = {"learning_rate": 0.02, "batch_size": 36, "local_epochs": 16}
"""No batch is smaller than a site's data, so their order changes rounding only."""

USE_MODEL = """
import sys, json, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
[logits] = session.run(None, {"inputs": numpy.load(sys.argv[2])})
labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
print(json.dumps([labels[i] for i in logits.argmax(1)]))
"""


@pytest.fixture(scope="session")
def bare() -> Mapping[str, Environment]:
    """Environments without PyTorch, as pip makes them from this checkout's extras."""
    return {extra: environment(extra) for extra in EXTRAS.values() if extra}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SiteData]:
    place = tmp_path_factory.mktemp("data")
    return {name: write_folder(place / name, seed) for seed, name in enumerate(EXTRAS, start=1)}


@pytest.fixture(scope="module")
def federation(
    bare: Mapping[str, Environment],
    data: Mapping[str, SiteData],
    prepared_home: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Federation]:
    """A mixed cohort that has tuned, then the same sites that did it with PyTorch."""
    place = tmp_path_factory.mktemp("federation")
    with running_federation(place / "server", prepared_home) as federation:
        for cohort in ("mixed", "torch"):
            sites = []
            for name, extra in EXTRAS.items():
                python = bare[extra].python if extra and cohort == "mixed" else None
                sites.append(
                    federation.add_site(
                        f"{name}-{cohort}", data[name].path, place, python=python, poll_s="2"
                    )
                )
            federation.have_running(sites)
            chosen = {"rounds": ROUNDS, "merge_weighting": "uniform", **WHOLE_BATCHES}
            federation.start_run(cohort, depth="full", min_participants=len(sites), **chosen)
            wait_until(f"the end of {cohort}", partial(is_evaluated, federation, cohort))
            for site in sites:
                assert site.client.ask_to_stop() == 0
        yield federation


@pytest.fixture(scope="module")
def exported(federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "tuned"
    federation.operate("export", "--run", "mixed", "--out", str(out))
    return out


def is_evaluated(federation: Federation, run: str) -> bool:
    last = federation.report(run).accuracy[-1:]
    return any(it.revision == ROUNDS and len(it.sites) == len(EXTRAS) for it in last)


def adapters(federation: Federation, run: str, revision: int) -> dict[str, FloatArray]:
    manifest = federation.store.revision(run, revision).manifest
    tensors: dict[str, FloatArray] = {}
    for ref in (*manifest.layers, manifest.head):
        tensors |= read_tensors(federation.blobs.path(ref.sha256))
    return tensors


@pytest.mark.parametrize("extra", ["onnx", "onnx-training"])
def test_there_is_no_torch(bare: Mapping[str, Environment], extra: str) -> None:
    done = bare[extra].run("-c", "import torch")
    assert (done.returncode, "No module named 'torch'" in done.stderr) == (1, True)
    told = bare[extra].run("-m", "fedra_edge", "version", "--json")
    assert json.loads(told.stdout)["backends"] == ["onnx"]


def test_sites_without_torch_train_and_all_deltas_are_merged(federation: Federation) -> None:
    backends = {client.name: client.profile.backend for client in federation.store.clients()}
    mixed = [backends[f"{name}-mixed"] for name in EXTRAS]
    assert mixed == ["onnx" if extra else "torch" for extra in EXTRAS.values()]
    for row in federation.report("mixed").rounds:
        assert (row.participants, row.merged) == (len(EXTRAS), len(EXTRAS))
    for number in range(1, ROUNDS + 1):
        federation.check_merge("mixed", number)
    for site in federation.sites.values():
        assert site.complaints() == ""
        assert site.deltas_refused == []


def test_a_mixed_cohort_merges_what_one_with_torch_only_merges(federation: Federation) -> None:
    start = adapters(federation, "mixed", 0)
    mixed, plain = (adapters(federation, run, 1) for run in ("mixed", "torch"))
    assert mixed.keys() == plain.keys() == start.keys()
    moved = np.concatenate([(plain[name] - start[name]).ravel() for name in plain])
    apart = np.concatenate([(mixed[name] - plain[name]).ravel() for name in plain])
    assert np.linalg.norm(moved) > 0.1
    assert np.linalg.norm(apart) < 1e-3 * np.linalg.norm(moved)


def test_a_mixed_cohort_learns_as_well(federation: Federation) -> None:
    rows = {run: federation.report(run).accuracy for run in ("mixed", "torch")}
    first, last = (rows["mixed"][number].pooled for number in (0, ROUNDS))
    plain = rows["torch"][ROUNDS].pooled
    assert last.accuracy > first.accuracy + 0.15
    assert last.accuracy == pytest.approx(plain.accuracy, abs=0.02)
    assert last.mean_loss == pytest.approx(plain.mean_loss, rel=0.01)


@pytest.mark.parametrize("extra", ["onnx", "onnx-training"])
def test_the_export_is_evaluated_without_torch(
    bare: Mapping[str, Environment], exported: Path, data: Mapping[str, SiteData], extra: str
) -> None:
    given = ("--export", str(exported), "--data", str(data["press"].path), "--json")
    found, known = (
        json.loads(run_edge_command("evaluate", *given, python=python).stdout)
        for python in (bare[extra].python, None)
    )
    assert found["num_correct"] == known["num_correct"]
    assert found["mean_loss"] == pytest.approx(known["mean_loss"], rel=1e-4)


def test_labels_are_predicted_without_torch(
    bare: Mapping[str, Environment], exported: Path, data: Mapping[str, SiteData]
) -> None:
    given = ("--export", str(exported), "--data", str(data["press"].path), "--top", "3")
    found, known = (
        list(csv.DictReader(io.StringIO(run_edge_command("predict", *given, python=it).stdout)))
        for it in (bare["onnx"].python, None)
    )
    assert len(found) == len(known) > 0
    for row, wanted in zip(found, known, strict=True):
        assert row.keys() == wanted.keys()
        for column, value in wanted.items():
            if "probability" in column:
                assert float(row[column]) == pytest.approx(float(value), abs=1e-4)
            else:
                assert row[column] == value


@pytest.mark.parametrize("extra", ["onnx", "onnx-training"])
def test_the_fused_model_runs_on_plain_onnxruntime(
    bare: Mapping[str, Environment],
    federation: Federation,
    exported: Path,
    extra: str,
    tmp_path: Path,
) -> None:
    out = tmp_path / "fused"
    federation.operate("export", "--run", "mixed", "--format", "onnx", "--out", str(out))
    inputs = np.random.default_rng(5).normal(size=(4, 3, 16, 16)).astype(np.float32)
    np.save(tmp_path / "inputs.npy", inputs)
    given = (str(out / "model.onnx"), str(tmp_path / "inputs.npy"))
    done = bare[extra].run("-c", USE_MODEL, *given)
    assert done.returncode == 0, done.stderr
    spec = ModelSpec.model_validate_json((exported / "model.json").read_bytes())
    assert set(json.loads(done.stdout)) <= set(spec.labels)


def test_a_damaged_graph_is_fetched_anew(federation: Federation) -> None:
    site = federation.sites["assembly-mixed"]
    graphs = federation.store.run("mixed").spec.graphs
    assert graphs is not None
    kept = cached(site, graphs.block_vjp)
    kept.write_bytes(b"\0" * graphs.block_vjp.size_bytes)
    federation.have_running([site])
    federation.start_run("again", rounds=1, min_participants=1, **WHOLE_BATCHES)
    assert federation.wait_for_rounds("again", 1).rounds[0].merged == 1
    assert sha256_of_file(kept) == graphs.block_vjp.sha256
    assert "is damaged; fetching it again" in site.complaints()
    assert site.client.ask_to_stop() == 0


def cached(site: EdgeSite, ref: BlobRef) -> Path:
    return site.config.blobs / ref.sha256[:2] / ref.sha256


def use_unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "NoSuchOperator"


def use_later_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 99


def use_later_format(model: onnx.ModelProto) -> None:
    model.ir_version = 99


@pytest.mark.parametrize("extra", ["onnx", "onnx-training"])
@pytest.mark.parametrize(
    "case",
    [
        (use_unknown_operator, "update fedra"),
        (use_later_opset, "pip install"),
        (use_later_format, "pip install"),
    ],
    ids=lambda case: case[0].__name__,
)
def test_a_graph_of_another_time_is_explained(
    bare: Mapping[str, Environment],
    exported: Path,
    data: Mapping[str, SiteData],
    extra: str,
    case: tuple[Callable[[onnx.ModelProto], None], str],
) -> None:
    alter, remedy = case
    out = exported.with_name(f"{alter.__name__}-{extra}")
    write_altered(exported, out, alter)
    given = ("--export", str(out), "--data", str(data["press"].path), "--json")
    done = run_edge_command("evaluate", *given, python=bare[extra].python)
    told = json.loads(done.stdout)
    assert done.returncode == 3
    assert "block" in told["message"]
    assert remedy in told["remedy"]
    assert "Traceback" not in done.stderr
    with_torch = run_edge_command("evaluate", *given)
    assert with_torch.returncode == 0, with_torch.stdout


def write_altered(exported: Path, out: Path, alter: Callable[[onnx.ModelProto], None]) -> None:
    """Copy an export, but for its block's graph, which is altered and named as it then is."""
    shutil.copytree(exported, out)
    path = out / "graphs" / "block.onnx"
    model = onnx.load_model_from_string(path.read_bytes())
    alter(model)
    path.write_bytes(model.SerializeToString())
    spec = json.loads((out / "model.json").read_bytes())
    named = {"sha256": sha256_of_file(path), "size_bytes": path.stat().st_size}
    spec["graphs"]["block"] = named
    (out / "model.json").write_text(json.dumps(spec), encoding="utf-8")


def test_an_export_without_graphs_needs_torch(
    bare: Mapping[str, Environment], exported: Path, data: Mapping[str, SiteData]
) -> None:
    old = exported.with_name("old")
    shutil.copytree(exported, old)
    shutil.rmtree(old / "graphs")
    spec = json.loads((old / "model.json").read_bytes()) | {"graphs": None}
    (old / "model.json").write_text(json.dumps(spec), encoding="utf-8")
    for command in ("evaluate", "predict"):
        given = ("--export", str(old), "--data", str(data["press"].path), "--json")
        done = run_edge_command(command, *given, python=bare["onnx"].python)
        told = json.loads(done.stdout)
        assert done.returncode == 3, told
        assert "needs PyTorch" in told["message"]
        assert "fedra[torch]" in told["remedy"]


def test_a_model_that_reads_texts_is_tuned_and_evaluated(tmp_path: Path) -> None:
    python = environment("onnx", "text").python
    home, saved, out = str(tmp_path / "prepared"), tmp_path / "saved", str(tmp_path / "tuned")
    save_llama(saved, initializer_range=0.02)
    tokens = f"--max-tokens={MAX_TOKENS}"
    run_server_command("init", "--home", home)
    run_server_command("model", "add", MODEL, str(saved), tokens, "--home", home)
    texts = write_text_folder(tmp_path / "texts", seed=1)
    with running_federation(tmp_path / "server", Path(home)) as federation:
        site = federation.add_site("mill", texts.path, tmp_path, python=python, poll_s="2")
        federation.have_running([site])
        training = {"optimizer": "adamw", "learning_rate": 0.01, "batch_size": 20}
        federation.start_run(
            "words", depth="full", rounds=1, min_participants=1, local_epochs=16, **training
        )

        def are_evaluated() -> bool:
            return [it.revision for it in federation.report("words").accuracy if it.sites] == [0, 1]

        wait_until("the evaluations", are_evaluated)
        first, last = (it.pooled for it in federation.report("words").accuracy)
        assert last.mean_loss < 0.8 * first.mean_loss
        federation.operate("export", "--run", "words", "--out", out)
    given = ("evaluate", "--export", out, "--data", str(texts.path), "--json")
    found, known = (json.loads(run_edge_command(*given, python=it).stdout) for it in (python, None))
    assert found["num_correct"] == known["num_correct"] == last.num_correct
    assert found["mean_loss"] == pytest.approx(known["mean_loss"], rel=1e-4)
