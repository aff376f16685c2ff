"""What a slice of the decoder computes, against plain transformers and peft, padding included."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedra_edge.protocol.layers import STEM, TensorKey
from fedra_edge.protocol.llama import LlamaSettings
from fedra_edge.training.torch_llama import LlamaBlock, LlamaHead, LlamaStem, real_tokens
from fedra_edge.training.torch_slice import ResidentSlice, trained_parameters
from fedra_edge.training.torch_walk import StreamedSlice
from tests.support.tiny_llama import (
    LABELS,
    NUM_LAYERS,
    TinyLlama,
    build_llama,
    call_plain,
    reference_parameter,
    word_data,
)

CPU = torch.device("cpu")
MICRO_BATCH = 4  # so that two micro-batches differ in size and length
SUBSETS = [
    subset
    for size in range(1, NUM_LAYERS + 1)
    for subset in itertools.combinations(range(NUM_LAYERS), size)
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return TinyLlama.register(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def examples(tiny: TinyLlama) -> tuple[Tensor, Tensor]:
    """Texts of different length, so that most of them are padded."""
    data = word_data(tiny)
    tokens, label_ids = data.batch(data.train_indices[:6], tiny.spec.input)
    lengths = (tokens >= 0).sum(axis=1)
    assert len(set(lengths)) > 2
    return torch.from_numpy(tokens), torch.from_numpy(label_ids)


@pytest.mark.parametrize(
    ("residency", "depth"),
    [*itertools.product((ResidentSlice, StreamedSlice), ("full", "reduced"))],
)
@pytest.mark.parametrize("trained", SUBSETS, ids=str)
def test_gradients_are_those_of_the_plain_model(
    tiny: TinyLlama,
    examples: tuple[Tensor, Tensor],
    trained: tuple[int, ...],
    depth: str,
    residency: type[ResidentSlice | StreamedSlice],
) -> None:
    tokens, label_ids = examples
    work = tiny.work(trained, depth=depth)
    held = work.manifest.layer_ids
    reference = tiny.reference(held)
    expected = F.cross_entropy(call_plain(reference, tokens), label_ids)
    expected.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    parameters = trained_parameters(work, CPU)
    loaded = residency(work, parameters, CPU)
    entering = loaded.enter(torch.split(tokens, MICRO_BATCH))
    loss = loaded.accumulate(entering, torch.split(label_ids, MICRO_BATCH), len(tokens))
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    wanted = work.spec.delta_shapes(work.manifest.adapter, work.manifest.trained_layer_ids)
    assert parameters.keys() == wanted.keys()
    for name, parameter in parameters.items():
        same = reference_parameter(reference, TensorKey.parse(name), held)
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, same.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 16},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rms_norm_eps": 0.1},
    ],
    ids=str,
)
def test_every_supported_setting_computes_what_transformers_does(
    examples: tuple[Tensor, Tensor], settings: dict[str, Any]
) -> None:
    tokens, _ = examples
    model = build_llama(**settings)
    config = LlamaSettings.model_validate(model.config.to_dict())
    stem, head = LlamaStem(config), LlamaHead(config, len(LABELS))
    stem.load_state_dict(model.model.embed_tokens.state_dict())
    head.norm.load_state_dict(model.model.norm.state_dict())
    head.score.load_state_dict(model.score.state_dict())
    context = real_tokens(tokens)
    with torch.no_grad():
        hidden = stem(tokens)
        for layer in model.model.layers:
            block = LlamaBlock(config)
            block.load_state_dict(layer.state_dict())
            hidden = block(hidden, *context)
        expected = call_plain(model, tokens)
        torch.testing.assert_close(head(hidden, *context), expected, rtol=0, atol=1e-5)


def test_padding_changes_nothing(tiny: TinyLlama, examples: tuple[Tensor, Tensor]) -> None:
    tokens, _ = examples
    loaded = ResidentSlice(tiny.work([1]), trained_parameters(tiny.work([1]), CPU), CPU)
    with torch.no_grad():
        [batch] = loaded.enter([F.pad(tokens, (0, 5), value=-1)])
        together = loaded.leave(batch)
        for row, expected in zip(tokens, together, strict=True):
            [alone] = loaded.enter([row[row >= 0].unsqueeze(0)])
            torch.testing.assert_close(loaded.leave(alone)[0], expected, rtol=0, atol=1e-5)


def test_a_decoder_stored_in_half_precision_is_the_rounded_one(
    tmp_path: Path, examples: tuple[Tensor, Tensor]
) -> None:
    tiny = TinyLlama.register(tmp_path, "bfloat16")
    work = tiny.work([0, 1, 2])
    loaded = ResidentSlice(work, trained_parameters(work, CPU), CPU)
    with torch.no_grad():
        [batch] = loaded.enter([examples[0]])
        expected = call_plain(tiny.reference(range(NUM_LAYERS)), examples[0])
        torch.testing.assert_close(loaded.leave(batch), expected, rtol=0, atol=1e-5)


def test_a_streamed_backward_leaves_frozen_weights_alone(
    tiny: TinyLlama, examples: tuple[Tensor, Tensor]
) -> None:
    tokens, label_ids = examples
    work = tiny.work([0])
    before = {piece: Path(path).read_bytes() for piece, path in work.weights.items()}
    loaded = StreamedSlice(work, trained_parameters(work, CPU), CPU)
    loaded.accumulate(loaded.enter([tokens]), [label_ids], len(tokens))
    assert STEM in before
    assert before == {piece: Path(path).read_bytes() for piece, path in work.weights.items()}
