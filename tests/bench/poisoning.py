"""What hostile sites do to a tuned model, with and without defences, and what defences cost.

Ten sites tune a network that was made for digits that look otherwise (rotated, inverted) on real
handwritten digits, each with a mix of labels of its own and three of four layers in each round;
some of them alter what they send, or learn exchanged labels. The server's way is the product's
own. Every figure is the median over three cohorts of other seeds.
``python -m tests.bench.poisoning [--json]`` takes some minutes.

``--choose`` shows instead what floors of cosines tell apart, on other seeds and other digits
(mirrored, shifted); the defaults of screening were chosen by that alone.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Final

import torch

from fedra_server.runs import ScreeningSpec
from tests.bench.rows import Row, print_rows
from tests.support.digit_cohort import (
    Attack,
    DigitCohort,
    digit_cohort,
    load,
    multiplied,
    noise,
    unaltered,
)

ATTACKERS: Final = 3
ATTACKS: Final[Mapping[str, Attack]] = {
    "signs flipped": multiplied(-1),
    "times -10": multiplied(-10),
    "times 100": multiplied(100),
    "noise, 10 times as long": noise(10),
    "labels exchanged": unaltered,
}
UNDEFENDED: Final = "mean, unscreened"
SCREENED: Final = "mean"
_MERGES: Final[Mapping[str, Mapping[str, object]]] = {
    "mean": {},
    "norm-clipped-mean": {"merge": "norm-clipped-mean"},
    "trimmed-mean": {"merge": "trimmed-mean", "trim_fraction": 0.45},
    "coordinate-median": {"merge": "coordinate-median"},
}
DEFENCES: Final[Mapping[str, Mapping[str, object]]] = {
    name + ("" if is_on else ", unscreened"): {**merge, "screening": {"enabled": is_on}}
    for name, merge in _MERGES.items()
    for is_on in (False, True)
}
_SHOWN: Final = (
    UNDEFENDED,
    SCREENED,
    "norm-clipped-mean, unscreened",
    "trimmed-mean, unscreened",
    "coordinate-median, unscreened",
)
"""Screening and robust merges each by themselves."""
_RATES: Final = (0.01, 0.03, 0.1)
_MIXES: Final = (0.3, 1.0, 10.0)
_CLOSE: Final = 0.85
"""A defence holds when the attacked run keeps so much of the clean run's accuracy."""


@dataclass(frozen=True)
class Play:
    """One run: who plays, how, and what screening may say (by the run's options)."""

    seed: int
    turn: str
    defence: str = SCREENED
    attack: str | None = None
    learning_rate: float = 0.03
    concentration: float = 0.5
    screening: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Result:
    """Accuracies in per cent, and shares of deltas of which something was quarantined."""

    before: float
    after: float
    honest_held: float
    hostile_held: float


_REPORTED: Final = (Play(0, "rotated"), Play(1, "inverted"), Play(2, "rotated"))
_CHOSEN_BY: Final = (Play(10, "mirrored"), Play(11, "shifted"))
_FLOORS: Final = (-0.15, -0.2, -0.25, -0.3)


def options(play: Play) -> dict[str, object]:
    """Give the run's options."""
    defence = DEFENCES[play.defence]
    return {
        "rounds": 10,
        "max_layers": 3,
        "tolerated_attackers": ATTACKERS,
        "training": {"learning_rate": play.learning_rate, "batch_size": 16},
        **defence,
        **({"screening": dict(play.screening)} if play.screening else {}),
    }


@contextmanager
def staged(play: Play) -> Iterator[DigitCohort]:
    """Have the sites of a run for the length of a block."""
    with (
        tempfile.TemporaryDirectory() as directory,
        digit_cohort(
            Path(directory),
            load(play.seed, play.turn),
            options(play),
            concentration=play.concentration,
            attackers=0 if play.attack is None else ATTACKERS,
            attack=unaltered if play.attack is None else ATTACKS[play.attack],
        ) as cohort,
    ):
        yield cohort


