"""The ONNX Runtime trainer: what it needs, refuses and reports, and that it needs no PyTorch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typing_extensions import override

from fedra_edge.config import SiteConfig
from fedra_edge.data.dataset import Example
from fedra_edge.data.matching import match_labels
from fedra_edge.errors import (
    ConfigurationError,
    MemoryShortError,
    SliceError,
    TrainingInterrupted,
)
from fedra_edge.promising import measure_promise
from fedra_edge.protocol.ids import ModelId
from fedra_edge.protocol.models import GraphName
from fedra_edge.protocol.rounds import EvaluationTask
from fedra_edge.protocol.slices import TrainingSpec
from fedra_edge.protocol.tensors import read_tensors, serialize_tensors
from fedra_edge.slicing import find_graphs, whole_model
from fedra_edge.training import PieceFile, SliceWork, TrainedSlice, WholeModel, load_trainer
from fedra_edge.training.onnx_trainer import OnnxTrainer
from fedra_edge.training.torch_trainer import TorchTrainer
from fedra_server.modelbook.stored_dtypes import WeightsDtype
from tests.support.surroundings import guard_of, room_for
from tests.support.tiny_vit import (
    ADAPTER,
    LABELS,
    NoiseImages,
    TinyVit,
    noise_data,
    put_revision,
    random_tensors,
)

CPU = torch.device("cpu")
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyVit:
    return TinyVit.register(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def trainer() -> OnnxTrainer:
    return OnnxTrainer(threads=1)


def work_of(tiny: TinyVit, trained: list[int], **values: object) -> SliceWork:
    settings = {"residency": "streamed", "micro_batch": 2, "walk_batch": 4}
    return tiny.work(trained, **(settings | {"graphs": tiny.spec.graphs} | values))


def whole(tiny: TinyVit) -> WholeModel:
    task = EvaluationTask(
        run="run", model_id=ModelId(tiny.spec.model_id), revision=tiny.revision, adapter=ADAPTER,
        graphs=tiny.spec.graphs,
    )  # fmt: skip
    return whole_model(task, tiny.spec, tiny.files)


def assert_same(found: TrainedSlice, expected: TrainedSlice) -> None:
    for name, value in expected.adapters.items():
        np.testing.assert_allclose(found.adapters[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_training_changes_exactly_the_assigned_adapters_and_the_head(
    tiny: TinyVit, trainer: OnnxTrainer
) -> None:
    received = {name: value.copy() for name, value in tiny.adapters.items()}
    work = work_of(tiny, [1, 3], steps=3)
    result = trainer.train(work, noise_data(), room_for(work))
    wanted = tiny.spec.delta_shapes(ADAPTER, work.manifest.trained_layer_ids)
    assert {name: value.shape for name, value in result.adapters.items()} == wanted
    for name, value in result.adapters.items():
        assert value.dtype == np.float32
        assert (value != tiny.adapters[name]).any(), name
    for name, value in tiny.adapters.items():
        np.testing.assert_array_equal(value, received[name])
    again = trainer.train(work, noise_data(), room_for(work))
    for name, value in result.adapters.items():
        np.testing.assert_array_equal(again.adapters[name], value)


@pytest.mark.parametrize("weights_dtype", ["bfloat16", "float16"])
def test_weights_stored_in_half_precision_are_widened_as_pytorch_does(
    tmp_path: Path, trainer: OnnxTrainer, weights_dtype: WeightsDtype
) -> None:
    half = TinyVit.register(tmp_path, weights_dtype)
    work = work_of(half, [0, 2], steps=2)
    found, expected = (
        one.train(work, noise_data(), room_for(work)) for one in (trainer, TorchTrainer(CPU))
    )
    assert found.first_loss == pytest.approx(expected.first_loss, rel=1e-5)
    assert_same(found, expected)


def test_frozen_layers_below_are_kept_for_later_epochs(
    tiny: TinyVit, trainer: OnnxTrainer, tmp_path: Path
) -> None:
    work = work_of(tiny, [2, 3], steps=8)
    kept = trainer.train(work, noise_data(), room_for(work))
    plain = trainer.train(work, noise_data(), room_for(work, scratch_bytes=0))
    assert_same(kept, plain)
    with pytest.raises(FileNotFoundError):
        trainer.train(work, noise_data(), replace(room_for(work), scratch=tmp_path / "missing"))


class ShortOfMemory(NoiseImages):
    """Images of which one cannot be read at first, because an allocation fails."""

    def __init__(self, failing: int) -> None:
        super().__init__()
        self._failing = {failing}

    @override
    def __getitem__(self, index: int) -> Example:
        if index in self._failing:
            self._failing.remove(index)
            raise MemoryError
        return super().__getitem__(index)


def test_a_step_whose_allocations_fail_is_taken_again_with_less(
    tiny: TinyVit, trainer: OnnxTrainer
) -> None:
    training = TrainingSpec(batch_size=6, learning_rate=0.05)
    work = work_of(tiny, [0, 2], training=training, steps=4, walk_batch=6)
    guard = guard_of(work)
    matched = match_labels(NoiseImages(), LABELS)
    failing = replace(matched, dataset=ShortOfMemory(matched.train_indices[-2]))
    stepped = trainer.train(work, failing, room_for(work, guard=guard))
    plain = trainer.train(work, matched, room_for(work))
    assert len(guard.step_downs) == 1
    assert_same(stepped, plain)


def test_training_and_evaluating_end_when_asked(tiny: TinyVit, trainer: OnnxTrainer) -> None:
    work = work_of(tiny, [0])
    with pytest.raises(TrainingInterrupted):
        trainer.train(work, noise_data(), room_for(work, should_stop=lambda: True))
    with pytest.raises(TrainingInterrupted):
        trainer.evaluate(whole(tiny), noise_data(), lambda: True, lambda: 2**40)


def test_a_model_without_graphs_asks_for_pytorch(tiny: TinyVit, trainer: OnnxTrainer) -> None:
    work = replace(work_of(tiny, [0]), graphs=None)
    with pytest.raises(SliceError, match="needs PyTorch on this machine") as caught:
        trainer.train(work, noise_data(), room_for(work))
    assert caught.value.remedy == "pip install 'fedra[torch]'"
    with pytest.raises(SliceError, match="needs PyTorch"):
        trainer.calibrate(tiny.spec, lambda: 2**40)
    model = replace(whole(tiny), graphs=None)
    with pytest.raises(SliceError, match="needs PyTorch"):
        trainer.predict(model, iter(()), lambda: False, lambda: 2**40)


class Nowhere(Mapping[GraphName, Path]):
    """Graphs that must not be looked up."""

    @override
    def __getitem__(self, name: GraphName) -> Path:
        raise AssertionError(f"{name} was looked up")

    @override
    def __iter__(self) -> Iterator[GraphName]:
        raise AssertionError("graphs were looked up")

    @override
    def __len__(self) -> int:
        return 5


def test_pytorch_looks_no_graph_up(tiny: TinyVit) -> None:
    by_torch = TorchTrainer(CPU)
    work = replace(work_of(tiny, [0]), graphs=Nowhere())
    by_torch.train(work, noise_data(), room_for(work))
    by_torch.calibrate(tiny.spec, lambda: 2**40, Nowhere())
    by_torch.evaluate(
        replace(whole(tiny), graphs=Nowhere()), noise_data(), lambda: False, lambda: 2**40
    )


def test_adapters_that_the_graph_does_not_have_are_refused(
    tiny: TinyVit, trainer: OnnxTrainer
) -> None:
    adapter = ADAPTER.model_copy(update={"targets": ("mlp.fc1",)})
    values = random_tensors(tiny.spec.delta_shapes(adapter, tiny.spec.layer_ids))
    revision = put_revision(tiny.spec, values, tiny.blobs)
    work = work_of(tiny, [0], adapter=adapter, revision=revision)
    with pytest.raises(SliceError, match="missing, extra or misshapen inputs"):
        trainer.train(work, noise_data(), room_for(work))


@pytest.mark.parametrize("spoil", ["missing", "extra", "dtype", "no file of weights"])
def test_weights_that_do_not_fit_are_refused(
    tiny: TinyVit, trainer: OnnxTrainer, tmp_path: Path, spoil: str
) -> None:
    model, path = whole(tiny), tmp_path / "piece"
    tensors = read_tensors(model.weights["layers.2"].path)
    name = min(tensors)
    match spoil:
        case "missing":
            del tensors[name]
        case "extra":
            tensors["other"] = np.ones(1, dtype=np.float32)
        case "dtype":
            tensors[name] = tensors[name].astype(np.float64)
        case _:
            tensors.clear()
    path.write_bytes(serialize_tensors(tensors) if tensors else b"?")
    pieces = {piece: model.weights[piece] for piece in model.weights}
    spoilt = replace(model, weights=pieces | {"layers.2": PieceFile(path)})
    with pytest.raises(SliceError, match=r"layers\.2"):
        trainer.evaluate(spoilt, noise_data(), lambda: False, lambda: 2**40)


def test_calibration_measures_a_block(tiny: TinyVit, trainer: OnnxTrainer) -> None:
    cost = trainer.calibrate(tiny.spec, lambda: 2**40, find_graphs(tiny.spec.graphs, tiny.files))
    assert 0 < cost.forward_s < 1
    assert 0 < cost.backward_s < 1
    assert cost.memory.idle_bytes > 0
    assert cost.memory.kept_bytes == cost.memory.kept_frozen_bytes == 0


def test_calibration_in_too_little_memory_is_told(tiny: TinyVit, trainer: OnnxTrainer) -> None:
    with pytest.raises(MemoryShortError):
        trainer.calibrate(tiny.spec, lambda: 1, find_graphs(tiny.spec.graphs, tiny.files))


def test_either_backend_can_be_asked_for() -> None:
    assert load_trainer().backend == "torch"
    assert load_trainer("onnx", threads=1).backend == "onnx"


def told_by(script: str, *blocked: str) -> str:
    """Run a script in a process in which these packages cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(blocked=blocked) + script],
        capture_output=True, check=True, encoding="utf-8",
    )  # fmt: skip
    return done.stdout.strip()


