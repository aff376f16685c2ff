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
from typing import Final

from tests.bench import vit_base

WAYS: Final = ("plain", "resident", "reduced 4", "streamed")


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
    """Start a process for one way of training."""
    command = [sys.executable, "-m", "tests.bench.stepping", way, str(micro_batch)]
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
    from fedra_edge.training.allocator import prefer_huge_pages

    prefer_huge_pages()
    import torch

    from fedra_edge.protocol.footprint import Footprint, MemoryPlan, SliceShape
    from fedra_edge.training.torch_optimizers import build_optimizer
    from fedra_edge.training.torch_slice import trained_parameters
    from fedra_edge.training.torch_trainer import TorchTrainer
    from fedra_edge.training.torch_training import load_slice

    is_reduced = way.startswith("reduced")
    trained = [0, 4, 8, 11] if is_reduced else list(range(12))
    work = vit_base.slice_work(
        trained,
        "reduced" if is_reduced else "full",
        "streamed" if way == "streamed" else "resident",
        micro_batch,
    )
    device = torch.device("cpu")
    cost = TorchTrainer(device).calibrate(work.spec, lambda: 2**40)
    manifest = work.manifest
    plan, shape = MemoryPlan.of(manifest), SliceShape.of(manifest.layers)
    footprint = Footprint(
        work.spec, manifest.adapter, manifest.training, cost.memory, shape, "torch"
    )
    parameters = trained_parameters(work, device)
    loaded = load_slice(work, plan, parameters, device)
    optimizer = build_optimizer(manifest.training, parameters.values())
    images = torch.randn(vit_base.BATCH_SIZE, 3, 224, 224)
    labels = torch.zeros(vit_base.BATCH_SIZE, dtype=torch.long)

    def step() -> None:
        entering = loaded.enter(torch.split(images, micro_batch))
        loaded.accumulate(entering, torch.split(labels, micro_batch), len(images))
        optimizer.step()

    return step, footprint.peak_bytes(plan)


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
