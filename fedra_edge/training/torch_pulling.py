"""Pulls given gradients back through a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override


class _Pull(torch.autograd.Function):
    """A scalar whose gradient with respect to each output is the given one.

    ``torch.autograd.backward`` takes gradients as well, but imports PyTorch's symbolic shapes for
    it, some 40 MB.
    """

    @staticmethod
    @override
    def forward(ctx: Any, output: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return output.new_zeros(())

    @staticmethod
    @override
    def backward(ctx: Any, _one: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None


def pull(outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
    """Add the gradients of what made these outputs; outputs that nothing trained made are left."""
    scalars = [
        _Pull.apply(output, gradient)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        for output, gradient in zip(outputs, gradients, strict=True)
        if output.requires_grad
    ]
    if scalars:
        torch.stack(scalars).sum().backward()  # type: ignore[no-untyped-call]  # as above
