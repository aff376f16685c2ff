"""Frozen weights in half precision: half the bytes, exactly rounded, and plain float32 again."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.nn import functional as F
from transformers import ViTForImageClassification

from fedra_edge.evaluation import evaluate_export
from fedra_edge.protocol.ids import RunId
from fedra_edge.protocol.models import ModelSpec, Piece
from fedra_edge.protocol.tensors import (
    TensorInfo,
    read_header,
    read_tensors,
    serialize_tensors,
)
from fedra_server.cli import main
from fedra_server.cli.output import format_bytes
from fedra_server.config import ServerHome
from fedra_server.errors import ConfigurationError
from fedra_server.exporting import export_revision
from fedra_server.modelbook.comparing import surely_differs
from fedra_server.modelbook.packing import pack_piece
from fedra_server.modelbook.registering import register_model
from fedra_server.modelbook.stored_dtypes import WeightsDtype, stored_dtype
from fedra_server.publishing import initial_revision
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.store import Store
from tests.support.builders import make_blob, make_run_spec
from tests.support.tiny_vit import ADAPTER, TinyVit, build_vit, noise_data, round_frozen

DTYPES: tuple[WeightsDtype, ...] = ("float32", "bfloat16", "float16")
HALVES = DTYPES[1:]
HEAD_NAMES = ("classifier.weight", "classifier.bias")


@dataclass(frozen=True)
class Registered:
    """A saved model, so wide that file headers hardly count, registered in every format."""

    saved: Path
    blobs: BlobStore
    specs: dict[WeightsDtype, ModelSpec]

    def load(self) -> ViTForImageClassification:
        return ViTForImageClassification.from_pretrained(self.saved)

    def header(self, piece: Piece) -> dict[str, TensorInfo]:
        return read_header(self.blobs.path(piece.weights.sha256))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Registered:
    directory = tmp_path_factory.mktemp("wide")
    build_vit(num_layers=2, hidden_size=192).save_pretrained(directory / "hf")
    blobs = BlobStore(directory / "blobs")
    specs = {dtype: register_model(directory / "hf", "wide", blobs, dtype) for dtype in DTYPES}
    return Registered(directory / "hf", blobs, specs)


def pieces_of(spec: ModelSpec) -> tuple[Piece, ...]:
    return (spec.stem, *spec.layers, spec.head)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_takes_half_the_bytes(wide: Registered, dtype: WeightsDtype) -> None:
    def stored_bytes(dtype: WeightsDtype) -> int:
        return sum(piece.weights.size_bytes for piece in pieces_of(wide.specs[dtype]))

    assert stored_bytes(dtype) <= 0.51 * stored_bytes("float32")


@pytest.mark.parametrize("dtype", HALVES)
def test_only_where_the_weights_are_tells_the_models_apart(
    wide: Registered, dtype: WeightsDtype
) -> None:
    full, half = wide.specs["float32"], wide.specs[dtype]
    assert half.model_id != full.model_id
    frozen_blobs = {piece.weights.sha256 for piece in pieces_of(half)}
    assert not frozen_blobs & {piece.weights.sha256 for piece in pieces_of(full)}
    for one, other in zip(pieces_of(half), pieces_of(full), strict=True):
        assert one.cost.parameter_bytes == other.cost.parameter_bytes
    moved = {"stem": full.stem, "layers": full.layers, "head": full.head}
    assert half.model_copy(update=moved) == full


def test_the_default_stores_what_it_always_stored(wide: Registered) -> None:
    assert register_model(wide.saved, "wide", wide.blobs) == wide.specs["float32"]
    for piece in pieces_of(wide.specs["float32"]):
        path = wide.blobs.path(piece.weights.sha256)
        assert path.read_bytes() == serialize_tensors(load_file(path))


@pytest.mark.parametrize("dtype", HALVES)
def test_registering_again_gives_the_same_model(wide: Registered, dtype: WeightsDtype) -> None:
    assert register_model(wide.saved, "wide", wide.blobs, dtype) == wide.specs[dtype]


@pytest.mark.parametrize("dtype", HALVES)
def test_a_run_starts_from_the_head_as_it_was_saved(wide: Registered, dtype: WeightsDtype) -> None:
    original, spec = wide.load().state_dict(), wide.specs[dtype]
    revision = initial_revision(spec, RunId("run"), make_run_spec(), wide.blobs, now=0.0)
    stored = read_tensors(wide.blobs.path(spec.head.weights.sha256))
    started = read_tensors(wide.blobs.path(revision.manifest.head.sha256))
    assert started.keys() == {f"head/{name}" for name in HEAD_NAMES}
    for name in HEAD_NAMES:
        for found in (stored[name], started[f"head/{name}"]):
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, original[name].numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_export_is_float32_and_holds_what_was_stored_bit_for_bit(
    wide: Registered, dtype: WeightsDtype, tmp_path: Path
) -> None:
    spec, out = wide.specs[dtype], tmp_path / "out"
    run_spec = make_run_spec(adapter=ADAPTER)
    revision = initial_revision(spec, RunId("run"), run_spec, wide.blobs, now=0.0).manifest
    export_revision(spec, ADAPTER, revision, wide.blobs, out)
    file = out / "base" / "model.safetensors"
    rounded = wide.load()
    round_frozen(rounded, dtype)
    expected = rounded.state_dict()
    assert {info.dtype for info in read_header(file).values()} == {"F32"}
    found = load_file(file)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.tobytes() == expected[name].numpy().tobytes()
    again = register_model(out / "base", spec.name, BlobStore(tmp_path / "blobs"), dtype)
    assert again == spec


@pytest.mark.parametrize("dtype", HALVES)
def test_an_export_is_evaluated_like_the_rounded_model(dtype: WeightsDtype, tmp_path: Path) -> None:
    tiny = TinyVit.register(tmp_path, dtype)
    export_revision(tiny.spec, ADAPTER, tiny.revision, tiny.blobs, tmp_path / "out")
    data = noise_data()
    judged = replace(data, train_indices=())
    counts = evaluate_export(tmp_path / "out", judged)
    images, label_ids = data.batch(data.held_out_indices, tiny.spec.input)
    with torch.no_grad():
        logits = tiny.reference(range(4))(torch.from_numpy(images)).logits
    assert counts.num_examples == len(label_ids)
    assert counts.num_correct == int((logits.argmax(1).numpy() == label_ids).sum())
    loss_sum = F.cross_entropy(logits, torch.from_numpy(label_ids), reduction="sum")
    assert counts.loss_sum == pytest.approx(loss_sum.item(), rel=1e-5)


@pytest.mark.parametrize(("dtype", "wider"), [("float16", "bfloat16"), ("bfloat16", "float32")])
def test_a_weight_too_large_for_the_format_is_refused(dtype: WeightsDtype, wider: str) -> None:
    largest = torch.finfo(getattr(torch, dtype)).max
    fitting = {"weight": np.array([largest, -largest, np.inf], np.float32)}
    assert pack_piece(fitting, dtype, ())
    over = {"weight": np.array([1.0, -min(largest * 1.01, 3.4e38)], np.float32)}
    with pytest.raises(ConfigurationError, match=f"weight .* too large for {dtype}") as caught:
        pack_piece(over, dtype, ())
    assert f"--weights-dtype {wider}" in caught.value.remedy
    assert pack_piece(over, dtype, ["weight"])


def test_a_refusal_says_which_dtype_would_do(wide: Registered, tmp_path: Path) -> None:
    model = wide.load()
    model.get_parameter("vit.layers.1.mlp.fc1.bias").data[0] = 1e5
    model.save_pretrained(tmp_path / "hf")
    blobs = BlobStore(tmp_path / "blobs")
    with pytest.raises(ConfigurationError, match=r"mlp\.fc1\.bias") as caught:
        register_model(tmp_path / "hf", "wide", blobs, "float16")
    assert "bfloat16" in caught.value.remedy
    assert register_model(tmp_path / "hf", "wide", blobs, "bfloat16").num_layers == 2


def test_the_stored_dtype_is_found_without_loading(wide: Registered) -> None:
    found = {dtype: stored_dtype(spec, wide.blobs) for dtype, spec in wide.specs.items()}
    assert found == {dtype: dtype for dtype in DTYPES}
    spec = wide.specs["float32"]
    for blob in (make_blob("lost"), wide.blobs.put_bytes(b"no tensors")):
        stem = spec.stem.model_copy(update={"weights": blob})
        assert stored_dtype(spec.model_copy(update={"stem": stem}), wide.blobs) is None


@pytest.mark.parametrize("asked", DTYPES)
@pytest.mark.parametrize("known", DTYPES)
def test_another_dtype_or_head_is_another_model(
    wide: Registered, tmp_path: Path, known: WeightsDtype, asked: WeightsDtype
) -> None:
    spec = wide.specs[known]
    assert surely_differs(wide.saved, asked, spec, wide.blobs) == (asked != known)
    model = wide.load()
    model.get_parameter("classifier.bias").data += 1
    model.save_pretrained(tmp_path)
    assert surely_differs(tmp_path, asked, spec, wide.blobs)


def test_all_but_the_trained_tensors_are_stored_in_half_precision(wide: Registered) -> None:
    for half, full in zip(*(pieces_of(wide.specs[it]) for it in DTYPES[1::-1]), strict=True):
        stored, original = wide.header(half), wide.header(full)
        assert {name: info.shape for name, info in stored.items()} == {
            name: info.shape for name, info in original.items()
        }
        for name, info in stored.items():
            assert info.dtype == ("F32" if name in HEAD_NAMES else "BF16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator_is_told_size_and_dtype(
    wide: Registered, dtype: WeightsDtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = ServerHome(tmp_path / "home")
    home.create()
    home.config_file.touch()
    blobs = BlobStore(home.blobs)
    spec = register_model(wide.saved, "wide", blobs, dtype)
    with closing(Store.open(home.path)) as store:
        store.add_model(spec, 1.0)

    def told(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["model", *arguments, "--home", str(home.path)])
        assert not ended.value.code
        return capsys.readouterr().out

    shown = json.loads(told("show", "wide", "--json"))
    assert json.loads(told("list", "--json")) == {"models": [shown]}
    stored_bytes = sum(piece.weights.size_bytes for piece in pieces_of(spec))
    assert (shown["weight_bytes"], shown["weights_dtype"]) == (stored_bytes, dtype)
    size = format_bytes(stored_bytes)
    assert f"{size} {dtype}" in " ".join(told("list").split())
    assert f"Weights: {size} in {dtype}" in told("show", "wide")
    blobs.path(spec.stem.weights.sha256).unlink()
    assert "unreadable" in told("list")
    assert json.loads(told("show", "wide", "--json"))["weights_dtype"] is None
