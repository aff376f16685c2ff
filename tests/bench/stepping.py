"""One way of training ViT-B/16 in a fresh process: a few steps, timed, and the peak memory.

``python -m tests.bench.stepping WAY MICRO_BATCH`` takes a step for every line it reads and
answers with the step's seconds, the peak memory of the process so far, and what was predicted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from tests.bench import vit_base

if TYPE_CHECKING:
    from fedra_edge.training.engine import TrainingEngine
    from fedra_edge.training.trainer import SliceWork, Trainer

WAYS: Final = ("plain", "resident", "reduced 4", "streamed", "onnx")


class Stepper:
    """A fresh process that takes steps when asked to; nobody predicts the plain way's peak."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def step(self) -> tuple[float, int, int]:
        """Take a step; give its seconds, and measured and predicted peak memory in bytes."""
        sender, answers = self._process.stdin, self._process.stdout
        assert sender is not None
        assert answers is not None
        sender.write("\n")
        sender.flush()
        seconds, peak_bytes, predicted_bytes = json.loads(answers.readline())
        return seconds, peak_bytes, predicted_bytes


@contextmanager
def stepper(way: str, micro_batch: int) -> Iterator[Stepper]:
    """Start a process for one way of training, where there is no PyTorch if it needs none."""
    from tests.support.environments import environment

    python = str(environment("onnx").python) if way == "onnx" else sys.executable
    command = [python, "-m", "tests.bench.stepping", way, str(micro_batch)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, encoding="utf-8") as process:
        try:
            yield Stepper(process)
        finally:
            process.terminate()


def _plain_step() -> tuple[Callable[[], None], int]:
    """Train with transformers, peft and ordinary autograd, as one does without this project."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(vit_base.PLACE / "hf").train()
    lora = LoraConfig(
        r=8, lora_alpha=8, target_modules=r".*\.(attention\.o_proj|mlp\.fc2)",
        modules_to_save=["classifier"],
    )  # fmt: skip
    adapted = get_peft_model(model, lora)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9)
    images = torch.randn(vit_base.BATCH_SIZE, 3, 224, 224)
    labels = torch.zeros(vit_base.BATCH_SIZE, dtype=torch.long)

    def step() -> None:
        adapted(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, 0


def _slice_step(way: str, micro_batch: int) -> tuple[Callable[[], None], int]:
    import numpy as np

    from fedra_edge.protocol.footprint import Footprint, MemoryPlan, SliceShape

    is_reduced = way.startswith("reduced")
    trained = [0, 4, 8, 11] if is_reduced else list(range(12))
    work = vit_base.slice_work(
        trained,
        "reduced" if is_reduced else "full",
        "streamed" if way in {"streamed", "onnx"} else "resident",
        micro_batch,
    )
    trainer = _onnx_trainer() if way == "onnx" else _torch_trainer()
    cost = trainer.calibrate(work.spec, lambda: 2**40, work.graphs)
    manifest = work.manifest
    plan, shape = MemoryPlan.of(manifest), SliceShape.of(manifest.layers)
    footprint = Footprint(
        work.spec, manifest.adapter, manifest.training, cost.memory, shape, trainer.backend
    )
    engine = (_onnx_engine if way == "onnx" else _torch_engine)(work, footprint.settled_bytes(plan))
    engine.load(plan)
    size = (vit_base.BATCH_SIZE, 3, 224, 224)
    images = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    labels = np.zeros(len(images), dtype=np.int64)
    starts = range(0, len(images), micro_batch)

    def step() -> None:
        entering = engine.enter(images[start : start + micro_batch] for start in starts)
        parts = [labels[start : start + micro_batch] for start in starts]
        engine.accumulate(entering, parts, len(images))
        engine.step()

    return step, footprint.peak_bytes(plan)


def _torch_trainer() -> Trainer:
    import torch

    from fedra_edge.training.torch_trainer import TorchTrainer

    return TorchTrainer(torch.device("cpu"))


def _torch_engine(work: SliceWork, settled_bytes: int) -> TrainingEngine[Any]:
    import torch

    from fedra_edge.training.torch_engine import TorchEngine

    return TorchEngine(work, torch.device("cpu"), lambda: settled_bytes)


def _onnx_trainer() -> Trainer:
    from fedra_edge.training.onnx_trainer import OnnxTrainer

    return OnnxTrainer()


def _onnx_engine(work: SliceWork, _settled_bytes: int) -> TrainingEngine[Any]:
    from fedra_edge.training.onnx_engine import OnnxEngine
    from fedra_edge.training.onnx_trainer import OnnxTrainer

    graphs = OnnxTrainer()._opened(work.graphs, work.spec, work.manifest.adapter.targets)
    return OnnxEngine(work, graphs)


def _serve(way: str, micro_batch: int) -> None:
    import time

    from fedra_edge.memory_meter import measured_peak

    with measured_peak() as meter:
        step, predicted = _plain_step() if way == "plain" else _slice_step(way, micro_batch)
        for _ in sys.stdin:
            started = time.perf_counter()
            step()
            told = [time.perf_counter() - started, meter.peak_bytes, predicted]
            print(json.dumps(told), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
