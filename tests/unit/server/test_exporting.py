"""An export is plain transformers and peft, and computes what the revision computes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForImageClassification, ViTImageProcessor
from typing_extensions import override

from fedra_edge.data.matching import match_labels
from fedra_edge.data.preparing import image_of
from fedra_edge.errors import ConfigurationError as EdgeConfigurationError
from fedra_edge.evaluation import evaluate_export
from fedra_edge.exports import read_export_spec
from fedra_server.errors import ConflictError
from fedra_server.exporting import export_revision
from fedra_server.modelbook.registering import register_model
from fedra_server.storage.blobs import BlobStore
from tests.support.tiny_vit import ADAPTER, LABELS, NoiseImages, TinyVit, noise_data

# peft asks transformers for a name that transformers renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


class NoiseToJudge(NoiseImages):
    """The same images, with no statement about what is held out."""

    @override
    def is_held_out(self, index: int) -> bool | None:
        return None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyVit:
    return TinyVit.register(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def exported(tiny: TinyVit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "out"
    export_revision(tiny.spec, ADAPTER, tiny.revision, tiny.blobs, out)
    return out


def load_plain(directory: Path) -> torch.nn.Module:
    base = AutoModelForImageClassification.from_pretrained(directory / "base")
    return PeftModel.from_pretrained(base, directory / "adapter").eval()


def test_plain_peft_computes_what_the_revision_computes(tiny: TinyVit, exported: Path) -> None:
    data = noise_data()
    images, _ = data.batch(data.train_indices, tiny.spec.input)
    pixels = torch.from_numpy(images)
    with torch.no_grad():
        logits = load_plain(exported)(pixel_values=pixels).logits
        expected = tiny.reference(range(4))(pixels).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_adapters_sit_on_exactly_the_named_modules(exported: Path) -> None:
    config = json.loads((exported / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert config["target_modules"] == [
        f"vit.layers.{index}.{target}" for index in range(4) for target in ADAPTER.targets
    ]
    model = load_plain(exported)
    wrapped = [name for name, _ in model.named_modules() if name.endswith(".base_layer")]
    assert len(wrapped) == 4 * len(ADAPTER.targets)
    assert not any("embeddings" in name for name in wrapped)


def test_the_base_is_the_registered_model(tiny: TinyVit, exported: Path, tmp_path: Path) -> None:
    own = tiny.model.state_dict()
    tensors = load_file(exported / "base" / "model.safetensors")
    assert tensors.keys() == own.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(value, own[name].numpy())
    again = register_model(exported / "base", tiny.spec.name, BlobStore(tmp_path / "blobs"))
    assert again == tiny.spec
    assert read_export_spec(exported) == tiny.spec


def test_the_preprocessor_prepares_images_as_the_sites_do(tiny: TinyVit, exported: Path) -> None:
    processor = ViTImageProcessor.from_pretrained(exported / "base")
    data = noise_data()
    image = image_of(data.dataset[0])
    pixels = processor(images=image, return_tensors="np")["pixel_values"][0]
    ours, _ = data.batch([0], tiny.spec.input)
    np.testing.assert_allclose(pixels, ours[0], atol=1e-6)


def test_central_evaluation_counts_as_plain_peft_does(tiny: TinyVit, exported: Path) -> None:
    data = match_labels(NoiseToJudge(), LABELS)
    counts = evaluate_export(exported, data)
    everything = range(len(data.dataset))
    images, label_ids = data.batch(everything, tiny.spec.input)
    with torch.no_grad():
        logits = load_plain(exported)(pixel_values=torch.from_numpy(images)).logits
    assert counts.num_examples == len(data.dataset)
    assert counts.num_correct == int((logits.argmax(1).numpy() == label_ids).sum())


def test_central_evaluation_leaves_out_what_was_for_training(exported: Path) -> None:
    assert evaluate_export(exported, noise_data()).num_examples == 6


def test_an_existing_export_is_never_overwritten(tiny: TinyVit, exported: Path) -> None:
    with pytest.raises(ConflictError):
        export_revision(tiny.spec, ADAPTER, tiny.revision, tiny.blobs, exported)


def test_an_export_leaves_nothing_else_behind(exported: Path) -> None:
    assert [path.name for path in exported.parent.iterdir()] == ["out"]
    assert {path.name for path in exported.iterdir()} == {
        "README.md", "adapter", "base", "graphs", "model.json",
    }  # fmt: skip


def test_a_directory_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgeConfigurationError, match="no exported model"):
        evaluate_export(tmp_path, noise_data())


def test_a_damaged_export_is_refused(tiny: TinyVit, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_revision(tiny.spec, ADAPTER, tiny.revision, tiny.blobs, out)
    (out / "base" / "model.safetensors").write_bytes(b"gone")
    with pytest.raises(EdgeConfigurationError, match="damaged"):
        evaluate_export(out, noise_data())
