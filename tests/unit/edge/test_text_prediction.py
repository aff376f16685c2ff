"""Prediction with a model that reads texts says what the plain model says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fedra_edge
from fedra_edge.data.tokenizing import padded
from fedra_edge.errors import ConfigurationError, DataError
from fedra_edge.training import Trainer, load_trainer
from fedra_server.exporting import export_revision
from tests.support.memory_floor import scarce
from tests.support.sites import write_folder
from tests.support.tiny_llama import ADAPTER, TinyLlama, WordTexts, call_plain


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return load_trainer()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return TinyLlama.register(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def export(llama: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "out"
    export_revision(llama.spec, ADAPTER, llama.revision, llama.blobs, out)
    return out


@pytest.mark.parametrize("memory", [scarce, lambda: 2**33], ids=["scarce", "plenty"])
def test_predictions_are_those_of_the_plain_model(
    llama: TinyLlama, export: Path, trainer: Trainer, tmp_path: Path, memory: Callable[[], int]
) -> None:
    data = WordTexts(12)
    texts = [data[index].text for index in range(12)]
    (tmp_path / "rows.csv").write_text("\n".join(["text", *texts]), encoding="utf-8")
    predictions = fedra_edge.predict(
        export, tmp_path / "rows.csv", top=3, trainer=trainer, memory_bytes=memory()
    )
    tokens = torch.from_numpy(padded([llama.tokenizer.encode(text) for text in texts]))
    with torch.no_grad():
        expected = call_plain(llama.reference(range(3)), tokens).softmax(1)
    for line, (told, row) in enumerate(zip(predictions, expected, strict=True), start=2):
        assert told.key == f"line {line}"
        assert dict(told.top) == pytest.approx(
            dict(zip(llama.spec.labels, row.tolist(), strict=True)), abs=1e-5
        )


def test_texts_that_are_none_are_skipped(export: Path, trainer: Trainer, tmp_path: Path) -> None:
    for name, content in (("a", b"oil drips"), ("b", b" "), ("c", b"\xff"), ("d", b"a\0b")):
        (tmp_path / f"{name}.txt").write_bytes(content)
    predictions = fedra_edge.predict(export, tmp_path, trainer=trainer)
    assert [told.key for told in predictions] == ["a.txt"]
    assert sum(predictions.skipped.counts.values()) == 3
    (tmp_path / "rows.csv").write_text("id,text\n1,\n2,oil\n", encoding="utf-8")
    rows = fedra_edge.predict(export, tmp_path / "rows.csv", trainer=trainer)
    assert [told.key for told in rows] == ["line 3"]
    assert rows.skipped.counts == {"text is empty": 1}


def test_images_are_refused(export: Path, trainer: Trainer, tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", seed=4).path
    with pytest.raises(DataError, match="nothing to predict"):
        fedra_edge.predict(export, images, trainer=trainer)
    paths = sorted(images.rglob("*.png"))
    with pytest.raises(DataError, match="reads texts"):
        next(fedra_edge.predict(export, paths, trainer=trainer))


def test_an_export_without_its_tokenizer_is_damaged(export: Path, tmp_path: Path) -> None:
    shutil.copytree(export, tmp_path / "export")
    (tmp_path / "export" / "base" / "tokenizer.json").unlink()
    (tmp_path / "a.txt").write_text("oil", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="damaged"):
        fedra_edge.predict(tmp_path / "export", tmp_path / "a.txt")
