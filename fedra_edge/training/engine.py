"""What a framework has to offer, so that training and the forward walk need none themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedra_edge.protocol.devices import Backend
from fedra_edge.protocol.footprint import MemoryPlan
from fedra_edge.protocol.tensors import FloatArray
from fedra_edge.training.trainer import InputArray

Entering = TypeVar("Entering")
"""A micro-batch at the lowest trained layer, in whatever form the framework has it."""

Moving = TypeVar("Moving")
"""A micro-batch between two layers, in whatever form the framework has it."""

LabelIds = NDArray[np.int64]
AnyArray = NDArray[Any]


class TrainingEngine(Protocol[Entering]):
    """The trained values of a slice, and the slice that their gradients come from."""

    @property
    def backend(self) -> Backend:
        """The framework underneath."""
        ...

    @property
    def has_context(self) -> bool:
        """Whether layers need more of a batch than the activations that enter them."""
        ...

    def load(self, plan: MemoryPlan) -> None:
        """Make the slice ready to be worked through as planned, in place of what was loaded.

        Raises:
            SliceError: The pieces do not fit the model.
        """
        ...

    def enter(self, inputs: Iterable[InputArray]) -> list[Entering]:
        """Bring micro-batches to the lowest trained layer, which no gradient passes."""
        ...

    def row_of(self, entering: Entering) -> FloatArray:
        """Give the activations of a micro-batch, of shape (examples, ...)."""
        ...

    def entering_of(self, rows: FloatArray) -> Entering:
        """Make a micro-batch of activations, where there is no context."""
        ...

    def accumulate(
        self, entering: Sequence[Entering], labels: Sequence[LabelIds], num_examples: int
    ) -> float:
        """Add the gradient of the mean loss to what is there.

        Args:
            entering: Micro-batches at the lowest trained layer.
            labels: Their label ids, of shape (n_i,).
            num_examples: What the mean is taken over, usually the whole batch.

        Returns:
            The part of the mean loss that these examples make.
        """
        ...

    def step(self) -> None:
        """Clip the gradient, move the values along it and forget it."""
        ...

    def forget_gradients(self) -> None:
        """Drop what has been accumulated."""
        ...

    def values(self) -> dict[str, FloatArray]:
        """Copy the trained values out, by global name."""
        ...

    def state(self) -> Iterator[tuple[str, AnyArray]]:
        """Show all that later steps depend on, one array after the other, without copying.

        Each has a name of its own, the same ones between any two steps.
        """
        ...

    def restore(self, state: Mapping[str, AnyArray]) -> None:
        """Go back to where ``state`` was shown; each array is looked up once, when it is used."""
        ...


class ForwardEngine(Protocol[Moving]):
    """A whole model, piece by piece; each piece is loaded when it is asked for.

    Raises:
        SliceError: The pieces do not fit the model.
    """

    def stem(self) -> Callable[[InputArray], Moving]:
        """Load the stem; it takes a batch of inputs."""
        ...

    def layers(self) -> Iterator[Callable[[Moving], Moving]]:
        """Load one layer after the other; a layer is of use until the next is taken."""
        ...

    def head(self) -> Callable[[Moving], FloatArray]:
        """Load the head; it gives logits of shape (examples, labels)."""
        ...
