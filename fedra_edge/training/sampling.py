"""Draws the batches of local training: seeded, epoch by epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def draw_batches(
    indices: Sequence[int], batch_size: int, steps: int, seed: int
) -> Iterator[NDArray[np.int64]]:
    """Yield one array of example indices per step.

    Every epoch visits each example once, in an order of its own; its last batch may be smaller.

    Raises:
        ValueError: There is no example to draw.
    """
    if not indices:
        raise ValueError("there is no example to train on")
    generator = np.random.default_rng(seed)
    examples = np.asarray(indices, dtype=np.int64)
    done = 0
    while True:
        order = generator.permutation(examples)
        for start in range(0, len(order), batch_size):
            if done == steps:
                return
            done += 1
            yield order[start : start + batch_size]
