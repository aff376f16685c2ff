"""A linear layer with a low-rank adapter beside its frozen weight (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from fedra_edge.protocol.models import AdapterSpec


class LoraLinear(nn.Module):
    """Computes W x + b + scale * B (A x); parameters have the names that travel on the wire.

    ``weight`` is W (out, in), ``lora_a`` is A (rank, in), ``lora_b`` is B (out, rank).
    """

    def __init__(self, base: nn.Linear, adapter: AdapterSpec) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self.lora_a = nn.Parameter(torch.empty(adapter.rank, base.in_features))
        self.lora_b = nn.Parameter(torch.empty(base.out_features, adapter.rank))
        self.scale = adapter.scale

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        rows = hidden.flatten(0, -2)
        out: Tensor = _LoraProduct.apply(  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            rows, self.weight, self.bias, self.lora_a, self.lora_b, self.scale
        )
        return out.view(*hidden.shape[:-1], -1)

    @torch.no_grad()
    def pull(self, hidden: Tensor, gradient: Tensor) -> Tensor:
        """Pull a gradient of the output back to the input, without computing the output.

        Gradients of A and B are added where they are trained.
        """
        rows, pulled = hidden.flatten(0, -2), gradient.flatten(0, -2)
        low_gradient = self.scale * (pulled @ self.lora_b)
        if self.lora_a.requires_grad:
            low = F.linear(rows, self.lora_a)
            _add_gradient(self.lora_a, low_gradient.t() @ rows)
            _add_gradient(self.lora_b, self.scale * (pulled.t() @ low))
        out = (pulled @ self.weight).addmm_(low_gradient, self.lora_a)
        return out.view(*hidden.shape[:-1], -1)


class _LoraProduct(torch.autograd.Function):
    """y = W x + b + s B (A x) for rows x, its backward pass without a buffer more than it needs.

    dA = s (B^T g) x^T,  dB = s g (A x)^T,  dx = W^T g + s A^T (B^T g).
    """

    @staticmethod
    @override
    def forward(
        rows: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        return F.linear(rows, weight, bias).addmm_(F.linear(rows, a), b.t(), alpha=scale)

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, weight, _, a, b, ctx.scale = inputs
        ctx.save_for_backward(rows if a.requires_grad else None, weight, a, b)

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b = ctx.saved_tensors
        low_gradient = ctx.scale * (gradient @ b)
        of_a = of_b = of_rows = None
        if rows is not None:
            of_a = low_gradient.t() @ rows
            of_b = ctx.scale * (gradient.t() @ F.linear(rows, a))
        if ctx.needs_input_grad[0]:
            of_rows = (gradient @ weight).addmm_(low_gradient, a)
        return of_rows, None, None, of_a, of_b, None


def pull_linear(linear: nn.Module, hidden: Tensor, gradient: Tensor) -> Tensor:
    """Pull a gradient back through a linear module with or without an adapter.

    Raises:
        TypeError: The module is of another kind.
    """
    if isinstance(linear, LoraLinear):
        return linear.pull(hidden, gradient)
    if isinstance(linear, nn.Linear):
        return gradient @ linear.weight.detach()
    raise TypeError(f"{type(linear).__name__} is no linear module")


def attach_adapter(block: nn.Module, adapter: AdapterSpec) -> None:
    """Replace exactly the targeted linear modules of a block.

    Raises:
        AttributeError: A target does not exist.
        TypeError: A target is no linear module.
    """
    for target in adapter.targets:
        base = block.get_submodule(target)
        if not isinstance(base, nn.Linear):
            raise TypeError(f"{target} is no linear module")
        parent, _, name = target.rpartition(".")
        setattr(block.get_submodule(parent), name, LoraLinear(base, adapter))


def _add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
