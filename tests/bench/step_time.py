"""Time of one training step of ViT-B/16, batch 8, as ratios to plain PyTorch + peft.

Steps of all ways are interleaved, and ratios are medians over rounds, because machines drift.
``python -m tests.bench.step_time [--json]``
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack

from tests.bench import vit_base
from tests.bench.rows import Row, print_rows
from tests.bench.stepping import stepper

_ROUNDS = 5
_COMPARED = {
    "full depth, resident": ("resident", 8, 1.05),
    "reduced depth, 4 of 12 layers": ("reduced 4", 8, 1.1 * 4 / 12),
    "full depth, streamed, micro-batch 8": ("streamed", 8, 1.5),
    "full depth, streamed, micro-batch 1": ("streamed", 1, None),
    "full depth, ONNX Runtime, micro-batch 8": ("onnx", 8, 2.2),
    "full depth, ONNX Runtime, micro-batch 1": ("onnx", 1, None),
}


def main() -> None:
    """Measure all ways side by side after one warm-up step each."""
    vit_base.prepare()
    with ExitStack() as running:
        plain = running.enter_context(stepper("plain", 8))
        others = {
            name: running.enter_context(stepper(way, micro_batch))
            for name, (way, micro_batch, _) in _COMPARED.items()
        }
        everybody = [plain, *others.values()]
        for process in everybody:
            process.step()
        rounds = [[process.step()[0] for process in everybody] for _ in range(_ROUNDS)]
    rows = [Row("plain PyTorch + peft", statistics.median(times[0] for times in rounds), "s")]
    for column, (name, (_, _, goal)) in enumerate(_COMPARED.items(), start=1):
        ratio = statistics.median(times[column] / times[0] for times in rounds)
        seconds = statistics.median(times[column] for times in rounds)
        told = "" if goal is None else f"<= {goal:.2f} x"
        holds = None if goal is None else ratio <= goal
        rows.append(Row(name, seconds, "s", "plain", ratio, told, holds))
    print_rows("step_time", rows, ["torch", "transformers", "peft", "onnxruntime"])


if __name__ == "__main__":
    main()
