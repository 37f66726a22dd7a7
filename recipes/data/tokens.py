"""Tokens on disk: built once per node, then mapped into memory by whoever reads them.

A store is a folder named by a key that covers everything it was made from. It is written aside, synced and
renamed into place under a file lock, so that it is either whole or absent: processes that come at the same
time wait for the first and read what it wrote, and what a killed process left behind is removed by the next.
The lock belongs to an open file, so the system releases it when its holder dies; no process group is needed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from filelock import FileLock
from tokenizers import Tokenizer

from mics_tools.atomic import flush
from recipes.data.corpus import Corpus, Fingerprint, Split, fingerprint, split_documents
from recipes.data.tokenizer import SpecialToken, load_tokenizer, train_tokenizer

# Raise when the same inputs would give other files.
_FORMAT = 1
# Characters. Bounds the text that is encoded at a time; an encoding takes about a hundred times its text.
_PIECE = 1 << 20

_log = logging.getLogger(__name__)


class TokenFile:
    """A flat file of token ids, mapped when first read; a copy sent to another process maps the file anew.

    Args:
        path: the file.
        dtype: NumPy's name of its type, "uint16" or "uint32".
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path = path
        self.dtype = dtype

    @cached_property
    def ids(self) -> np.ndarray:
        """The ids, of shape (tokens,), read-only."""
        if not len(self):
            return np.empty(0, self.dtype)
        return np.memmap(self.path, self.dtype, mode="r")

    def __len__(self) -> int:
        return self.path.stat().st_size // np.dtype(self.dtype).itemsize

    def __reduce__(self) -> tuple[type[TokenFile], tuple[Path, str]]:
        return TokenFile, (self.path, self.dtype)


@dataclass(frozen=True)
class TokenStore:
    """A corpus as tokens, with its tokenizer.

    Attributes:
        folder: where it lies; its name is the key.
        documents: documents in the corpus.
        train_tokens: tokens that train, the end of each document included.
        validation_tokens: tokens that validate.
        vocab_size: entries that the tokenizer filled, special tokens included.
        unigram_entropy: entropy of the training tokens' frequencies in nats: the loss of the best model that
            ignores context.
        dtype: NumPy's name of the type on disk.
    """

    folder: Path
    documents: int
    train_tokens: int
    validation_tokens: int
    vocab_size: int
    unigram_entropy: float
    dtype: str

    @classmethod
    def find(cls, folder: Path) -> TokenStore | None:
        """Open the store in a folder; ``None`` where there is none or it is not whole."""
        try:
            store = cls(folder, **json.loads((folder / "store.json").read_text()))
            intact = all(len(store.tokens(split)) == store._count(split) for split in Split)
        except FileNotFoundError:
            return None
        return store if intact and (folder / "tokenizer.json").is_file() else None

    def tokens(self, split: Split) -> TokenFile:
        """The ids of one side's documents, each ended by ``SpecialToken.EOS``."""
        return TokenFile(self.folder / f"{split}.bin", self.dtype)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids."""
        return load_tokenizer(str(self.folder / "tokenizer.json"))

    def _count(self, split: Split) -> int:
        return self.train_tokens if split is Split.TRAIN else self.validation_tokens


def prepare(corpus: Corpus, *, vocab_size: int, val_fraction: float, cache_dir: Path) -> TokenStore:
    """Find a corpus's tokens in the cache, or make them; safe to call from any number of processes.

    Reads the whole corpus once to know its key, and twice more where the tokens must be made.

    Args:
        corpus: the documents.
        vocab_size: entries of the vocabulary to train.
        val_fraction: expected share of the documents that validates, in (0, 1).
        cache_dir: a folder on a file system with locks.

    Raises:
        ValueError: the corpus holds no text.
        RuntimeError: the corpus changed while it was read.
    """
    contents = fingerprint(corpus)
    folder = cache_dir / store_key(contents, vocab_size=vocab_size, val_fraction=val_fraction)
    if store := TokenStore.find(folder):
        return store
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if store := TokenStore.find(folder):
            return store
        _log.info("tokenizing %s into %s", corpus.name, folder)
        part = Path(f"{folder}.part")
        # What a killed run or damage left; nobody else writes here while the lock is held.
        for remains in (part, folder):
            shutil.rmtree(remains, ignore_errors=True)
        part.mkdir()
        try:
            _write_store(part, corpus, contents, vocab_size=vocab_size, val_fraction=val_fraction)
            os.rename(part, folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        flush(cache_dir)
    store = TokenStore.find(folder)
    assert store is not None, f"{folder} was written and cannot be read"
    return store


def store_key(contents: Fingerprint, *, vocab_size: int, val_fraction: float) -> str:
    """The name that a corpus's tokens are cached under: 32 hexadecimal digits over all they depend on."""
    made_from = {
        "format": _FORMAT,
        "tokenizers": tokenizers.__version__,
        "specials": [token.text for token in SpecialToken],
        "corpus": contents.digest,
        "vocab_size": vocab_size,
        "val_fraction": val_fraction,
    }
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]


def _write_store(folder: Path, corpus: Corpus, contents: Fingerprint, *, vocab_size: int, val_fraction: float) -> None:
    sides = [*Split]

    def pieces() -> Iterator[tuple[Split, str, bool]]:
        for split, text in split_documents(corpus, contents.hashes, val_fraction):
            yield from ((split, piece, last) for piece, last in _pieces(text))

    tokenizer = train_tokenizer((piece for split, piece, _ in pieces() if split is Split.TRAIN), vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab_size()
    dtype = "uint16" if vocabulary <= 1 << 16 else "uint32"
    counts = {side: np.zeros(vocabulary, np.int64) for side in sides}
    with ExitStack() as stack:
        files = {side: stack.enter_context(open(folder / f"{side}.bin", "wb")) for side in sides}
        for batch in _batches(pieces()):
            texts = [piece for _, piece, _ in batch]
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for (side, _, last), encoding in zip(batch, encodings, strict=True):
                ids = np.array(encoding.ids + [SpecialToken.EOS] * last, dtype)
                files[side].write(ids.tobytes())
                counts[side] += np.bincount(ids, minlength=vocabulary)
    if fingerprint(corpus).digest != contents.digest:
        raise RuntimeError(f"{corpus.name} changed while it was being tokenized; run again")
    store = TokenStore(
        folder=folder,
        documents=len(contents.hashes),
        train_tokens=int(counts[Split.TRAIN].sum()),
        validation_tokens=int(counts[Split.VALIDATION].sum()),
        vocab_size=vocabulary,
        unigram_entropy=entropy(counts[Split.TRAIN]),
        dtype=dtype,
    )
    _write_description(store)
    for file in (*folder.iterdir(), folder):
        flush(file)


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that counts, of shape (vocabulary,), stand for; 0 for no counts."""
    seen = counts[counts > 0]
    share = seen / seen.sum()
    return float(-(share * np.log(share)).sum())


def _write_description(store: TokenStore) -> None:
    fields: dict[str, Any] = asdict(store)
    del fields["folder"]
    (store.folder / "store.json").write_text(json.dumps(fields, indent=2) + "\n")


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Cut a text after line ends into pieces of bounded length, each with whether it is the text's last."""
    start = 0
    while start < len(text):
        stop = start + _PIECE
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop], stop >= len(text)
        start = stop


def _batches(pieces: Iterator[tuple[Split, str, bool]]) -> Iterator[list[tuple[Split, str, bool]]]:
    batch: list[tuple[Split, str, bool]] = []
    length = 0
    for piece in pieces:
        batch.append(piece)
        length += len(piece[1])
        if length >= _PIECE:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch
