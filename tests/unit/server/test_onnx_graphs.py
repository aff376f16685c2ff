"""Graphs for clients without PyTorch: checked at registration, moved to a run's targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fedra_edge.protocol.models import BlobRef, PieceGraphs
from fedra_edge.protocol.rounds import Wait
from fedra_server.cli import main
from fedra_server.errors import ConfigurationError
from fedra_server.guidance import guide
from fedra_server.modelbook.costing import measure_costs
from fedra_server.modelbook.graphs.adapters import place_adapters, remove_adapters
from fedra_server.modelbook.graphs.differences import check_by_differences, random_values
from fedra_server.modelbook.graphs.making import (
    FinishedGraphs,
    block_gradients,
    finish_graphs,
    forward_graphs,
)
from fedra_server.modelbook.graphs.retargeting import retarget_graphs
from fedra_server.modelbook.graphs.running import run_graph
from fedra_server.modelbook.graphs.verifying import verify_graphs
from fedra_server.modelbook.loading import find_family, load_model
from fedra_server.modelbook.registering import register_model
from fedra_server.modelbook.splitting import split_model
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.store import Store
from tests.support.builders import RUN, make_blob
from tests.support.headless import Headless
from tests.support.tiny_llama import TinyLlama
from tests.support.tiny_vit import TinyVit, build_vit

TARGETS = ("attention.o_proj", "mlp.fc2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyVit:
    return TinyVit.register(tmp_path_factory.mktemp("vit"))


def read_graph(ref: BlobRef, blobs: BlobStore) -> onnx.ModelProto:
    return onnx.load_model_from_string(blobs.path(ref.sha256).read_bytes())


def graphs_of(tiny: TinyVit) -> PieceGraphs:
    assert tiny.spec.graphs is not None
    return tiny.spec.graphs


def test_a_registered_model_has_graphs_of_its_default_targets(tiny: TinyVit) -> None:
    graphs = graphs_of(tiny)
    assert graphs.targets == tiny.spec.default_targets
    for ref in graphs.by_name.values():
        onnx.checker.check_model(read_graph(ref, tiny.blobs), full_check=True)
        assert ref.size_bytes < 20_000


def test_the_same_model_gives_the_same_graphs(tiny: TinyVit, tmp_path: Path) -> None:
    assert TinyVit.register(tmp_path).spec.model_id == tiny.spec.model_id


def test_graphs_can_be_left_out(tmp_path: Path) -> None:
    build_vit().save_pretrained(tmp_path / "hf")
    spec = register_model(tmp_path / "hf", "it", BlobStore(tmp_path / "blobs"), with_graphs=False)
    assert spec.graphs is None


def test_what_no_graph_can_be_written_for_is_refused(tmp_path: Path) -> None:
    build_vit(hidden_act="quick_gelu").save_pretrained(tmp_path / "hf")
    blobs = BlobStore(tmp_path / "blobs")
    with pytest.raises(ConfigurationError, match=r"hidden_act in config\.json") as caught:
        register_model(tmp_path / "hf", "it", blobs)
    assert "--no-graphs" in caught.value.remedy
    assert register_model(tmp_path / "hf", "it", blobs, with_graphs=False).graphs is None


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"layer_norm_eps": 0.5}, "out of the ONNX graphs differs"),
        ({"hidden_act": "relu"}, "out of the ONNX graphs differs"),
        ({"num_attention_heads": 2}, "out of the ONNX graphs differs"),
    ],
)
def test_graphs_that_compute_something_else_are_found_out(
    tmp_path: Path, changed: dict[str, object], told: str
) -> None:
    build_vit().save_pretrained(tmp_path / "hf")
    with pytest.raises(ConfigurationError, match=told):
        verify(tmp_path / "hf", changed)


def test_a_wrong_gradient_is_found_out(tmp_path: Path) -> None:
    build_vit().save_pretrained(tmp_path / "hf")
    with pytest.raises(ConfigurationError, match=r"lora_b_grad|hidden_grad|lora_a_grad"):
        verify(tmp_path / "hf", {}, spoil=double_the_scale)


def double_the_scale(graphs: FinishedGraphs) -> None:
    graph = graphs.block_vjp.graph
    for node in graph.node:
        node.input[:] = ["doubled" if name == "lora_scale" else name for name in node.input]
    doubling = helper.make_node("Add", ["lora_scale", "lora_scale"], ["doubled"])
    graph.node.insert(0, doubling)


def verify(
    directory: Path,
    changed: dict[str, object],
    spoil: Callable[[FinishedGraphs], None] = lambda _graphs: None,
) -> None:
    """Verify graphs, written from a changed configuration, against the model itself."""
    family = find_family(directory)
    model = load_model(directory, family)
    forward = forward_graphs(family.name, model.config.to_dict() | changed, 3)
    graphs = finish_graphs(forward, family.default_targets, family.head_parameters)
    spoil(graphs)
    spec_input = register_model(
        directory, "it", BlobStore(directory / "blobs"), with_graphs=False
    ).input
    pieces = split_model(model, family)
    measure_costs(model, family, spec_input)
    verify_graphs(model, family, spec_input, pieces, graphs)


def test_adapters_come_off_as_they_went_on(tiny: TinyVit) -> None:
    bare = remove_adapters(read_graph(graphs_of(tiny).block, tiny.blobs))
    assert bare == forward_graphs("vit", tiny.spec.config, 3).block
    assert remove_adapters(place_adapters(bare, ["mlp.fc1"])) == bare


def test_a_run_moves_the_adapters_to_its_targets(tiny: TinyVit) -> None:
    known = graphs_of(tiny)
    moved = retarget_graphs(known, ["mlp.fc1"], tiny.blobs)
    assert (moved.stem, moved.head, moved.head_vjp) == (known.stem, known.head, known.head_vjp)
    block = read_graph(moved.block, tiny.blobs)
    names = {it.name for it in block.graph.input}
    assert {"mlp.fc1.lora_a", "mlp.fc1.lora_b", "lora_scale"} <= names
    assert not {"mlp.fc2.lora_a", "attention.o_proj.lora_b"} & names
    assert retarget_graphs(moved, known.targets, tiny.blobs) == known


def test_a_text_model_moves_them_too(tmp_path: Path) -> None:
    tiny = TinyLlama.register(tmp_path)
    moved = retarget_graphs(graphs_of(tiny), ["self_attn.q_proj"], tiny.blobs)
    assert moved.targets == ("self_attn.q_proj",)


def test_gradients_that_disagree_with_differences_are_found_out(tiny: TinyVit) -> None:
    graphs = finish_graphs(forward_graphs("vit", tiny.spec.config, 3), TARGETS, ())
    values = random_values(graphs.block)
    check_by_differences(graphs.block, graphs.block_vjp, block_gradients(TARGETS), values)
    double_the_scale(graphs)
    with pytest.raises(ConfigurationError, match="gradient of"):
        check_by_differences(graphs.block, graphs.block_vjp, block_gradients(TARGETS), values)


@pytest.mark.parametrize("product", ["in first", "turned", "gemm", "gemm turned"])
def test_an_adapter_fits_a_weight_that_is_stored_either_way(product: str) -> None:
    """It adds scale * B A x, whichever operator multiplies by the weight."""
    block = linear_block(product)
    adapted = place_adapters(block, ["it"])
    values = random_values(adapted)
    values["lora_scale"] = np.array(0.5, dtype=np.float32)
    x, a, b = (values[name].astype(np.float64) for name in ("hidden", "it.lora_a", "it.lora_b"))
    expected = run_graph(block, values)["out"] + 0.5 * x @ a.T @ b.T
    assert np.allclose(expected, run_graph(adapted, values)["out"], atol=1e-5)


def linear_block(product: str) -> onnx.ModelProto:
    """Multiply (examples, 4) by a weight that makes 6 features of them."""
    is_out_first = "turned" in product
    shape: list[str | int] = [6, 4] if is_out_first else [4, 6]
    if product == "turned":
        nodes = [
            helper.make_node("Transpose", ["it.weight"], ["turned"], perm=[1, 0]),
            helper.make_node("MatMul", ["hidden", "turned"], ["out"]),
        ]
    elif product == "in first":
        nodes = [helper.make_node("MatMul", ["hidden", "it.weight"], ["out"])]
    else:
        inputs = ["hidden", "it.weight", "it.bias"]
        nodes = [helper.make_node("Gemm", inputs, ["out"], transB=int(is_out_first))]
    return make_block(nodes, {"hidden": ["n", 4], "it.weight": shape, "it.bias": [6]})


def make_block(
    nodes: Sequence[onnx.NodeProto], inputs: dict[str, list[str | int]]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, it) for name, it in inputs.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])


@pytest.mark.parametrize(
    ("node", "target", "told"),
    [
        (("Add", "hidden", "it.weight"), "it", "exactly one matrix product"),
        (("MatMul", "it.weight", "hidden"), "it", "not the right factor"),
        (("MatMul", "hidden", "it.weight"), "that", "no input of the block"),
        (("MatMul", "hidden", "flat.weight"), "flat", "no matrix"),
    ],
)
def test_a_target_that_is_no_linear_layer_is_refused(
    node: tuple[str, str, str], target: str, told: str
) -> None:
    operator, *inputs = node
    shapes: dict[str, list[str | int]] = {
        "hidden": [4, 4], "it.weight": [4, 4], "flat.weight": [4],
    }  # fmt: skip
    block = make_block([helper.make_node(operator, inputs, ["out"])], shapes)
    with pytest.raises(ConfigurationError, match=told):
        place_adapters(block, [target])


def make_graphs() -> PieceGraphs:
    names = ("stem", "block", "block_vjp", "head", "head_vjp")
    return PieceGraphs(targets=TARGETS, **{name: make_blob(name) for name in names})


def test_slices_and_evaluations_carry_the_graphs_of_the_run(tmp_path: Path) -> None:
    server = Headless(tmp_path)
    graphs = make_graphs()
    server.create_run(min_participants=1, graphs=graphs)
    client = server.enrol("client", backend="onnx")
    assert server.coordinator.advance()
    assert server.assignments(1)[client].manifest.graphs == graphs
    told = guide(server.store, server.store.client(client), server.clock.now())
    assert told.kind == "train"
    assert told.manifest.graphs == graphs
    assert told.evaluate is None or told.evaluate.graphs == graphs
    server.store.close()


def test_a_client_without_pytorch_waits_where_a_run_has_no_graphs(tmp_path: Path) -> None:
    server = Headless(tmp_path)
    server.create_run(min_participants=1)
    client = server.enrol("client", backend="onnx")
    assert not server.coordinator.advance()
    told = guide(server.store, server.store.client(client), server.clock.now())
    assert isinstance(told, Wait)
    assert told.calibrate is None
    assert told.evaluate is None
    assert told.reason == (
        f"this machine cannot take part in run {RUN}: it has no graphs for clients without PyTorch"
    )
    server.store.close()


def fedra_server(capsys: pytest.CaptureFixture[str], home: Path, *arguments: str) -> str:
    """Run a command that must work and give what it prints."""
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--home", str(home)])
    printed = capsys.readouterr()
    assert not ended.value.code, printed.err
    return printed.out


def test_an_operator_sees_who_can_take_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    build_vit().save_pretrained(tmp_path / "hf")
    fedra_server(capsys, home, "init")
    fedra_server(capsys, home, "model", "add", "vit", str(tmp_path / "hf"))
    assert "Clients without PyTorch: welcome" in fedra_server(capsys, home, "model", "show", "vit")
    plain = ("run", "create", "plain", "--model", "vit")
    assert "PyTorch" not in fedra_server(capsys, home, *plain)
    fedra_server(capsys, home, "run", "create", "other", "--model", "vit", "--target", "mlp.fc1")
    with closing(Store.open(home)) as store:
        graphs = store.model_by_name("vit").spec.graphs
        assert graphs is not None
        assert store.run("plain").spec.graphs == graphs
        moved = store.run("other").spec.graphs
    assert moved is not None
    assert moved.targets == ("mlp.fc1",)
    assert moved.block != graphs.block


def test_an_operator_may_do_without_graphs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    build_vit().save_pretrained(tmp_path / "hf")
    fedra_server(capsys, home, "init")
    fedra_server(capsys, home, "model", "add", "vit", str(tmp_path / "hf"), "--no-graphs")
    shown = fedra_server(capsys, home, "model", "show", "vit")
    assert "Clients without PyTorch: cannot take part" in shown
    told = fedra_server(capsys, home, "run", "create", "plain", "--model", "vit")
    assert "Only clients with PyTorch can take part" in told
