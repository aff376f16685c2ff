"""What hostile sites do to a tuned model, with and without defences.

Ten sites tune a small vision transformer on real handwritten digits of their own, each with a mix
of labels of its own and three of four layers in each round; three of them alter what they send.
Model, training, screening and merging are the product's own, in this process.
``python -m tests.bench.poisoning [--json]`` takes some minutes.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.bench.rows import Row, print_rows
from tests.support.digit_cohort import ATTACKS, Digits, digit_cohort, save_model

ATTACKERS: Final = 3
UNDEFENDED: Final = "undefended mean"
SCREENED: Final = "screened mean"
_STRICT: Final = {"screening": {"cosine_floor": -0.15}}
_TOLERANT: Final = {"tolerated_attackers": ATTACKERS, **_STRICT}
DEFENCES: Final[Mapping[str, Mapping[str, object]]] = {
    UNDEFENDED: {"screening": {"enabled": False}},
    SCREENED: _STRICT,
    "screened norm-clipped-mean": {"merge": "norm-clipped-mean", **_TOLERANT},
    "screened trimmed-mean": {"merge": "trimmed-mean", "trim_fraction": 0.45, **_TOLERANT},
    "screened coordinate-median": {"merge": "coordinate-median", **_TOLERANT},
}
RUN: Final = {
    "rounds": 6,
    "max_layers": 3,
    "server_optimizer": {"kind": "fedavgm", "momentum": 0.5},
    "training": {"learning_rate": 0.1, "batch_size": 16, "local_epochs": 4},
}
_CLOSE: Final = 0.75
"""A defence holds when the attacked run keeps so much of the clean run's accuracy."""


def accuracy(saved: Path, attack: str | None, defence: str) -> float:
    """Play one run; give the accuracy on held-out digits in per cent."""
    attackers = 0 if attack is None else ATTACKERS
    with (
        tempfile.TemporaryDirectory() as directory,
        digit_cohort(
            Path(directory),
            saved,
            {**RUN, **DEFENCES[defence]},
            attackers=attackers,
            attack=None if attack is None else ATTACKS[attack],
        ) as cohort,
    ):
        return 100 * cohort.tune()


def measure() -> list[Row]:
    """Play every attack against every defence."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        saved = Path(directory) / "saved"
        save_model(Digits.load(), saved)
        clean = {defence: accuracy(saved, None, defence) for defence in DEFENCES}
        rows += [Row(f"no attack, {defence}", value, "%") for defence, value in clean.items()]
        for attack in ATTACKS:
            for defence in DEFENCES:
                value = accuracy(saved, attack, defence)
                ratio = value / clean[UNDEFENDED]
                is_held = None if defence == UNDEFENDED else ratio >= _CLOSE
                rows.append(
                    Row(
                        f"{attack}, {defence}", value, "%", "no attack", ratio,
                        "" if is_held is None else f">= {_CLOSE}", is_held,
                    )
                )  # fmt: skip
                print(rows[-1], file=sys.stderr)  # noqa: T201 - it takes minutes
    return rows


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print_rows("poisoning", measure(), ("numpy", "torch", "scikit-learn"))
