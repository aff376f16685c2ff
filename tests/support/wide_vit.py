"""A vision transformer with much in its weights and little to compute: few tokens, wide inside."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

from tests.support.federation import MODEL
from tests.support.servers import run_server_command
from tests.support.sites import SIZE_PX
from tests.support.tiny_vit import LABELS


def prepare_wide_home(directory: Path, num_layers: int, inner_size: int) -> Path:
    """Make a server home with such a model registered; each layer has 512 bytes per inner unit."""
    home, saved = directory / "home", directory / "saved"
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=num_layers, num_attention_heads=4,
        intermediate_size=inner_size, image_size=SIZE_PX, patch_size=SIZE_PX // 2,
        id2label=dict(enumerate(LABELS)), label2id={label: i for i, label in enumerate(LABELS)},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTForImageClassification(config).save_pretrained(saved)
    run_server_command("init", "--home", str(home))
    run_server_command("model", "add", MODEL, str(saved), "--home", str(home))
    return home
