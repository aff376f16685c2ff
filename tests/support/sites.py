"""Data that a site could have: small images of three parts, split for good, in two layouts."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.support.tiny_vit import LABELS

SIZE_PX = 16
_HALF = SIZE_PX // 2
_BRIGHT = 180
_TRAIN, _TEST = 12, 8


@dataclass(frozen=True)
class SiteData:
    """What a client is pointed at, and the images in it that are for evaluation only."""

    path: Path
    held_out: tuple[tuple[Path, str], ...]


def write_folder(directory: Path, seed: int) -> SiteData:
    """Write ``DIR/{train,test}/CLASS/N.png``."""
    held_out = []
    for split, label, name, image in _draw(seed):
        path = directory / split / label / name
        save_image(path, image)
        if split == "test":
            held_out.append((path, label))
    return SiteData(directory, tuple(held_out))


def write_manifest(directory: Path, seed: int) -> SiteData:
    """Write the images into one directory, beside a CSV file that tells labels and split."""
    rows, held_out = [], []
    for split, label, name, image in _draw(seed):
        path = directory / f"{split}-{label}-{name}"
        save_image(path, image)
        rows.append((path.name, label, split))
        if split == "test":
            held_out.append((path, label))
    manifest = directory / "images.csv"
    with manifest.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    return SiteData(manifest, tuple(held_out))


def save_image(path: Path, image: NDArray[np.uint8]) -> None:
    """Write one image as PNG, with the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def draw_image(label: str, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a part: each class is bright in other quarters of a noisy image."""
    image = generator.integers(0, 15, (SIZE_PX, SIZE_PX, 3))
    match LABELS.index(label):
        case 0:
            image[:_HALF] += _BRIGHT
        case 1:
            image[:, :_HALF] += _BRIGHT
        case _:
            image[:_HALF, :_HALF] += _BRIGHT
            image[_HALF:, _HALF:] += _BRIGHT
    return image.astype(np.uint8)


def _draw(seed: int) -> Iterator[tuple[str, str, str, NDArray[np.uint8]]]:
    generator = np.random.default_rng(seed)
    for split, count in (("train", _TRAIN), ("test", _TEST)):
        for label in LABELS:
            for number in range(count):
                yield split, label, f"{number:03}.png", draw_image(label, generator)
