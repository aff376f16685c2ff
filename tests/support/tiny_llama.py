"""A tiny Llama-like decoder, registered with its tokenizer, and texts to try it on."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification
from typing_extensions import override

from fedra_edge.data.dataset import TextExample
from fedra_edge.data.matching import MatchedDataset, match_labels
from fedra_edge.data.tokenizing import TextTokenizer
from fedra_edge.protocol.families import family_named
from fedra_edge.protocol.layers import HEAD, LORA_A, TensorKey
from fedra_edge.protocol.models import AdapterSpec, TokenInput
from fedra_edge.protocol.slices import SliceManifest
from fedra_server.modelbook.registering import register_model
from fedra_server.modelbook.stored_dtypes import WeightsDtype
from fedra_server.storage.blobs import BlobStore
from tests.support.tiny_vit import TinyVit, put_revision, random_tensors, round_frozen

LABELS = ("leak", "noise", "wear")
NUM_LAYERS = 3
ADAPTER = AdapterSpec(rank=2, alpha=4.0, targets=("self_attn.o_proj", "mlp.down_proj"))
WORDS = (
    "seal", "drips", "oil", "puddle", "hiss", "rattle", "hum", "squeal", "worn", "tooth", "crack",
    "thin", "the", "pump", "is", "on", "line", "again", "since", "monday",
)  # fmt: skip
TELLING = {"leak": WORDS[:4], "noise": WORDS[4:8], "wear": WORDS[8:12]}
MAX_TOKENS = 24
_SPECIAL = ("<pad>", "<s>", "<unk>")
_LLAMA = family_named("llama")


def build_llama(num_layers: int = NUM_LAYERS, **settings: Any) -> LlamaForSequenceClassification:  # noqa: ANN401 (as LlamaConfig takes them)
    """Build a model with grouped heads and weights large enough that every layer matters."""
    values = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: index for index, label in enumerate(LABELS)},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: LlamaForSequenceClassification = LlamaForSequenceClassification(  # type: ignore[no-untyped-call]  # transformers leaves it unannotated
            LlamaConfig(**(values | settings))
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith((".bias", "norm.weight")):  # which start as zeros and ones
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval()  # type: ignore[no-untyped-call]  # as above
    return model


def build_tokenizer(words: Sequence[str] = WORDS) -> Tokenizer:
    """Build a tokenizer of whole words that begins every text with <s>."""
    vocabulary = {word: number for number, word in enumerate((*_SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 (a word)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def save_llama(directory: Path, **settings: Any) -> LlamaForSequenceClassification:  # noqa: ANN401 (as above)
    """Save a model with its tokenizer, as an operator would have it."""
    model = build_llama(**settings)
    model.save_pretrained(directory)
    build_tokenizer().save(str(directory / "tokenizer.json"))
    return model


@dataclass(frozen=True)
class TinyLlama(TinyVit):
    """The same as ``TinyVit``, for the decoder."""

    model: LlamaForSequenceClassification  # type: ignore[assignment]  # in place of the other

    @classmethod
    @override
    def register(cls, directory: Path, weights_dtype: WeightsDtype = "float32") -> TinyLlama:
        model = save_llama(directory / "hf")
        blobs = BlobStore(directory / "blobs")
        spec = register_model(directory / "hf", "tiny", blobs, weights_dtype, max_tokens=MAX_TOKENS)
        round_frozen(model, weights_dtype)
        adapters = random_tensors(spec.delta_shapes(ADAPTER, spec.layer_ids))
        return cls(model, spec, blobs, put_revision(spec, adapters, blobs), adapters)

    @property
    def tokenizer(self) -> TextTokenizer:
        """The registered tokenizer, as a client has it."""
        wanted = self.spec.input
        assert isinstance(wanted, TokenInput)
        return TextTokenizer(self.files.path(wanted.tokenizer), wanted)

    @override
    def manifest(self, trained: Iterable[int], **values: Any) -> SliceManifest:
        return super().manifest(trained, **({"adapter": ADAPTER} | values))

    @override
    def reference(self, layer_ids: Iterable[int]) -> nn.Module:
        model = copy.deepcopy(self.model)
        kept = list(layer_ids)
        model.model.layers = nn.ModuleList(model.model.layers[i] for i in kept)
        model.config.num_hidden_layers = len(kept)
        targets = [f"model.layers.{i}.{name}" for i in range(len(kept)) for name in ADAPTER.targets]
        lora = LoraConfig(r=ADAPTER.rank, lora_alpha=int(ADAPTER.alpha), target_modules=targets)
        inject_adapter_in_model(lora, model)
        with torch.no_grad():
            for name, value in self.adapters.items():
                key = TensorKey.parse(name)
                if key.piece == HEAD or key.layer_id in kept:
                    reference_parameter(model, key, kept).copy_(torch.tensor(value))
        return model.requires_grad_(requires_grad=True)


def reference_parameter(model: nn.Module, key: TensorKey, kept: Sequence[int]) -> nn.Parameter:
    """Find an adapter tensor in a reference model that has only some layers."""
    position = "" if key.layer_id is None else f"layers.{kept.index(key.layer_id)}"
    module, _, last = _LLAMA.full_name(TensorKey(position or HEAD, key.name)).rpartition(".")
    factor = {LORA_A: "lora_A.default.weight", "lora_b": "lora_B.default.weight"}.get(last, last)
    return model.get_parameter(f"{module}.{factor}")


def call_plain(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Give a plain model's logits for a padded batch."""
    is_real = tokens >= 0
    logits: torch.Tensor = model(
        tokens.clamp(min=0), attention_mask=is_real.long(), use_cache=False
    ).logits
    return logits


class WordTexts:
    """Short texts of different length whose label some words tell; every third is held out."""

    def __init__(self, size: int = 18, seed: int = 5) -> None:
        self._texts = [
            write_text(LABELS[i % 3], np.random.default_rng([seed, i])) for i in range(size)
        ]

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> TextExample:
        return TextExample(self._texts[index], self.label_of(index))

    def label_of(self, index: int) -> str:
        return LABELS[index % len(LABELS)]

    def key_of(self, index: int) -> str:
        return str(index)

    def is_held_out(self, index: int) -> bool | None:
        return (index // 3) % 3 == 2


def write_text(label: str, generator: np.random.Generator) -> str:
    """Write two to twelve words, at least one of which tells the label."""
    plain = generator.choice(WORDS[12:], size=generator.integers(1, 10))
    telling = generator.choice(TELLING[label], size=generator.integers(1, 3))
    return " ".join(generator.permutation([*plain, *telling]).tolist())


def word_data(tiny: TinyLlama, size: int = 18) -> MatchedDataset:
    """Match texts to the tiny model; a third of them is held out."""
    return match_labels(WordTexts(size), LABELS, tiny.tokenizer)
