"""Room to train in: a guard over as much memory as a test says, and a place for scratch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from fedra_edge.guard import PromiseGuard
from fedra_edge.protocol.devices import BlockMemory
from fedra_edge.protocol.footprint import Footprint, SliceShape
from fedra_edge.training.trainer import OnStep, ShouldStop, SliceWork, Surroundings
from tests.support.builders import make_block_memory


def guard_of(
    work: SliceWork,
    usable_bytes: Callable[[], int] = lambda: 2**50,
    memory: BlockMemory | None = None,
) -> PromiseGuard:
    """Guard a slice on a machine with this much memory."""
    manifest = work.manifest
    footprint = Footprint(
        work.spec,
        manifest.adapter,
        manifest.training,
        memory or make_block_memory(),
        SliceShape.of(manifest.layers),
        "torch",
    )
    return PromiseGuard(footprint, usable_bytes)


def room_for(
    work: SliceWork,
    *,
    on_step: OnStep = lambda *_: None,
    should_stop: ShouldStop = lambda: False,
    guard: PromiseGuard | None = None,
    scratch_bytes: int = 2**30,
) -> Surroundings:
    """Give a slice surroundings that leave it alone."""
    return Surroundings(
        on_step=on_step,
        should_stop=should_stop,
        guard=guard or guard_of(work),
        scratch=Path(tempfile.gettempdir()),
        scratch_bytes=scratch_bytes,
    )
