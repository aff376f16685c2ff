"""An image counts once, under one label and on one side of the split, however it is reached."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fedra_edge.data import ImageFolder, LocalDataset, ManifestDataset, match_labels


def save_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8)).save(path)


def link(place: Path, target: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.symlink_to(target, target_is_directory=target.is_dir())
    except OSError:
        pytest.skip("this system does not let us make links")


def contents(dataset: LocalDataset) -> dict[str, str]:
    return {dataset.key_of(index): dataset.label_of(index) for index in range(len(dataset))}


def test_a_manifest_that_spells_a_path_differently_lists_it_once(tmp_path: Path) -> None:
    lines = ["path,label,split"]
    for number in range(30):
        save_image(tmp_path / "bolt" / f"{number}.png")
        name = f"{number}.png"
        lines += [f"{prefix}{name},bolt," for prefix in ("bolt/", "./bolt/", "bolt/../bolt/")]
        lines += [f"bolt//{name},bolt,test", f"{tmp_path.as_posix()}/bolt/{name},nut,"]
    manifest = tmp_path / "images.csv"
    manifest.write_text("\n".join(lines), encoding="utf-8")
    dataset = ManifestDataset(manifest)
    assert contents(dataset) == {f"bolt/{number}.png": "bolt" for number in range(30)}
    assert dataset.skipped.counts == {
        "listed twice": 60,
        "listed twice with different values": 60,
    }
    matched = match_labels(dataset, ["bolt"])
    trained = {dataset.key_of(index) for index in matched.train_indices}
    held_out = {dataset.key_of(index) for index in matched.held_out_indices}
    assert trained
    assert held_out
    assert not trained & held_out


def test_the_spelling_of_a_path_does_not_decide_the_split(tmp_path: Path) -> None:
    keys = []
    for spelling in ("bolt/0.png", "./bolt/0.png", "bolt/../bolt/0.png", "bolt\\0.png"):
        manifest = tmp_path / "images.csv"
        manifest.write_text(f"path,label\n{spelling},bolt\n", encoding="utf-8")
        keys.append(ManifestDataset(manifest).key_of(0))
    assert set(keys) == {"bolt/0.png"}


def test_a_manifest_that_lists_a_link_and_its_target_lists_one_image(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    link(tmp_path / "b.png", tmp_path / "a.png")
    manifest = tmp_path / "images.csv"
    manifest.write_text("path,label,split\na.png,bolt,test\nb.png,bolt,train\n", encoding="utf-8")
    assert contents(ManifestDataset(manifest)) == {"a.png": "bolt"}


def test_an_image_counts_at_its_own_place_and_not_where_a_link_shows_it(tmp_path: Path) -> None:
    save_image(tmp_path / "train" / "nut" / "0.png")
    save_image(tmp_path / "train" / "nut" / "2.png")
    save_image(tmp_path / "test" / "nut" / "1.png")
    link(tmp_path / "train" / "bolt" / "0.png", tmp_path / "train" / "nut" / "0.png")
    link(tmp_path / "train" / "nut" / "1.png", tmp_path / "test" / "nut" / "1.png")
    dataset = ImageFolder(tmp_path)
    assert contents(dataset) == {
        "test/nut/1.png": "nut",
        "train/nut/0.png": "nut",
        "train/nut/2.png": "nut",
    }
    assert dataset.skipped.counts == {"link to an image that was already read": 2}


def test_a_link_to_a_file_elsewhere_counts_once(tmp_path: Path) -> None:
    save_image(tmp_path / "store" / "0.png")
    link(tmp_path / "data" / "bolt" / "0.png", tmp_path / "store" / "0.png")
    link(tmp_path / "data" / "nut" / "0.png", tmp_path / "store" / "0.png")
    assert contents(ImageFolder(tmp_path / "data")) == {"bolt/0.png": "bolt"}


@pytest.mark.parametrize("target", [".", "..", "bolt", "bolt/deep"])
def test_a_link_to_a_directory_gives_no_image_another_label(tmp_path: Path, target: str) -> None:
    root = tmp_path / "data"
    save_image(tmp_path / "elsewhere" / "9.png")
    save_image(root / "bolt" / "0.png")
    save_image(root / "bolt" / "deep" / "1.png")
    save_image(root / "nut" / "2.png")
    link(root / "nut" / "a", root / target)
    link(root / "also", root / "bolt")
    dataset = ImageFolder(root)
    assert contents(dataset) == {
        "bolt/0.png": "bolt",
        "bolt/deep/1.png": "bolt",
        "nut/2.png": "nut",
    }
    assert dataset.skipped


def test_a_class_may_be_a_link_to_a_directory_elsewhere(tmp_path: Path) -> None:
    save_image(tmp_path / "store" / "bolts" / "0.png")
    link(tmp_path / "data" / "bolt", tmp_path / "store" / "bolts")
    dataset = ImageFolder(tmp_path / "data")
    assert contents(dataset) == {"bolt/0.png": "bolt"}
    assert not dataset.skipped
