"""The optimizers of local training, on plain tensors.

Written here because creating one of ``torch.optim`` imports PyTorch's compiler, which costs a
client about 80 MB; tests hold every step against ``torch.optim``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

import torch
from torch import Tensor, nn

from fedra_edge.protocol.slices import TrainingSpec

_BETAS: Final = (0.9, 0.999)
_EPSILON: Final = 1e-8


State = dict[nn.Parameter, dict[str, Tensor]]


class Optimizer(Protocol):
    """Moves parameters along their gradients, then forgets the gradients.

    ``state`` is all that is remembered between steps; it may be read and put back between them.
    """

    state: State

    def step(self) -> None:
        """Take one step; a parameter without a gradient stays where it is."""
        ...


class Sgd:
    """Stochastic gradient descent with momentum and L2 weight decay.

    d = grad + weight_decay * p;  v = momentum * v + d;  p = p - learning_rate * v
    """

    def __init__(self, parameters: Iterable[nn.Parameter], training: TrainingSpec) -> None:
        self._parameters = list(parameters)
        self._training = training
        self.state: State = {}

    @torch.no_grad()
    def step(self) -> None:
        """Take one step."""
        training = self._training
        for parameter in self._parameters:
            if parameter.grad is None:
                continue
            direction = parameter.grad.add(parameter, alpha=training.weight_decay)
            if parameter in self.state:
                velocity = self.state[parameter]["velocity"]
                direction = velocity.mul_(training.momentum).add_(direction)
            else:
                self.state[parameter] = {"velocity": direction}
            parameter.add_(direction, alpha=-training.learning_rate)
            parameter.grad = None


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2)."""

    def __init__(self, parameters: Iterable[nn.Parameter], training: TrainingSpec) -> None:
        self._parameters = list(parameters)
        self._training = training
        self.state: State = {}

    @torch.no_grad()
    def step(self) -> None:
        """Take one step."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                self._move(parameter, parameter.grad)
                parameter.grad = None

    def _move(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        training, (first_beta, second_beta) = self._training, _BETAS
        if parameter not in self.state:
            first, second = torch.zeros_like(parameter), torch.zeros_like(parameter)
            counted = torch.zeros(1, dtype=torch.int64)  # on the CPU, where it is read
            self.state[parameter] = {"first": first, "second": second, "steps": counted}
        state = self.state[parameter]
        first, second = state["first"], state["second"]
        state["steps"] += 1
        steps = int(state["steps"])
        first.lerp_(gradient, 1 - first_beta)
        second.mul_(second_beta).addcmul_(gradient, gradient, value=1 - second_beta)
        parameter.mul_(1 - training.learning_rate * training.weight_decay)
        scale = (second / (1 - second_beta**steps)).sqrt_().add_(_EPSILON)
        parameter.addcdiv_(first, scale, value=-training.learning_rate / (1 - first_beta**steps))


def build_optimizer(training: TrainingSpec, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Make the optimizer that a run asks for."""
    return (AdamW if training.optimizer == "adamw" else Sgd)(parameters, training)
