"""Peak memory of one training step of ViT-B/16, batch 8, in fresh processes.

``python -m tests.bench.memory [--json]``
"""

from __future__ import annotations

from tests.bench import vit_base
from tests.bench.rows import Row, print_rows
from tests.bench.stepping import stepper

_MEGABYTE = 10**6
_STEPS = 2
_GOAL_MB = 620.0


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
    for way, micro_batch in (("resident", 8), ("reduced 4", 8), ("streamed", 8), ("streamed", 1)):
        peak, predicted = peak_mb(way, micro_batch)
        name = f"{_NAMES[way]}, micro-batch {micro_batch}"
        goal = f"<= {_GOAL_MB:.0f} MB" if (way, micro_batch) == ("streamed", 8) else ""
        rows.append(
            Row(name, peak, "MB", "plain", peak / plain, goal, peak <= _GOAL_MB if goal else None)
        )
        ratio = predicted / peak
        rows.append(
            Row(
                "  predicted", predicted, "MB", "measured", ratio,
                f"{_UNDER} to {_OVER:.2f} x", _UNDER <= ratio <= _OVER,
            )
        )  # fmt: skip
    print_rows("memory", rows, ["torch", "transformers", "peft"])


_NAMES = {
    "resident": "full depth, resident",
    "reduced 4": "reduced depth, 4 of 12 layers",
    "streamed": "full depth, all 12 layers trained, streamed",
}

if __name__ == "__main__":
    main()
