"""Admission: exactly the assigned tensors, finite and float32, pass; anything else is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedra_edge.protocol.layers import LayerPositions
from fedra_edge.protocol.models import Shape
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.tensors import FloatArray, serialize_tensors
from fedra_server.admission import check_delta, largest_delta_bytes
from fedra_server.errors import RefusedError
from tests.support.builders import make_model_spec, make_run_spec

SPEC = make_model_spec(num_layers=4)
ADAPTER = make_run_spec().adapter


def shapes_of(layers: list[int]) -> dict[str, Shape]:
    return SPEC.delta_shapes(ADAPTER, LayerPositions.of(layers).layer_ids)


def honest(shapes: dict[str, Shape]) -> dict[str, FloatArray]:
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=s).astype(np.float32) for name, s in shapes.items()}


@given(st.sets(st.integers(0, 3), min_size=1))
def test_an_honest_delta_of_any_layers_passes_within_its_bound(layers: set[int]) -> None:
    shapes = shapes_of(sorted(layers))
    assert len(serialize_tensors(honest(shapes))) <= largest_delta_bytes(shapes)


def refusal(tmp_path: Path, tensors: Mapping[str, NDArray[Any]]) -> ProblemCode:
    path = tmp_path / "delta.safetensors"
    path.write_bytes(serialize_tensors(tensors))
    with pytest.raises(RefusedError) as caught:
        check_delta(path, shapes_of([1, 3]))
    assert caught.value.remedy
    return caught.value.code


def test_an_honest_delta_is_admitted(tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    path.write_bytes(serialize_tensors(honest(shapes_of([1, 3]))))
    check_delta(path, shapes_of([1, 3]))


def test_every_dishonest_delta_has_its_own_code(tmp_path: Path) -> None:
    good = honest(shapes_of([1, 3]))
    name = min(good)
    missing = {key: value for key, value in good.items() if key != name}
    foreign = honest(shapes_of([1, 2, 3]))
    assert refusal(tmp_path, missing) is ProblemCode.TENSOR_MISSING
    assert refusal(tmp_path, foreign) is ProblemCode.TENSOR_UNEXPECTED
    assert refusal(tmp_path, good | {name: good[name].T[:1]}) is ProblemCode.TENSOR_SHAPE
    doubled = good | {name: np.zeros(good[name].shape, dtype=np.float64)}
    assert refusal(tmp_path, doubled) is ProblemCode.TENSOR_DTYPE
    for poison in (np.nan, np.inf, -np.inf, 3e38):
        bad = good[name].copy()
        bad.flat[-1] = poison
        assert refusal(tmp_path, good | {name: bad}) is ProblemCode.TENSOR_NOT_FINITE


def test_bytes_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(RefusedError) as caught:
        check_delta(path, shapes_of([1]))
    assert caught.value.code is ProblemCode.TENSORS_MALFORMED
