"""Tensor names and layer positions: what is formatted parses back, for every subset."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedra_edge.protocol.ids import LayerId, Position
from fedra_edge.protocol.layers import LayerPositions, TensorKey, layer_piece

MODULES = st.from_regex(r"[a-z0-9_]{1,8}(\.[a-z0-9_]{1,8}){0,3}", fullmatch=True)


@given(st.integers(0, 99_999), MODULES)
def test_a_layer_tensor_name_parses_back(layer: int, name: str) -> None:
    key = TensorKey(layer_piece(LayerId(layer)), name)
    assert TensorKey.parse(str(key)) == key
    assert key.layer_id == layer


@given(MODULES, st.sampled_from(["stem", "head"]))
def test_stem_and_head_belong_to_no_layer(name: str, piece: str) -> None:
    assert TensorKey.parse(f"{piece}/{name}").layer_id is None


@pytest.mark.parametrize(
    "text",
    ["", "head", "/weight", "head/", "layers.01/x", "layers.-1/x", "layers/x", "tail/x",
     "layers.1/../x", "head/a b", "head/a..b", "layers.123456/x"],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a tensor key"):
        TensorKey.parse(text)


@given(st.sets(st.integers(0, 40), min_size=1))
def test_global_to_local_to_global_is_the_identity(layers: set[int]) -> None:
    positions = LayerPositions.of(sorted(layers))
    for expected, layer_id in enumerate(sorted(layers)):
        position = positions.position_of(LayerId(layer_id))
        assert position == expected
        assert positions.layer_at(position) == layer_id


@pytest.mark.parametrize("layers", [[2, 1], [1, 1]])
def test_ambiguous_positions_are_refused(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="must ascend"):
        LayerPositions.of(layers)


def test_positions_outside_the_slice_are_refused() -> None:
    positions = LayerPositions.of([3, 7])
    with pytest.raises(ValueError, match="not in tuple"):
        positions.position_of(LayerId(4))
    for position in (-1, 2):
        with pytest.raises(IndexError):
            positions.layer_at(Position(position))
