"""A model that does not fit the memory there is can be used all the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from fedra_server.exporting import export_revision
from fedra_server.modelbook.registering import register_model
from fedra_server.storage.blobs import BlobStore
from tests.support.memory_groups import limited_group
from tests.support.memory_limits import run_limited
from tests.support.sites import write_folder
from tests.support.tiny_vit import ADAPTER, LABELS, TinyVit, put_revision, random_tensors

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform != "linux", reason="limits and figures are those of Linux"),
]
MEGABYTE = 10**6
NUM_LAYERS = 18
LEAST_BYTES = 300 * MEGABYTE
HEADROOM_BYTES = 64 * MEGABYTE
GROUP_BYTES = 250 * MEGABYTE


def build_large() -> ViTForImageClassification:
    """Build a model with much in its weights and little to compute: few tokens, a wide inside."""
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=NUM_LAYERS, num_attention_heads=4,
        intermediate_size=2**15, image_size=16, patch_size=8,
        id2label=dict(enumerate(LABELS)), label2id={label: i for i, label in enumerate(LABELS)},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ViTForImageClassification(config)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose base alone is larger than the memory in these tests."""
    directory = tmp_path_factory.mktemp("large")
    build_large().save_pretrained(directory / "hf")
    blobs = BlobStore(directory / "blobs")
    spec = register_model(directory / "hf", "large", blobs)
    revision = put_revision(spec, random_tensors(spec.delta_shapes(ADAPTER, spec.layer_ids)), blobs)
    export_revision(spec, ADAPTER, revision, blobs, directory / "export")
    assert (directory / "export" / "base" / "model.safetensors").stat().st_size > LEAST_BYTES
    return directory / "export"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    tiny = TinyVit.register(directory)
    export_revision(tiny.spec, ADAPTER, tiny.revision, tiny.blobs, directory / "export")
    return directory / "export"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("site") / "images", seed=4).path / "test" / "nut"


@pytest.fixture(scope="module")
def expected(large: Path, images: Path) -> str:
    done = run_limited("predict", "--export", large, "--data", images)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_prediction_needs_little_more_address_space_for_a_large_model(
    tiny: Path, large: Path, images: Path, expected: str
) -> None:
    least = run_limited("predict", "--export", tiny, "--data", images).address_peak_bytes
    limit_bytes = least + HEADROOM_BYTES
    done = run_limited(
        "predict", "--export", large, "--data", images, address_limit_bytes=limit_bytes
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected


def test_prediction_works_in_a_group_with_less_memory_than_the_model(
    large: Path, images: Path, expected: str
) -> None:
    with limited_group(GROUP_BYTES) as group:
        done = run_limited("predict", "--export", large, "--data", images, launcher=group.launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected


def test_evaluation_works_in_a_group_with_less_memory_than_the_model(
    large: Path, images: Path
) -> None:
    data = images.parent.parent
    with limited_group(GROUP_BYTES) as group:
        done = run_limited(
            "evaluate", "--export", large, "--data", data, "--json", launcher=group.launcher
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_examples"] == 3 * len(list(images.iterdir()))


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_less_memory_than_the_program_itself_takes_is_refused(
    tiny: Path, images: Path, command: str
) -> None:
    data = images if command == "predict" else images.parent.parent
    done = run_limited(command, "--export", tiny, "--data", data, "--memory", "50MB")
    assert done.returncode != 0
    assert "this process may use 50 MB, and needs" in done.stderr
