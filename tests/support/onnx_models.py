"""Models as their owners would hand them over: exported to ONNX by either exporter of PyTorch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)
from typing_extensions import override

from tests.support.tiny_vit import LABELS, build_vit

SIZE_PX = 16
PATCH_PX = 4
TOKENS = (SIZE_PX // PATCH_PX) ** 2
POSITIONS = 32
WINDOW = 16
VOCABULARY = 50
_LABELLED: dict[str, Any] = {"num_labels": len(LABELS)}


class MixerBlock(nn.Module):
    """A layer of an MLP-Mixer (arXiv 2105.01601): mix tokens, then channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_tokens, self.norm_channels = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(TOKENS, 24), nn.GELU(), nn.Linear(24, TOKENS))
        self.channels = nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width))

    @override
    def forward(self, states: Tensor) -> Tensor:
        mixed = self.tokens(self.norm_tokens(states).transpose(1, 2)).transpose(1, 2)
        states = states + mixed
        out: Tensor = states + self.channels(self.norm_channels(states))
        return out


class PostNormBlock(nn.Module):
    """A layer that normalises after adding, with a gate of its own and a plain ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 24), nn.Linear(24, width)
        self.norm, self.gate = nn.LayerNorm(width), nn.Parameter(torch.ones(1))

    @override
    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.norm(states + self.gate * self.fc2(F.relu(self.fc1(states))))
        return out


class PatchModel(nn.Module):
    """Patches of an image, blocks, and a classifier on their mean."""

    def __init__(
        self, block: type[MixerBlock | PostNormBlock], layers: int, width: int = 16
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, PATCH_PX, PATCH_PX)
        self.blocks = nn.ModuleList([block(width) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(LABELS))

    @override
    def forward(self, images: Tensor) -> Tensor:
        states = self.patches(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            states = block(states)
        logits: Tensor = self.head(self.norm(states).mean(1))
        return logits


class WindowedTextModel(nn.Module):
    """Reads texts; every layer shifts the tokens after the first ``WINDOW``."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList([PostNormBlock(width) for _ in range(3)])
        self.head = nn.Linear(width, len(LABELS))

    @override
    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        states = self.words(inputs) * mask[..., None]
        shift = (torch.arange(inputs.shape[1]) // WINDOW).float()[:, None]
        for block in self.blocks:
            states = block(states + shift)
        logits: Tensor = self.head(states.mean(1))
        return logits


class Logits(nn.Module):
    """A model of transformers that gives nothing but its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @override
    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        given = {} if mask is None else {"attention_mask": mask}
        logits: Tensor = self.model(inputs, **given).logits
        return logits


def build_model(name: str) -> nn.Module:
    """Make a model in which every tensor differs from every other one, as after training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module
        match name:
            case "mixer":
                model = PatchModel(MixerBlock, 3)
            case "postnorm":
                model = PatchModel(PostNormBlock, 3)
            case "vit":
                model = Logits(build_vit(3))
            case "bert":
                model = Logits(_build_bert())
            case "gpt2":
                model = Logits(_build_gpt2())
            case "convnext":
                config = ConvNextConfig(
                    hidden_sizes=[16, 16], depths=[1, 3], num_stages=2,
                    patch_size=2, image_size=SIZE_PX, **_LABELLED,
                )  # fmt: skip
                model = Logits(ConvNextForImageClassification(config))
            case _:
                raise ValueError(name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model.eval()


def export_model(model: nn.Module, path: Path, *, dynamo: bool, opset: int = 18) -> Path:
    """Write a model with batches of any size, and texts of any length."""
    reads_texts = any(isinstance(it, nn.Embedding) for it in model.modules())
    inputs = _texts() if reads_texts else (torch.randn(2, 3, SIZE_PX, SIZE_PX),)
    names = ["input_ids", "attention_mask"] if reads_texts else ["images"]
    axes = {0: "batch", 1: "length"} if reads_texts else {0: "batch"}
    how: dict[str, Any] = {"dynamic_axes": dict.fromkeys(names, axes)}
    if dynamo:
        dims = {axis: torch.export.Dim(name, max=POSITIONS) for axis, name in axes.items()}
        how = {"dynamic_shapes": (dims,) * len(names), "external_data": False, "verbose": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            inputs,
            path,
            dynamo=dynamo,
            input_names=names,
            output_names=["logits"],
            opset_version=opset,
            **how,
        )
    return path


def _texts() -> tuple[Tensor, Tensor]:
    return torch.randint(0, VOCABULARY, (2, 7)), torch.ones(2, 7, dtype=torch.int64)


def _build_bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=POSITIONS,
            **_LABELLED,
        )
    )


def _build_gpt2() -> nn.Module:
    return GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=POSITIONS,
            **_LABELLED,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            use_cache=False,
        )
    )
