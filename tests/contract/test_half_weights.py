"""Clients compute in float32 with weights that are stored in half precision, and tune them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from fedra_edge.protocol.layers import TensorKey
from fedra_edge.protocol.rounds import EvaluationTask
from fedra_edge.slicing import whole_model
from fedra_edge.training.torch_slice import ResidentSlice, trained_parameters
from fedra_edge.training.torch_trainer import TorchTrainer
from fedra_edge.training.torch_walk import StreamedSlice
from fedra_server.modelbook.stored_dtypes import WeightsDtype
from tests.support.edges import run_edge_command, wait_until
from tests.support.federation import Federation, prepare_home, running_federation
from tests.support.sites import write_folder
from tests.support.tiny_vit import (
    ADAPTER,
    NUM_LAYERS,
    TinyVit,
    build_vit,
    noise_data,
    reference_parameter,
)

CPU = torch.device("cpu")
LAYERS = tuple(range(NUM_LAYERS))
ROUNDS = 4
SITES = ("assembly", "foundry")


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyVit:
    """A model in half precision; its ``model`` and ``reference`` have the rounded weights."""
    dtype: WeightsDtype = request.param
    return TinyVit.register(tmp_path_factory.mktemp(dtype), dtype)


def examples(tiny: TinyVit) -> tuple[torch.Tensor, torch.Tensor]:
    data = noise_data()
    images, label_ids = data.batch(data.held_out_indices, tiny.spec.input)
    return torch.from_numpy(images), torch.from_numpy(label_ids)


@pytest.mark.parametrize("trained", [(0,), (1, 3), LAYERS], ids=str)
@pytest.mark.parametrize("depth", ["full", "reduced"])
def test_logits_are_those_of_the_rounded_plain_model(
    tiny: TinyVit, trained: tuple[int, ...], depth: str
) -> None:
    work = tiny.work(trained, depth=depth)
    loaded = ResidentSlice(work, trained_parameters(work, CPU), CPU)
    images, _ = examples(tiny)
    [entering] = loaded.enter([images])
    expected = tiny.reference(work.manifest.layer_ids)(images).logits
    torch.testing.assert_close(loaded.leave(entering), expected, rtol=0, atol=1e-5)


def test_rounding_is_no_matter_of_the_last_digit(tiny: TinyVit) -> None:
    images, _ = examples(tiny)
    with torch.no_grad():
        difference = build_vit()(images).logits - tiny.model(images).logits
    assert difference.abs().max() > 1e-4


@pytest.mark.parametrize("trained", [(0,), (1, 3), LAYERS], ids=str)
def test_a_streamed_slice_has_the_gradients_of_the_rounded_plain_model(
    tiny: TinyVit, trained: tuple[int, ...]
) -> None:
    work = tiny.work(trained)
    parameters = trained_parameters(work, CPU)
    streamed = StreamedSlice(work, parameters, CPU)
    images, label_ids = examples(tiny)
    entering = streamed.enter(torch.split(images, 2))
    loss = streamed.accumulate(entering, torch.split(label_ids, 2), len(images))

    reference = tiny.reference(LAYERS)
    expected = F.cross_entropy(reference(images).logits, label_ids)
    expected.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    positions = {layer: layer for layer in LAYERS}
    for name, parameter in parameters.items():
        same = reference_parameter(reference, TensorKey.parse(name), positions)
        torch.testing.assert_close(parameter.grad, same.grad, rtol=1e-5, atol=1e-5)


def test_evaluation_counts_with_the_rounded_weights(tiny: TinyVit) -> None:
    task = EvaluationTask(
        run="run", model_id=tiny.spec.model_id, revision=tiny.revision, adapter=ADAPTER
    )
    model = whole_model(task, tiny.spec, tiny.files)
    counts = TorchTrainer(CPU).evaluate(model, noise_data(), lambda: False, lambda: 2**40)
    images, label_ids = examples(tiny)
    with torch.no_grad():
        logits = tiny.reference(LAYERS)(images).logits
    assert counts.num_correct == int((logits.argmax(dim=1) == label_ids).sum())
    expected = F.cross_entropy(logits, label_ids, reduction="sum").item()
    assert counts.loss_sum == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Two sites on a server whose model is stored as bfloat16."""
    place = tmp_path_factory.mktemp("half")
    prepared = prepare_home(place / "prepared", "--weights-dtype", "bfloat16")
    with running_federation(place / "server", prepared) as running:
        for seed, name in enumerate(SITES):
            data = write_folder(place / "data" / name, seed)
            running.add_site(name, data.path, place, "--max-layers=2", poll_s="2")
        yield running


def is_evaluated(federation: Federation, run: str) -> bool:
    last = federation.report(run).accuracy[-1:]
    return any(it.revision == ROUNDS and len(it.sites) == len(SITES) for it in last)


@pytest.mark.e2e
def test_sites_tune_a_model_that_is_stored_in_half_precision(
    federation: Federation, tmp_path: Path
) -> None:
    [model] = federation.operate("model", "list")["models"]
    assert model["weights_dtype"] == "bfloat16"
    sites = list(federation.sites.values())
    federation.have_running(sites)
    federation.start_run(
        "half", depth="full", rounds=ROUNDS, min_participants=len(SITES),
        learning_rate=0.02, batch_size=12, local_epochs=6,
    )  # fmt: skip
    wait_until("the end to be evaluated", lambda: is_evaluated(federation, "half"))
    accuracy = federation.operate("run", "status", "half")["accuracy"]
    first, last = accuracy[0]["pooled"], accuracy[-1]["pooled"]
    assert last["mean_loss"] < 0.8 * first["mean_loss"]
    assert last["accuracy"] > first["accuracy"] + 0.15

    out = str(tmp_path / "out")
    federation.operate("export", "--run", "half", "--out", out)
    for site in sites:
        judged = run_edge_command("evaluate", "--export", out, "--data", str(site.data), "--json")
        assert judged.returncode == 0, judged.stderr
        shown = accuracy[-1]["sites"][site.identity.client_id]
        found = json.loads(judged.stdout)
        for count in ("num_examples", "num_correct"):
            assert found[count] == shown[count]
