"""Local datasets are listed, checked and matched by name, and nothing bad in them is fatal."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from PIL import Image

from fedra_edge.data import (
    Example,
    ImageFolder,
    ManifestDataset,
    SkipReport,
    is_held_out_by_key,
    match_labels,
    open_dataset,
    prepare_image,
)
from fedra_edge.data.images import read_image
from fedra_edge.data.preparing import image_of
from fedra_edge.errors import DataError
from fedra_edge.protocol.models import ImageInput

COLOUR = ImageInput(size_px=8, channels=3, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
GREY = ImageInput(size_px=8, channels=1, mean=(0.0,), std=(1.0,))


class ArrayDataset:
    """Examples in memory, as a user would write them."""

    def __init__(self, labels: list[str], held_out: list[bool | None] | None = None) -> None:
        self.labels = labels
        self.held_out = held_out or [None] * len(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return Example(np.full((8, 8), index, dtype=np.uint8), self.labels[index])

    def label_of(self, index: int) -> str:
        """Give the label."""
        return self.labels[index]

    def key_of(self, index: int) -> str:
        """Give a stable name."""
        return f"example-{index}"

    def is_held_out(self, index: int) -> bool | None:
        """Give what the test stated."""
        return self.held_out[index]


def save_image(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(path)


def save_bomb(path: Path) -> None:
    """Write a PNG of 400 million pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))


