"""Examples to predict are found in any layout, in a stable order, under stable names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedra_edge.data.dataset import Example, TextExample
from fedra_edge.data.unlabelled import Examples, ExampleSource, open_examples
from fedra_edge.errors import DataError
from fedra_edge.protocol.models import BlobRef, ImageInput, TokenInput
from tests.support.sites import save_image

IMAGES = ImageInput(size_px=8, channels=3, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
TEXTS = TokenInput(
    vocabulary_size=10, max_tokens=8, tokenizer=BlobRef(sha256="0" * 64, size_bytes=1)
)


def image_at(path: Path, value: int = 0) -> Path:
    save_image(path, np.full((8, 8, 3), value, dtype=np.uint8))
    return path


def keys(data: ExampleSource) -> list[str]:
    examples = open_examples(data, IMAGES)
    return [examples.key_of(index) for index in range(len(examples))]


def image_of(examples: Examples, index: int) -> int:
    example = examples[index]
    assert isinstance(example, Example)
    return int(example.image[0, 0, 0])


class Squares:
    """The least that a program must bring."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Example:
        return Example(np.full((8, 8), index, dtype=np.uint8), "")

    def key_of(self, index: int) -> str:
        return f"square-{index}"


def test_a_directory_is_searched_to_any_depth_in_order(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.jpg", "a/deep/er/y.PNG", "test/nut/1.png"):
        image_at(tmp_path / name)
    assert keys(tmp_path) == keys(str(tmp_path))
    assert keys(tmp_path) == ["a/deep/er/y.PNG", "a/z.jpg", "b.png", "test/nut/1.png"]


def test_what_is_hidden_is_ignored_and_what_is_no_image_is_counted(tmp_path: Path) -> None:
    for name in ("a.png", ".b.png", ".git/c.png"):
        image_at(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").write_text("no image")
    examples = open_examples(tmp_path, IMAGES)
    assert keys(tmp_path) == ["a.png"]
    assert getattr(examples, "skipped").counts == {"another kind of file": 1}  # noqa: B009


def test_links_are_followed_once(tmp_path: Path) -> None:
    image_at(tmp_path / "elsewhere" / "a.png")
    inside = tmp_path / "inside"
    image_at(inside / "b.png")
    (inside / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (inside / "loop").symlink_to(inside, target_is_directory=True)
    assert keys(inside) == ["b.png", "linked/a.png"]


def test_a_csv_file_needs_no_labels(tmp_path: Path) -> None:
    image_at(tmp_path / "a.png")
    image_at(tmp_path / "sub" / "b.png")
    for text in ("path\nsub/b.png\na.png\n", "label;path\n;sub\\b.png\nnut;./a.png\n"):
        (tmp_path / "list.csv").write_text(text, encoding="utf-8")
        assert keys(tmp_path / "list.csv") == ["sub/b.png", "a.png"]


def test_a_list_keeps_its_order_and_its_names(tmp_path: Path) -> None:
    paths = [image_at(tmp_path / name, value) for value, name in enumerate(("b.png", "a.png"))]
    assert keys(paths) == [path.as_posix() for path in paths]
    assert keys([str(path) for path in paths]) == keys(paths)
    assert [image_of(open_examples(paths, IMAGES), index) for index in range(2)] == [0, 1]


def test_one_image_and_a_program_of_ones_own(tmp_path: Path) -> None:
    assert keys(image_at(tmp_path / "single.png")) == ["single.png"]
    assert keys(Squares()) == ["square-0", "square-1", "square-2"]


def test_text_models_get_texts(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("hello", encoding="utf-8")
    image_at(tmp_path / "a.png")
    examples = open_examples(tmp_path, TEXTS)
    assert [examples.key_of(index) for index in range(len(examples))] == ["sub/a.txt"]
    assert examples[0] == TextExample("hello", "")
    (tmp_path / "rows.csv").write_text('text\n"two\nlines"\nlast\n', encoding="utf-8")
    rows = open_examples(tmp_path / "rows.csv", TEXTS)
    assert [rows.key_of(0), rows.key_of(1)] == ["line 3", "line 4"]
    assert rows[0] == TextExample("two\nlines", "")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("missing", "does not exist"),
        ("notes.txt", "is nothing that"),
        ("empty", "nothing to predict"),
    ],
)
def test_data_that_cannot_be_predicted_is_refused(
    tmp_path: Path, name: str, complaint: str
) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=complaint) as caught:
        open_examples(tmp_path / name, IMAGES)
    assert ".png" in caught.value.remedy


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(DataError, match="nothing to predict"):
        open_examples([], IMAGES)
