"""What the graphs of a model take and give, by name, and whether one that was opened does."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from fedra_edge.errors import SliceError
from fedra_edge.protocol.graphs import (
    GRADIENT,
    GRADIENT_SUFFIX,
    HIDDEN,
    INPUTS,
    LOGITS,
    LORA_SCALE,
    OUT,
)
from fedra_edge.protocol.layers import LORA_A, LORA_B
from fedra_edge.protocol.models import GraphName, ModelSpec

_FLOAT_BYTES: Final = 4
_RANK: Final = "r"
_ADAPTER_ENDS: Final = (f".{LORA_A}", f".{LORA_B}")
_MOST_TOLD: Final = 5
Shapes = Mapping[str, tuple[int | str | None, ...]]
"""Sizes by name; text stands for a size that a call decides."""


@dataclass(frozen=True)
class Interface:
    """What is expected of the graphs of a model with adapters on some of its linear layers."""

    spec: ModelSpec
    targets: tuple[str, ...]

    def check(
        self, what: GraphName, inputs: Shapes, outputs: Collection[str], contexts: Iterable[str]
    ) -> None:
        """Compare a graph with what is known of its piece.

        Args:
            what: Which of the graphs it is.
            inputs: Their shapes.
            outputs: Their names.
            contexts: The outputs of the stem, which may be inputs of the others.

        Raises:
            SliceError: A name is missing or extra, a shape differs, or weights are too large.
        """
        entering = INPUTS if what == "stem" else HIDDEN
        beside = {entering, LORA_SCALE, *contexts}
        weights = {name: shape for name, shape in inputs.items() if name not in beside}
        problems = [
            *self._names(what, inputs, outputs, GRADIENT if what.endswith("_vjp") else entering),
            *(self._weights(what, weights) if not what.endswith("_vjp") else ()),
        ]
        if problems:
            raise SliceError(
                f"the graph {what!r} of {self.spec.name} {problems[0]}",
                remedy="Register the model again on the server, or pip install 'fedra[torch]' here",
            )

    def _names(
        self, what: GraphName, inputs: Shapes, outputs: Collection[str], entering: str
    ) -> Iterator[str]:
        if entering not in inputs:
            yield f"does not take {entering}"
        expected = {
            "stem": {HIDDEN, *outputs},
            "block": {OUT},
            "block_vjp": {name + GRADIENT_SUFFIX for name in (HIDDEN, *self._adapters)},
            "head": {LOGITS},
            "head_vjp": {name + GRADIENT_SUFFIX for name in (HIDDEN, *self.spec.head_parameters)},
        }[what]
        if odd := expected ^ {*outputs}:
            yield f"has missing or extra outputs: {', '.join(sorted(odd)[:_MOST_TOLD])}"

    def _weights(self, what: GraphName, weights: Shapes) -> Iterator[str]:
        """Hold weights against the shapes that are known, and what they take against the piece."""
        spec = self.spec
        piece = {"stem": spec.stem, "block": spec.layers[0], "head": spec.head}[what]
        adapters = self._adapters if what == "block" else {}
        trained = adapters if what == "block" else spec.head_parameters if what == "head" else {}
        found = {
            name: tuple(_RANK if isinstance(size, str) else size for size in shape)
            for name, shape in weights.items()
            if name in trained or (what == "block" and name.endswith(_ADAPTER_ENDS))
        }
        if odd := sorted(dict(found.items() ^ trained.items())):
            yield f"has missing, extra or misshapen inputs: {', '.join(odd[:_MOST_TOLD])}"
        for name, sizes in spec.block_linears.items() if what == "block" else ():
            if (shape := weights.get(f"{name}.weight", sizes)) not in {sizes, sizes[::-1]}:
                yield f"takes {name}.weight of shape {shape}, not {sizes}"
        frozen = {name: shape for name, shape in weights.items() if name not in adapters}
        total_bytes = 0
        for name, shape in frozen.items():
            known = [size for size in shape if isinstance(size, int) and size > 0]
            if len(known) < len(shape):
                yield f"does not say how large {name} is"
            total_bytes += _FLOAT_BYTES * math.prod(known)
        if total_bytes > piece.cost.parameter_bytes:
            yield f"takes {total_bytes} bytes, the piece has {piece.cost.parameter_bytes}"

    @property
    def _adapters(self) -> Shapes:
        shapes: dict[str, tuple[int | str | None, ...]] = {}
        for target in self.targets:
            if target not in self.spec.block_linears:
                raise SliceError(f"{self.spec.name} has no linear layer {target} in its blocks")
            out_features, in_features = self.spec.block_linears[target]
            shapes[f"{target}.{LORA_A}"] = (_RANK, in_features)
            shapes[f"{target}.{LORA_B}"] = (out_features, _RANK)
        return shapes
