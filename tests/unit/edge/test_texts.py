"""Local texts are listed, checked and tokenized, and nothing bad in them is fatal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import normalizers, processors
from typing_extensions import override

from fedra_edge.data import (
    Example,
    ImageFolder,
    TextExample,
    TextFolder,
    TextManifest,
    TextTokenizer,
    match_labels,
    open_dataset,
)
from fedra_edge.data.csv_rows import MAX_CSV_BYTES
from fedra_edge.data.preparing import WrongKindError
from fedra_edge.data.texts import MAX_TEXT_BYTES
from fedra_edge.data.tokenizing import PADDING
from fedra_edge.errors import DataError, SliceError
from fedra_edge.protocol.models import ImageInput, TokenInput
from tests.support.builders import make_blob
from tests.support.sites import save_image
from tests.support.tiny_llama import LABELS, WordTexts, build_tokenizer

WANTED = TokenInput(vocabulary_size=32, max_tokens=6, tokenizer=make_blob("tokenizer"))
IMAGES = ImageInput(size_px=8, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def tokenizer(tmp_path: Path) -> TextTokenizer:
    path = tmp_path / "tokenizer.json"
    build_tokenizer().save(str(path))
    return TextTokenizer(path, WANTED)


def save_text(path: Path, text: str | bytes = "the pump drips") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def write_manifest(path: Path, text: str | bytes) -> Path:
    save_text(path, text)
    return path


class ListedTexts(WordTexts):
    """Texts as a program of its own would give them, whatever they are."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    @override
    def is_held_out(self, index: int) -> bool | None:
        return False


class GreyImages(WordTexts):
    """The same labels for images."""

    @override
    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # another kind
        return Example(np.zeros((8, 8), dtype=np.uint8), self.label_of(index))


def test_a_text_folder_names_classes_by_directory(tmp_path: Path) -> None:
    save_text(tmp_path / "train" / "leak" / "1.txt", "ölig\r\n")
    save_text(tmp_path / "train" / "noise" / "deeper" / "2.TXT", b"\xef\xbb\xbfhum")
    save_text(tmp_path / "test" / "leak" / "3.txt")
    save_text(tmp_path / "test" / "leak" / ".hidden.txt")
    dataset = open_dataset(tmp_path)
    assert isinstance(dataset, TextFolder)
    assert [dataset.key_of(i) for i in range(3)] == [
        "test/leak/3.txt", "train/leak/1.txt", "train/noise/deeper/2.TXT",
    ]  # fmt: skip
    assert [dataset.is_held_out(i) for i in range(3)] == [True, False, False]
    assert dataset[1] == TextExample("ölig\r\n", "leak")
    assert dataset[2] == TextExample("hum", "noise")


def test_a_folder_with_an_image_is_one_of_images(tmp_path: Path) -> None:
    save_text(tmp_path / "leak" / "1.txt")
    save_image(tmp_path / "leak" / "1.png", np.zeros((8, 8, 3), dtype=np.uint8))
    dataset = open_dataset(tmp_path)
    assert isinstance(dataset, ImageFolder)
    assert dataset.skipped.counts == {"not an image file": 1}


def test_a_folder_without_either_is_said_to_lack_images(tmp_path: Path) -> None:
    save_text(tmp_path / "leak" / "1.pdf")
    with pytest.raises(DataError, match="not an image file: 1"):
        match_labels(open_dataset(tmp_path), LABELS)


def test_hostile_files_are_skipped_and_counted(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    place = tmp_path / "texts" / "leak"
    save_text(place / "good.txt")
    save_text(place / "empty.txt", b"")
    save_text(place / "blank.txt", " \r\n\t ")
    save_text(place / "nul.txt", "the\0pump")
    save_text(place / "latin.txt", "Öl".encode("latin-1"))
    save_text(place / "wide.txt", "the pump".encode("utf-16"))
    save_text(place / "half.txt", "\ud800".encode("utf-8", "surrogatepass"))
    (place / "pipe.txt").parent.mkdir(exist_ok=True)
    os.mkfifo(place / "pipe.txt")
    with (place / "huge.txt").open("wb") as file:
        file.truncate(100 * 2**20)
    save_text(place / "limit.txt", b"oil " * (MAX_TEXT_BYTES // 4) + b"x")
    matched = match_labels(open_dataset(tmp_path / "texts"), LABELS, tokenizer)
    assert len(matched.train_indices) == 1
    counts = {reason: n for reason, n in matched.report.counts.items() if "label" not in reason}
    assert counts == {
        "text is empty": 2,
        "text has NUL characters": 1,
        "text is not UTF-8": 3,
        "not a regular file": 1,
        "text is too large": 2,
    }


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_manifest_holds_texts(tmp_path: Path, separator: str) -> None:
    rows = [
        ["Label", "Text", "Split"],
        ["leak", '"the pump, or ""line""; drips\r\nsince monday"', "test"],
        ["noise", "hum", "train"],
        ["noise", "hum", ""],
        ["wear", '"  "', ""],
        ["wear", "thin\0", ""],
    ]
    text = "\ufeff" + "\r\n".join(separator.join(row) for row in rows)
    dataset = open_dataset(write_manifest(tmp_path / "texts.csv", text))
    assert isinstance(dataset, TextManifest)
    assert dataset[0] == TextExample('the pump, or "line"; drips\r\nsince monday', "leak")
    assert [dataset.is_held_out(i) for i in range(len(dataset))] == [True, False, None]
    assert dataset.skipped.counts == {"text is empty": 1, "text has NUL characters": 1}
    assert dataset.skipped.samples("text is empty") == ("line 6",)


def test_equal_texts_are_held_out_together_wherever_they_stand(tmp_path: Path) -> None:
    first = TextManifest(write_manifest(tmp_path / "a.csv", "text,label\nhum,noise\noil,leak\n"))
    more = TextManifest(
        write_manifest(tmp_path / "b.csv", "label,text\nwear,thin\nnoise,hum\nnoise,hum\n")
    )
    assert first.key_of(0) == more.key_of(1) == more.key_of(2) != more.key_of(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,class\na,b", "line 1: the line lacks the column label"),
        ("text,label\na,leak\nb", "line 3: the line has 1 values for 2 columns"),
        ("text,label\na, ", "line 2: the line has no label"),
        ("text,label,split\na,leak,x", "line 2: the line has split 'x'"),
        ('text,label\n"a,leak', "line 2: the line is not CSV"),
        (b"text,label\nok,leak\n\xff,leak\n", "line 3: the line is not UTF-8"),
        ("text,label\n" + "a" * 200_000 + ",leak\n", "line 2: the line is not CSV: field larger"),
        (b"text,label\n" + b"a," * (MAX_CSV_BYTES // 2), "larger than 64 MiB"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_broken_manifest_is_refused_with_its_line(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(write_manifest(tmp_path / "texts.csv", text))
    assert caught.value.remedy


def test_a_manifest_with_paths_lists_images_whatever_else_it_has(tmp_path: Path) -> None:
    save_image(tmp_path / "1.png", np.zeros((8, 8, 3), dtype=np.uint8))
    manifest = write_manifest(tmp_path / "images.csv", "path,text,label\n1.png,hum,leak\n")
    assert isinstance(open_dataset(manifest)[0], Example)


def test_a_batch_is_padded_to_its_longest_text(tokenizer: TextTokenizer) -> None:
    data = match_labels(ListedTexts(["oil", "the pump drips", "zzz oil"]), LABELS, tokenizer)
    tokens, label_ids = data.batch(data.train_indices, WANTED)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [
        [1, 5, PADDING, PADDING], [1, 15, 16, 4], [1, 2, 5, PADDING],
    ]  # fmt: skip
    assert label_ids.tolist() == [0, 1, 2]


def test_long_texts_are_cut_and_counted(tokenizer: TextTokenizer) -> None:
    texts = ["oil " * 5, "oil " * 6, "oil " * 500]
    data = match_labels(ListedTexts(texts), LABELS, tokenizer)
    assert data.report.counts["text was cut after 6 tokens"] == 2
    assert data.report.samples("text was cut after 6 tokens") == ("1", "2")
    tokens, _ = data.batch(data.train_indices, WANTED)
    assert tokens.tolist() == [[1, 5, 5, 5, 5, 5]] * 3


def test_texts_of_a_program_are_checked_as_well(tokenizer: TextTokenizer) -> None:
    data = match_labels(ListedTexts(["oil", "\ud800", "hum"]), LABELS, tokenizer)
    assert data.report.counts["text that the model's tokenizer cannot read"] == 1
    assert len(data.train_indices) == 2


def test_a_tokenizer_may_leave_nothing_of_a_text(tmp_path: Path) -> None:
    silent = build_tokenizer()
    silent.normalizer = normalizers.Replace("hum", " ")
    silent.post_processor = processors.TemplateProcessing(single="$A")  # no <s>
    path = tmp_path / "tokenizer.json"
    silent.save(str(path))
    data = match_labels(ListedTexts(["oil", "hum", "oil"]), LABELS, TextTokenizer(path, WANTED))
    assert len(data.train_indices) == 2
    assert data.report.counts["text has no token"] == 1


@pytest.mark.parametrize("reads_texts", [True, False])
def test_data_of_the_wrong_kind_are_refused_when_they_are_matched(
    tokenizer: TextTokenizer, *, reads_texts: bool
) -> None:
    dataset = GreyImages() if reads_texts else WordTexts()
    with pytest.raises(WrongKindError, match="the model reads") as caught:
        match_labels(dataset, LABELS, tokenizer if reads_texts else None)
    assert caught.value.remedy


def test_a_tokenizer_is_refused_that_is_none_or_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(SliceError, match="holds no tokenizer"):
        TextTokenizer(path, WANTED)
    build_tokenizer().save(str(path))
    small = TextTokenizer(path, WANTED.model_copy(update={"vocabulary_size": 5}))
    assert small.encode("drips").tolist() == [1, 4]
    with pytest.raises(SliceError, match="does not know"):
        small.encode("oil")


def test_a_tokenizer_must_leave_room_for_the_text(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(SliceError, match="before it comes to the text"):
        TextTokenizer(tmp_path / "tokenizer.json", WANTED.model_copy(update={"max_tokens": 1}))
    assert len(tokenizer.encode("oil " * 9)) == WANTED.max_tokens


def test_the_stored_settings_of_a_tokenizer_do_not_count(tmp_path: Path) -> None:
    stored = build_tokenizer()
    stored.enable_padding(length=20)
    stored.enable_truncation(2)
    path = tmp_path / "tokenizer.json"
    stored.save(str(path))
    assert TextTokenizer(path, WANTED).encode("oil oil oil").tolist() == [1, 5, 5, 5]


def test_without_the_library_the_message_says_what_to_install(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    build_tokenizer().save(str(path))
    script = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "from pathlib import Path\n"
        "from fedra_edge.data.tokenizing import TextTokenizer\n"
        "from fedra_edge.errors import BackendUnavailableError\n"
        "from tests.support.builders import make_blob\n"
        "from fedra_edge.protocol.models import TokenInput\n"
        "wanted = TokenInput(vocabulary_size=9, max_tokens=9, tokenizer=make_blob('t'))\n"
        "try: TextTokenizer(Path(sys.argv[1]), wanted)\n"
        "except BackendUnavailableError as error: print(error.remedy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, check=True, encoding="utf-8"
    )
    assert done.stdout.strip() == "pip install 'fedra[text]'"


def test_reading_images_loads_no_tokenizers() -> None:
    script = "import sys, fedra_edge.client; print('tokenizers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, encoding="utf-8"
    )
    assert done.stdout.strip() == "False"


def test_a_tokenizer_that_panics_makes_no_text_readable(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    build_tokenizer().save(str(path))
    description = json.loads(path.read_text(encoding="utf-8"))
    description["pre_tokenizer"] = {"type": "FixedLength", "length": 0}
    path.write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises((DataError, SliceError)):
        TextTokenizer(path, WANTED).encode("the pump drips")
