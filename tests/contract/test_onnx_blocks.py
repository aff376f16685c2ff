"""The ONNX graphs of both families compute what our PyTorch pieces compute, gradients included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from fedra_edge.protocol.families import family_named
from fedra_edge.protocol.llama import LlamaSettings
from fedra_edge.protocol.vit import VitSettings
from fedra_edge.training.torch_llama import LlamaBlock, LlamaHead, LlamaStem, real_tokens
from fedra_edge.training.torch_pieces import Context, no_context
from fedra_edge.training.torch_vit import VitBlock, VitHead, VitStem
from fedra_server.modelbook.graphs.making import FinishedGraphs, finish_graphs, forward_graphs
from fedra_server.modelbook.graphs.running import run_graph

LABELS = 3
LORA_SCALE = 0.7
VIT = {
    "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 20,
    "patch_size": 8, "num_channels": 3,
}  # fmt: skip
LLAMA = {
    "vocab_size": 19, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
LENGTHS = (6, 2, 5)
VIT_TARGETS = {
    "default": ("attention.o_proj", "mlp.fc2"),
    "attention": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "one": ("mlp.fc1",),
}
LLAMA_TARGETS = {
    "default": ("self_attn.o_proj", "mlp.down_proj"),
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "gates": ("mlp.gate_proj", "mlp.up_proj"),
}

Values = dict[str, NDArray[Any]]


@dataclass
class Pieces:
    """The three pieces of a model in PyTorch, with random weights, and a batch for them."""

    family: str
    config: Mapping[str, Any]
    stem: nn.Module
    block: nn.Module
    head: nn.Module
    inputs: Tensor
    context: Context

    def graphs(self, targets: Sequence[str]) -> FinishedGraphs:
        forward = forward_graphs(self.family, self.config, LABELS)
        return finish_graphs(forward, targets, family_named(self.family).head_parameters)

    def contexts(self) -> Values:
        """Give what the stem's graph computes beside the activations."""
        stem = forward_graphs(self.family, self.config, LABELS).stem
        found = run_graph(stem, {**weights_of(self.stem), "inputs": self.inputs.numpy()})
        found.pop("hidden")
        return found


def vit(examples: int, **settings: object) -> Pieces:
    config = VIT | settings
    known = VitSettings.model_validate(config)
    torch.manual_seed(1)
    stem, block, head = VitStem(known), VitBlock(known), VitHead(known, LABELS)
    randomise(stem, block, head)
    images = torch.randn(examples, 3, 20, 20)
    return Pieces("vit", config, stem, block, head, images, no_context(images))


def llama(examples: int, **settings: object) -> Pieces:
    config = LLAMA | settings
    known = LlamaSettings.model_validate(config)
    torch.manual_seed(1)
    stem, block, head = LlamaStem(known), LlamaBlock(known), LlamaHead(known, LABELS)
    randomise(stem, block, head)
    lengths = torch.tensor(LENGTHS[:examples]).unsqueeze(1)
    tokens = torch.randint(0, 19, (examples, max(LENGTHS[:examples])))
    tokens = tokens.where(torch.arange(tokens.shape[1]) < lengths, -1)
    return Pieces("llama", config, stem, block, head, tokens, real_tokens(tokens))


def randomise(*pieces: nn.Module) -> None:
    for piece in pieces:
        for name, parameter in piece.named_parameters():
            nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)


MODELS: Mapping[str, Callable[[int], Pieces]] = {
    "vit": vit,
    "vit without bias, tanh gelu": lambda n: vit(n, qkv_bias=False, hidden_act="gelu_new"),
    "vit with relu": lambda n: vit(n, hidden_act="relu"),
    "vit with silu": lambda n: vit(n, hidden_act="silu", num_attention_heads=1),
    "llama": llama,
    "llama with bias": lambda n: llama(n, attention_bias=True, mlp_bias=True),
    "llama with one key head, gelu": lambda n: llama(n, num_key_value_heads=1, hidden_act="gelu"),
    "llama with as many key heads": lambda n: llama(n, num_key_value_heads=4, head_dim=4),
}


