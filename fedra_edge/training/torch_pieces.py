"""What the pieces of every model family have in common, whatever their inside looks like."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn
from typing_extensions import override

Context = tuple[Tensor, ...]
"""What every layer and the head of a batch need beside the activations, such as a mask."""


class ResidualBlock(nn.Module):
    """A layer that ends in ``residual + last(inner value)``, with ``last`` a linear module.

    In two parts, so that a backward pass can recompute a layer without the matrix product whose
    result it does not need.
    """

    @property
    @abstractmethod
    def last(self) -> nn.Module:
        """The linear module at the end."""

    @abstractmethod
    def inner(self, hidden: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        """Map (examples, tokens, width) to the residual, of that shape, and what enters last."""

    @override
    def forward(self, hidden: Tensor, *context: Tensor) -> Tensor:
        """Map (examples, tokens, width) to the same shape."""
        residual, entering = self.inner(hidden, *context)
        out: Tensor = self.last(entering).add_(residual)
        return out


def no_context(_inputs: Tensor) -> Context:
    """Say that a batch needs no context: all of its tokens are real."""
    return ()