def test_without_pytorch_the_trainer_is_that_of_onnx_runtime() -> None:
    script = (
        "import logging; logging.basicConfig(stream=sys.stdout, level=logging.INFO)\n"
        "from fedra_edge.training import load_trainer\n"
        "print(load_trainer().backend)\n"
    )
    told, backend = told_by(script, "torch", "transformers", "onnx").splitlines()
    assert backend == "onnx"
    assert "'onnx'" in told
    assert "'torch' cannot be loaded" in told


@pytest.mark.parametrize(
    ("backend", "extras"),
    [("auto", ("torch", "onnx")), ("torch", ("torch",)), ("onnx", ("onnx",))],
)
def test_without_any_backend_the_message_says_what_to_install(
    backend: str, extras: tuple[str, ...]
) -> None:
    script = (
        "from fedra_edge.errors import BackendUnavailableError\n"
        "from fedra_edge.training import load_trainer\n"
        f"try: load_trainer({backend!r})\n"
        "except BackendUnavailableError as error: print(error.remedy)\n"
    )
    remedy = told_by(script, "torch", "onnxruntime")
    assert [extra for extra in ("torch", "onnx") if f"fedra[{extra}]" in remedy] == [*extras]


def test_a_promise_needs_the_graphs_themselves(tiny: TinyVit, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(tiny.spec.model_dump_json(), encoding="utf-8")
    config = SiteConfig(home=tmp_path, backend="onnx")
    with pytest.raises(ConfigurationError, match="does not hold the graphs of model") as caught:
        measure_promise(path, {}, config)
    assert "model show" in caught.value.remedy
