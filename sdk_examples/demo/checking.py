"""Loads the exported adapter with plain peft and counts what it gets right at each site.

Run as ``python -m sdk_examples.demo.checking EXPORT SITES``; it knows nothing of fedra and
prints one JSON object: for each site, how many held-out images there are and how many are right.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageClassification


def count_correct(export: Path, sites: Path) -> dict[str, dict[str, int]]:
    """Evaluate the adapted model on the test folder of every site."""
    base = AutoModelForImageClassification.from_pretrained(export / "base")
    model = PeftModel.from_pretrained(base, export / "adapter").eval()
    steps = json.loads((export / "base" / "preprocessor_config.json").read_text("utf-8"))
    return {
        site.name: _count(model, base.config.label2id, steps, site / "test")
        for site in sorted(sites.iterdir())
        if site.is_dir()
    }


def _count(
    model: PeftModel, label2id: Mapping[str, int], steps: Mapping[str, Any], directory: Path
) -> dict[str, int]:
    paths = sorted(directory.glob("*/*.png"))
    images = torch.stack([_prepare(path, steps) for path in paths])
    labels = torch.tensor([label2id[path.parent.name] for path in paths])
    with torch.no_grad():
        predicted = model(pixel_values=images).logits.argmax(1)
    return {"num_examples": len(paths), "num_correct": int((predicted == labels).sum())}


def _prepare(path: Path, steps: Mapping[str, Any]) -> Tensor:
    """Scale and normalise; the demo's images have the model's size already."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    mean, std = (np.array(steps[key], dtype=np.float32) for key in ("image_mean", "image_std"))
    return torch.from_numpy((pixels / 255 - mean) / std).permute(2, 0, 1)


if __name__ == "__main__":
    print(json.dumps(count_correct(Path(sys.argv[1]), Path(sys.argv[2]))))
