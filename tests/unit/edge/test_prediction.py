"""Prediction says of local examples what plain transformers and peft say of them."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForImageClassification

import fedra_edge
from fedra_edge.data.dataset import Example
from fedra_edge.data.images import prepare_image, read_image
from fedra_edge.errors import ConfigurationError, DataError, TrainingInterrupted
from fedra_edge.protocol.models import ImageInput
from fedra_edge.training import Trainer, load_trainer
from fedra_server.exporting import export_revision
from tests.support.memory_floor import scarce
from tests.support.sites import write_folder
from tests.support.tiny_vit import ADAPTER, LABELS, TinyVit

# peft asks transformers for a name that transformers renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyVit:
    return TinyVit.register(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def exported(tiny: TinyVit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "out"
    export_revision(tiny.spec, ADAPTER, tiny.revision, tiny.blobs, out)
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("site") / "images", seed=4).path


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return load_trainer()


def expected_probabilities(exported: Path, tiny: TinyVit, paths: list[Path]) -> np.ndarray:
    base = AutoModelForImageClassification.from_pretrained(exported / "base")
    model = PeftModel.from_pretrained(base, exported / "adapter").eval()
    assert isinstance(tiny.spec.input, ImageInput)
    pixels = np.stack([prepare_image(read_image(path), tiny.spec.input) for path in paths])
    with torch.no_grad():
        logits = model(pixel_values=torch.from_numpy(pixels)).logits
    probabilities: np.ndarray = logits.softmax(1).numpy()
    return probabilities


def test_predictions_are_those_of_plain_peft(tiny: TinyVit, exported: Path, images: Path) -> None:
    predictions = list(fedra_edge.predict(exported, images, top=3))
    paths = sorted(images.rglob("*.png"))
    assert [told.key for told in predictions] == [p.relative_to(images).as_posix() for p in paths]
    for told, row in zip(predictions, expected_probabilities(exported, tiny, paths), strict=True):
        order = np.argsort(-row)
        assert [likely.label for likely in told.top] == [LABELS[i] for i in order]
        assert [likely.probability for likely in told.top] == pytest.approx(row[order], abs=1e-6)
        assert (told.label, told.probability) == told.top[0]


def test_memory_never_changes_a_prediction(exported: Path, images: Path, trainer: Trainer) -> None:
    plenty = list(fedra_edge.predict(exported, images, trainer=trainer))
    little = list(fedra_edge.predict(exported, images, trainer=trainer, memory_bytes=scarce()))
    assert [told.key for told in little] == [told.key for told in plenty]
    assert [told.probability for told in little] == pytest.approx(
        [told.probability for told in plenty], abs=1e-6
    )


def test_at_most_as_many_labels_as_there_are(
    exported: Path, images: Path, trainer: Trainer
) -> None:
    told = next(fedra_edge.predict(exported, images, top=100, trainer=trainer))
    assert sum(likely.probability for likely in told.top) == pytest.approx(1)
    assert {likely.label for likely in told.top} == set(LABELS)
    with pytest.raises(ConfigurationError, match="0 labels"):
        fedra_edge.predict(exported, images, top=0)


def test_a_dataset_of_the_programs_own_is_predicted(exported: Path, trainer: Trainer) -> None:
    class Camera:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Example:
            if index == 2:
                raise OSError("the camera is busy")
            return Example(np.full((20, 30, 3), 60 * index, dtype=np.uint8), "whatever")

        def key_of(self, index: int) -> str:
            return f"frame-{index}"

    predictions = fedra_edge.predict(exported, Camera(), trainer=trainer)
    assert [told.key for told in predictions] == ["frame-0", "frame-1", "frame-3"]
    assert list(predictions.skipped) == ["the camera is busy: 1 (frame-2)"]
    assert (predictions.num_read, predictions.num_examples) == (4, 4)


def test_what_cannot_be_read_is_skipped_and_counted(
    exported: Path, images: Path, trainer: Trainer, tmp_path: Path
) -> None:
    good = [images / "test" / label / "000.png" for label in LABELS]
    (tmp_path / "broken.png").write_bytes(good[0].read_bytes()[:60])
    (tmp_path / "folder.png").mkdir()
    paths = [
        tmp_path / "broken.png",
        good[0],
        tmp_path / "gone.png",
        *good[1:],
        tmp_path / "folder.png",
    ]
    predictions = fedra_edge.predict(exported, paths, trainer=trainer)
    assert [told.key for told in predictions] == [path.as_posix() for path in good]
    assert predictions.skipped.counts == {
        "unreadable image": 1, "file not found": 1, "not a regular file": 1,
    }  # fmt: skip


def test_the_export_is_not_copied(
    exported: Path, images: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/there/is/no/such/directory")
    assert len(list(fedra_edge.predict(exported, images, trainer=trainer))) == 60


def test_prediction_stops_when_asked(exported: Path, images: Path, trainer: Trainer) -> None:
    with pytest.raises(TrainingInterrupted):
        next(fedra_edge.predict(exported, images, trainer=trainer, should_stop=lambda: True))


def test_a_directory_that_is_no_export_is_refused(images: Path) -> None:
    with pytest.raises(ConfigurationError, match="no exported model"):
        fedra_edge.predict(images, images)


def test_no_data_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        fedra_edge.predict(exported, tmp_path / "nothing")


class TestDamagedExports:
    @pytest.fixture
    def export(self, exported: Path, tmp_path: Path) -> Path:
        shutil.copytree(exported, tmp_path / "export")
        return tmp_path / "export"

    def test_a_layer_is_missing(self, export: Path, images: Path) -> None:
        tensors = load_file(export / "base" / "model.safetensors")
        kept = {name: value for name, value in tensors.items() if ".layers.1." not in name}
        save_file(kept, export / "base" / "model.safetensors")
        with pytest.raises(ConfigurationError, match=r"damaged.*layers"):
            fedra_edge.predict(export, images)

    def test_a_tensor_is_missing(self, export: Path, images: Path, trainer: Trainer) -> None:
        tensors = load_file(export / "base" / "model.safetensors")
        tensors.pop("vit.layers.1.mlp.fc1.weight")
        save_file(tensors, export / "base" / "model.safetensors")
        with pytest.raises(ConfigurationError, match=r"damaged.*layer 1.*missing") as caught:
            next(fedra_edge.predict(export, images, trainer=trainer))
        assert "fedra-server export" in caught.value.remedy

    def test_weights_are_no_numbers(self, export: Path, images: Path, trainer: Trainer) -> None:
        tensors = load_file(export / "base" / "model.safetensors")
        tensors["vit.layernorm.weight"][0] = np.nan
        save_file(tensors, export / "base" / "model.safetensors")
        with pytest.raises(ConfigurationError, match="no finite numbers"):
            next(fedra_edge.predict(export, images, trainer=trainer))

    @pytest.mark.parametrize("content", ["", "[]", '{"r": "x"}', '{"target_modules": 3}'])
    def test_the_adapters_description_is_none(
        self, export: Path, images: Path, content: str
    ) -> None:
        (export / "adapter" / "adapter_config.json").write_text(content)
        with pytest.raises(ConfigurationError, match="damaged"):
            fedra_edge.predict(export, images)

    def test_the_adapter_is_that_of_another_rank(self, export: Path, images: Path) -> None:
        path = export / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 3}))
        with pytest.raises(ConfigurationError, match="does not fit"):
            fedra_edge.predict(export, images)
