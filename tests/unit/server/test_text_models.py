"""Registering and exporting a model that reads texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.numpy import load_file
from tokenizers import Tokenizer, processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedra_edge.data.matching import match_labels
from fedra_edge.evaluation import evaluate_export
from fedra_edge.exports import open_tokenizer
from fedra_edge.protocol.families import family_named
from fedra_edge.protocol.layers import TensorKey
from fedra_edge.protocol.models import ImageInput, ModelSpec, TokenInput
from fedra_server.errors import ConfigurationError
from fedra_server.exporting import export_revision
from fedra_server.modelbook.registering import register_model
from fedra_server.storage.blobs import BlobStore
from tests.support.builders import make_model_spec
from tests.support.tiny_llama import (
    ADAPTER,
    LABELS,
    MAX_TOKENS,
    TinyLlama,
    WordTexts,
    build_tokenizer,
    call_plain,
    save_llama,
    word_data,
)
from tests.support.tiny_vit import build_vit

# peft asks transformers for a name that transformers renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
LLAMA = family_named("llama")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return TinyLlama.register(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def exported(tiny: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "out"
    export_revision(tiny.spec, ADAPTER, tiny.revision, tiny.blobs, out)
    return out


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    save_llama(directory)
    return directory


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "hf")
    return tmp_path / "hf"


def register(directory: Path, **options: Any) -> ModelSpec:  # noqa: ANN401 (any option)
    return register_model(directory, "tiny", BlobStore(directory.parent / "blobs"), **options)


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(content | changes), encoding="utf-8")


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))


def test_a_spec_says_what_the_model_reads(tiny: TinyLlama) -> None:
    spec, wanted = tiny.spec, tiny.spec.input
    assert (spec.family, spec.labels, spec.num_layers) == ("llama", LABELS, 3)
    assert isinstance(wanted, TokenInput)
    assert (wanted.vocabulary_size, wanted.max_tokens) == (32, MAX_TOKENS)
    assert Tokenizer.from_file(str(tiny.files.path(wanted.tokenizer))).encode("oil").ids == [1, 5]
    assert spec.block_linears == {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (48, 32),
        "mlp.up_proj": (48, 32),
        "mlp.down_proj": (32, 48),
    }
    assert spec.default_targets == ("self_attn.o_proj", "mlp.down_proj")
    assert spec.head_parameters == {"score.weight": (3, 32)}
    assert ModelSpec.model_validate_json(spec.model_dump_json()).model_id == spec.model_id


def test_specs_of_image_models_keep_their_form_and_id() -> None:
    spec = make_model_spec(num_layers=1)
    assert spec.model_id == "903543157bc2c0fd02717ae1fbc6b74b5660c620d5e67e3431e0fecb77d1e120"
    assert isinstance(ModelSpec.model_validate_json(spec.model_dump_json()).input, ImageInput)


@pytest.mark.parametrize(
    "changes",
    [{"kind": "sound"}, {"max_tokens": 0}, {"max_tokens": 2**20}, {"vocabulary_size": 0}],
    ids=str,
)
def test_an_impossible_input_is_refused(tiny: TinyLlama, changes: dict[str, object]) -> None:
    content = json.loads(tiny.spec.model_dump_json())
    content["input"] |= changes
    with pytest.raises(ValidationError):
        ModelSpec.model_validate(content)


def test_the_pieces_together_are_exactly_the_model(tiny: TinyLlama) -> None:
    work = tiny.work([0])
    found = {
        LLAMA.full_name(TensorKey(piece, name)): value
        for piece, path in work.weights.items()
        for name, value in load_file(path).items()
    }
    own = tiny.model.state_dict()
    assert found.keys() == own.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, own[name].numpy())


def test_costs_are_those_of_the_longest_text(tiny: TinyLlama) -> None:
    width, inner, keys = 32, 48, 16
    layer, head, stem = tiny.spec.layers[0].cost, tiny.spec.head.cost, tiny.spec.stem.cost
    assert layer.boundary_bytes == stem.boundary_bytes == 4 * MAX_TOKENS * width
    assert stem.parameter_bytes == 4 * 32 * width
    assert head.boundary_bytes == 4 * len(LABELS)
    linears = 2 * MAX_TOKENS * width * (2 * width + 2 * keys + 3 * inner)
    attention = 2 * 2 * MAX_TOKENS * MAX_TOKENS * width
    assert layer.forward_flops == linears + attention
    least = 4 * MAX_TOKENS * (2 * width + 2 * width + 2 * keys + 4 * inner)
    assert least <= layer.activation_bytes <= 1.6 * least


@pytest.mark.parametrize(("asked", "expected"), [(None, 64), (5, 5), (64, 64)])
def test_texts_are_cut_where_asked_or_where_the_model_ends(
    copied: Path, asked: int | None, expected: int
) -> None:
    wanted = register(copied, max_tokens=asked).input
    assert isinstance(wanted, TokenInput)
    assert wanted.max_tokens == expected


def test_a_model_for_long_texts_is_cut_at_512_tokens(tmp_path: Path) -> None:
    save_llama(tmp_path / "hf", max_position_embeddings=4096)
    wanted = register(tmp_path / "hf").input
    assert isinstance(wanted, TokenInput)
    assert wanted.max_tokens == 512


def test_more_tokens_than_positions_are_refused(copied: Path) -> None:
    with pytest.raises(ConfigurationError, match="up to 64 tokens") as caught:
        register(copied, max_tokens=65)
    assert "--max-tokens 64" in caught.value.remedy


def test_no_less_is_asked_for_than_the_tokenizer_adds(copied: Path) -> None:
    with pytest.raises(ConfigurationError, match="adds 1 tokens of its own") as caught:
        register(copied, max_tokens=1)
    assert "--max-tokens 2" in caught.value.remedy


def test_images_have_no_tokens(tmp_path: Path) -> None:
    build_vit().save_pretrained(tmp_path / "hf")
    with pytest.raises(ConfigurationError, match="reads images"):
        register(tmp_path / "hf", max_tokens=5)


def test_a_model_without_padding_token_can_be_registered(copied: Path) -> None:
    change_config(copied, pad_token_id=None)
    assert register(copied).config["pad_token_id"] is None


@pytest.mark.parametrize("slow_file", [None, "tokenizer.model"])
def test_a_missing_fast_tokenizer_is_refused(copied: Path, slow_file: str | None) -> None:
    (copied / "tokenizer.json").unlink()
    if slow_file is not None:
        (copied / slow_file).write_bytes(b"slow")
    with pytest.raises(ConfigurationError, match=r"no tokenizer\.json") as caught:
        register(copied)
    assert "use_fast=True" in caught.value.remedy


def test_a_damaged_tokenizer_is_refused(copied: Path) -> None:
    (copied / "tokenizer.json").write_text('{"version": "1.0"}', encoding="utf-8")
    with pytest.raises(ConfigurationError, match="holds no tokenizer"):
        register(copied)


def test_a_tokenizer_of_another_model_is_refused(copied: Path) -> None:
    save_tokenizer(build_tokenizer([f"word{number}" for number in range(40)]), copied)
    with pytest.raises(ConfigurationError, match="ids go up to 42") as caught:
        register(copied)
    assert caught.value.remedy


def test_a_tokenizer_that_ends_texts_with_padding_is_refused(copied: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <pad>", special_tokens=[("<pad>", 0)]
    )
    save_tokenizer(tokenizer, copied)
    with pytest.raises(ConfigurationError, match="padding token"):
        register(copied)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
            r"rope_parameters\.rope_type",
        ),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, r"rope_parameters\.rope_type"),
        ({"hidden_act": "tanh"}, "hidden_act"),
    ],
)
def test_a_model_that_no_client_can_compute_is_refused(
    copied: Path, changes: dict[str, object], field: str
) -> None:
    change_config(copied, **changes)
    with pytest.raises(ConfigurationError, match=field) as caught:
        register(copied)
    assert caught.value.remedy


def test_plain_transformers_and_peft_compute_what_the_revision_computes(
    tiny: TinyLlama, exported: Path
) -> None:
    data = word_data(tiny)
    ours, _ = data.batch(data.train_indices, tiny.spec.input)
    tokenizer = AutoTokenizer.from_pretrained(exported / "base")
    base = AutoModelForSequenceClassification.from_pretrained(exported / "base")
    model = PeftModel.from_pretrained(base, exported / "adapter").eval()
    expected = tiny.reference(range(3))
    with torch.no_grad():
        for row, index in zip(ours, data.train_indices, strict=True):
            text = WordTexts()[index].text
            prepared = tokenizer(text, truncation=True, return_tensors="pt")
            assert prepared["input_ids"][0].tolist() == row[row >= 0].tolist()
            logits = model(input_ids=prepared["input_ids"], use_cache=False).logits
            wanted = call_plain(expected, prepared["input_ids"])
            torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-6)


def test_the_export_cuts_long_texts_as_the_sites_do(tiny: TinyLlama, exported: Path) -> None:
    text = " ".join(["oil", "seal"] * MAX_TOKENS)
    tokenizer = AutoTokenizer.from_pretrained(exported / "base")
    assert tokenizer(text, truncation=True)["input_ids"] == tiny.tokenizer.encode(text).tolist()


def test_an_export_can_be_registered_again(tiny: TinyLlama, exported: Path, tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    assert register_model(exported / "base", "tiny", blobs, max_tokens=MAX_TOKENS) == tiny.spec


def test_central_evaluation_counts_as_the_plain_model_does(tiny: TinyLlama, exported: Path) -> None:
    data = match_labels(WordTexts(36), LABELS, open_tokenizer(exported, tiny.spec))
    counts = evaluate_export(exported, data)
    tokens, label_ids = data.batch(data.held_out_indices, tiny.spec.input)
    with torch.no_grad():
        logits = call_plain(tiny.reference(range(3)), torch.from_numpy(tokens))
    assert counts.num_examples == len(data.held_out_indices) == 12
    assert counts.num_correct == int((logits.argmax(1).numpy() == label_ids).sum())


def test_the_readme_of_an_export_speaks_of_texts(exported: Path) -> None:
    text = (exported / "README.md").read_text("utf-8")
    assert "AutoModelForSequenceClassification" in text
    assert "Image" not in text
