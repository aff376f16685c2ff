"""Tensor files: round trips are exact, and no altered file crashes the reader."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from fedra_edge.protocol.files import iterate_chunks, sha256_of_file
from fedra_edge.protocol.tensors import (
    MAX_HEADER_BYTES,
    MalformedTensorsError,
    iterate_float32,
    read_header,
    read_tensors,
    serialize_tensors,
    tensor_file_bytes,
    tensor_parts,
)


def stored(directory: str | Path, data: bytes) -> Path:
    path = Path(directory) / "tensors.safetensors"
    path.write_bytes(data)
    return path


SAMPLE = serialize_tensors(
    {
        "layers.0/q.lora_a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "head/classifier.weight": np.ones((4, 2), dtype=np.float32),
    }
)


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 2**32))
def test_arrays_come_back_bit_for_bit(rows: int, columns: int, seed: int) -> None:
    array = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    with TemporaryDirectory() as directory:
        path = stored(directory, serialize_tensors({"b": array, "a": array.T}))
        again = read_tensors(path)
        assert again["b"].tobytes() == array.tobytes()
        assert again["a"].shape == (columns, rows)
        assert b"".join(iterate_chunks(path)) == path.read_bytes()
        assert len(sha256_of_file(path)) == 64


def test_equal_arrays_give_equal_bytes_whatever_their_order() -> None:
    first, second = np.zeros(2, dtype=np.float32), np.ones(3, dtype=np.float32)
    assert serialize_tensors({"x": first, "y": second}) == serialize_tensors(
        {"y": second, "x": first}
    )


@given(st.integers(0, len(SAMPLE) - 1))
def test_any_truncation_is_refused(size: int) -> None:
    with TemporaryDirectory() as directory, pytest.raises(MalformedTensorsError):
        read_header(stored(directory, SAMPLE[:size]))


@given(st.binary(min_size=1, max_size=64))
def test_any_appendix_is_refused(appendix: bytes) -> None:
    with TemporaryDirectory() as directory, pytest.raises(MalformedTensorsError):
        read_header(stored(directory, SAMPLE + appendix))


@given(st.integers(0, len(SAMPLE) - 1), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_changes_only_what_it_says(place: int, mask: int) -> None:
    data = bytearray(SAMPLE)
    data[place] ^= mask
    with TemporaryDirectory() as directory:
        path = stored(directory, bytes(data))
        try:
            infos = read_header(path)
        except MalformedTensorsError:
            return
        assert sum(info.size_bytes for info in infos.values()) <= len(data)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with TemporaryDirectory() as directory, pytest.raises(MalformedTensorsError):
        read_header(stored(directory, data))


def with_header(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (with_header([]), "not a JSON object"),
        (with_header(b'{"a":' + json.dumps(ENTRY).encode() + b',"a":{}}', bytes(4)), "repeats"),
        (with_header({"a": {"dtype": "F32"}}), "lacks"),
        (with_header({"a": ENTRY | {"dtype": "F99"}}, bytes(4)), "unknown dtype"),
        (with_header({"a": ENTRY | {"shape": [-1]}}, bytes(4)), "holds -1"),
        (with_header({"a": ENTRY | {"shape": [True]}}, bytes(4)), "impossible shape"),
        (with_header({"a": ENTRY | {"shape": [1] * 9}}, bytes(4)), "impossible shape"),
        (with_header({"a": ENTRY | {"shape": [2**39, 2**39]}}, bytes(4)), "do not fit its shape"),
        (with_header({"a": ENTRY | {"data_offsets": [-4, 0]}}, bytes(4)), "holds -4"),
        (with_header({"a": ENTRY | {"data_offsets": [False, True]}}, bytes(1)), "lacks"),
        (with_header({"a": ENTRY | {"more": []}}, bytes(4)), "or has more"),
        (with_header({"a": ENTRY | {"shape": [0, 2**39, 2**39]}}), "do not fit its shape"),
        (with_header({"__metadata__": {"a": 1}}), "metadata"),
        (with_header({"__metadata__": {"a": "\ud800"}}), "metadata"),
        (with_header({"__metadata__": []}), "metadata"),
        (with_header(b'{"__metadata__": {"a": NaN}}'), "holds NaN"),
        (with_header({"a": ENTRY, "b": ENTRY}, bytes(4)), "overlap"),
        (with_header({"a": ENTRY | {"data_offsets": [4, 8]}}, bytes(8)), "gap"),
        (with_header({"a": ENTRY}, bytes(5)), "size is not"),
        (with_header(b"[" * 100_000), "not JSON"),
        (with_header(b"\xff\xfe"), "not JSON"),
        ((2**62).to_bytes(8, "little") + b"{}", "shorter than its header"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + bytes(MAX_HEADER_BYTES + 1), "over"),
    ],
)  # fmt: skip
def test_header_lies_are_named(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(MalformedTensorsError, match=reason):
        read_header(stored(tmp_path, data))


def every_half(dtype: torch.dtype) -> torch.Tensor:
    """Give every number that a 16-bit format has, and infinities, but no NaN."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    halves = bits.view(dtype)
    return halves[~halves.isnan()].reshape(2, -1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_is_widened_as_torch_does(tmp_path: Path, dtype: torch.dtype) -> None:
    halves = every_half(dtype)
    path = tmp_path / "halves.safetensors"
    save_file({"a": torch.ones(3), "b": halves, "c": halves[1, 5].clone()}, path)
    header, read = read_header(path), read_tensors(path)
    wide = halves.float().numpy()
    for name, value in {"a": np.ones(3, np.float32), "b": wide, "c": wide[1, 5]}.items():
        assert read[name].shape == value.shape
        assert read[name].astype(np.float32).tobytes() == value.tobytes()
        assert b"".join(iterate_float32(path, header[name])) == value.tobytes()
    assert read["b"].dtype == {torch.bfloat16: np.float32, torch.float16: np.float16}[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_widening_a_large_tensor_takes_little_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    large = torch.linspace(-1, 1, 3 * 2**21 + 1).to(dtype)
    path = tmp_path / "large.safetensors"
    save_file({"a": torch.zeros(1, dtype=dtype), "b": large}, path)
    info = read_header(path)["b"]
    expected = large.float().numpy().tobytes()
    place = 0
    tracemalloc.start()
    for chunk in iterate_float32(path, info):
        assert chunk == expected[place : place + len(chunk)]
        place += len(chunk)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert place == len(expected)
    assert peak_bytes < 2**23


@pytest.mark.parametrize("dtype", [np.int32, np.float64])
def test_what_float32_cannot_hold_is_not_widened(tmp_path: Path, dtype: type) -> None:
    path = stored(tmp_path, serialize_tensors({"a": np.ones(2, dtype)}))
    with pytest.raises(MalformedTensorsError, match="does not fit"):
        list(iterate_float32(path, read_header(path)["a"]))


@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_./]{0,30}", fullmatch=True),
        st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple),
        max_size=8,
    )
)
def test_the_size_of_a_file_is_known_without_making_it(shapes: dict[str, tuple[int, ...]]) -> None:
    tensors = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    assert tensor_file_bytes(shapes) == len(serialize_tensors(tensors))
    assert b"".join(tensor_parts(tensors)) == serialize_tensors(tensors)


@pytest.mark.parametrize("name", ["\ud800", "a\x00b", "a\nb", "\x1b[31m", "caf\u00e9"])
def test_a_name_that_could_not_be_shown_is_refused(tmp_path: Path, name: str) -> None:
    header = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(MalformedTensorsError, match="printable"):
        read_header(path)
