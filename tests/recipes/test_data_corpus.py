"""Corpora: which text is found, how it is fingerprinted, and how it is split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from recipes.data.corpus import Document, Split, fingerprint, split_documents
from recipes.data.files import TextFiles
from recipes.data.huggingface import HuggingFaceText

datasets = pytest.importorskip("datasets")


@dataclass(frozen=True)
class Listed:
    """A corpus of given texts."""

    texts: tuple[str, ...]
    name: str = "the list"

    def documents(self) -> Iterator[Document]:
        for number, text in enumerate(self.texts):
            yield Document(str(number), text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {
        "b.txt": b"second",
        "a.py": b"first",
        "deep/er/c.md": b"third \xff",
        "deep/empty.txt": b" \n",
        "deep/image.bin": b"\x89PNG\0\0",
        ".hidden/secret.txt": b"hidden",
        "__pycache__/a.pyc.txt": b"cached",
    }.items():
        file = tmp_path / "texts" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path / "texts"


def found(path: str | None, max_documents: int | None = None) -> dict[str, str]:
    return {document.name: document.text for document in TextFiles(path, max_documents).documents()}


def test_a_folder_gives_its_visible_text_in_order_of_name(folder: Path) -> None:
    texts = found(str(folder))
    assert list(texts.items()) == [("a.py", "first"), ("b.txt", "second"), ("deep/er/c.md", "third \ufffd")]


def test_a_file_and_a_glob(folder: Path) -> None:
    assert found(str(folder / "b.txt")) == {"b.txt": "second"}
    assert found(str(folder / "*.txt")) == {"b.txt": "second"}
    assert list(found(f"{folder}/**/*.m*")) == ["deep/er/c.md"]


def test_names_do_not_depend_on_where_the_folder_lies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert fingerprint(TextFiles("texts")).digest == fingerprint(TextFiles(str(folder))).digest


def test_max_documents_keeps_the_first_that_hold_text(folder: Path) -> None:
    assert list(found(str(folder), 2)) == ["a.py", "b.txt"]


def test_a_path_that_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path='.*/no/where.*' is no file, no folder.*give an existing path"):
        found(str(tmp_path / "no" / "where"))


def test_a_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no text; give a file"):
        fingerprint(TextFiles(str(tmp_path)))


def test_the_standard_library_is_there_without_its_tests() -> None:
    names = set(found(None))
    assert {"os.py", "asyncio/tasks.py"} <= names
    assert not any(part in name.split("/") for part in ("site-packages", "test", "idle_test") for name in names)


def test_a_fingerprint_covers_names_texts_and_borders() -> None:
    @dataclass(frozen=True)
    class Named(Listed):
        def documents(self) -> Iterator[Document]:
            return (Document(f"other {document.name}", document.text) for document in super().documents())

    base = fingerprint(Listed(("ab", "c"))).digest
    assert fingerprint(Listed(("ab", "c"))).digest == base
    others = [Listed(("ab", "d")), Listed(("a", "bc")), Listed(("c", "ab")), Listed(("abc",)), Named(("ab", "c"))]
    assert base not in {fingerprint(other).digest for other in others}


def sides(texts: tuple[str, ...], val_fraction: float) -> dict[Split, list[str]]:
    corpus = Listed(texts)
    result: dict[Split, list[str]] = {side: [] for side in Split}
    for side, text in split_documents(corpus, fingerprint(corpus).hashes, val_fraction):
        result[side].append(text)
    return result


def test_the_split_is_a_partition_without_leakage() -> None:
    texts = tuple(f"document {number % 900}" for number in range(1000))
    split = sides(texts, 0.1)
    assert sorted(split[Split.TRAIN] + split[Split.VALIDATION]) == sorted(texts)
    assert not set(split[Split.TRAIN]) & set(split[Split.VALIDATION])
    # 900 draws of 0.1: mean 90, standard deviation 9.
    assert 54 <= len(set(split[Split.VALIDATION])) <= 126


def test_a_document_stays_on_its_side_when_others_come() -> None:
    texts = tuple(f"document {number}" for number in range(400))
    assert set(sides(texts[100:], 0.1)[Split.VALIDATION]) <= set(sides(texts, 0.1)[Split.VALIDATION])


@pytest.mark.parametrize("val_fraction", [1e-9, 1 - 1e-9])
def test_no_side_is_left_empty(val_fraction: float) -> None:
    split = sides(("one", "two", "three", "two"), val_fraction)
    assert all(split.values())
    assert not set(split[Split.TRAIN]) & set(split[Split.VALIDATION])


def test_a_single_document_is_cut_at_a_line() -> None:
    text = "".join(f"line {number}\n" for number in range(100))
    split = sides((text,), 0.25)
    (head,), (tail,) = split[Split.TRAIN], split[Split.VALIDATION]
    assert head + tail == text
    assert head.endswith("\n")
    assert 0.2 < len(tail) / len(text) < 0.3


ROWS = {"title": ["x", "y", "z", "w"], "body": ["first", None, "", "fourth"], "year": [1, 2, 3, 4]}


def rows_of(**arguments: object) -> dict[str, str]:
    corpus = HuggingFaceText(text_column="body", **arguments)  # type: ignore[arg-type]
    return {document.name: document.text for document in corpus.documents()}


EXPECTED = {"row 0": "first", "row 3": "fourth"}


def test_a_dataset_saved_to_disk(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "tail": data.select([3])}).save_to_disk(tmp_path / "many")
    assert rows_of(dataset=str(tmp_path / "one")) == EXPECTED
    assert rows_of(dataset=str(tmp_path / "many")) == EXPECTED
    assert rows_of(dataset=str(tmp_path / "many"), split="tail") == {"row 0": "fourth"}
    with pytest.raises(ValueError, match=r"split='test' is not in .*; choose one of train, tail"):
        rows_of(dataset=str(tmp_path / "many"), split="test")


def test_a_dataset_loaded_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_dict(ROWS).to_json(tmp_path / "rows.jsonl")
    assert rows_of(dataset="json", data_files=str(tmp_path / "rows.jsonl")) == EXPECTED


def test_columns_that_hold_no_text(tmp_path: Path) -> None:
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"text_column='text' is not a column of .*; choose one of title, body, year"):
        next(HuggingFaceText(str(tmp_path)).documents())
    with pytest.raises(TypeError, match=r"text_column='year' of .* holds int; choose a column of strings"):
        next(HuggingFaceText(str(tmp_path), text_column="year").documents())
