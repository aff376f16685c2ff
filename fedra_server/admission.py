"""Decides whether a delta may enter a merge, reading it tensor by tensor. Nothing is changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from fedra_edge.protocol.models import Shape
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.tensors import (
    MAX_HEADER_BYTES,
    MalformedTensorsError,
    TensorInfo,
    read_header,
    read_tensor,
)
from fedra_server.errors import RefusedError

_REMEDY: Final = "Update the client software; if it is up to date, report this as a defect."
_FLOAT32_BYTES: Final = 4
_LARGEST: Final = 1e6
"""No honest training moves a parameter so far; larger values could overflow a merge."""

_NAMES_SHOWN: Final = 5


def largest_delta_bytes(shapes: Mapping[str, Shape]) -> int:
    """Bound the size of a delta with exactly these float32 tensors."""
    data = _FLOAT32_BYTES * sum(math.prod(shape) for shape in shapes.values())
    return data + min(MAX_HEADER_BYTES, 4096 + 256 * len(shapes))


def check_delta(path: Path, shapes: Mapping[str, Shape]) -> None:
    """Accept a file that holds exactly these tensors, float32, finite and of sane size.

    Raises:
        RefusedError: With the code of the first rule broken. Memory use is one tensor.
    """
    try:
        infos = read_header(path)
    except MalformedTensorsError as error:
        raise RefusedError(ProblemCode.TENSORS_MALFORMED, str(error), remedy=_REMEDY) from error
    _check_names(infos, shapes)
    for name, info in infos.items():
        _check_declaration(name, info, shapes[name])
    for name, info in infos.items():
        if not (np.abs(read_tensor(path, info)) <= _LARGEST).all():
            raise RefusedError(
                ProblemCode.TENSOR_NOT_FINITE,
                f"{name} holds NaN, infinity or a value beyond {_LARGEST:g}",
                remedy="Training diverged: lower the run's learning rate or check the site's data.",
            )


def _check_names(infos: Mapping[str, TensorInfo], shapes: Mapping[str, Shape]) -> None:
    if missing := sorted(shapes.keys() - infos.keys()):
        raise RefusedError(ProblemCode.TENSOR_MISSING, f"missing: {_some(missing)}", remedy=_REMEDY)
    if extra := sorted(infos.keys() - shapes.keys()):
        raise RefusedError(
            ProblemCode.TENSOR_UNEXPECTED, f"not assigned: {_some(extra)}", remedy=_REMEDY
        )


def _check_declaration(name: str, info: TensorInfo, shape: Shape) -> None:
    if info.dtype != "F32":
        raise RefusedError(
            ProblemCode.TENSOR_DTYPE, f"{name} is {info.dtype}, expected F32", remedy=_REMEDY
        )
    if info.shape != shape:
        raise RefusedError(
            ProblemCode.TENSOR_SHAPE,
            f"{name} has shape {info.shape}, expected {shape}",
            remedy=_REMEDY,
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(name[:100] for name in names[:_NAMES_SHOWN])
    hidden = len(names) - _NAMES_SHOWN
    return shown if hidden <= 0 else f"{shown} and {hidden} more"
