"""The delta is trained minus received, and only that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedra_edge.deltas import compute_delta, pack_delta
from fedra_edge.errors import SliceError
from fedra_edge.protocol.tensors import read_tensors

NAME = "layers.1/mlp.fc2.lora_a"
OTHER = "layers.2/mlp.fc2.lora_a"


def test_a_delta_holds_the_differences_of_the_trained_tensors_only() -> None:
    received = {NAME: np.full((2, 3), 1, np.float32), OTHER: np.zeros((2, 3), np.float32)}
    delta = compute_delta(received, {NAME: np.full((2, 3), 1.5, np.float32)})
    assert delta.keys() == {NAME}
    assert delta[NAME].dtype == np.float32
    np.testing.assert_array_equal(delta[NAME], np.full((2, 3), 0.5))


def test_packed_bytes_depend_on_the_values_only(tmp_path: Path) -> None:
    first, second = np.ones(3, np.float32), np.zeros((2, 2), np.float32)
    packed = b"".join(pack_delta({NAME: first, OTHER: second}))
    assert packed == b"".join(pack_delta({OTHER: second, NAME: first}))
    path = tmp_path / "delta.safetensors"
    path.write_bytes(packed)
    unpacked = read_tensors(path)
    np.testing.assert_array_equal(unpacked[NAME], first)
    np.testing.assert_array_equal(unpacked[OTHER], second)


@pytest.mark.parametrize(
    "trained",
    [
        {OTHER: np.zeros(3, np.float32)},
        {NAME: np.zeros((3, 1), np.float32)},
        {NAME: np.array([0, np.nan, 0], np.float32)},
        {NAME: np.array([0, np.inf, 0], np.float32)},
    ],
    ids=["never received", "other shape", "nan", "infinite"],
)
def test_what_cannot_be_merged_is_refused(trained: dict[str, np.ndarray]) -> None:
    with pytest.raises(SliceError):
        compute_delta({NAME: np.zeros(3, np.float32)}, trained)
