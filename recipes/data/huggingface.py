"""Text from Hugging Face datasets; importing it needs the ``datasets`` package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets

from recipes.data.corpus import Document


@dataclass(frozen=True)
class HuggingFaceText:
    """A text column of a Hugging Face dataset, one document a row; rows without text are passed over.

    Args:
        dataset: a folder written by ``Dataset.save_to_disk``, or whatever ``datasets.load_dataset`` takes: a
            name on the hub, a folder, a format such as "json" or "text".
        config: the dataset's configuration, where it has several.
        split: the split to read; all splits of ours are cut from it.
        data_files: files for ``load_dataset``.
        text_column: the column that holds the text.
        max_documents: keep the first so many rows with text, ``None`` for all.
    """

    dataset: str
    config: str | None = None
    split: str = "train"
    data_files: str | Sequence[str] | None = None
    text_column: str = "text"
    max_documents: int | None = None

    @property
    def name(self) -> str:
        """The dataset, its configuration and its split."""
        return "/".join(part for part in (self.dataset, self.config, self.split) if part)

    def documents(self) -> Iterator[Document]:
        """Yield the rows' text, named by row number.

        Raises:
            ValueError: the dataset has no such split or column.
            TypeError: the column holds something other than strings.
        """
        rows = self._load()
        if self.text_column not in rows.column_names:
            raise ValueError(
                f"text_column={self.text_column!r} is not a column of {self.name}; "
                f"choose one of {', '.join(rows.column_names)}"
            )
        texts = map(self._text, rows[self.text_column])
        readable = (Document(f"row {row}", text) for row, text in enumerate(texts) if text.strip())
        yield from islice(readable, self.max_documents)

    def _text(self, cell: object) -> str:
        if not isinstance(cell, str | None):
            raise TypeError(
                f"text_column={self.text_column!r} of {self.name} holds {type(cell).__name__}; "
                "choose a column of strings"
            )
        return cell or ""

    def _load(self) -> datasets.Dataset:
        folder = Path(self.dataset).expanduser()
        if not any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(self.dataset, self.config, split=self.split, data_files=self.data_files)
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.Dataset):
            return saved
        if self.split not in saved:
            raise ValueError(f"split={self.split!r} is not in {self.dataset}; choose one of {', '.join(saved)}")
        return saved[self.split]
