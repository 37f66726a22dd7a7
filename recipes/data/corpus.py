"""The text that a model learns from, as a stream of named documents.

A corpus is anything that can tell its documents again and again in one order. Its fingerprint covers every
name and every character, so that whatever is made from a corpus can be cached under it. Its split goes by
the text of each document alone: no document, and no copy of one, is on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np


class Split(StrEnum):
    """The side of the corpus that a document is on."""

    TRAIN = "train"
    VALIDATION = "validation"


@dataclass(frozen=True)
class Document:
    """One unit of text; the split never cuts it, save where it is the whole corpus."""

    name: str
    text: str


class Corpus(Protocol):
    """Documents that come in the same order each time they are asked for."""

    @property
    def name(self) -> str:
        """What a person calls this corpus."""
        ...

    def documents(self) -> Iterator[Document]:
        """Every document that holds text, in a fixed order."""
        ...


@dataclass(frozen=True)
class Fingerprint:
    """What a corpus contained when it was read.

    Attributes:
        digest: SHA-256 over every document's name, size and text, in hexadecimal.
        hashes: one uint64 a document, a hash of its text alone, uniform over the type's range.
    """

    digest: str
    hashes: np.ndarray


def fingerprint(corpus: Corpus) -> Fingerprint:
    """Read the whole corpus once.

    Raises:
        ValueError: it holds no text.
    """
    whole = hashlib.sha256()
    hashes: list[int] = []
    for document in corpus.documents():
        text = document.text.encode()
        content = hashlib.sha256(text).digest()
        whole.update(f"{document.name}\0{len(text)}\0".encode(errors="surrogateescape") + content)
        hashes.append(int.from_bytes(content[:8], "big"))
    if not hashes:
        raise ValueError(f"{corpus.name} holds no text; give a file, folder, glob or dataset with text in it")
    return Fingerprint(whole.hexdigest(), np.array(hashes, dtype=np.uint64))


def split_documents(corpus: Corpus, hashes: np.ndarray, val_fraction: float) -> Iterator[tuple[Split, str]]:
    """Send each document to one side, by the hash of its text.

    The choice depends on the document alone: it outlives additions to the corpus, and copies of a document
    stay together. Where that would leave a side empty, the document of the smallest hash is the validation
    side; where all documents are the same, each is cut, and its end validates.

    Args:
        corpus: the documents.
        hashes: their ``Fingerprint.hashes``.
        val_fraction: expected share of the documents that validates, in (0, 1).

    Yields:
        The side and the text, in the corpus's order.
    """
    validates = hashes / 2.0**64 < val_fraction
    if validates.all() or not validates.any():
        validates = hashes == hashes.min()
    for document, validation in zip(corpus.documents(), validates, strict=True):
        if validates.all():
            head, tail = _cut(document.text, 1 - val_fraction)
            yield Split.TRAIN, head
            yield Split.VALIDATION, tail
        else:
            yield (Split.VALIDATION if validation else Split.TRAIN), document.text


def _cut(text: str, share: float) -> tuple[str, str]:
    middle = int(len(text) * share)
    middle = text.rfind("\n", 0, middle) + 1 or middle
    return text[:middle], text[middle:]
