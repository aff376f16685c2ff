"""Cuts a loaded model into its pieces: named arrays of the stem, each layer and the head."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedra_edge.protocol.families import Family
from fedra_edge.protocol.ids import LayerId
from fedra_edge.protocol.layers import HEAD, STEM, layer_piece
from fedra_server.errors import ConfigurationError

Arrays = dict[str, NDArray[Any]]


def split_model(model: nn.Module, family: Family) -> dict[str, Arrays]:
    """Give the tensors of every piece, by piece and by their name inside it.

    Raises:
        ConfigurationError: A tensor lies in no piece, or the layers differ in structure.
    """
    pieces: defaultdict[str, Arrays] = defaultdict(dict)
    for full_name, tensor in model.state_dict().items():
        try:
            key = family.locate(full_name)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
        pieces[key.piece][key.name] = np.asarray(tensor.detach().float().numpy())
    num_layers = count_layers(model, family)
    first = _shapes(pieces[layer_piece(LayerId(0))])
    for index in range(1, num_layers):
        if _shapes(pieces[layer_piece(LayerId(index))]) != first:
            raise ConfigurationError(f"layer {index} is not built like layer 0")
    if not pieces[STEM] or not pieces[HEAD] or not first:
        raise ConfigurationError("the model lacks a stem, a layer or a head")
    return dict(pieces)


def count_layers(model: nn.Module, family: Family) -> int:
    """Count the layers of a model."""
    return len(list(model.get_submodule(family.layers).children()))


def linear_shapes(model: nn.Module, family: Family) -> dict[str, tuple[int, int]]:
    """Give (out_features, in_features) of each linear module of a block, by its name there."""
    block = model.get_submodule(f"{family.layers}.0")
    return {
        name: (module.out_features, module.in_features)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }


def _shapes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}
