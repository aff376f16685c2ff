"""What a local dataset is: labelled examples, read one at a time, and a stable held-out part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

HELD_OUT_PERCENT: Final = 20
_MAX_SAMPLES: Final = 3


class Example(NamedTuple):
    """One labelled image, as 8-bit values of shape (height, width, channels) or (height, width)."""

    image: NDArray[np.uint8]
    label: str


class TextExample(NamedTuple):
    """One labelled text."""

    text: str
    label: str


class LocalDataset(Protocol):
    """Examples by index, all images or all texts; only ``__getitem__`` reads one."""

    def __len__(self) -> int:
        """Count the examples."""
        ...

    def __getitem__(self, index: int) -> Example | TextExample:
        """Read one example; ``DataError`` or ``OSError`` when it cannot be read."""
        ...

    def label_of(self, index: int) -> str:
        """Give the label's name without reading the example."""
        ...

    def key_of(self, index: int) -> str:
        """Give a name that this example keeps when others are added or removed."""
        ...

    def is_held_out(self, index: int) -> bool | None:
        """Tell whether the example is for evaluation only; None lets its key decide."""
        ...


@runtime_checkable
class SelfCheckingDataset(Protocol):
    """A dataset that can say what is wrong with it before training starts."""

    @property
    def skipped(self) -> SkipReport:
        """Give what was left out while the data was listed."""
        ...

    def problem_of(self, index: int) -> str | None:
        """Give the reason why an example cannot be used; None when it can."""
        ...


class SkipReport:
    """What was left out of the local data and why: a count and a few samples per reason."""

    def __init__(self) -> None:
        self._samples: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, reason: str, sample: str, count: int = 1) -> None:
        """Count something left out; the first few samples of a reason are kept."""
        self._counts[reason] = self._counts.get(reason, 0) + count
        samples = self._samples.setdefault(reason, [])
        if len(samples) < _MAX_SAMPLES:
            samples.append(sample)

    def merge(self, other: SkipReport) -> None:
        """Add all that another report holds."""
        for reason, count in other._counts.items():
            samples = other._samples[reason]
            self.add(reason, samples[0], count)
            for sample in samples[1:]:
                self.add(reason, sample, 0)

    @property
    def counts(self) -> dict[str, int]:
        """How many were left out, by reason."""
        return dict(self._counts)

    def samples(self, reason: str) -> tuple[str, ...]:
        """Give a few of those left out for a reason."""
        return tuple(self._samples.get(reason, ()))

    def __bool__(self) -> bool:
        return bool(self._counts)

    def __iter__(self) -> Iterator[str]:
        """Yield one line of text per reason, the most frequent first."""
        for reason, count in sorted(self._counts.items(), key=lambda entry: (-entry[1], entry[0])):
            samples = self._samples[reason]
            more = ", ..." if count > len(samples) else ""
            yield f"{reason}: {count} ({', '.join(samples)}{more})"

    @override
    def __str__(self) -> str:
        return "\n".join(self) if self else "nothing was skipped"


def is_held_out_by_key(key: str) -> bool:
    """Decide by a digest of the key, so that adding files never moves an example."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT
