"""Runs graphs on onnxruntime, as a client would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import onnx
import onnxruntime
from numpy.typing import NDArray

from fedra_server.errors import ConfigurationError

_ERRORS_ONLY: Final = 3


def run_graph(
    graph: onnx.ModelProto, values: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Compute all outputs of a graph, each input taken from the values by its name.

    Raises:
        ConfigurationError: It wants an input that is not there, or cannot be run.
    """
    names = [it.name for it in graph.graph.input]
    if missing := [name for name in names if name not in values]:
        raise ConfigurationError(f"a graph wants inputs that nothing gives: {', '.join(missing)}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.enable_cpu_mem_arena = False
    try:
        session = onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        results = session.run(None, {name: values[name] for name in names})
    except Exception as error:  # the library raises nothing more precise
        raise ConfigurationError(f"onnxruntime cannot run a graph: {error}") from error
    return dict(zip((it.name for it in graph.graph.output), results, strict=True))