def played(play: Play) -> Result:
    """Play one run."""
    with staged(play) as cohort:
        before, after = cohort.accuracy(), cohort.tune()
        return Result(100 * before, 100 * after, *cohort.held())


def medians(plays: Iterable[Play], cohorts: Sequence[Play]) -> dict[Play, Result]:
    """Play every play by each cohort, some at once; give the medians, means of what was held."""
    wanted = list(plays)
    every = [replace(play, seed=it.seed, turn=it.turn) for play in wanted for it in cohorts]
    with ProcessPoolExecutor(
        os.cpu_count(), multiprocessing.get_context("spawn"), initializer=_begin
    ) as pool:
        results = list(pool.map(played, every))
    found = {}
    for index, play in enumerate(wanted):
        own = results[index * len(cohorts) : (index + 1) * len(cohorts)]
        found[play] = Result(
            before=statistics.median(it.before for it in own),
            after=statistics.median(it.after for it in own),
            honest_held=statistics.fmean(it.honest_held for it in own),
            hostile_held=statistics.fmean(it.hostile_held for it in own),
        )
    return found


def _begin() -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def defence_rows() -> list[Row]:
    """Play every attack against every defence."""
    plays = [Play(0, "", defence, attack) for attack in (None, *ATTACKS) for defence in _SHOWN]
    found = medians(plays, _REPORTED)
    clean = found[Play(0, "", UNDEFENDED)]
    rows = [Row("before tuning", clean.before, "%")]
    for play, it in found.items():
        ratio, is_defended = it.after / clean.after, play.defence != UNDEFENDED
        rows += [
            Row(
                f"{play.attack or 'no attack'}: {play.defence}", it.after, "%", "clean mean", ratio,
                f">= {_CLOSE}" if is_defended else "", ratio >= _CLOSE if is_defended else None,
            ),
            *_held_rows(play, it),
        ]  # fmt: skip
    return rows


def floor_rows(cohorts: Sequence[Play], floors: Sequence[float]) -> list[Row]:
    """Show whom screening by direction holds, at several learning rates and mixes of labels."""
    plays = [
        Play(0, "", SCREENED, attack, rate, mix, (("cosine_floor", floor),))
        for floor, rate, mix, attack in product(floors, _RATES, _MIXES, (None, "signs flipped"))
    ]
    rows = []
    for play, it in medians(plays, cohorts).items():
        told = f"{play.attack or 'no attack'}: floor {play.screening[0][1]}, rate "
        told += f"{play.learning_rate}, Dirichlet {play.concentration}"
        rows += [Row(told, it.after, "%"), *_held_rows(play, it)]
    return rows


def length_rows(cohorts: Sequence[Play]) -> list[Row]:
    """Show what bounds of length do where sites differ most."""
    plays = [
        Play(
            0, "", SCREENED, attack, 0.1, 0.3, (("clip_factor", clip), ("quarantine_factor", most))
        )
        for clip, most in product((1.5, 3.0, 6.0), (4.0, 8.0, 16.0))
        for attack in (None, "times -10")
    ]
    rows = []
    for play, it in medians(plays, cohorts).items():
        told = ", ".join(f"{name} {value}" for name, value in play.screening)
        rows += [Row(f"{play.attack or 'no attack'}: {told}", it.after, "%"), *_held_rows(play, it)]
    return rows


def _held_rows(play: Play, result: Result) -> list[Row]:
    if "unscreened" in play.defence:
        return []
    rows = [Row("  deltas of honest sites quarantined", result.honest_held, "%")]
    if play.attack is not None:
        rows.append(Row("  deltas of attackers quarantined", result.hostile_held, "%"))
    return rows


def main() -> None:
    """Show what defences do, or what they were chosen by."""
    if "--choose" in sys.argv[1:]:
        rows = [*floor_rows(_CHOSEN_BY, _FLOORS), *length_rows(_CHOSEN_BY)]
    else:
        floor = ScreeningSpec().cosine_floor
        rows = [*defence_rows(), *floor_rows(_REPORTED, [floor])]
    print_rows("poisoning", rows, ("numpy", "torch", "scikit-learn"))


if __name__ == "__main__":
    main()
