"""The one place where tensor names are formatted, parsed and renumbered.

A model is cut into pieces: ``stem``, ``layers.0`` .. ``layers.L-1``, ``head``. A tensor of an
adapter state or delta is named ``PIECE/NAME``, for example
``layers.3/attention.o_proj.lora_a`` or ``head/classifier.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from typing_extensions import override

from fedra_edge.protocol.ids import LayerId, Position

STEM: Final = "stem"
HEAD: Final = "head"
LORA_A: Final = "lora_a"
LORA_B: Final = "lora_b"

_PIECE = re.compile(r"layers\.(0|[1-9][0-9]{0,4})|stem|head")
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


def layer_piece(layer_id: LayerId) -> str:
    """Name the piece that holds a layer."""
    return f"layers.{layer_id}"


@dataclass(frozen=True, order=True)
class TensorKey:
    """A tensor's place in the whole model: which piece, and its name inside that piece."""

    piece: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a key back from its wire form.

        Raises:
            ValueError: The text is not ``PIECE/NAME``.
        """
        piece, separator, name = text.partition("/")
        if not separator or not _PIECE.fullmatch(piece) or not _NAME.fullmatch(name):
            raise ValueError(f"not a tensor key: {text[:100]!r}")
        return cls(piece, name)

    @override
    def __str__(self) -> str:
        return f"{self.piece}/{self.name}"

    @property
    def layer_id(self) -> LayerId | None:
        """The layer this tensor belongs to; None for stem and head."""
        return LayerId(int(self.piece[7:])) if self.piece.startswith("layers.") else None


@dataclass(frozen=True)
class LayerPositions:
    """Maps a client's layers, given by ascending global ids, to positions 0, 1, 2 ..."""

    layer_ids: tuple[LayerId, ...]

    def __post_init__(self) -> None:
        """Refuse an order that would make positions ambiguous."""
        if list(self.layer_ids) != sorted(set(self.layer_ids)):
            raise ValueError(f"layer ids must ascend without repeats: {self.layer_ids}")

    @classmethod
    def of(cls, layer_ids: Sequence[int]) -> Self:
        """Build the mapping from plain integers."""
        return cls(tuple(LayerId(layer_id) for layer_id in layer_ids))

    def position_of(self, layer_id: LayerId) -> Position:
        """Give the position of a layer; ValueError when the client does not hold it."""
        return Position(self.layer_ids.index(layer_id))

    def layer_at(self, position: Position) -> LayerId:
        """Give the global id of the layer at a position; IndexError beyond the last."""
        if position < 0:
            raise IndexError(f"position {position} is negative")
        return self.layer_ids[position]
