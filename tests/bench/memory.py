"""Peak memory of one training step of ViT-B/16, batch 8, in fresh processes.

``python -m tests.bench.memory [--json]``
"""

from __future__ import annotations

from tests.bench import vit_base
from tests.bench.rows import Row, print_rows
from tests.bench.stepping import stepper

_MEGABYTE = 10**6
_STEPS = 2
_GOALS_MB = {("streamed", 8): 620.0, ("onnx", 8): 400.0, ("onnx", 1): 240.0}
_OVER, _UNDER = 1.10, 0.95


def peak_mb(way: str, micro_batch: int) -> tuple[float, float]:
    """Take two steps in a fresh process and give its measured and predicted peak in MB."""
    with stepper(way, micro_batch) as process:
        _, peak_bytes, predicted_bytes = [process.step() for _ in range(_STEPS)][-1]
    return peak_bytes / _MEGABYTE, predicted_bytes / _MEGABYTE


def main() -> None:
    """Measure every way of training, plain PyTorch and peft first."""
    vit_base.prepare()
    plain, _ = peak_mb("plain", 8)
    rows = [Row("plain PyTorch + peft, whole model", plain, "MB")]
    for way, micro_batch in _MEASURED:
        peak, predicted = peak_mb(way, micro_batch)
        name = f"{_NAMES[way]}, micro-batch {micro_batch}"
        goal_mb = _GOALS_MB.get((way, micro_batch))
        told = "" if goal_mb is None else f"<= {goal_mb:.0f} MB"
        holds = None if goal_mb is None else peak <= goal_mb
        rows.append(Row(name, peak, "MB", "plain", peak / plain, told, holds))
        ratio = predicted / peak
        rows.append(
            Row(
                "  predicted", predicted, "MB", "measured", ratio,
                f"{_UNDER} to {_OVER:.2f} x", _UNDER <= ratio <= _OVER,
            )
        )  # fmt: skip
    print_rows("memory", rows, ["torch", "transformers", "peft", "onnxruntime"])


_MEASURED = (
    ("resident", 8), ("reduced 4", 8), ("streamed", 8), ("streamed", 1), ("onnx", 8), ("onnx", 1),
)  # fmt: skip
_NAMES = {
    "resident": "full depth, resident",
    "reduced 4": "reduced depth, 4 of 12 layers",
    "streamed": "full depth, all 12 layers trained, streamed",
    "onnx": "the same on ONNX Runtime, no PyTorch",
}

if __name__ == "__main__":
    main()
