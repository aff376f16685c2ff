"""Registering a model: the pieces, what is recorded of them, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedra_edge.protocol.families import FAMILIES, family_named
from fedra_edge.protocol.layers import TensorKey, layer_piece
from fedra_edge.protocol.models import ImageInput, ModelSpec, Piece
from fedra_edge.protocol.tensors import read_tensors
from fedra_server.errors import ConfigurationError
from fedra_server.modelbook.registering import register_model
from fedra_server.storage.blobs import BlobStore
from tests.support.tiny_vit import LABELS, TinyVit, build_vit

VIT = family_named("vit")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyVit:
    return TinyVit.register(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    build_vit().save_pretrained(directory)
    return directory


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "hf")
    return tmp_path / "hf"


def register(directory: Path) -> ModelSpec:
    return register_model(directory, "tiny", BlobStore(directory.parent / "blobs"))


def change_json(path: Path, **changes: Any) -> None:  # noqa: ANN401 (any JSON)
    content = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(content | changes), encoding="utf-8")


def pieces_of(spec: ModelSpec) -> dict[str, Piece]:
    layers = {layer_piece(layer_id): spec.layers[layer_id] for layer_id in spec.layer_ids}
    return {"stem": spec.stem, **layers, "head": spec.head}


def test_the_pieces_together_are_exactly_the_model(tiny: TinyVit) -> None:
    found = {
        VIT.full_name(TensorKey(piece, name)): value
        for piece, held in pieces_of(tiny.spec).items()
        for name, value in read_tensors(tiny.blobs.path(held.weights.sha256)).items()
    }
    own = tiny.model.state_dict()
    assert found.keys() == own.keys()
    for name, value in found.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, own[name].numpy())


def test_a_spec_says_what_the_model_is(tiny: TinyVit) -> None:
    spec = tiny.spec
    assert (spec.family, spec.labels, spec.num_layers) == ("vit", LABELS, 4)
    assert isinstance(spec.input, ImageInput)
    assert (spec.input.size_px, spec.input.channels) == (16, 3)
    assert (spec.input.mean, spec.input.std) == ((0.5,) * 3, (0.5,) * 3)
    assert spec.block_linears == {
        "attention.q_proj": (32, 32),
        "attention.k_proj": (32, 32),
        "attention.v_proj": (32, 32),
        "attention.o_proj": (32, 32),
        "mlp.fc1": (48, 32),
        "mlp.fc2": (32, 48),
    }
    assert spec.default_targets == ("attention.o_proj", "mlp.fc2")
    assert spec.head_parameters == {"classifier.weight": (3, 32), "classifier.bias": (3,)}


def test_a_spec_keeps_its_id_across_the_wire(tiny: TinyVit) -> None:
    assert ModelSpec.model_validate_json(tiny.spec.model_dump_json()).model_id == tiny.spec.model_id


def test_registering_again_gives_the_same_model(tiny: TinyVit, copied: Path) -> None:
    assert register(copied) == tiny.spec


def test_costs_are_those_of_the_pieces(tiny: TinyVit) -> None:
    tokens, width, inner, rank = 5, 32, 48, 8
    layer, head, stem = tiny.spec.layers[0].cost, tiny.spec.head.cost, tiny.spec.stem.cost
    own = tiny.model.vit.layers[0].parameters()
    assert layer.parameter_bytes == 4 * sum(parameter.numel() for parameter in own)
    assert layer.boundary_bytes == stem.boundary_bytes == 4 * tokens * width
    assert head.boundary_bytes == 4 * len(LABELS)
    linears = 2 * tokens * (4 * width * width + 2 * width * inner)
    attention = 2 * 2 * tokens * tokens * width
    assert layer.forward_flops == linears + attention
    assert stem.activation_bytes == 0  # it is never trained, and nothing below it is

    wide = 2 * 4 * tokens * width  # inputs of the two norms
    attended = 4 * 4 * tokens * width  # query, key, value and output
    hidden = 2 * 4 * tokens * inner  # before and after the activation function
    factors = 2 * 4 * tokens * rank
    least = wide + attended + hidden + factors
    assert least <= layer.activation_bytes <= 1.3 * least


def test_the_preprocessor_decides_the_normalisation(copied: Path) -> None:
    change_json(
        copied / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3], image_std=[1.0, 2.0, 3.0]
    )
    wanted = register(copied).input
    assert isinstance(wanted, ImageInput)
    assert (wanted.mean, wanted.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    change_json(copied / "preprocessor_config.json", do_normalize=False)
    wanted = register(copied).input
    assert isinstance(wanted, ImageInput)
    assert (wanted.mean, wanted.std) == ((0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    "changes",
    [{"rescale_factor": 1 / 127.5}, {"image_mean": [0.5]}, {"image_std": [0.0, 1.0, 1.0]}],
    ids=["scale", "channels", "deviation"],
)
def test_an_input_we_cannot_prepare_is_refused(copied: Path, changes: dict[str, object]) -> None:
    change_json(copied / "preprocessor_config.json", **changes)
    with pytest.raises(ConfigurationError):
        register(copied)


def test_labels_keep_the_order_of_their_ids(copied: Path) -> None:
    change_json(copied / "config.json", id2label={"2": "a", "0": "c", "1": "b"})
    assert register(copied).labels == ("c", "b", "a")


def test_labels_with_one_name_are_refused(copied: Path) -> None:
    change_json(copied / "config.json", id2label={"0": "a", "1": "a", "2": "b"})
    with pytest.raises(ConfigurationError, match="distinct labels"):
        register(copied)


def test_an_unsupported_architecture_is_refused_with_the_list(copied: Path) -> None:
    change_json(copied / "config.json", architectures=["SwinForImageClassification"])
    with pytest.raises(ConfigurationError, match="Swin") as caught:
        register(copied)
    assert all(family.architecture in caught.value.remedy for family in FAMILIES)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", None])
def test_pickled_or_absent_weights_are_refused(copied: Path, name: str | None) -> None:
    weights = copied / "model.safetensors"
    if name is None:
        weights.unlink()
    else:
        weights.rename(copied / name)
    with pytest.raises(ConfigurationError, match="pickle" if name else "has no"):
        register(copied)


@pytest.mark.parametrize("damage", ["missing", "extra", "bytes"])
def test_incomplete_weights_are_refused(copied: Path, damage: str) -> None:
    path = copied / "model.safetensors"
    tensors = load_file(path)
    if damage == "missing":
        del tensors["classifier.weight"]
    else:
        tensors["vit.other.weight"] = np.zeros(2, np.float32)
    save_file(tensors, path, metadata={"format": "pt"})
    if damage == "bytes":
        path.write_bytes(b"no tensors")
    with pytest.raises(ConfigurationError):
        register(copied)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_directory_without_configuration_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        register_model(tmp_path, "tiny", BlobStore(tmp_path / "blobs"))


def test_names_of_a_family_round_trip() -> None:
    for text in ("stem/cls_token", "layers.11/mlp.fc1.bias", "head/layernorm.weight"):
        key = TensorKey.parse(text)
        assert VIT.locate(VIT.full_name(key)) == key
    for full_name in ("vit.pooler.dense.weight", "vit.layers.x.weight", "classifiers.weight"):
        with pytest.raises(ValueError, match="no piece"):
            VIT.locate(full_name)
    with pytest.raises(ValueError, match="no module"):
        VIT.full_name(TensorKey("head", "pooler.weight"))
    with pytest.raises(ValueError, match="there are: vit"):
        family_named("later")
