"""A tiny vision transformer, registered, with adapters, data and slices to try it on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from fedra_edge.data.dataset import Example
from fedra_edge.data.matching import MatchedDataset, match_labels
from fedra_edge.protocol.ids import LayerId, RevisionNumber
from fedra_edge.protocol.layers import HEAD, TensorKey
from fedra_edge.protocol.models import AdapterSpec, BlobRef, ModelSpec, Shape
from fedra_edge.protocol.slices import LayerRole, RevisionManifest, SliceManifest, TrainingSpec
from fedra_edge.protocol.tensors import FloatArray, serialize_tensors
from fedra_edge.slicing import materialize
from fedra_edge.training.trainer import SliceWork
from fedra_server.modelbook.registering import register_model
from fedra_server.modelbook.stored_dtypes import WeightsDtype
from fedra_server.storage.blobs import BlobStore

LABELS = ("bolt", "nut", "washer")
NUM_LAYERS = 4
_PEFT_NAMES = {"lora_a": "lora_A.default.weight", "lora_b": "lora_B.default.weight"}
ADAPTER = AdapterSpec(rank=2, alpha=4.0, targets=("attention.o_proj", "mlp.fc2"))


def build_vit(
    num_layers: int = NUM_LAYERS,
    hidden_size: int = 32,
    **settings: Any,  # noqa: ANN401 (as ViTConfig takes them)
) -> ViTForImageClassification:
    """Build a model with weights large enough that every layer matters."""
    config = ViTConfig(
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        initializer_range=0.2,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ViTForImageClassification(config)


def round_frozen(model: nn.Module, weights_dtype: WeightsDtype) -> None:
    """Round every weight but the trained head's to a format, as its owner would do with torch."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(("classifier.", "score.")):
                parameter.copy_(parameter.to(getattr(torch, weights_dtype)))


@dataclass(frozen=True)
class BlobFiles:
    """A layer cache that has everything."""

    blobs: BlobStore

    def path(self, ref: BlobRef, /) -> Path:
        return self.blobs.path(ref.sha256)


@dataclass(frozen=True)
class TinyVit:
    """A registered model, the plain one that computes the same, and a revision that changes it."""

    model: ViTForImageClassification
    spec: ModelSpec
    blobs: BlobStore
    revision: RevisionManifest
    adapters: Mapping[str, FloatArray]

    @classmethod
    def register(cls, directory: Path, weights_dtype: WeightsDtype = "float32") -> TinyVit:
        model = build_vit()
        model.save_pretrained(directory / "hf")
        blobs = BlobStore(directory / "blobs")
        spec = register_model(directory / "hf", "tiny", blobs, weights_dtype)
        round_frozen(model, weights_dtype)
        adapters = random_tensors(spec.delta_shapes(ADAPTER, spec.layer_ids))
        return cls(model, spec, blobs, put_revision(spec, adapters, blobs), adapters)

    @property
    def files(self) -> BlobFiles:
        return BlobFiles(self.blobs)

    def manifest(
        self,
        trained: Iterable[int],
        *,
        depth: str = "full",
        training: TrainingSpec | None = None,
        **values: Any,  # noqa: ANN401 (any field of the manifest)
    ) -> SliceManifest:
        """Describe a slice that trains these layers."""
        trained_ids = sorted(trained)
        held = range(self.spec.num_layers) if depth == "full" else trained_ids
        layers = [
            LayerRole(layer_id=LayerId(i), role="train" if i in trained_ids else "frozen")
            for i in held
        ]
        settings = {
            "assignment_id": "a1",
            "run": "run",
            "round_number": 1,
            "model_id": self.spec.model_id,
            "revision": self.revision,
            "adapter": ADAPTER,
            "training": training or TrainingSpec(batch_size=6),
            "layers": layers,
            "depth": depth,
            "residency": "resident",
            "micro_batch": 6,
            "steps": 1,
            "seed": 7,
            "remaining_s": 60.0,
            "predicted_peak_bytes": 0,
        }
        return SliceManifest.model_validate(settings | values)

    def work(self, trained: Iterable[int], **values: Any) -> SliceWork:  # noqa: ANN401 (as above)
        """Make a slice that trains these layers ready."""
        return materialize(self.manifest(trained, **values), self.spec, self.files)

    def reference(self, layer_ids: Iterable[int]) -> nn.Module:
        """Build the plain transformers + peft model that has these layers only."""
        kept = list(layer_ids)
        model = build_vit(num_layers=len(kept))
        own = self.model.state_dict()
        moved = {f"vit.layers.{index}.": f"vit.layers.{i}." for index, i in enumerate(kept)}
        model.load_state_dict({name: own[_moved(name, moved)] for name in model.state_dict()})
        targets = [f"{prefix}{target}" for prefix in moved for target in ADAPTER.targets]
        lora = LoraConfig(r=ADAPTER.rank, lora_alpha=int(ADAPTER.alpha), target_modules=targets)
        inject_adapter_in_model(lora, model)
        positions = {i: index for index, i in enumerate(kept)}
        with torch.no_grad():
            for name, value in self.adapters.items():
                if (key := TensorKey.parse(name)).piece == HEAD or key.layer_id in positions:
                    parameter = reference_parameter(model, key, positions)
                    parameter.copy_(torch.tensor(value))
        for parameter in model.parameters():
            parameter.requires_grad = True
        return model


def reference_parameter(
    model: nn.Module, key: TensorKey, positions: Mapping[int, int]
) -> nn.Parameter:
    """Find an adapter tensor in a reference model."""
    prefix = "" if key.layer_id is None else f"vit.layers.{positions[key.layer_id]}."
    module, _, last = key.name.rpartition(".")
    own = f"{module}.{_PEFT_NAMES[last]}" if last in _PEFT_NAMES else key.name
    return model.get_parameter(prefix + own)


def _moved(name: str, moved: Mapping[str, str]) -> str:
    for here, there in moved.items():
        if name.startswith(here):
            return there + name.removeprefix(here)
    return name


def random_tensors(shapes: Mapping[str, Shape], seed: int = 3) -> dict[str, FloatArray]:
    """Draw a value for every tensor."""
    generator = np.random.default_rng(seed)
    return {
        name: generator.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()
    }


def put_revision(
    spec: ModelSpec, adapters: Mapping[str, FloatArray], blobs: BlobStore
) -> RevisionManifest:
    """Store an adapter state as one blob per layer and one for the head."""

    def put(layer_id: LayerId | None) -> BlobRef:
        held = {
            name: value
            for name, value in adapters.items()
            if TensorKey.parse(name).layer_id == layer_id
        }
        return blobs.put_bytes(serialize_tensors(held))

    layers = tuple(put(layer_id) for layer_id in spec.layer_ids)
    return RevisionManifest(number=RevisionNumber(0), layers=layers, head=put(None))


class NoiseImages:
    """A dataset of random images; every third one is held out."""

    def __init__(self, size: int = 18) -> None:
        generator = np.random.default_rng(11)
        self._images: NDArray[np.uint8] = generator.integers(
            0, 256, (size, 16, 16, 3), dtype=np.uint8
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        return Example(self._images[index], self.label_of(index))

    def label_of(self, index: int) -> str:
        return LABELS[index % len(LABELS)]

    def key_of(self, index: int) -> str:
        return str(index)

    def is_held_out(self, index: int) -> bool | None:
        return index % 3 == 2


def noise_data(size: int = 18) -> MatchedDataset:
    """Match random images to the tiny model's labels; a third of them is held out."""
    return match_labels(NoiseImages(size), LABELS)
