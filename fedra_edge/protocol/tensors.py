"""Safetensors files, checked before a byte of tensor data is read or allocated.

The format is an 8-byte little-endian header length, a JSON header and the data
(https://github.com/huggingface/safetensors, README, section Format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from fedra_edge.protocol.files import iterate_chunks

MAX_HEADER_BYTES: Final = 4 * 2**20
MAX_TENSORS: Final = 100_000
MAX_DIMENSIONS: Final = 8
_LENGTH_BYTES: Final = 8
_ALIGNMENT: Final = 8
_DTYPES: Final[Mapping[str, str]] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
    "I8": "<i1", "U8": "<u1", "BOOL": "|b1", "BF16": "<u2",
}  # fmt: skip
_BF16: Final = "BF16"  # numpy has no such type: its bits, until they are widened
_UP_TO_FLOAT32: Final = frozenset({"F32", "F16", _BF16})
_ITEM_BYTES: Final = {name: np.dtype(code).itemsize for name, code in _DTYPES.items()}

FloatArray = NDArray[np.float32]


class MalformedTensorsError(ValueError):
    """The bytes are no safetensors file that we accept; the message says why."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header declares it; ``start`` is its offset in the file, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int


def serialize_tensors(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """Turn arrays into the bytes of a safetensors file, the same bytes for the same arrays."""
    return save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)})


def tensor_parts(tensors: Mapping[str, FloatArray]) -> list[bytes | memoryview]:
    """Give the same file in parts, of which all but the first are the arrays' own memory."""
    ordered = {name: np.ascontiguousarray(tensors[name], "<f4") for name in sorted(tensors)}
    text = _float32_header({name: array.shape for name, array in ordered.items()}).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    contents = (array.reshape(-1).view(np.uint8).data for array in ordered.values())
    return [len(text).to_bytes(_LENGTH_BYTES, "little") + text, *contents]


def tensor_file_bytes(shapes: Mapping[str, Sequence[int]]) -> int:
    """Give the size of a safetensors file with these float32 tensors, without making it."""
    text = _float32_header(shapes)
    data_bytes = _ITEM_BYTES["F32"] * sum(map(math.prod, shapes.values()))
    return _LENGTH_BYTES + math.ceil(len(text) / _ALIGNMENT) * _ALIGNMENT + data_bytes


def _float32_header(shapes: Mapping[str, Sequence[int]]) -> str:
    """Describe float32 tensors that lie behind each other in the order of their names."""
    header, end = {}, 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + _ITEM_BYTES["F32"] * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    return json.dumps(header, separators=(",", ":"))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check a safetensors header.

    Every declared tensor must lie inside the file, the data must be covered without gap or
    overlap, and names must not repeat.

    Raises:
        MalformedTensorsError: The file breaks any rule of the format or of our limits.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_LENGTH_BYTES)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < _LENGTH_BYTES or header_bytes > file_bytes - _LENGTH_BYTES:
            raise MalformedTensorsError("the file is shorter than its header says")
        if header_bytes > MAX_HEADER_BYTES:
            raise MalformedTensorsError(f"the header is over {MAX_HEADER_BYTES} bytes")
        entries = _parse_json(file.read(header_bytes))
    data_start = _LENGTH_BYTES + header_bytes
    infos = {name: _parse_entry(name, entry, data_start) for name, entry in entries.items()}
    _check_layout(infos, data_start, file_bytes)
    return infos


def read_tensor(path: Path, info: TensorInfo) -> NDArray[Any]:
    """Read one declared tensor into memory; bfloat16, which numpy lacks, becomes float32."""
    with path.open("rb") as file:
        return _read_from(file, info)


def map_tensor(path: Path, info: TensorInfo) -> NDArray[Any]:
    """Give one declared tensor as a view of its file, read as it is used; bfloat16 is widened.

    Changes to the array stay in memory.
    """
    mapped = map_stored(path, info)
    return _from_bfloat16(mapped) if info.dtype == _BF16 else mapped


def map_stored(path: Path, info: TensorInfo) -> NDArray[Any]:
    """Give one declared tensor as ``map_tensor`` does, but bfloat16 as its bits, in uint16."""
    return np.memmap(path, _DTYPES[info.dtype], mode="c", offset=info.start, shape=info.shape)


