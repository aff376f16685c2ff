"""The foundation model of the demo: a 12-layer ViT that has only ever seen printed digits."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from transformers import ViTConfig, ViTForImageClassification

from sdk_examples.demo.sites import LABELS, SIZE_PX

FONTS: Final = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralItalic.ttf",
    "cmb10.ttf",
    "cmr10.ttf",
    "cmss10.ttf",
    "cmti10.ttf",
    "cmtt10.ttf",
)

_INVERTED_SHARE: Final = 0.4

Progress = Callable[[int, int, float], None]
"""Called with the step, the number of steps and the share of printed digits it gets right."""


@dataclass(frozen=True)
class Pretraining:
    """How the model is built and pretrained; any change makes another model."""

    num_layers: int = 12
    hidden_size: int = 96
    num_heads: int = 4
    patch_px: int = 8
    steps: int = 450
    batch_size: int = 96
    learning_rate: float = 1.5e-3
    layer_drop: float = 0.1
    seed: int = 0

    @property
    def key(self) -> str:
        """Name the model by its settings and by the code that draws and trains it."""
        source = "".join(inspect.getsource(part) for part in (print_digit, _train, _config))
        told = json.dumps(asdict(self), sort_keys=True) + source
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def pretrained_model(cache: Path, settings: Pretraining, on_step: Progress) -> Path:
    """Give the directory of the pretrained model; train it first unless the cache has it."""
    directory = cache / settings.key
    if (directory / "config.json").exists():
        return directory
    torch.manual_seed(settings.seed)
    model = ViTForImageClassification(_config(settings))
    _train(model, settings, on_step)
    partial = cache / f"{settings.key}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"height": SIZE_PX, "width": SIZE_PX},
    }
    (partial / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    partial.replace(directory)
    return directory


def print_digit(
    label: int, font: ImageFont.FreeTypeFont, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Print a digit a little turned, shifted and sheared, in one light and one dark colour."""
    sheet = Image.new("L", (SIZE_PX, SIZE_PX))
    middle = tuple(SIZE_PX / 2 + generator.uniform(-2.5, 2.5, 2))
    width = int(generator.integers(0, 2))
    ImageDraw.Draw(sheet).text(
        middle, LABELS[label], fill=255, font=font, anchor="mm", stroke_width=width
    )
    turn, shear = generator.uniform(-0.3, 0.3, 2)
    matrix = np.array([[np.cos(turn), np.sin(turn) + shear], [-np.sin(turn), np.cos(turn)]])
    offset = SIZE_PX / 2 * (1 - matrix.sum(axis=1))
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    turned = sheet.transform(
        sheet.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )
    blurred = turned.filter(ImageFilter.GaussianBlur(float(generator.uniform(0, 1))))
    ink = np.asarray(blurred, dtype=np.float32)[..., None] / 255
    light, dark = generator.uniform(150, 255, 3), generator.uniform(0, 105, 3)
    paper, colour = (dark, light) if generator.random() < _INVERTED_SHARE else (light, dark)
    grain = generator.normal(0, generator.uniform(0, 12), (SIZE_PX, SIZE_PX, 1))
    drawn = paper * (1 - ink) + colour * ink + grain
    return np.clip(drawn, 0, 255).astype(np.uint8)


def _batches(settings: Pretraining) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = np.random.default_rng(settings.seed)
    directory = Path(mpl.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(directory / name, px) for name in FONTS for px in (20, 24, 28)]
    while True:
        labels = generator.integers(len(LABELS), size=settings.batch_size)
        chosen = generator.integers(len(fonts), size=settings.batch_size)
        pictures = np.stack(
            [
                print_digit(int(label), fonts[font], generator)
                for label, font in zip(labels, chosen, strict=True)
            ]
        )
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        yield images, torch.from_numpy(labels)


def _config(settings: Pretraining) -> ViTConfig:
    return ViTConfig(
        image_size=SIZE_PX,
        patch_size=settings.patch_px,
        num_hidden_layers=settings.num_layers,
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        num_attention_heads=settings.num_heads,
        id2label=dict(enumerate(LABELS)),
        label2id={label: label_id for label_id, label in enumerate(LABELS)},
    )


def _train(model: ViTForImageClassification, settings: Pretraining, on_step: Progress) -> None:
    """Minimise cross-entropy; layers are dropped at random so that each is useful alone."""
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, settings.steps, pct_start=0.15
    )
    layers = model.vit.layers
    model.train()
    for step, (images, labels) in zip(range(settings.steps), _batches(settings), strict=False):
        keep = torch.rand(len(layers), generator=generator) >= settings.layer_drop
        model.vit.layers = torch.nn.ModuleList(
            layer for layer, is_kept in zip(layers, keep, strict=True) if is_kept
        )
        logits = model(pixel_values=images).logits
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(step + 1, settings.steps, (logits.argmax(1) == labels).float().mean().item())
    model.vit.layers = layers
    model.eval()
