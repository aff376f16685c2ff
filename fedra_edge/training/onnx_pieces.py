"""What the graphs of a piece are fed beside activations: its weights and adapters, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedra_edge.errors import SliceError
from fedra_edge.protocol.graphs import HIDDEN, INPUTS, LORA_SCALE
from fedra_edge.protocol.layers import HEAD, STEM, TensorKey
from fedra_edge.protocol.models import GraphName
from fedra_edge.protocol.tensors import FloatArray, TensorInfo, map_tensor, read_header
from fedra_edge.training.onnx_sessions import Arrays, Graph, Graphs
from fedra_edge.training.prefetching import prefetch
from fedra_edge.training.trainer import PieceFile

_FORWARD: Final[Mapping[str, GraphName]] = {STEM: "stem", HEAD: "head"}
_STORED_DTYPES: Final = frozenset({"F32", "F16", "BF16"})


def context_names(graphs: Graphs) -> frozenset[str]:
    """Name what layers and head need of a batch beside the activations that enter them."""
    return frozenset(graphs["stem"].outputs) - {HIDDEN}


def weight_names(graph: Graph, graphs: Graphs) -> frozenset[str]:
    """Name the inputs of a forward graph that are weights or adapters."""
    return frozenset(graph.inputs) - {INPUTS, HIDDEN, LORA_SCALE} - context_names(graphs)


class PieceFeeds:
    """Reads pieces; weights stay in their files until they are used, unless stored in 16 bits.

    Args:
        graphs: What the pieces are for.
        weights: Where the pieces are.
        adapters: Adapters and the head's trained tensors, by global name.
        scale: What multiplies the low-rank products.
    """

    def __init__(
        self,
        graphs: Graphs,
        weights: Mapping[str, PieceFile],
        adapters: Mapping[str, FloatArray],
        scale: float,
    ) -> None:
        self._graphs = graphs
        self._weights = weights
        self._scale = {LORA_SCALE: np.asarray(scale, dtype=np.float32)}
        self._own: dict[str, dict[str, FloatArray]] = {}
        for name, value in adapters.items():
            key = TensorKey.parse(name)
            self._own.setdefault(key.piece, {})[key.name] = value

    def read(self, piece: str) -> Arrays:
        """Give a piece's weights and adapters, for its forward graph and for that one's vjp.

        Raises:
            SliceError: The file is no file of weights, or a tensor is missing or extra.
        """
        own = self._own.get(piece, {})
        feeds = {**self._frozen(piece, leaving_out=own), **own}
        wanted = weight_names(self._graphs[_FORWARD.get(piece, "block")], self._graphs)
        if odd := sorted(feeds.keys() ^ wanted):
            raise SliceError(f"{piece} has missing or extra tensors: {', '.join(odd[:5])}")
        return {**feeds, **self._scale}

    def prefetch(self, piece: str) -> None:
        """Ask the system to bring a piece's file into its cache."""
        prefetch(self._weights[piece].path)

    def _frozen(self, piece: str, leaving_out: Mapping[str, object]) -> dict[str, NDArray[Any]]:
        held = self._weights[piece]
        try:
            infos = read_header(held.path) if held.tensors is None else held.tensors
            return {
                name: _mapped(held, info) for name, info in infos.items() if name not in leaving_out
            }
        except ValueError as error:
            raise SliceError(f"the weights of {piece} cannot be read: {error}") from error


def _mapped(held: PieceFile, info: TensorInfo) -> FloatArray:
    if info.dtype not in _STORED_DTYPES:
        raise ValueError(f"dtype {info.dtype} is not computed with")
    return np.asarray(map_tensor(held.path, info), dtype=np.float32)
