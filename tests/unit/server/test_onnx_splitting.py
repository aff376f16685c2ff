"""Models that are only there as ONNX become pieces that compute and train as the original does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from fedra_edge.protocol.ids import LayerId
from fedra_edge.protocol.layers import HEAD, LORA_A, LORA_B, STEM, layer_piece
from fedra_edge.protocol.models import AdapterSpec, BlobRef, ImageInput, ModelSpec
from fedra_edge.protocol.tensors import read_tensors
from fedra_server.cli.onnx_models import register_file
from fedra_server.errors import ConfigurationError
from fedra_server.modelbook.graphs.retargeting import retarget_graphs
from fedra_server.modelbook.graphs.running import run_graph
from fedra_server.modelbook.importing.inputs import Preparation
from fedra_server.modelbook.importing.naming import default_targets, named_by_index
from fedra_server.modelbook.importing.probing import MIN_TOKENS
from fedra_server.modelbook.importing.registering import register_onnx
from fedra_server.storage.blobs import BlobStore
from tests.support.onnx_models import (
    POSITIONS,
    VOCABULARY,
    WINDOW,
    WindowedTextModel,
    build_model,
    export_model,
)
from tests.support.tiny_vit import LABELS

BLOCKS = {
    "mixer": "blocks.1",
    "postnorm": "blocks.1",
    "vit": "model.vit.layers.1",
    "bert": "model.bert.encoder.layer.1",
}
TARGETS = {
    "mixer": ("tokens.0", "tokens.2", "channels.0", "channels.2"),
    "postnorm": ("fc1", "fc2"),
    "vit": ("attention.o_proj", "mlp.fc2"),
    "bert": ("attention.output.dense", "output.dense"),
}
Values = dict[str, Any]


@dataclass(frozen=True)
class Imported:
    """A model of PyTorch and what was registered of its ONNX file."""

    name: str
    model: nn.Module
    spec: ModelSpec
    blobs: BlobStore

    def weights(self, piece: str) -> Values:
        refs = {STEM: self.spec.stem, HEAD: self.spec.head}
        refs |= {layer_piece(LayerId(i)): it for i, it in enumerate(self.spec.layers)}
        return read_tensors(self.blobs.path(refs[piece].weights.sha256))

    def run(self, ref: BlobRef, values: Values) -> Values:
        graph = onnx.load_model_from_string(self.blobs.path(ref.sha256).read_bytes())
        return run_graph(graph, values)

    def adapters(self, *, zero: bool) -> Values:
        adapter = AdapterSpec(rank=2, targets=self.spec.default_targets)
        shapes = self.spec.layer_adapter_shapes(adapter, LayerId(0))
        generator = np.random.default_rng(4)
        return {
            name.partition("/")[2]: np.zeros(shape, np.float32)
            if zero
            else generator.normal(0, 0.2, shape).astype(np.float32)
            for name, shape in shapes.items()
        } | {"lora_scale": np.array(0.5, np.float32)}

    def walk(self, inputs: np.ndarray, layers: int) -> Values:
        """Give what enters the piece after so many layers."""
        assert self.spec.graphs
        values = self.run(self.spec.graphs.stem, {"inputs": inputs, **self.weights(STEM)})
        for index in range(layers):
            piece = self.weights(layer_piece(LayerId(index)))
            layer = {**values, **piece, **self.adapters(zero=True)}
            values["hidden"] = self.run(self.spec.graphs.block, layer)["out"]
        return values


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Tokenizer(models.WordLevel({"a": 0, "b": VOCABULARY - 1, "?": 1}, unk_token="?"))  # noqa: S106 (a word)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture(scope="module", params=[True, False], ids=["dynamo", "torchscript"])
def by_dynamo(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module", params=BLOCKS)
def imported(
    request: pytest.FixtureRequest,
    by_dynamo: bool,
    tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Imported:
    place = tmp_path_factory.mktemp("imported")
    model = build_model(request.param)
    path = export_model(model, place / "model.onnx", dynamo=by_dynamo)
    blobs = BlobStore(place / "blobs")
    is_bert = request.param == "bert"
    given = Preparation(tokenizer=tokenizer, max_tokens=POSITIONS) if is_bert else Preparation()
    spec = register_onnx(path, "imported", LABELS, given, blobs)
    return Imported(request.param, model, spec, blobs)


def draw_inputs(spec: ModelSpec, examples: int) -> np.ndarray:
    generator = np.random.default_rng(examples)
    if spec.input.kind == "image":
        return generator.normal(size=(examples, 3, 16, 16)).astype(np.float32)
    texts = generator.integers(0, VOCABULARY, (examples, 4 + examples))
    texts[1:, -3:] = -1
    return texts


def expected_logits(model: nn.Module, inputs: np.ndarray) -> np.ndarray:
    given = torch.from_numpy(inputs)
    with torch.no_grad():
        if inputs.dtype == np.float32:
            return model(given).numpy()  # type: ignore[no-any-return]
        return model(given.clamp(min=0), (given >= 0).long()).numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("examples", [1, 4])
def test_the_pieces_together_compute_what_the_model_does(imported: Imported, examples: int) -> None:
    inputs = draw_inputs(imported.spec, examples)
    values = imported.walk(inputs, imported.spec.num_layers)
    assert imported.spec.graphs
    head = {**values, **imported.weights(HEAD)}
    logits = imported.run(imported.spec.graphs.head, head)["logits"]
    expected = expected_logits(imported.model, inputs)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_every_layer_is_found_and_named_as_in_the_model(imported: Imported) -> None:
    spec = imported.spec
    assert (spec.family, spec.num_layers) == ("onnx", 3)
    assert spec.default_targets == TARGETS[imported.name]
    block = imported.model.get_submodule(BLOCKS[imported.name])
    linears = {
        name: (it.out_features, it.in_features)
        for name, it in block.named_modules()
        if isinstance(it, nn.Linear)
    }
    assert spec.block_linears == linears
    own = {name for name, _ in block.named_parameters()}
    assert imported.weights("layers.1").keys() == own
    assert {name.rpartition(".")[2] for name in spec.head_parameters} == {"weight", "bias"}
    for piece, held in ((spec.stem, STEM), (spec.layers[1], "layers.1"), (spec.head, HEAD)):
        held_bytes = sum(it.nbytes for it in imported.weights(held).values())
        assert piece.cost.parameter_bytes == held_bytes
        assert piece.cost.boundary_bytes > 0
    assert spec.layers[0].cost.forward_flops > 0


def test_the_gradients_of_a_layer_are_those_of_autograd(imported: Imported) -> None:
    spec, adapters = imported.spec, imported.adapters(zero=False)
    values = imported.walk(draw_inputs(spec, 3), 1)
    assert spec.graphs
    layer = {**values, **imported.weights("layers.1"), **adapters}
    gradient = np.random.default_rng(9).normal(size=values["hidden"].shape).astype(np.float32)
    found = imported.run(spec.graphs.block_vjp, {**layer, "gradient": gradient})

    block = imported.model.get_submodule(BLOCKS[imported.name])
    leaves = {name: torch.from_numpy(it).requires_grad_() for name, it in adapters.items()}
    hidden = torch.from_numpy(values["hidden"]).requires_grad_()
    hooks = [
        block.get_submodule(target).register_forward_hook(adding(leaves, target))
        for target in spec.default_targets
    ]
    given = (
        {"attention_mask": torch.from_numpy(values["context_0"])} if "context_0" in values else {}
    )
    out = block(hidden, **given)
    out = out[0] if isinstance(out, tuple) else out
    for hook in hooks:
        hook.remove()
    wanted = {"hidden": hidden} | {it: leaves[it] for it in leaves if it != "lora_scale"}
    expected = torch.autograd.grad(out, list(wanted.values()), torch.from_numpy(gradient))
    assert found.keys() == {f"{name}_grad" for name in wanted}
    for name, tensor in zip(wanted, expected, strict=True):
        atol = 1e-4 * float(tensor.abs().max())
        np.testing.assert_allclose(found[f"{name}_grad"], tensor.numpy(), atol=atol, err_msg=name)


def adding(leaves: dict[str, Tensor], target: str) -> Callable[..., Tensor]:
    """Add an adapter to what a linear layer gives."""

    def add(_module: nn.Module, entered: tuple[Tensor, ...], left: Tensor) -> Tensor:
        low = entered[0] @ leaves[f"{target}.{LORA_A}"].T
        return left + leaves["lora_scale"] * (low @ leaves[f"{target}.{LORA_B}"].T)

    return add


def test_the_gradients_of_the_head_are_those_of_autograd(imported: Imported) -> None:
    spec = imported.spec
    values = imported.walk(draw_inputs(spec, 3), 3)
    assert spec.graphs
    gradient = np.random.default_rng(9).normal(size=(3, len(LABELS))).astype(np.float32)
    head = {**values, **imported.weights(HEAD), "gradient": gradient}
    found = imported.run(spec.graphs.head_vjp, head)
    features = torch.from_numpy(gradient)
    bias = next(name for name in spec.head_parameters if name.endswith("bias"))
    np.testing.assert_allclose(found[f"{bias}_grad"], features.sum(0).numpy(), atol=1e-5)
    assert found["hidden_grad"].shape == values["hidden"].shape
    assert {name: found[f"{name}_grad"].shape for name in spec.head_parameters} == dict(
        spec.head_parameters
    )


def test_registering_twice_gives_the_same_model(tmp_path: Path) -> None:
    path = export_model(build_model("mixer"), tmp_path / "model.onnx", dynamo=True)
    first, second = (
        register_onnx(path, "m", LABELS, Preparation(), BlobStore(tmp_path / place))
        for place in ("one", "two")
    )
    assert first.model_id == second.model_id


@pytest.mark.parametrize(
    ("opset", "curve"), [(13, "none"), (16, "tanh"), (20, "none"), (20, "tanh")]
)
def test_other_opsets_are_taken(tmp_path: Path, opset: int, curve: str) -> None:
    model = build_model("mixer")
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.approximate = curve
    path = export_model(model, tmp_path / "model.onnx", dynamo=False, opset=opset)
    spec = register_onnx(path, "other", LABELS, Preparation(), BlobStore(tmp_path / "blobs"))
    assert (spec.num_layers, spec.default_targets) == (3, TARGETS["mixer"])


def test_the_size_of_images_can_be_told(tmp_path: Path) -> None:
    path = export_model(build_model("mixer"), tmp_path / "model.onnx", dynamo=True)
    model = onnx.load(path)
    for dim, name in zip(model.graph.input[0].type.tensor_type.shape.dim[1:], "chw", strict=True):
        dim.dim_param = name
    onnx.save(model, path)
    assert "--image-size" in refused(path, tmp_path).remedy
    given = Preparation(image_size=16, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    spec = register_onnx(path, "told", LABELS, given, BlobStore(tmp_path / "blobs"))
    assert spec.input == ImageInput(size_px=16, channels=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    wrong = Preparation(image_size=20)
    with pytest.raises(ConfigurationError) as caught:
        register_onnx(path, "wrong", LABELS, wrong, BlobStore(tmp_path / "blobs"))
    assert "--image-size" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "dynamo", "targets"),
    [
        ("gpt2", True, ("attn.c_proj", "mlp.c_proj")),
        ("gpt2", False, ("attn.c_proj", "mlp.c_proj")),
        ("convnext", True, ("pwconv1", "pwconv2")),
    ],
)
def test_further_architectures_are_taken(
    tmp_path: Path, tokenizer: Path, name: str, dynamo: bool, targets: tuple[str, ...]
) -> None:
    path = export_model(build_model(name), tmp_path / "model.onnx", dynamo=dynamo)
    given = Preparation(tokenizer=tokenizer, max_tokens=12) if name == "gpt2" else Preparation()
    spec = register_onnx(path, name, LABELS, given, BlobStore(tmp_path / "blobs"))
    assert (spec.num_layers, spec.default_targets) == (3, targets)


def test_texts_longer_than_the_models_positions_are_refused(
    tmp_path: Path, tokenizer: Path
) -> None:
    path = export_model(build_model("bert"), tmp_path / "model.onnx", dynamo=False)
    given = Preparation(tokenizer=tokenizer, max_tokens=POSITIONS + 1)
    with pytest.raises(ConfigurationError, match="for texts of 33 tokens: onnxruntime") as caught:
        register_onnx(path, "long", LABELS, given, BlobStore(tmp_path / "blobs"))
    assert "--max-tokens" in caught.value.remedy
    with pytest.raises(ConfigurationError, match="reads token ids") as caught:
        register_onnx(path, "untold", LABELS, Preparation(), BlobStore(tmp_path / "blobs"))
    assert "--tokenizer" in caught.value.remedy


@pytest.mark.parametrize("dynamo", [True, False])
def test_what_is_otherwise_for_longer_texts_is_refused(
    tmp_path: Path, tokenizer: Path, dynamo: bool
) -> None:
    path = export_model(WindowedTextModel().eval(), tmp_path / "model.onnx", dynamo=dynamo)
    blobs = BlobStore(tmp_path / "blobs")
    for longest in (WINDOW + 1, 2 * WINDOW, 8 * WINDOW):
        given = Preparation(tokenizer=tokenizer, max_tokens=longest)
        with pytest.raises(ConfigurationError, match=r"differ by .* from the file's") as caught:
            register_onnx(path, "windowed", LABELS, given, blobs)
        assert "--max-tokens" in caught.value.remedy
    given = Preparation(tokenizer=tokenizer, max_tokens=WINDOW)
    assert register_onnx(path, "windowed", LABELS, given, blobs).num_layers == 3


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_shortest_length_that_can_be_registered_is_told(
    tmp_path: Path, tokenizer: Path, by_dynamo: bool, name: str
) -> None:
    path = export_model(build_model(name), tmp_path / "model.onnx", dynamo=by_dynamo)
    blobs = BlobStore(tmp_path / "blobs")
    for longest in range(MIN_TOKENS):
        given = Preparation(tokenizer=tokenizer, max_tokens=longest)
        with pytest.raises(ConfigurationError, match="too short") as caught:
            register_onnx(path, "short", LABELS, given, blobs)
        assert f"at least {MIN_TOKENS} with --max-tokens" in caught.value.remedy
    given = Preparation(tokenizer=tokenizer, max_tokens=MIN_TOKENS)
    assert register_onnx(path, "short", LABELS, given, blobs).num_layers == 3


def test_a_run_may_choose_other_targets(tmp_path: Path) -> None:
    path = export_model(build_model("mixer"), tmp_path / "model.onnx", dynamo=False)
    blobs = BlobStore(tmp_path / "blobs")
    spec = register_onnx(path, "mixer", LABELS, Preparation(), blobs)
    assert spec.graphs
    moved = retarget_graphs(spec.graphs, ("channels.2",), blobs)
    vjp = onnx.load_model_from_string(blobs.path(moved.block_vjp.sha256).read_bytes())
    gradients = {it.name for it in vjp.graph.output}
    assert gradients == {"hidden_grad", "channels.2.lora_a_grad", "channels.2.lora_b_grad"}


def refused(path: Path, place: Path, labels: tuple[str, ...] = LABELS) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        register_onnx(path, "refused", labels, Preparation(), BlobStore(place / "blobs"))
    return caught.value


def save_graph(
    path: Path, nodes: list[onnx.NodeProto], *, batch: int | str, domain: str = ""
) -> Path:
    """Write a small graph from images to three logits."""
    weight = np.random.default_rng(0).normal(size=(48, 3)).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 3])],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    opsets = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=opsets), path)
    return path


def linear_nodes() -> list[onnx.NodeProto]:
    return [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]


def test_what_has_no_blocks_is_refused(tmp_path: Path) -> None:
    path = save_graph(tmp_path / "model.onnx", linear_nodes(), batch="n")
    error = refused(path, tmp_path)
    assert "no repeated block" in str(error)
    assert "two layers" in error.remedy


def test_a_single_block_is_no_chain(tmp_path: Path) -> None:
    model = build_model("mixer")
    model.blocks = model.blocks[:1]  # type: ignore[index]
    path = export_model(model, tmp_path / "model.onnx", dynamo=True)
    assert "no repeated block" in str(refused(path, tmp_path))


@pytest.mark.parametrize(
    ("operator", "domain", "named"),
    [("FusedGelu", "com.example", "com.example.FusedGelu"), ("Loop", "", "Loop")],
)
def test_foreign_operators_are_named(
    tmp_path: Path, operator: str, domain: str, named: str
) -> None:
    nodes = [helper.make_node(operator, ["images"], ["strange"], domain=domain), *linear_nodes()]
    nodes[1].input[0] = "strange"
    path = save_graph(tmp_path / "model.onnx", nodes, batch="n", domain=domain)
    error = refused(path, tmp_path)
    assert f"operator {named} is not supported" in str(error)
    assert error.remedy


@pytest.mark.parametrize("opset", [9, 99])
def test_opsets_that_are_too_old_or_new_are_told(tmp_path: Path, opset: int) -> None:
    path = save_graph(tmp_path / "model.onnx", linear_nodes(), batch="n")
    model = onnx.load(path)
    model.opset_import[0].version = opset
    onnx.save(model, path)
    error = refused(path, tmp_path)
    assert f"opset {opset} is not supported; 13 to" in str(error)
    assert "opset 18" in error.remedy


def test_a_transpose_may_leave_the_order_of_axes_out(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("Transpose", ["weight"], ["one"]),
        helper.make_node("Transpose", ["weight"], ["other"]),
        helper.make_node("Add", ["one", "other"], ["sum"]),
        helper.make_node("Transpose", ["sum"], ["turned"]),
        helper.make_node("MatMul", ["flat", "turned"], ["logits"]),
    ]
    path = save_graph(tmp_path / "model.onnx", nodes, batch="n")
    assert "no repeated block" in str(refused(path, tmp_path))


def test_a_batch_of_one_size_is_refused(tmp_path: Path) -> None:
    path = save_graph(tmp_path / "model.onnx", linear_nodes(), batch=1)
    error = refused(path, tmp_path)
    assert "exactly 1" in str(error)
    assert "dynamic batch" in error.remedy


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model at all")
    error = refused(path, tmp_path)
    assert "model.onnx" in str(error)
    assert "Export the model" in error.remedy


def test_a_wrong_path_is_told(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "model.onnx", tmp_path):
        error = refused(path, tmp_path)
        assert str(path) in str(error)
        assert error.remedy.startswith("Give the path")


SPARSE = helper.make_sparse_tensor(
    helper.make_tensor("values", TensorProto.FLOAT, [1], [1.0]),
    helper.make_tensor("places", TensorProto.INT64, [1], [0]),
    [4],
)


@pytest.mark.parametrize(
    ("node", "told"),
    [
        (
            helper.make_node("Constant", [], ["c"], value_string=b"words"),
            "with value_string",
        ),
        (
            helper.make_node("Constant", [], ["c"], sparse_value=SPARSE),
            "with sparse_value",
        ),
        (helper.make_node("Constant", [], ["c"]), "a constant with no value"),
        (helper.make_node("Neg", ["nothing"], ["negative"]), "'nothing' of node"),
        (helper.make_node("Neg", ["logits"], ["logits"]), "'logits' of node"),
        (helper.make_node("Flatten", ["images"], ["weight"]), "'weight'"),
        (helper.make_node("Flatten", ["images"], ["flat"]), "'flat'"),
    ],
    ids=["string", "sparse", "empty", "dangling", "cycle", "weight made", "made twice"],
)
def test_invalid_nodes_are_refused(tmp_path: Path, node: onnx.NodeProto, told: str) -> None:
    path = save_graph(tmp_path / "model.onnx", [node, *linear_nodes()], batch="n")
    error = refused(path, tmp_path)
    assert told in str(error)
    assert "Export the model" in error.remedy


def test_constants_without_elements_are_taken(tmp_path: Path) -> None:
    path = export_model(build_model("mixer"), tmp_path / "model.onnx", dynamo=True)
    model = onnx.load(path)
    kinds = {"value_ints": onnx.AttributeProto.INTS, "value_floats": onnx.AttributeProto.FLOATS}
    for name, kind in kinds.items():
        node = helper.make_node("Constant", [], [name])
        node.attribute.append(helper.make_attribute(name, [], attr_type=kind))
        model.graph.node.insert(0, node)
    onnx.save(model, path)
    spec = register_onnx(path, "empty", LABELS, Preparation(), BlobStore(tmp_path / "blobs"))
    assert spec.num_layers == 3


def test_invalid_weights_and_outputs_are_refused(tmp_path: Path) -> None:
    path = save_graph(tmp_path / "model.onnx", linear_nodes(), batch="n")

    def broken(change: Callable[[onnx.GraphProto], object]) -> str:
        model = onnx.load(path)
        change(model.graph)
        changed = tmp_path / "changed.onnx"
        changed.write_bytes(model.SerializeToString())
        error = refused(changed, tmp_path)
        assert "Export the model" in error.remedy
        return str(error)

    assert "not unique" in broken(lambda it: it.initializer.append(it.initializer[0]))
    assert "raw_data size" in broken(lambda it: it.initializer[0].dims.append(2**40))
    sparse = onnx.SparseTensorProto()
    sparse.CopyFrom(SPARSE)
    assert "sparse weights" in broken(lambda it: it.sparse_initializer.append(sparse))
    assert "no operator makes" in broken(lambda it: it.output.pop())
    assert "no operator makes" in broken(lambda it: it.output[0].MergeFrom(it.input[0]))


@pytest.mark.parametrize("text", ["a,,b", "a,b,", "", " ", "a, ,b"])
def test_empty_labels_are_refused(tmp_path: Path, text: str) -> None:
    chosen = {"path": None, "weights_dtype": "float32", "graphs": True, "labels": text}
    file = tmp_path / "labels.txt"
    file.write_text(text.replace(",", "\n") + "\n\nc", encoding="utf-8")
    for labels in (text, str(file)):
        with pytest.raises(ConfigurationError, match="a label is empty") as caught:
            register_file(
                tmp_path / "model.onnx", "m", {**chosen, "labels": labels}, BlobStore(tmp_path)
            )
        assert "--labels" in caught.value.remedy


def test_all_labels_must_be_named(tmp_path: Path) -> None:
    path = export_model(build_model("mixer"), tmp_path / "model.onnx", dynamo=True)
    error = refused(path, tmp_path, ("bolt", "nut"))
    assert "3 labels apart, 2 are named" in str(error)
    assert "--labels" in error.remedy


def test_dropout_at_work_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node(
            "Constant", [], ["at_work"], value=onnx.numpy_helper.from_array(np.array(1, bool))
        ),
        helper.make_node("Dropout", ["images", "", "at_work"], ["dropped"]),
        *linear_nodes(),
    ]
    nodes[2].input[0] = "dropped"
    path = save_graph(tmp_path / "model.onnx", nodes, batch="n")
    assert ".eval()" in refused(path, tmp_path).remedy


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["h.0.fc.weight", "h.1.fc.weight"], "fc.weight"),
        (["h.4.mlp.2.bias", "h.5.mlp.2.bias"], "mlp.2.bias"),
        (["h.0.fc.weight", "h.2.fc.weight"], None),
        (["fc.weight", "fc.weight"], None),
        (["val_8", "val_9"], None),
    ],
)
def test_the_layers_number_is_cut_out_of_names(names: list[str], found: str | None) -> None:
    assert named_by_index(names) == found


def test_default_targets_are_the_last_layers_of_attention_and_the_rest() -> None:
    assert default_targets(["attn.qkv", "attn.proj", "fc1", "fc2"]) == ("attn.proj", "fc2")
    assert default_targets(["w0", "w2"]) == ("w0", "w2")
