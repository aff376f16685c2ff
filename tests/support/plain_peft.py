"""Counts the right answers of an export with plain transformers and peft; knows nothing of fedra.

Usage: python plain_peft.py REQUESTS.json, where the file holds a list of exports:
[{"export": DIR, "sites": {NAME: [[IMAGE, LABEL], ...]}}, ...]. Prints, for each export, how
many of each site's images were right, and which modules of fedra got loaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageClassification, ViTImageProcessor


def count_right(export: Path, sites: dict[str, list[tuple[str, str]]]) -> dict[str, int]:
    """Count the right answers on each site's images."""
    processor = ViTImageProcessor.from_pretrained(export / "base")
    base = AutoModelForImageClassification.from_pretrained(export / "base")
    model = PeftModel.from_pretrained(base, export / "adapter").eval()
    counts = {}
    for name, images in sites.items():
        pictures = [np.asarray(Image.open(path).convert("RGB")) for path, _ in images]
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            answers = model(pixel_values=pixels).logits.argmax(1).tolist()
        labels = [base.config.label2id[label] for _, label in images]
        counts[name] = sum(answer == label for answer, label in zip(answers, labels, strict=True))
    return counts


if __name__ == "__main__":
    requests = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    right = [count_right(Path(item["export"]), item["sites"]) for item in requests]
    loaded = sorted(name for name in sys.modules if name.startswith("fedra"))
    sys.stdout.write(json.dumps({"right": right, "fedra_modules": loaded}) + "\n")