def write_manifest(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_an_image_folder_names_classes_by_directory(tmp_path: Path) -> None:
    save_image(tmp_path / "cat" / "1.png", 7)
    save_image(tmp_path / "dog" / "deeper" / "2.JPG")
    (tmp_path / ".hidden").mkdir()
    dataset = ImageFolder(tmp_path)
    assert [dataset.label_of(i) for i in range(len(dataset))] == ["cat", "dog"]
    assert [dataset.key_of(i) for i in range(2)] == ["cat/1.png", "dog/deeper/2.JPG"]
    assert dataset[0].image.shape == (8, 8, 3)
    assert dataset[0].image.max() == 7
    assert dataset.is_held_out(0) is None
    assert not dataset.skipped


def test_a_test_directory_is_held_out(tmp_path: Path) -> None:
    save_image(tmp_path / "train" / "cat" / "1.png")
    save_image(tmp_path / "test" / "cat" / "2.png")
    matched = match_labels(ImageFolder(tmp_path), ["cat"])
    assert matched.dataset.key_of(matched.train_indices[0]) == "train/cat/1.png"
    assert matched.dataset.key_of(matched.held_out_indices[0]) == "test/cat/2.png"


def test_a_train_directory_alone_is_split_by_key(tmp_path: Path) -> None:
    save_image(tmp_path / "train" / "cat" / "1.png")
    dataset = ImageFolder(tmp_path)
    assert (dataset.label_of(0), dataset.is_held_out(0)) == ("cat", None)


def test_classes_called_train_and_test_are_classes_when_they_hold_images(tmp_path: Path) -> None:
    save_image(tmp_path / "train" / "1.png")
    save_image(tmp_path / "test" / "2.png")
    dataset = ImageFolder(tmp_path)
    assert {dataset.label_of(0), dataset.label_of(1)} == {"train", "test"}


def test_bad_files_are_reported_and_the_rest_is_used(tmp_path: Path) -> None:
    save_image(tmp_path / "cat" / "good.png")
    (tmp_path / "cat" / "text.png").write_text("not an image")
    (tmp_path / "cat" / "empty.png").touch()
    (tmp_path / "cat" / "notes.txt").write_text("hello")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cat" / "truncated.png")
    whole = (tmp_path / "cat" / "truncated.png").read_bytes()
    (tmp_path / "cat" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    save_bomb(tmp_path / "cat" / "bomb.png")
    save_image(tmp_path / "horse" / "1.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "stray.png").touch()
    matched = match_labels(open_dataset(tmp_path), ["cat", "dog"])
    assert len(matched.train_indices) == 1
    assert matched.report.counts == {
        "unreadable image": 3,
        "image is too large": 1,
        "not an image file": 1,
        "class directory without images": 1,
        "file outside any class directory": 1,
        "label 'horse' is unknown to the model": 1,
        "the model's label has no example to train on here": 1,
        "label has too few examples to learn much from": 1,
    }
    assert "unreadable image: 3 (cat/empty.png, cat/text.png, cat/truncated.png)" in str(
        matched.report
    )


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    save_image(tmp_path / "cat" / "1.png")
    try:
        (tmp_path / "cat" / "again").symlink_to(tmp_path / "cat", target_is_directory=True)
        (tmp_path / "cat" / "up").symlink_to(tmp_path, target_is_directory=True)
        (tmp_path / "cat" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    except OSError:
        pytest.skip("this system does not let us make links")
    dataset = ImageFolder(tmp_path)
    matched = match_labels(dataset, ["cat"])
    assert matched.report.counts["link to a directory that was already read"] >= 1
    assert matched.report.counts["file not found"] == 1


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs file permissions")
def test_a_directory_that_cannot_be_listed_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir(mode=0)
    with pytest.raises(DataError, match="cannot be listed"):
        ImageFolder(tmp_path)


def test_labels_match_by_name_and_never_by_order(tmp_path: Path) -> None:
    for label in ("a", " b", "c"):
        save_image(tmp_path / label / "1.png")
    matched = match_labels(ArrayDataset(["a", " b ", "c"], [False] * 3), ["c", "b\n", "a"])
    assert [matched.label_ids[i] for i in range(3)] == [2, 1, 0]


def test_nothing_left_is_an_error_that_names_the_reasons() -> None:
    with pytest.raises(DataError, match="label 'Cat' is unknown") as caught:
        match_labels(ArrayDataset(["Cat"]), ["cat", "dog"])
    assert "cat, dog" in caught.value.remedy
    with pytest.raises(DataError, match="no example found"):
        match_labels(ArrayDataset([]), ["cat"])
    with pytest.raises(DataError, match="can be trained on"):
        match_labels(ArrayDataset(["cat"], [True]), ["cat"])


def test_the_remedy_fits_what_left_nothing_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "text.png").write_text("not an image")
    with pytest.raises(DataError, match="unreadable image") as caught:
        match_labels(ImageFolder(tmp_path), ["cat"])
    assert caught.value.remedy == "Give whole files that the user who runs the client may read."
    save_image(tmp_path / "Cat " / "1.png")
    with pytest.raises(DataError, match="unreadable image") as caught:
        match_labels(ImageFolder(tmp_path), ["cat"])
    assert "Name the classes as the model does: cat. Give whole files" in caught.value.remedy
    with pytest.raises(DataError) as caught:
        match_labels(ArrayDataset(["cat"], [True]), ["cat"])
    assert caught.value.remedy.startswith("Hold out fewer")


def test_two_equal_labels_of_the_model_are_refused() -> None:
    with pytest.raises(DataError, match="same name"):
        match_labels(ArrayDataset(["cat"]), ["cat", "cat "])


def test_a_batch_holds_prepared_images_and_label_ids() -> None:
    matched = match_labels(ArrayDataset(["x", "y", "x"], [False] * 3), ["y", "x"])
    images, label_ids = matched.batch(matched.train_indices, GREY)
    assert images.shape == (3, 1, 8, 8)
    assert images.dtype == np.float32
    assert label_ids.tolist() == [1, 0, 1]
    np.testing.assert_allclose(images[2], 2 / 255, rtol=1e-6)


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    save_image(tmp_path / "cat" / "1.png")
    matched = match_labels(ImageFolder(tmp_path), ["cat"])
    (tmp_path / "cat" / "1.png").unlink()
    with pytest.raises(DataError, match=r"cat/1\.png cannot be read: file not found"):
        matched.batch(matched.train_indices, COLOUR)


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("separator", [b",", b";", b"\t"])
def test_a_manifest_lists_paths_relative_to_itself(
    tmp_path: Path, prefix: bytes, separator: bytes
) -> None:
    save_image(tmp_path / "img" / "ü.png")
    lines = ["Path,Label,Split", "img/ü.png,cat,train", "", "img\\b.png,dog,test", "c.png,cat,"]
    text = prefix + "\r\n".join(lines).encode().replace(b",", separator)
    dataset = open_dataset(write_manifest(tmp_path / "data.csv", text))
    assert [dataset.is_held_out(i) for i in range(3)] == [False, True, None]
    assert [dataset.key_of(i) for i in range(3)] == ["img/ü.png", "img/b.png", "c.png"]
    assert image_of(dataset[0]).shape == (8, 8, 3)
    assert match_labels(dataset, ["cat"]).report.counts["file not found"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the line lacks the column path and label"),
        ("path,class\na,b", "line 1: the line lacks the column label"),
        ("path,label,label\n", "line 1: the line repeats a column"),
        ("path,label\na.png,cat\nb.png", "line 3: the line has 1 values for 2 columns"),
        ("path,label\n,cat", "line 2: the line has no path"),
        ("path,label\na.png, ", "line 2: the line has no label"),
        ("path,label,split\na.png,cat,validation", "line 2: the line has split 'validation'"),
        ('path,label\na.png,"cat', "line 2: the line is not CSV"),
        (b"path,label\na.png,b\xff", "line 2: the line is not UTF-8"),
        ("path,label\na\0.png,b", "line 2: the line has a path with a NUL"),
    ],
)
def test_a_broken_manifest_is_refused_with_its_line(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        ManifestDataset(write_manifest(tmp_path / "data.csv", text))
    assert caught.value.remedy


def test_a_path_listed_twice_counts_once(tmp_path: Path) -> None:
    text = "path,label\na.png,cat\na.png,cat\na.png,dog\n"
    dataset = ManifestDataset(write_manifest(tmp_path / "data.csv", text))
    assert len(dataset) == 1
    assert dataset.skipped.counts == {"listed twice": 1, "listed twice with different values": 1}


def test_a_path_that_is_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_dataset(tmp_path / "missing")
    (tmp_path / "data.bin").touch()
    with pytest.raises(DataError, match=r"no directory and no \.csv"):
        open_dataset(tmp_path / "data.bin")
    with pytest.raises(DataError, match="is no directory"):
        ImageFolder(tmp_path / "data.bin")
    with pytest.raises(DataError, match="cannot be read"):
        ManifestDataset(tmp_path / "missing.csv")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_image_becomes_eight_bit_grey_or_colour(tmp_path: Path, mode: str) -> None:
    suffix = "tif" if mode == "CMYK" else "png"
    Image.new(mode, (5, 3)).save(tmp_path / f"image.{suffix}")
    image = read_image(tmp_path / f"image.{suffix}")
    assert image.dtype == np.uint8
    assert image.shape in {(3, 5), (3, 5, 3)}


def test_an_image_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (5, 3)).save(tmp_path / "image.jpg", exif=exif)
    assert read_image(tmp_path / "image.jpg").shape == (5, 3)


@given(npst.arrays(np.uint8, npst.array_shapes(min_dims=2, max_dims=2, max_side=20)))
def test_prepared_images_have_the_wanted_shape_and_range(image: NDArray[np.uint8]) -> None:
    prepared = prepare_image(image, COLOUR)
    assert prepared.shape == (3, 8, 8)
    assert prepared.dtype == np.float32
    assert prepared.min() >= -1
    assert prepared.max() <= 1
    np.testing.assert_array_equal(prepared[0], prepared[2])
    np.testing.assert_array_equal(prepared, prepare_image(image[:, :, None], COLOUR))


@given(npst.arrays(np.uint8, (8, 8, 3)))
def test_an_image_of_the_right_size_keeps_its_values(image: NDArray[np.uint8]) -> None:
    expected = (image.transpose(2, 0, 1).astype(np.float32) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(prepare_image(image, COLOUR), expected, atol=1e-6)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8), dtype=np.float32),
        np.zeros((8,), dtype=np.uint8),
        np.zeros((8, 8, 2), dtype=np.uint8),
        np.zeros((0, 8), dtype=np.uint8),
    ],
)
def test_what_is_no_image_is_refused(image: NDArray[np.uint8]) -> None:
    with pytest.raises(DataError):
        prepare_image(image, COLOUR)


