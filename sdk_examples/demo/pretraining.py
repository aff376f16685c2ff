"""The foundation model of the demo: a 12-layer ViT that has only ever seen printed digits."""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils.logging import disable_progress_bar

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

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
Progress = Callable[[int, int, float], None]
"""Called with the step, the number of steps and the share of printed digits it gets right."""


class Stage(NamedTuple):
    """A stretch of pretraining at one depth; the model grows from stage to stage."""

    num_layers: int
    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Pretraining:
    """How the model is built and pretrained; any change makes another model."""

    hidden_size: int = 96
    num_heads: int = 4
    patch_px: int = 8
    stages: tuple[Stage, ...] = (Stage(3, 800, 2e-3), Stage(12, 160, 1e-3))
    batch_size: int = 64
    layer_drop: float = 0.1
    seed: int = 0

    @property
    def key(self) -> str:
        """Name the model by its settings and by the code that draws and trains it."""
        source = "".join(inspect.getsource(part) for part in _RECIPE)
        told = json.dumps(asdict(self), sort_keys=True) + source
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def pretrained_model(cache: Path, settings: Pretraining, on_step: Progress) -> Path:
    """Give the directory of the pretrained model; train it first unless the cache has it."""
    directory = cache / settings.key
    if (directory / "config.json").exists():
        return directory
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = _train(settings, on_step)
    partial = cache / f"{settings.key}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # unannotated
    model.save_pretrained(partial)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "rescale_factor": 1 / 255,
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


def _batches(settings: Pretraining) -> Batches:
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


def _prepared_ahead(batches: Batches) -> Batches:
    """Draw the next batch in another thread while this one is trained on."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(next, batches)
        while True:
            ready = pending.result()
            pending = pool.submit(next, batches)
            yield ready


def _config(settings: Pretraining) -> ViTConfig:
    return ViTConfig(
        image_size=SIZE_PX,
        patch_size=settings.patch_px,
        num_hidden_layers=settings.stages[0].num_layers,
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        num_attention_heads=settings.num_heads,
        initializer_range=0.1,  # the default of 0.02 is for models eight times as wide
        id2label=dict(enumerate(LABELS)),
        label2id={label: label_id for label_id, label in enumerate(LABELS)},
    )


def _train(settings: Pretraining, on_step: Progress) -> ViTForImageClassification:
    """Train a shallow model, then grow it: half the time of training it deep from the start."""
    torch.set_num_threads(1)  # the steps are too short to be worth sharing
    model = ViTForImageClassification(_config(settings))
    batches = _prepared_ahead(_batches(settings))
    generator = torch.Generator().manual_seed(settings.seed)
    steps_total, steps_done = sum(stage.steps for stage in settings.stages), 0
    model.train()
    for stage in settings.stages:
        _grow(model, stage.num_layers)
        drop = settings.layer_drop if stage is settings.stages[-1] else 0.0
        for share_right in _steps(model, stage, batches, drop, generator):
            steps_done += 1
            on_step(steps_done, steps_total, share_right)
    return model


def _grow(model: ViTForImageClassification, num_layers: int) -> None:
    """Put copies of each layer behind it, all with an equal part of its contribution."""
    copies = num_layers // len(model.vit.layers)
    grown = [copy.deepcopy(layer) for layer in model.vit.layers for _ in range(copies)]
    for layer, target in itertools.product(grown, ("attention.o_proj", "mlp.fc2")):
        for parameter in layer.get_submodule(target).parameters():
            parameter.data /= copies
    model.vit.layers = torch.nn.ModuleList(grown)
    model.config.num_hidden_layers = num_layers


def _steps(
    model: ViTForImageClassification,
    stage: Stage,
    batches: Batches,
    drop: float,
    generator: torch.Generator,
) -> Iterator[float]:
    """Minimise cross-entropy and yield the share of right answers of each step.

    Layers are dropped at random with the given chance, so that each is useful without others.
    """
    layers = model.vit.layers
    optimizer = torch.optim.AdamW(
        model.parameters(), stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.02
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, stage.learning_rate, stage.steps, pct_start=0.15
    )
    for images, labels in itertools.islice(batches, stage.steps):
        kept = torch.rand(len(layers), generator=generator) >= drop
        model.vit.layers = torch.nn.ModuleList(itertools.compress(layers, kept.tolist()))
        logits = model(pixel_values=images).logits
        optimizer.zero_grad()
        torch.autograd.backward(torch.nn.functional.cross_entropy(logits, labels))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield (logits.argmax(1) == labels).float().mean().item()
    model.vit.layers = layers


_RECIPE: Final = (print_digit, _batches, _config, _train, _grow, _steps)
