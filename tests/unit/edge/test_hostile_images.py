"""Image files that are damaged, huge or no files at all are skipped and never stop a client."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedra_edge.data import ImageFolder, ManifestDataset, match_labels
from fedra_edge.data.images import MAX_PIXELS, MAX_SIDE_PX, problem_of_image, read_image

BROKEN_EXIF = (
    b"Exif\0\0XX\0*\0\0\0\x08\0\0",
    b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
    b"Exif\0\0II*\0",
    b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01",
    b"Exif\0\0",
    b"rubbish",
)
MEMORY_PROBE = """
import resource, sys
from pathlib import Path
import numpy as np
from fedra_edge.data import prepare_image
from fedra_edge.data.images import problem_of_image, read_image
from fedra_edge.protocol.models import ImageInput
wanted = ImageInput(size_px=224, channels=3, mean=(0, 0, 0), std=(1, 1, 1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert problem_of_image(Path(sys.argv[1])) is None
prepare_image(read_image(Path(sys.argv[1])), wanted)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("exif", BROKEN_EXIF)
def test_an_image_whose_exif_is_broken_is_taken_to_be_upright(
    tmp_path: Path, exif: bytes, suffix: str
) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.new("RGB", (16, 12)).save(path, exif=exif)
    assert problem_of_image(path) is None
    assert read_image(path).shape == (12, 16, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "gif", "bmp"])
def test_whatever_is_damaged_the_probe_says_what_reading_says(tmp_path: Path, suffix: str) -> None:
    generator = np.random.default_rng(3)
    whole = tmp_path / f"whole.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, exif=exif)
    content = np.frombuffer(whole.read_bytes(), dtype=np.uint8)
    damaged = tmp_path / f"damaged.{suffix}"
    for _ in range(150):
        changed = content.copy()
        places = generator.integers(0, min(len(content), 200), 3)
        changed[places] = generator.integers(0, 256, 3, dtype=np.uint8)
        damaged.write_bytes(changed.tobytes())
        if problem_of_image(damaged) is None:
            assert read_image(damaged).size


@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, 0), (2, 2), (3, 11), (4, 9), (5, 0), (6, 9), (7, 11), (8, 2)],
)
def test_every_orientation_is_turned_upright(tmp_path: Path, orientation: int, corner: int) -> None:
    stored = np.arange(12, dtype=np.uint8).reshape(4, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "image.png", exif=exif)
    upright = read_image(tmp_path / "image.png")
    assert upright.shape == ((4, 3) if orientation < 5 else (3, 4))
    assert upright[0, 0] == corner


@pytest.mark.parametrize("size", [(MAX_SIDE_PX + 1, 1), (1, MAX_SIDE_PX + 1), (4001, 4000)])
def test_an_image_that_is_too_large_is_skipped(tmp_path: Path, size: tuple[int, int]) -> None:
    assert size[0] * size[1] > MAX_PIXELS or max(size) > MAX_SIDE_PX
    (tmp_path / "cat").mkdir()
    Image.new("L", size).save(tmp_path / "cat" / "large.png")
    Image.new("L", (8, 8)).save(tmp_path / "cat" / "small.png")
    matched = match_labels(ImageFolder(tmp_path), ["cat"])
    assert matched.report.samples("image is too large") == ("cat/large.png",)
    assert len(matched.train_indices) == 1


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("LA", "png"), ("P", "png"), ("RGB", "jpg"), ("RGBA", "png"), ("I;16", "png")],
)
def test_a_large_image_is_averaged_down_and_shows_the_same(
    tmp_path: Path, mode: str, suffix: str
) -> None:
    path = tmp_path / f"large.{suffix}"
    value = 51 * 257 if mode == "I;16" else 51 if len(mode) < 3 else (51, 102, 153, 0)[: len(mode)]
    Image.new(mode, (4096, 2050), value).save(path)
    image = read_image(path)
    assert min(image.shape[:2]) >= 1024
    assert max(image.shape[:2]) <= 2048
    if mode != "P":
        expected = [51, 102, 153] if image.ndim == 3 else 51
        np.testing.assert_allclose(image, np.broadcast_to(expected, image.shape), atol=2)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures as Linux does")
@pytest.mark.parametrize(
    ("mode", "size", "suffix", "pixel_bytes"),
    [
        ("RGBA", (4000, 4000), "png", 4),
        ("RGB", (MAX_SIDE_PX, 800), "png", 4),
        ("RGB", (4000, 4000), "jpg", 4),
        ("LA", (4000, 4000), "png", 4),
    ],
)
def test_reading_takes_little_more_than_the_decoded_image(
    tmp_path: Path, mode: str, size: tuple[int, int], suffix: str, pixel_bytes: int
) -> None:
    path = tmp_path / f"large.{suffix}"
    Image.new(mode, size).save(path)
    command = [sys.executable, "-c", MEMORY_PROBE, str(path)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(told) < 1.6 * pixel_bytes * size[0] * size[1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.timeout(30)
def test_a_pipe_named_like_an_image_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "cat" / "1.png")
    os.mkfifo(tmp_path / "cat" / "2.png")
    manifest = tmp_path / "images.csv"
    manifest.write_text("path,label\ncat/1.png,cat\ncat/2.png,cat\ncat,cat\n", encoding="utf-8")
    for dataset, count in ((ImageFolder(tmp_path / "."), 1), (ManifestDataset(manifest), 2)):
        matched = match_labels(dataset, ["cat"])
        assert matched.report.counts["not a regular file"] == count
        assert len(matched.train_indices) == 1
