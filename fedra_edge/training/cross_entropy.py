"""Cross-entropy of logits, its gradient, and the probabilities they mean, in numpy."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedra_edge.training.engine import LabelIds

Float = TypeVar("Float", np.float32, np.float64)


def log_softmax(logits: NDArray[Float]) -> NDArray[Float]:
    """Give log-probabilities of shape (examples, labels), whatever the size of the logits."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    logs: NDArray[Float] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logs


def cross_entropy_sum(logits: NDArray[Float], label_ids: LabelIds) -> float:
    """Add up the cross-entropies of examples."""
    return -float(log_softmax(logits)[np.arange(len(label_ids)), label_ids].sum())


def cross_entropy_pull(
    logits: NDArray[Float], label_ids: LabelIds, num_examples: int
) -> tuple[float, NDArray[Float]]:
    """Give the sum of cross-entropies over ``num_examples``, and its gradient by the logits."""
    rows = np.arange(len(label_ids))
    logs = log_softmax(logits)
    loss = -float(logs[rows, label_ids].sum()) / num_examples
    gradient = np.exp(logs)
    gradient[rows, label_ids] -= 1
    gradient /= num_examples
    return loss, gradient
