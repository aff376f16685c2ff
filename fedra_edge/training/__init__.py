"""Training on local data: the trainer contract, and the door to its implementations."""

from __future__ import annotations

from typing import Literal

from fedra_edge.errors import BackendUnavailableError
from fedra_edge.training.allocator import prefer_huge_pages
from fedra_edge.training.trainer import (
    BlockCost,
    EvaluationCounts,
    PieceFile,
    SliceWork,
    TrainedSlice,
    Trainer,
    WholeModel,
)

__all__ = [
    "BlockCost",
    "EvaluationCounts",
    "PieceFile",
    "SliceWork",
    "TrainedSlice",
    "Trainer",
    "WholeModel",
    "load_trainer",
]


def load_trainer(backend: Literal["auto", "torch"] = "auto") -> Trainer:
    """Load a training backend, which takes seconds; ``auto`` takes the best one installed.

    Raises:
        BackendUnavailableError: The backend's packages are missing or cannot be loaded.
    """
    prefer_huge_pages()
    try:
        from fedra_edge.training.torch_trainer import TorchTrainer
    except (ImportError, OSError) as error:  # OSError: a shared library of torch is missing
        raise BackendUnavailableError(
            f"the training backend {backend!r} cannot be loaded: {error}",
            remedy="Install it with: pip install 'fedra[torch]'",
        ) from error
    return TorchTrainer()
