"""Trains a slice on PyTorch: its values, clipping and optimizer, and the slice as planned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final

import torch
from torch import nn

from fedra_edge.protocol.devices import Backend
from fedra_edge.protocol.footprint import MemoryPlan
from fedra_edge.protocol.models import TokenInput
from fedra_edge.protocol.tensors import FloatArray
from fedra_edge.training.allocator import keep_freed_memory, trim_heap, trim_heap_beyond
from fedra_edge.training.engine import AnyArray, LabelIds
from fedra_edge.training.torch_optimizers import build_optimizer
from fedra_edge.training.torch_slice import (
    Entering,
    ResidentSlice,
    TrainableSlice,
    parameter_values,
    trained_parameters,
)
from fedra_edge.training.torch_walk import StreamedSlice
from fedra_edge.training.trainer import InputArray, SliceWork

_VALUE: Final = "value"


class TorchEngine:
    """Implements ``TrainingEngine``.

    Args:
        work: What to train.
        device: Where it is computed.
        settled_bytes: Gives what the process may occupy when a micro-batch is through.
    """

    def __init__(
        self,
        work: SliceWork,
        device: torch.device,
        settled_bytes: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self._settled_bytes = settled_bytes
        self._work = work
        self._device = device
        self._parameters = trained_parameters(work, device)
        self._optimizer = build_optimizer(work.manifest.training, self._parameters.values())
        self._loaded: TrainableSlice | None = None

    @property
    def backend(self) -> Backend:
        """The framework underneath."""
        return "torch"

    @property
    def has_context(self) -> bool:
        """Whether layers need more of a batch than the activations that enter them."""
        return isinstance(self._work.spec.input, TokenInput)

    def load(self, plan: MemoryPlan) -> None:
        """Make the slice ready as planned, once what was loaded is gone."""
        self._loaded = None
        trim_heap()
        self._loaded = self._load_slice(plan)

    def enter(self, inputs: Iterable[InputArray]) -> list[Entering]:
        """Bring micro-batches to the lowest trained layer."""
        return self._slice.enter(map(torch.from_numpy, inputs))

    def row_of(self, entering: Entering) -> FloatArray:
        """Give the activations of a micro-batch."""
        rows: FloatArray = entering.hidden.cpu().numpy()
        return rows

    def entering_of(self, rows: FloatArray) -> Entering:
        """Make a micro-batch of activations."""
        return Entering(torch.from_numpy(rows).to(self._device), ())

    def accumulate(
        self, entering: Sequence[Entering], labels: Sequence[LabelIds], num_examples: int
    ) -> float:
        """Add the gradient of the mean loss to the parameters."""
        label_ids = [torch.from_numpy(part) for part in labels]
        for parameter in self._parameters.values():
            if parameter.grad is None:  # in a block's midst it would leave a gap
                parameter.grad = torch.zeros_like(parameter)
        return self._slice.accumulate(entering, label_ids, num_examples)

    def step(self) -> None:
        """Clip the gradient and take an optimizer step, which forgets it."""
        clip_norm = self._work.manifest.training.clip_norm
        nn.utils.clip_grad_norm_(self._parameters.values(), clip_norm)
        self._optimizer.step()

    def forget_gradients(self) -> None:
        """Drop what has been accumulated."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def values(self) -> dict[str, FloatArray]:
        """Copy the parameters out, by global name."""
        return parameter_values(self._parameters)

    def state(self) -> Iterator[tuple[str, AnyArray]]:
        """Show parameters and what the optimizer remembers of each."""
        for name, parameter in self._parameters.items():
            yield f"{_VALUE}/{name}", parameter.detach().cpu().numpy()
            for part, tensor in self._optimizer.state.get(parameter, {}).items():
                yield f"{part}/{name}", tensor.cpu().numpy()

    @torch.no_grad()
    def restore(self, state: Mapping[str, AnyArray]) -> None:
        """Go back to where ``state`` was shown."""
        for key in state:
            part, _, name = key.partition("/")
            parameter, tensor = self._parameters[name], torch.tensor(state[key])
            if part == _VALUE:
                parameter.copy_(tensor)
            else:
                kept = tensor.to(self._device) if tensor.is_floating_point() else tensor
                self._optimizer.state.setdefault(parameter, {})[part] = kept

    def _load_slice(self, plan: MemoryPlan) -> TrainableSlice:
        keep_freed_memory()
        slice_type = ResidentSlice if plan.residency == "resident" else StreamedSlice
        settle = partial(_settle, self._settled_bytes)  # not this object: a cycle outlives its use
        return slice_type(self._work, self._parameters, self._device, settle)

    @property
    def _slice(self) -> TrainableSlice:
        if self._loaded is None:
            raise RuntimeError("no slice has been loaded")
        return self._loaded


def _settle(settled_bytes: Callable[[], float]) -> None:
    """Give unused memory back when the process occupies more than it may between micro-batches."""
    trim_heap_beyond(settled_bytes())