@pytest.mark.parametrize("examples", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_stem_and_head_agree(model: str, examples: int) -> None:
    pieces = MODELS[model](examples)
    graphs = pieces.graphs(family_named(pieces.family).default_targets)
    hidden = pieces.stem(pieces.inputs).detach().requires_grad_()
    stem = run_graph(graphs.stem, {**weights_of(pieces.stem), "inputs": pieces.inputs.numpy()})
    assert_close("hidden", stem.pop("hidden"), hidden)
    logits = pieces.head(hidden, *pieces.context)
    values = {**stem, **weights_of(pieces.head), "hidden": hidden.detach().numpy()}
    assert_close("logits", run_graph(graphs.head, values)["logits"], logits)
    gradient = torch.randn(logits.shape)
    trained = {name: pieces.head.get_parameter(name) for name in head_parameters(pieces)}
    expected = pull(logits, {"hidden": hidden, **trained}, gradient)
    assert_all_close(run_graph(graphs.head_vjp, {**values, "gradient": gradient.numpy()}), expected)


@pytest.mark.parametrize(("examples", "rank"), [(1, 8), (3, 2)])
@pytest.mark.parametrize("model", MODELS)
def test_blocks_agree(model: str, examples: int, rank: int) -> None:
    pieces = MODELS[model](examples)
    check_block(pieces, family_named(pieces.family).default_targets, rank)


@pytest.mark.parametrize("targets", VIT_TARGETS.values(), ids=VIT_TARGETS)
def test_vit_blocks_agree_on_any_targets(targets: tuple[str, ...]) -> None:
    check_block(vit(2), targets, rank=2)


@pytest.mark.parametrize("targets", LLAMA_TARGETS.values(), ids=LLAMA_TARGETS)
def test_llama_blocks_agree_on_any_targets(targets: tuple[str, ...]) -> None:
    check_block(llama(2), targets, rank=2)


def check_block(pieces: Pieces, targets: Sequence[str], rank: int) -> None:
    """Compare the output and every gradient of a block with adapters."""
    graphs = pieces.graphs(targets)
    hidden = pieces.stem(pieces.inputs).detach().requires_grad_()
    weights = dict(pieces.block.named_parameters())
    adapters = {}
    for target in targets:
        out_features, in_features = weights[f"{target}.weight"].shape
        adapters[f"{target}.lora_a"] = 0.3 * torch.randn(rank, in_features)
        adapters[f"{target}.lora_b"] = 0.3 * torch.randn(out_features, rank)
    for tensor in adapters.values():
        tensor.requires_grad_()
    adapted = {
        f"{target}.weight": weights[f"{target}.weight"]
        + LORA_SCALE * adapters[f"{target}.lora_b"] @ adapters[f"{target}.lora_a"]
        for target in targets
    }
    out = functional_call(pieces.block, weights | adapted, (hidden, *pieces.context))
    gradient = torch.randn(out.shape)
    values = {
        **pieces.contexts(),
        **weights_of(pieces.block),
        **{name: tensor.detach().numpy() for name, tensor in adapters.items()},
        "lora_scale": np.array(LORA_SCALE, dtype=np.float32),
        "hidden": hidden.detach().numpy(),
        "gradient": gradient.numpy(),
    }
    assert_close("out", run_graph(graphs.block, values)["out"], out)
    expected = pull(out, {"hidden": hidden, **adapters}, gradient)
    assert_all_close(run_graph(graphs.block_vjp, values), expected)


@pytest.mark.parametrize("model", ["vit", "llama"])
def test_graphs_keep_the_contract(model: str) -> None:
    """Standard operators of opset 18, no weight inside, and no input that decides nothing."""
    pieces = MODELS[model](1)
    targets = family_named(pieces.family).default_targets
    graphs = pieces.graphs(targets)
    adapters = {f"{target}.lora_{factor}" for target in targets for factor in "ab"}
    block = {it.name for it in graphs.block.graph.input}
    assert block == {"hidden", *contexts_of(graphs) - {"last"}, *adapters, "lora_scale"} | set(
        weights_of(pieces.block)
    )
    assert {it.name for it in graphs.block_vjp.graph.input} <= block | {"gradient"}
    for graph in (graphs.stem, graphs.block, graphs.block_vjp, graphs.head, graphs.head_vjp):
        onnx.checker.check_model(graph, full_check=True)
        assert graph.ir_version == 10
        assert [(it.domain, it.version) for it in graph.opset_import] == [("", 18)]
        assert all(np.prod(it.dims) <= 64 for it in graph.graph.initializer)
        used = {name for node in graph.graph.node for name in node.input}
        assert {it.name for it in graph.graph.input} <= used


def contexts_of(graphs: FinishedGraphs) -> set[str]:
    return {it.name for it in graphs.stem.graph.output} - {"hidden"}


def head_parameters(pieces: Pieces) -> tuple[str, ...]:
    return family_named(pieces.family).head_parameters


def weights_of(piece: nn.Module) -> Values:
    return {name: parameter.detach().numpy() for name, parameter in piece.named_parameters()}


def pull(output: Tensor, inputs: Mapping[str, Tensor], gradient: Tensor) -> Values:
    pulled = torch.autograd.grad(output, list(inputs.values()), gradient)
    return {f"{name}_grad": it.numpy() for name, it in zip(inputs, pulled, strict=True)}


def assert_all_close(found: Values, expected: Values) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(name, found[name], torch.tensor(value))


def assert_close(name: str, found: NDArray[Any], expected: Tensor) -> None:
    wanted = expected.detach().numpy()
    assert found.shape == wanted.shape, name
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max(), name