@given(st.sets(st.text(max_size=10), min_size=1, max_size=30), st.text(max_size=10))
def test_adding_an_example_moves_no_other(keys: set[str], added: str) -> None:
    before = {key: is_held_out_by_key(key) for key in keys}
    after = {key: is_held_out_by_key(key) for key in keys | {added}}
    assert before.items() <= after.items()


def test_about_a_fifth_is_held_out() -> None:
    held_out = sum(is_held_out_by_key(f"class/{i}.png") for i in range(2000))
    assert 320 < held_out < 480


def test_a_single_example_is_trained_on() -> None:
    key = next(i for i in range(1000) if is_held_out_by_key(f"example-{i}"))
    dataset = ArrayDataset(["other"] * key + ["cat"])
    matched = match_labels(dataset, ["cat"])
    assert (matched.train_indices, matched.held_out_indices) == ((key,), ())


@given(st.lists(st.tuples(st.sampled_from("abc"), st.text(max_size=3)), max_size=20))
def test_a_report_counts_each_reason_and_merges(entries: list[tuple[str, str]]) -> None:
    whole, first, second = SkipReport(), SkipReport(), SkipReport()
    for number, (reason, sample) in enumerate(entries):
        whole.add(reason, sample)
        (first if number < 5 else second).add(reason, sample)
    first.merge(second)
    assert first.counts == whole.counts
    assert sum(whole.counts.values()) == len(entries)
    assert all(len(whole.samples(reason)) <= 3 for reason in whole.counts)
    assert str(whole).count(": ") >= len(whole.counts)
