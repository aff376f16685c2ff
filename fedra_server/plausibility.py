"""Decides whether what is said of a delta can be true, before a byte of it is accepted."""

from __future__ import annotations

from typing import Final

from fedra_edge.protocol.deltas import DeltaManifest
from fedra_edge.protocol.devices import Calibration
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.slices import SliceManifest
from fedra_server.errors import RefusedError

MOST_EXAMPLES: Final = 10**8
"""No site has more, whatever its work would let it claim; a claim is a weight in the merge."""


def find_implausible(
    delta: DeltaManifest, work: SliceManifest, calibration: Calibration | None
) -> RefusedError | None:
    """Give the refusal of a delta of more examples than its training can have drawn.

    Each example counts once, so there are no more than the steps of the slice take, and no more
    than the client itself has told, if it has told since it came back.
    """
    most = min(work.steps * work.training.batch_size, MOST_EXAMPLES)
    if calibration is not None:
        most = min(most, calibration.train_examples)
    if delta.num_examples <= most:
        return None
    return RefusedError(
        ProblemCode.NUM_EXAMPLES_IMPLAUSIBLE,
        f"{delta.num_examples} examples are claimed, this slice was trained on at most {most}",
    )
