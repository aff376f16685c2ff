"""Bytes of a graph are refused when they hold or name more than arithmetic on the inputs."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from fedra_edge.errors import SliceError
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.training.graph_checking import check_graph
from fedra_edge.training.onnx_interface import Interface
from fedra_edge.training.onnx_sessions import Graph
from fedra_server.modelbook.importing.inputs import Preparation
from fedra_server.modelbook.importing.registering import register_onnx
from fedra_server.storage.blobs import BlobStore
from tests.support.onnx_models import build_model, export_model
from tests.support.tiny_llama import TinyLlama
from tests.support.tiny_vit import LABELS, TinyVit


def varint(value: int) -> bytes:
    low = value & 127
    return bytes([low | 128]) + varint(value >> 7) if value > low else bytes([low])


def held(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


RELU = held(1, b"x") + held(2, b"y") + held(4, b"Relu")
WEIGHT = number(1, 4) + number(2, 1) + held(8, b"w") + held(9, bytes(16))
LOCATION = held(1, b"location") + held(2, b"secret")


def value(name: bytes) -> bytes:
    shape = held(2, held(1, number(1, 4)))
    return held(1, name) + held(2, held(1, number(1, 1) + shape))


def graph(*extra: bytes, node: bytes = RELU, tensor: bytes = WEIGHT) -> bytes:
    interface = held(11, value(b"x")) + held(12, value(b"y"))
    return held(1, node) + held(2, b"g") + held(5, tensor) + interface + b"".join(extra)


def model(content: bytes, *extra: bytes) -> bytes:
    return number(1, 10) + held(7, content) + held(8, number(2, 18)) + b"".join(extra)


def with_attribute(content: bytes) -> bytes:
    return graph(node=RELU + held(5, held(1, b"value") + content))


def test_the_plain_graph_is_computed() -> None:
    content = model(graph())
    onnx.checker.check_model(onnx.load_from_string(content))
    check_graph(content, "block")
    assert Graph(content, "block", threads=1).outputs == ("y",)


REFUSED = {
    "external, key first": model(graph(tensor=WEIGHT + held(13, LOCATION))),
    "external, value first": model(
        graph(tensor=WEIGHT + held(13, held(2, b"secret") + held(1, b"location")))
    ),
    "external, longer varint": model(
        graph(tensor=WEIGHT + held(13, b"\n\x88\x00location" + held(2, b"secret")))
    ),
    "external, longer tag": model(
        graph(tensor=WEIGHT + b"\xea\x80\x00" + varint(len(LOCATION)) + LOCATION)
    ),
    "location without a file": model(graph(tensor=WEIGHT + number(14, 1))),
    "external in a second graph that is merged": model(
        graph(), held(7, held(5, WEIGHT + held(13, LOCATION)))
    ),
    "external in an attribute": model(with_attribute(held(5, WEIGHT + held(13, LOCATION)))),
    "external in an attribute's second tensor": model(
        with_attribute(held(5, WEIGHT) + held(5, held(13, LOCATION)))
    ),
    "list of tensors": model(with_attribute(held(10, WEIGHT))),
    "graph in an attribute": model(with_attribute(held(6, graph()))),
    "graphs in an attribute": model(with_attribute(held(11, graph()))),
    "sparse attribute": model(with_attribute(held(22, b""))),
    "sparse initializer": model(graph(held(15, b""))),
    "texts": model(graph(tensor=WEIGHT + held(6, b"text"))),
    "function": model(graph(), held(25, b"")),
    "training": model(graph(), held(20, b"")),
    "sequence as input": model(graph(held(11, held(1, b"s") + held(2, held(4, b""))))),
    "overload": model(graph(node=RELU + held(8, b"other"))),
    "field of a later version": model(graph(), held(99, b"")),
    "tag of more than 32 bits": model(graph(), b"\xba\x80\x80\x80\x10\x00"),
    "group": model(graph(), b"\x13\x14"),
    "message as a number": model(graph(), number(7, 1)),
    "no operator": model(graph(node=held(1, b"x"))),
    "no graph": number(1, 10),
    "tag without end": model(graph()) + b"\xff" * 11,
    "length beyond the end": model(graph()) + b"\x3a\xff\xff\xff\xff\x0f",
}


@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED)
def test_all_else_is_refused(content: bytes) -> None:
    with pytest.raises(SliceError, match="'head' is damaged") as caught:
        check_graph(content, "head")
    assert caught.value.remedy


def test_bytes_that_end_too_early_are_refused() -> None:
    content = number(1, 10) + held(8, number(2, 18)) + held(7, graph())
    for size in range(len(content)):
        with pytest.raises(SliceError):
            check_graph(content[:size], "block")


@pytest.mark.parametrize("operator", ["Loop", "If", "Scan", "RandomNormal", "SequenceEmpty", "\n"])
def test_operators_that_are_not_known_ask_for_an_update(operator: str) -> None:
    node = RELU + held(4, operator.encode())  # the last of two is what counts
    for first, second in ((node, b""), (held(4, operator.encode()) + RELU, b"")):
        with pytest.raises(SliceError, match="uses the operator") as caught:
            check_graph(model(graph(node=first + second)), "block")
        assert repr(operator) in str(caught.value)
        assert caught.value.remedy == "update fedra on this machine"


def test_operators_of_other_domains_are_refused() -> None:
    for domain in (b"com.microsoft", b"ai.onnx.ml", b"ai.onnx\0"):
        with pytest.raises(SliceError, match="uses the domain"):
            check_graph(model(graph(node=RELU + held(7, domain))), "block")
    check_graph(model(graph(node=RELU + held(7, b"ai.onnx"))), "block")


@pytest.mark.parametrize("name", ["vit", "llama", "mixer", "postnorm", "convnext"])
def test_whatever_the_server_writes_is_accepted(name: str, tmp_path: Path) -> None:
    if name in {"vit", "llama"}:
        tiny = (TinyVit if name == "vit" else TinyLlama).register(tmp_path)
        spec, blobs = tiny.spec, tiny.blobs
    else:
        path = export_model(build_model(name), tmp_path / "model.onnx", dynamo=False)
        blobs = BlobStore(tmp_path / "blobs")
        spec = register_onnx(path, name, LABELS, Preparation(), blobs)
    graphs = spec.graphs
    assert graphs is not None
    interface = Interface(spec, graphs.targets)
    contexts: tuple[str, ...] = ()
    for what, ref in graphs.by_name.items():
        opened = Graph(blobs.path(ref.sha256).read_bytes(), what, threads=1)
        contexts = opened.outputs if what == "stem" else contexts
        interface.check(what, opened.inputs, opened.outputs, contexts)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return TinyVit.register(tmp_path_factory.mktemp("vit")).spec


def block_inputs(spec: ModelSpec) -> dict[str, tuple[int | str | None, ...]]:
    shapes: dict[str, tuple[int | str | None, ...]] = {"hidden": ("n", 1, 1), "lora_scale": ()}
    for target in spec.default_targets:
        out_features, in_features = spec.block_linears[target]
        shapes |= {
            f"{target}.lora_a": ("r", in_features),
            f"{target}.lora_b": (out_features, "r"),
            f"{target}.weight": (out_features, in_features),
        }
    return shapes


def test_a_block_is_held_against_the_model(spec: ModelSpec) -> None:
    interface, shapes = Interface(spec, spec.default_targets), block_inputs(spec)
    target = spec.default_targets[0]
    interface.check("block", shapes, ["out"], [])
    for spoilt, told in [
        (shapes | {"large": (60_000, 20_000)}, "the piece has"),
        (shapes | {"open": ("a",)}, "how large open is"),
        (shapes | {"odd": (0, -5)}, "how large odd is"),
        (shapes | {f"{target}.lora_a": ("r", 10**6)}, "misshapen"),
        (shapes | {"other.lora_a": ("r", 2)}, r"other\.lora_a"),
        (shapes | {f"{target}.weight": (1, 1)}, "of shape"),
        ({name: it for name, it in shapes.items() if name != "hidden"}, "does not take hidden"),
    ]:
        with pytest.raises(SliceError, match=told):
            interface.check("block", spoilt, ["out"], [])
    with pytest.raises(SliceError, match="inputs"):
        Interface(spec, ()).check("block", shapes, ["out"], [])
    with pytest.raises(SliceError, match="no linear layer nonesuch"):
        Interface(spec, ("nonesuch",)).check("block", shapes, ["out"], [])


@pytest.mark.parametrize(
    ("what", "outputs", "told"),
    [
        ("stem", ["hiddenx"], "hidden"),
        ("block", ["out", "more"], "more"),
        ("block_vjp", ["hidden_grad"], "lora_a_grad"),
        ("head", [], "logits"),
        ("head_vjp", ["hidden_grad"], "classifier"),
    ],
)
def test_outputs_must_be_those_of_the_contract(
    spec: ModelSpec, what: str, outputs: list[str], told: str
) -> None:
    inputs = {"inputs": ("n",), "hidden": ("n",), "gradient": ("n",)}
    with pytest.raises(SliceError, match=f"outputs: .*{told}"):
        Interface(spec, spec.default_targets).check(what, inputs, outputs, [])  # type: ignore[arg-type]


def test_what_onnx_itself_writes_of_files_is_refused() -> None:
    held_model = onnx.load_from_string(model(graph()))
    tensor = held_model.graph.initializer.add(name="o", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    for spoilt in (held_model, helper.make_model(helper.make_graph([node], "g", [], []))):
        with pytest.raises(SliceError, match=r"field 1[34]"):
            check_graph(spoilt.SerializeToString(), "stem")
