"""Training on local data: the trainer contract, and the door to its implementations."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Final, Literal

from fedra_edge.errors import BackendUnavailableError
from fedra_edge.training.trainer import (
    BlockCost,
    EvaluationCounts,
    GraphFiles,
    PieceFile,
    SliceWork,
    TrainedSlice,
    Trainer,
    WholeModel,
)

__all__ = [
    "BlockCost",
    "EvaluationCounts",
    "GraphFiles",
    "PieceFile",
    "SliceWork",
    "TrainedSlice",
    "Trainer",
    "WholeModel",
    "load_trainer",
]


LOGGER: Final = logging.getLogger(__name__)


def load_trainer(
    backend: Literal["auto", "torch", "onnx"] = "auto", threads: int | None = None
) -> Trainer:
    """Load a training backend, which takes seconds; ``auto`` takes the best one installed.

    Args:
        backend: PyTorch trains any model; ONNX Runtime those with graphs, in less memory.
        threads: How many processor threads to compute with; the backend's default is all.

    Raises:
        BackendUnavailableError: The backend's packages are missing or cannot be loaded.
    """
    if backend == "onnx":
        trainer, why = _load_onnx(threads), "it was asked for"
    elif backend == "torch":
        trainer, why = _load_torch(threads), "it was asked for"
    else:
        trainer, why = _load_best(threads)
    LOGGER.info("training on the backend %r: %s", trainer.backend, why)
    return trainer


def _load_best(threads: int | None) -> tuple[Trainer, str]:
    """Load PyTorch where it can be, and say why."""
    try:
        return _load_torch(threads), "it can be loaded"
    except BackendUnavailableError as error:
        why_not_torch = str(error)
    if find_spec("onnxruntime") is None:
        raise BackendUnavailableError(
            f"no training backend is installed; {why_not_torch}",
            remedy="pip install 'fedra[torch]', or pip install 'fedra[onnx]' for less memory",
        )
    return _load_onnx(threads), why_not_torch


def _load_torch(threads: int | None) -> Trainer:
    try:
        import torch

        from fedra_edge.training.torch_trainer import TorchTrainer
    except (ImportError, OSError) as error:  # OSError: a shared library of torch is missing
        raise _cannot_be_loaded("torch", error) from error
    if threads is not None:
        torch.set_num_threads(threads)
    return TorchTrainer()


def _load_onnx(threads: int | None) -> Trainer:
    try:
        from fedra_edge.training.onnx_trainer import OnnxTrainer
    except (ImportError, OSError) as error:
        raise _cannot_be_loaded("onnx", error) from error
    return OnnxTrainer(threads)


def _cannot_be_loaded(backend: str, error: Exception) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"the training backend {backend!r} cannot be loaded: {error}",
        remedy=f"Install it with: pip install 'fedra[{backend}]'",
    )
