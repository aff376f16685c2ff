"""Six sites' private data: real handwritten digits, each site with its own look and label mix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits

SIZE_PX: Final = 32
LABELS: Final = tuple("0123456789")
_DIGIT_PX: Final = 24
_MOST_INK: Final = 16.0
_CONCENTRATION: Final = 1.5
_EVEN_SHARE: Final = 0.35
_TEST_SHARE: Final = 0.3

Ink = NDArray[np.floating]
"""How much ink lies on each pixel, 0..1, shape (SIZE_PX, SIZE_PX)."""

Colours = NDArray[np.floating]
Picture = NDArray[np.uint8]
Style = Callable[[Ink, np.random.Generator], Picture]


@dataclass(frozen=True)
class Site:
    """A site's name and its folder with ``train`` and ``test``, one directory per label."""

    name: str
    directory: Path
    train_examples: int
    test_examples: int


def make_sites(directory: Path, seed: int = 0) -> tuple[Site, ...]:
    """Spread the digits over six sites that share no image, and draw them as PNG files.

    The same seed gives the same files.
    """
    generator = np.random.default_rng(seed)
    digits = load_digits()
    owners = _deal(digits.target, len(STYLES), generator)
    sites = []
    for number, (name, style) in enumerate(STYLES.items()):
        mine = np.flatnonzero(owners == number)
        counts = {"train": 0, "test": 0}
        for part, indices in _parts(mine, digits.target, generator):
            for index in indices:
                path = directory / name / part / str(digits.target[index]) / f"{index:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                ink = _place(digits.images[index], generator)
                Image.fromarray(style(ink, generator)).save(path)
            counts[part] += len(indices)
        sites.append(Site(name, directory / name, counts["train"], counts["test"]))
    return tuple(sites)


def _deal(
    labels: NDArray[np.int64], num_sites: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Give each example an owner; a Dirichlet draw per label makes the sites' mixes differ."""
    owners = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        examples = generator.permutation(np.flatnonzero(labels == label))
        skewed = generator.dirichlet([_CONCENTRATION] * num_sites)
        shares = _EVEN_SHARE / num_sites + (1 - _EVEN_SHARE) * skewed
        cuts = np.round(np.cumsum(shares)[:-1] * len(examples)).astype(np.int64)
        for site, mine in enumerate(np.split(examples, cuts)):
            owners[mine] = site
    return owners


def _parts(
    mine: NDArray[np.int64], labels: NDArray[np.int64], generator: np.random.Generator
) -> Iterator[tuple[str, NDArray[np.int64]]]:
    for label in np.unique(labels[mine]):
        examples = generator.permutation(mine[labels[mine] == label])
        num_test = max(1, round(_TEST_SHARE * len(examples)))
        yield "test", examples[:num_test]
        yield "train", examples[num_test:]


def _place(image: NDArray[np.float64], generator: np.random.Generator) -> Ink:
    """Enlarge an 8 x 8 digit and put it near the middle of an empty sheet."""
    grey = Image.fromarray((np.clip(image / _MOST_INK, 0, 1) * 255).astype(np.uint8))
    digit = grey.resize((_DIGIT_PX, _DIGIT_PX), Image.Resampling.BICUBIC)
    sheet = Image.new("L", (SIZE_PX, SIZE_PX))
    left, top = (generator.integers(2, SIZE_PX - _DIGIT_PX - 1) for _ in range(2))
    sheet.paste(digit, (int(left), int(top)))
    return np.asarray(sheet, dtype=np.float32) / 255


def _paint(ink: Ink, paper: Colours, colour: Colours) -> Picture:
    """Mix ink and paper, both as 0..255 and of a shape that fits (SIZE_PX, SIZE_PX, 3)."""
    mixed = paper * (1 - ink[..., None]) + colour * ink[..., None]
    return np.clip(mixed, 0, 255).astype(np.uint8)


def _colour(red: float, green: float, blue: float) -> Colours:
    return np.array([red, green, blue], dtype=np.float32)


def _filtered(ink: Ink, *filters: ImageFilter.Filter) -> Ink:
    picture = Image.fromarray((ink * 255).astype(np.uint8))
    for each in filters:
        picture = picture.filter(each)
    return np.asarray(picture, dtype=np.float32) / 255


def scanned(ink: Ink, generator: np.random.Generator) -> Picture:
    """Dark ink on white paper, as a scanner sees it."""
    return _paint(ink, _colour(250, 250, 250) - generator.uniform(0, 10), _colour(25, 25, 35))


def chalk(ink: Ink, generator: np.random.Generator) -> Picture:
    """White chalk on a green board, with dust."""
    dust = generator.normal(0, 12, (SIZE_PX, SIZE_PX, 1)).astype(np.float32)
    return _paint(ink * 0.85, _colour(35, 80, 55) + dust, _colour(240, 240, 230))


def coloured(ink: Ink, generator: np.random.Generator) -> Picture:
    """A pen and a sheet of any two colours that differ enough."""
    paper = generator.uniform(120, 255, 3).astype(np.float32)
    pen = generator.uniform(0, 90, 3).astype(np.float32)
    pen[generator.integers(3)] += 100
    return _paint(ink, paper, pen)


def textured(ink: Ink, generator: np.random.Generator) -> Picture:
    """Dark paint on rough, blotchy metal."""
    blotches = Image.fromarray(generator.integers(110, 256, (6, 6), dtype=np.uint8))
    large = blotches.resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC)
    grain = generator.normal(0, 18, (SIZE_PX, SIZE_PX)).astype(np.float32)
    metal = np.asarray(large, dtype=np.float32) + grain
    return _paint(ink, metal[..., None] * _colour(1.0, 0.95, 0.85), _colour(20, 25, 45))


def tilted(ink: Ink, generator: np.random.Generator) -> Picture:
    """Red ink on cream, under a camera that hangs askew."""
    sheet = Image.fromarray((ink * 255).astype(np.uint8))
    turned = sheet.rotate(float(generator.uniform(20, 50)), Image.Resampling.BICUBIC)
    turned_ink = np.asarray(turned, dtype=np.float32) / 255
    return _paint(turned_ink, _colour(245, 235, 205), _colour(170, 30, 40))


def marker(ink: Ink, generator: np.random.Generator) -> Picture:
    """A thick marker, out of focus, on blue cardboard."""
    blur = ImageFilter.GaussianBlur(float(generator.uniform(0.8, 1.4)))
    thick = _filtered(ink, ImageFilter.MaxFilter(3), blur)
    return _paint(thick, _colour(45, 85, 150), _colour(245, 220, 60))


STYLES: Final[Mapping[str, Style]] = MappingProxyType(
    {
        "scanned": scanned,
        "chalk": chalk,
        "coloured": coloured,
        "textured": textured,
        "tilted": tilted,
        "marker": marker,
    }
)
"""Each site's name and look, in the order of the sites' budgets."""
