"""Graphs are opened from their bytes alone, fed what they name, and refused with a remedy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from fedra_edge.errors import SliceError
from fedra_edge.training.onnx_sessions import Graph, SessionCache

NUMBERS = np.array([-1.0, 2.0], dtype=np.float32)


def graph_bytes(
    operator: str = "Relu", opset: int = 18, ir_version: int = 10, domain: str = ""
) -> bytes:
    """Write a graph that applies one operator to ``left``."""
    left, out = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("left", "out")
    )
    nodes = [helper.make_node(operator, ["left"], ["out"], domain=domain)]
    opsets = [helper.make_opsetid("", opset)]
    if domain:
        opsets.append(helper.make_opsetid(domain, 1))
    model = helper.make_model(
        helper.make_graph(nodes, "graph", [left], [out]), opset_imports=opsets
    )
    model.ir_version = ir_version
    content: bytes = model.SerializeToString()
    return content


def test_a_graph_takes_what_it_names_from_whoever_has_it() -> None:
    graph = Graph(graph_bytes(), "block", threads=1)
    assert graph.inputs == {"left": ("n",)}
    assert graph.outputs == ("out",)
    computed = graph.run(["out"], {"other": NUMBERS}, {"left": NUMBERS})
    np.testing.assert_array_equal(computed["out"], [0, 2])


@pytest.mark.parametrize(
    "content",
    [
        graph_bytes(ir_version=99),
        graph_bytes(opset=99),
    ],
    ids=["IR version", "opset"],
)
def test_what_is_too_new_asks_for_an_upgrade(content: bytes) -> None:
    with pytest.raises(SliceError, match="cannot compute the graph 'block'") as caught:
        Graph(content, "block", threads=1)
    assert "--upgrade 'fedra[onnx]'" in caught.value.remedy
    assert "/onnxruntime_src" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no graph", graph_bytes()[:-9]])
def test_damaged_graphs_are_refused(content: bytes) -> None:
    with pytest.raises(SliceError, match="'stem' is damaged") as caught:
        Graph(content, "stem", threads=1)
    assert caught.value.remedy


def test_a_file_of_another_format_is_not_read_as_such() -> None:
    both = b"\x12\x20ABORTM" + bytes(26)  # a producer's name, or a mark at its place
    with pytest.raises(SliceError, match="incomplete"):
        Graph(both, "stem", threads=1)
    with pytest.raises(SliceError, match=r"No graph was found|damaged") as caught:
        Graph(both + b"\x3a\x00", "stem", threads=1)
    assert "ORT model" not in str(caught.value)


def test_nothing_is_computed_when_nothing_is_asked_for() -> None:
    assert Graph(graph_bytes(), "block", threads=1).run([], {"left": NUMBERS}) == {}


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({}, "needs left"),
        ({"left": np.ones((2, 2), dtype=np.float32)}, "failed"),
        ({"left": np.ones(2, dtype=np.float64)}, "failed"),
    ],
    ids=["missing", "shape", "dtype"],
)
def test_what_does_not_fit_is_an_error(given: dict[str, np.ndarray], complaint: str) -> None:
    with pytest.raises(SliceError, match=complaint):
        Graph(graph_bytes(), "block", threads=1).run(["out"], given)


def test_a_graph_is_opened_once_by_its_content(tmp_path: Path) -> None:
    sessions = SessionCache(threads=1)
    (tmp_path / "a").write_bytes(graph_bytes())
    (tmp_path / "b").write_bytes(graph_bytes())
    (tmp_path / "c").write_bytes(graph_bytes("Neg"))
    first = sessions.open(tmp_path / "a", "block")
    assert sessions.open(tmp_path / "b", "block") is first
    assert sessions.open(tmp_path / "c", "block") is not first
