"""Opens a model's graphs in ONNX Runtime, and runs them on what their inputs are named after."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import onnxruntime
from numpy.typing import NDArray

from fedra_edge.errors import SliceError
from fedra_edge.protocol.models import GraphName
from fedra_edge.training.graph_checking import check_graph
from fedra_edge.training.memory_shortage import is_memory_shortage
from fedra_edge.training.onnx_interface import Interface
from fedra_edge.training.trainer import GraphFiles

Arrays = Mapping[str, NDArray[Any]]

_ERRORS_ONLY: Final = 3
_MOST_OPEN: Final = 10

_TOO_NEW: Final = (
    "Unsupported model IR version", "under development", "is not a registered", "No Op registered",
)  # fmt: skip
"""What ONNX Runtime says of graphs that are of a later version than itself."""

_PREFIX: Final = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : |/\S+:\d+ .*?\) (?=[A-Z])")
"""What its messages begin with: a code, and the place in its source."""

_MOST_TOLD: Final = 300


class Graph:
    """One computation; all it needs is an input.

    ``inputs`` are shapes by name, with text for a size that a call decides; ``outputs`` are names.

    Args:
        content: The graph's bytes; they are checked before ONNX Runtime sees them.
        threads: How many processor threads it may use.

    Raises:
        SliceError: The bytes are no graph, or one that this ONNX Runtime cannot compute.
    """

    def __init__(self, content: bytes, what: GraphName, threads: int) -> None:
        self._what = what
        check_graph(content, what)
        options = onnxruntime.SessionOptions()
        options.enable_cpu_mem_arena = False  # which would keep what was needed once
        options.enable_mem_pattern = False
        options.intra_op_num_threads = threads
        options.log_severity_level = _ERRORS_ONLY
        # A file that can be read as both would else be taken for one of its own format.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise self._explained(error) from error
        self.inputs = {held.name: tuple(held.shape) for held in self._session.get_inputs()}
        self.outputs = tuple(held.name for held in self._session.get_outputs())
        self._options = onnxruntime.RunOptions()
        self._options.only_execute_path_to_fetches = True  # of effect in the training build
        self._options.log_severity_level = _ERRORS_ONLY

    def run(self, fetched: Iterable[str], *sources: Arrays) -> dict[str, Any]:
        """Compute outputs, by name, from what the sources hold together under the inputs' names.

        Raises:
            SliceError: Something is missing or does not fit.
            MemoryError: Memory does not suffice.
        """
        names = list(fetched)
        if not names:  # for ONNX Runtime this means all
            return {}
        feeds = {}
        for name in self.inputs:
            found = [source[name] for source in sources if name in source]
            if not found:
                raise SliceError(f"the graph {self._what!r} needs {name}, which is missing")
            feeds[name] = found[0]
        try:
            computed = self._session.run(names, feeds, self._options)
        except Exception as error:
            if is_memory_shortage(error):
                raise MemoryError(str(error)) from error
            raise SliceError(f"the graph {self._what!r} failed: {_told(error)}") from error
        return dict(zip(names, computed, strict=True))

    def _explained(self, error: Exception) -> Exception:
        if is_memory_shortage(error):
            return MemoryError(str(error))
        not_implemented = type(error).__name__ == "NotImplemented"
        if not_implemented or any(sign in str(error) for sign in _TOO_NEW):
            return SliceError(
                f"ONNX Runtime {onnxruntime.__version__} cannot compute the graph "
                f"{self._what!r}: {_told(error)}",
                remedy="pip install --upgrade 'fedra[onnx]' in an environment without "
                "onnxruntime-training, or pip install 'fedra[torch]' here",
            )
        return self._unusable(_told(error))

    def _unusable(self, why: str) -> SliceError:
        return SliceError(
            f"the model's graph {self._what!r} is damaged: {why}",
            remedy="Register the model again on the server, or pip install 'fedra[torch]' here.",
        )


class Graphs:
    """A model's graphs, each opened and held against ``interface`` when it is first asked for."""

    def __init__(self, files: GraphFiles, sessions: SessionCache, interface: Interface) -> None:
        self._files = files
        self._interface = interface
        self._sessions = sessions
        self._open: dict[GraphName, Graph] = {}

    def __getitem__(self, name: GraphName) -> Graph:
        if name not in self._open:
            contexts = () if name == "stem" else self["stem"].outputs
            graph = self._sessions.open(self._files[name], name)
            self._interface.check(name, graph.inputs, graph.outputs, contexts)
            self._open[name] = graph
        return self._open[name]

    def open_all(self) -> None:
        """Open them all now, as they will be while a slice is trained."""
        for name in self._files:
            _ = self[name]


class SessionCache:
    """Keeps graphs open for the next round; opening one takes longer than a small step."""

    def __init__(self, threads: int | None) -> None:
        self._threads = threads or _schedulable_cpus()
        self._held: dict[str, Graph] = {}

    def open(self, path: Path, what: GraphName) -> Graph:
        """Give a file's graph; raises what ``Graph`` does."""
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self._held:
            if len(self._held) >= _MOST_OPEN:  # left from other models
                self._held.clear()
            self._held[digest] = Graph(content, what, self._threads)
        return self._held[digest]


def _told(error: Exception) -> str:
    return _PREFIX.sub("", str(error)).partition("\n")[0][:_MOST_TOLD]


def _schedulable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
