"""An exported ONNX model computes on onnxruntime what plain transformers and peft compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from fedra_edge.errors import ConfigurationError as EdgeConfigurationError
from fedra_edge.exports import open_export
from fedra_edge.protocol.tensors import FloatArray
from fedra_server.errors import ConfigurationError, ConflictError
from fedra_server.exporting import export_onnx, export_revision
from fedra_server.modelbook.graphs.fusing import FusedModel
from tests.support import tiny_llama, tiny_vit
from tests.support.tiny_llama import TinyLlama
from tests.support.tiny_vit import TinyVit


@dataclass(frozen=True)
class Exported:
    """A registered model, its export, and how to ask the plain model."""

    tiny: TinyVit
    directory: Path
    expected: Callable[[NDArray[Any]], FloatArray]
    inputs: Callable[[int], NDArray[Any]]

    @property
    def fused(self) -> FusedModel:
        graphs = self.tiny.spec.graphs
        assert graphs is not None
        adapter = self.tiny.manifest([0]).adapter
        return FusedModel(self.tiny.spec, graphs, adapter, self.tiny.revision, self.tiny.blobs)


def export(tiny: TinyVit, out: Path) -> Path:
    adapter = tiny.manifest([0]).adapter
    export_onnx(tiny.spec, adapter, tiny.revision, tiny.blobs, out)
    return out


def images(number: int) -> NDArray[Any]:
    return np.random.default_rng(number).normal(size=(number, 3, 16, 16)).astype(np.float32)


def texts(number: int) -> NDArray[Any]:
    """Draw padded texts of different length."""
    generator = np.random.default_rng(number)
    tokens = generator.integers(1, 23, (number, 4 + number))
    for row in range(1, number):
        tokens[row, 1 + row :] = -1
    return tokens


@pytest.fixture(scope="module", params=["vit", "llama", "half a vit"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    place = tmp_path_factory.mktemp("exported")
    if request.param == "llama":
        llama = TinyLlama.register(place)
        plain = llama.reference(range(tiny_llama.NUM_LAYERS)).eval()
        make = texts

        def ask(inputs: NDArray[Any]) -> torch.Tensor:
            return tiny_llama.call_plain(plain, torch.from_numpy(inputs))

        tiny: TinyVit = llama
    else:
        tiny = TinyVit.register(place, "bfloat16" if request.param == "half a vit" else "float32")
        plain = tiny.reference(range(tiny_vit.NUM_LAYERS)).eval()
        make = images

        def ask(inputs: NDArray[Any]) -> torch.Tensor:
            logits: torch.Tensor = plain(torch.from_numpy(inputs)).logits
            return logits

    def expected(inputs: NDArray[Any]) -> FloatArray:
        with torch.no_grad():
            return ask(inputs).numpy()

    return Exported(tiny, export(tiny, place / "out"), expected, make)


def run(path: Path, inputs: NDArray[Any]) -> FloatArray:
    """Use the model as a plant's own program does."""
    session = onnxruntime.InferenceSession(path)
    assert [it.name for it in session.get_inputs()] == ["inputs"]
    logits: FloatArray
    [logits] = session.run(["logits"], {"inputs": inputs})
    return logits


@pytest.mark.parametrize("number", [1, 3])
def test_onnxruntime_computes_what_plain_peft_computes(exported: Exported, number: int) -> None:
    inputs = exported.inputs(number)
    logits = run(exported.directory / "model.onnx", inputs)
    np.testing.assert_allclose(logits, exported.expected(inputs), rtol=1e-4, atol=1e-4)


def test_adapters_change_what_the_model_says_and_are_no_part_of_it(exported: Exported) -> None:
    model = onnx.load(exported.directory / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    names = {name for node in model.graph.node for name in (*node.input, *node.output)}
    names |= {it.name for it in model.graph.initializer}
    assert not [name for name in names if "lora" in name]
    assert {it.domain for it in model.opset_import} == {""}
    untuned = {name: np.zeros_like(value) for name, value in exported.tiny.adapters.items()}
    inputs = exported.inputs(3)
    base = tiny_vit.put_revision(exported.tiny.spec, untuned, exported.tiny.blobs)
    plain = exported.directory.with_name("plain.onnx")
    FusedModel(**(vars(exported.fused) | {"revision": base})).write(plain)
    tuned = run(exported.directory / "model.onnx", inputs)
    assert np.abs(run(plain, inputs) - tuned).max() > 0.01


def test_weights_too_large_for_one_file_lie_beside_it(exported: Exported, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    exported.fused.write(path, most_inside_bytes=1000)
    assert path.stat().st_size < (tmp_path / "model.onnx.data").stat().st_size
    inputs = exported.inputs(2)
    np.testing.assert_array_equal(run(path, inputs), run(exported.directory / "model.onnx", inputs))


def test_the_file_says_how_to_use_it(exported: Exported) -> None:
    session = onnxruntime.InferenceSession(exported.directory / "model.onnx")
    told = session.get_modelmeta().custom_metadata_map
    spec = exported.tiny.spec
    assert json.loads(told["labels"]) == list(spec.labels)
    assert json.loads(told["preprocessing"]).items() >= spec.input.model_dump(mode="json").items()
    files = {path.name for path in exported.directory.iterdir()}
    assert files == {"model.onnx"} | ({"tokenizer.json"} if spec.input.kind == "tokens" else set())


def test_a_model_without_graphs_is_refused(exported: Exported, tmp_path: Path) -> None:
    tiny = exported.tiny
    spec = tiny.spec.model_copy(update={"graphs": None})
    adapter = tiny.manifest([0]).adapter
    with pytest.raises(ConfigurationError, match="without ONNX graphs") as raised:
        export_onnx(spec, adapter, tiny.revision, tiny.blobs, tmp_path / "out")
    assert raised.value.remedy
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_never_overwritten(exported: Exported) -> None:
    with pytest.raises(ConflictError):
        export(exported.tiny, exported.directory)


def test_an_ordinary_export_carries_the_graphs(exported: Exported, tmp_path: Path) -> None:
    tiny, out = exported.tiny, tmp_path / "out"
    adapter = tiny.manifest([0]).adapter
    export_revision(tiny.spec, adapter, tiny.revision, tiny.blobs, out)
    graphs = tiny.spec.graphs
    assert graphs is not None
    opened = open_export(out).graphs
    assert opened is not None
    for name, ref in graphs.by_name.items():
        assert opened[name].read_bytes() == tiny.blobs.path(ref.sha256).read_bytes()
    (out / "graphs" / "block.onnx").write_bytes(b"altered")
    with pytest.raises(EdgeConfigurationError, match=r"block\.onnx") as raised:
        open_export(out)
    assert "Export the model once more" in raised.value.remedy


def test_an_export_of_a_model_without_graphs_has_none(exported: Exported, tmp_path: Path) -> None:
    tiny, out = exported.tiny, tmp_path / "out"
    adapter = tiny.manifest([0]).adapter
    spec = tiny.spec.model_copy(update={"graphs": None})
    export_revision(spec, adapter, tiny.revision, tiny.blobs, out)
    assert not (out / "graphs").exists()
    assert open_export(out).graphs is None