def read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Read a whole file that is known to be small."""
    return read_declared(path, read_header(path))


def read_declared(path: Path, infos: Mapping[str, TensorInfo]) -> dict[str, NDArray[Any]]:
    """Read what a header declares, in one go."""
    with path.open("rb") as file:
        return {name: _read_from(file, info) for name, info in infos.items()}


def iterate_float32(path: Path, info: TensorInfo) -> Iterator[bytes]:
    """Yield a float tensor's values as float32, exactly, in bounded chunks.

    Raises:
        MalformedTensorsError: The tensor holds no floats, or wider ones.
    """
    if info.dtype not in _UP_TO_FLOAT32:
        raise MalformedTensorsError(f"dtype {info.dtype} does not fit into float32")
    for chunk in iterate_chunks(path, info.start, info.size_bytes):
        values = np.frombuffer(chunk, _DTYPES[info.dtype])
        wide = _from_bfloat16(values) if info.dtype == _BF16 else values.astype("<f4", copy=False)
        yield wide.tobytes()


def _read_from(file: BufferedReader, info: TensorInfo) -> NDArray[Any]:
    flat = np.empty(math.prod(info.shape), dtype=_DTYPES[info.dtype])
    file.seek(info.start)
    if flat.size and file.readinto(flat.data) != flat.nbytes:
        raise MalformedTensorsError("the file is shorter than its header says")
    return (_from_bfloat16(flat) if info.dtype == _BF16 else flat).reshape(info.shape)


def _from_bfloat16(bits: NDArray[np.uint16]) -> FloatArray:
    """Widen bfloat16, which is the upper half of a float32."""
    wide = bits.astype("<u4")
    wide <<= 16
    return wide.view("<f4")


def _parse_json(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_refuse_repeats,
            parse_int=_natural,
            parse_float=_natural,
            parse_constant=_natural,
        )
    except (ValueError, RecursionError) as error:
        raise MalformedTensorsError(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise MalformedTensorsError("the header is not a JSON object")
    _check_metadata(header.pop("__metadata__", None))
    if len(header) > MAX_TENSORS:
        raise MalformedTensorsError(f"more than {MAX_TENSORS} tensors")
    return header


def _natural(text: str) -> int:
    """Read the only kind of number that a header has."""
    if not text.isdecimal():
        raise MalformedTensorsError(f"the header holds {text[:20]}, which is no size and no offset")
    return int(text)


def _check_metadata(metadata: object) -> None:
    """Take from texts to texts, as every reader of the format does."""
    match metadata:
        case None:
            return
        case dict() if all(isinstance(text, str) for text in metadata.values()):
            with suppress(UnicodeEncodeError):
                "".join([*metadata, *metadata.values()]).encode()
                return
    raise MalformedTensorsError("the metadata are not texts")


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise MalformedTensorsError("the header repeats a name")
    return keys


def _parse_entry(name: str, entry: object, data_start: int) -> TensorInfo:
    match entry:
        case {
            "dtype": str(dtype),
            "shape": [*shape],
            "data_offsets": [int(begin), int(end)],
            **more,
        } if not more and bool not in {type(begin), type(end)}:
            pass
        case _:
            raise MalformedTensorsError(
                f"tensor {name[:100]!r} lacks dtype, shape or offsets, or has more"
            )
    if not (name.isascii() and name.isprintable()):
        raise MalformedTensorsError("the name of a tensor is not of printable ASCII characters")
    if dtype not in _ITEM_BYTES:
        raise MalformedTensorsError(f"tensor {name[:100]!r} has unknown dtype {dtype[:20]!r}")
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise MalformedTensorsError(f"tensor {name[:100]!r} has an impossible shape")
    size_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
    is_countable = math.prod(filter(None, shape)) < 2**60  # even where a dimension is 0
    if end - begin != size_bytes or not is_countable:
        raise MalformedTensorsError(f"tensor {name[:100]!r} has offsets that do not fit its shape")
    return TensorInfo(dtype, tuple(shape), data_start + begin, size_bytes)


def _check_layout(infos: Mapping[str, TensorInfo], data_start: int, file_bytes: int) -> None:
    position = data_start
    for info in sorted(infos.values(), key=lambda info: (info.start, info.size_bytes)):
        if info.start != position:
            raise MalformedTensorsError("tensors overlap or leave a gap")
        position += info.size_bytes
    if position != file_bytes:
        raise MalformedTensorsError("the file's size is not what the header says")
