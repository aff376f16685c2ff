"""The optimizers of local training on numpy arrays; they move values as PyTorch's do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from fedra_edge.protocol.slices import TrainingSpec
from fedra_edge.protocol.tensors import FloatArray

_BETAS: Final = (0.9, 0.999)
_EPSILON: Final = 1e-8
_CLIP_EPSILON: Final = 1e-6
"""What ``torch.nn.utils.clip_grad_norm_`` adds to a norm before it divides by it."""

Tensors = Mapping[str, FloatArray]
State = dict[str, dict[str, NDArray[Any]]]


class Optimizer(Protocol):
    """Moves values along their gradients.

    ``state`` is all that is remembered between steps; it may be read and put back between them.
    """

    state: State

    def step(self, values: Tensors, gradients: Tensors) -> None:
        """Take one step in place; a value without a gradient stays where it is."""
        ...


class Sgd:
    """Stochastic gradient descent with momentum and L2 weight decay.

    d = grad + weight_decay * p;  v = momentum * v + d;  p = p - learning_rate * v
    """

    def __init__(self, training: TrainingSpec) -> None:
        self._training = training
        self.state: State = {}

    def step(self, values: Tensors, gradients: Tensors) -> None:
        """Take one step."""
        training = self._training
        for name, gradient in gradients.items():
            direction = gradient + training.weight_decay * values[name]
            if name in self.state:
                velocity = self.state[name]["velocity"]
                velocity *= training.momentum
                velocity += direction
                direction = velocity
            else:
                self.state[name] = {"velocity": direction}
            values[name][...] -= training.learning_rate * direction


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2)."""

    def __init__(self, training: TrainingSpec) -> None:
        self._training = training
        self.state: State = {}

    def step(self, values: Tensors, gradients: Tensors) -> None:
        """Take one step."""
        training, (first_beta, second_beta) = self._training, _BETAS
        for name, gradient in gradients.items():
            if name not in self.state:
                first, second = np.zeros_like(gradient), np.zeros_like(gradient)
                counted = np.zeros(1, dtype=np.int64)
                self.state[name] = {"first": first, "second": second, "steps": counted}
            state = self.state[name]
            first, second = state["first"], state["second"]
            state["steps"] += 1
            steps = int(state["steps"][0])
            first += (1 - first_beta) * (gradient - first)
            second *= second_beta
            second += (1 - second_beta) * np.square(gradient)
            scale = np.sqrt(second / (1 - second_beta**steps))
            scale += _EPSILON
            rate = training.learning_rate / (1 - first_beta**steps)
            value = values[name]
            value *= 1 - training.learning_rate * training.weight_decay
            value -= rate * first / scale


def build_optimizer(training: TrainingSpec) -> Optimizer:
    """Make the optimizer that a run asks for."""
    return (AdamW if training.optimizer == "adamw" else Sgd)(training)


def clip_gradients(gradients: Tensors, most: float) -> None:
    """Shorten gradients together to the norm ``most``, in place, when theirs is larger."""
    squares = (float(np.vdot(gradient, gradient)) for gradient in gradients.values())
    factor = most / (math.sqrt(sum(squares)) + _CLIP_EPSILON)
    if factor < 1:
        for gradient in gradients.values():
            np.multiply(gradient, np.float32(factor), out=gradient)
