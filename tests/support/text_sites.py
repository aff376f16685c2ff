"""Texts that a site could have, whose label some words tell, in the two layouts there are."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.support.sites import SiteData
from tests.support.tiny_llama import LABELS, write_text

_TRAIN, _TEST = 30, 10


def write_text_folder(directory: Path, seed: int) -> SiteData:
    """Write ``DIR/{train,test}/CLASS/N.txt``."""
    held_out = []
    for split, label, number, text in _draw(seed):
        path = directory / split / label / f"{number:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if split == "test":
            held_out.append((path, label))
    return SiteData(directory, tuple(held_out))


def write_text_manifest(path: Path, seed: int) -> int:
    """Write a CSV file; give the number of texts in it that are for evaluation only."""
    rows = [(text, label, split) for split, label, _, text in _draw(seed)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label", "split"), *rows])
    return sum(split == "test" for _, _, split in rows)


def _draw(seed: int) -> Iterator[tuple[str, str, int, str]]:
    generator = np.random.default_rng(seed)
    for split, count in (("train", _TRAIN), ("test", _TEST)):
        for label in LABELS:
            for number in range(count):
                yield split, label, number, write_text(label, generator)
