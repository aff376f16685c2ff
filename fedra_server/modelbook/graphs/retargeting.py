"""Moves the adapters of a registered model's graphs to the targets of a run. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from fedra_edge.protocol.models import BlobRef, PieceGraphs
from fedra_server.modelbook.graphs.adapters import remove_adapters
from fedra_server.modelbook.graphs.differences import check_by_differences, random_values
from fedra_server.modelbook.graphs.making import adapt_block, block_gradients, pack_graph
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.durability import disk_errors


def retarget_graphs(graphs: PieceGraphs, targets: Sequence[str], blobs: BlobStore) -> PieceGraphs:
    """Give graphs whose adapters sit on other targets; stem and head stay what they are.

    Raises:
        ConfigurationError: A target is no linear layer, an operator has no known gradient, or
            the gradients disagree with finite differences.
        NotFoundError: The known graphs are not there.
        StorageError: The blob store refused.
    """
    block, block_vjp = adapt_block(remove_adapters(_load(graphs.block, blobs)), targets)
    check_by_differences(block, block_vjp, block_gradients(targets), random_values(block))
    refs = {
        "block": blobs.put_bytes(pack_graph(block)),
        "block_vjp": blobs.put_bytes(pack_graph(block_vjp)),
    }
    return graphs.model_copy(update=refs | {"targets": tuple(targets)})


def _load(ref: BlobRef, blobs: BlobStore) -> onnx.ModelProto:
    path = blobs.path(ref.sha256)
    with disk_errors(f"reading {path.name}"):
        return onnx.load_model_from_string(path.read_bytes())
