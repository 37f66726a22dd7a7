"""The token store: what its key covers, what it holds, and who may write it when."""

from __future__ import annotations

import logging
import math
import os
import pickle
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from recipes.data.corpus import Document, Split
from recipes.data.files import TextFiles
from recipes.data.tokenizer import SpecialToken, load_tokenizer, train_tokenizer
from recipes.data.tokens import TokenFile, TokenStore, entropy, prepare
from tests.distributed.ranks import begun

VOCAB_SIZE = 300
VAL_FRACTION = 0.2


class Held(TextFiles):
    """Says so at the end of a pass over the corpus, and waits."""

    def __init__(self, folder: str, hold: int, test: Connection) -> None:
        super().__init__(folder)
        self._passes, self._hold, self._test = 0, hold, test

    def documents(self) -> Iterator[Document]:
        yield from super().documents()
        self._passes += 1
        if self._passes == self._hold:
            self._test.send("held")
            self._test.recv()


def worker(folder: Path, cache: Path, hold: int, test: Connection) -> None:
    handler = logging.Handler()
    handler.emit = lambda record: test.send(record.getMessage())  # type: ignore[method-assign]
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    corpus = Held(str(folder), hold, test)
    store = prepare(corpus, vocab_size=VOCAB_SIZE, val_fraction=VAL_FRACTION, cache_dir=cache)
    test.send(f"done {store.folder.name}")


FINGERPRINT, TRAIN, ENCODE = 1, 2, 3


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"text {number} says [EOS] and [MASK] and größe\n" * (number + 1))
    return folder


def make(folder: Path, cache: Path, vocab_size: int = VOCAB_SIZE, val_fraction: float = VAL_FRACTION) -> TokenStore:
    return prepare(TextFiles(str(folder)), vocab_size=vocab_size, val_fraction=val_fraction, cache_dir=cache)


def start(folder: Path, cache: Path, hold: int) -> tuple[BaseProcess, Connection]:
    """A process that runs `prepare`, and is held in the given pass over the corpus."""
    ours, theirs = Pipe()
    process = begun(worker, folder, cache, hold, theirs)
    theirs.close()  # when the process has gone, too, nothing more can be said
    return process, ours


def told(process: Connection) -> list[str]:
    """What it says until it is held, or to its end."""
    lines = []
    with suppress(EOFError):
        while not lines or lines[-1] != "held":
            lines.append(process.recv())
    return lines


def contents(store: TokenStore) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.folder.iterdir()}


def test_the_store_holds_every_text_exactly(texts: Path, tmp_path: Path) -> None:
    store = make(texts, tmp_path / "cache")
    read = []
    for side in Split:
        ids = store.tokens(side).ids
        assert ids.dtype == np.uint16
        assert ids[-1] == SpecialToken.EOS
        for document in np.split(ids, np.flatnonzero(ids == SpecialToken.EOS) + 1)[:-1]:
            read.append(store.tokenizer.decode(document[:-1].tolist(), skip_special_tokens=False))
    assert sorted(read) == sorted(file.read_text() for file in texts.iterdir())
    assert store.documents == 30
    assert store.train_tokens == len(store.tokens(Split.TRAIN)) > store.validation_tokens > 0


def test_long_texts_are_tokenized_in_pieces_and_stay_whole(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(texts, tmp_path / "whole")
    monkeypatch.setattr("recipes.data.tokens._PIECE", 100)
    pieces = make(texts, tmp_path / "pieces")
    # Pieces end at line ends, where the pre-tokenizer of this text cuts anyway.
    assert contents(pieces) == contents(whole)


def test_unigram_entropy() -> None:
    assert entropy(np.array([1, 0, 1, 2])) == pytest.approx(1.5 * math.log(2))
    assert entropy(np.array([0, 7])) == 0


def test_the_store_knows_the_entropy_of_its_training_tokens(texts: Path, tmp_path: Path) -> None:
    store = make(texts, tmp_path / "cache")
    _, counts = np.unique(store.tokens(Split.TRAIN).ids, return_counts=True)
    share = counts / counts.sum()
    assert store.unigram_entropy == pytest.approx(-(share * np.log(share)).sum())


def test_the_key_covers_all_that_the_tokens_depend_on(texts: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    keys = [make(texts, cache).folder, make(texts, cache, vocab_size=301).folder]
    keys.append(make(texts, cache, val_fraction=0.3).folder)
    file = texts / "7.txt"
    before = file.stat()
    file.write_text(file.read_text().replace("says", "sayz"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    keys.append(make(texts, cache).folder)
    file.rename(texts / "8b.txt")
    keys.append(make(texts, cache).folder)
    assert len(set(keys)) == 5


def test_a_store_is_made_once(texts: Path, tmp_path: Path) -> None:
    store = make(texts, tmp_path / "cache")
    written = (store.folder / "store.json").stat()
    assert make(texts, tmp_path / "cache") == store
    assert (store.folder / "store.json").stat() == written


@pytest.mark.parametrize("file", ["train.bin", "validation.bin", "tokenizer.json", "store.json"])
def test_a_store_that_lost_a_file_is_made_again(texts: Path, tmp_path: Path, file: str) -> None:
    store = make(texts, tmp_path / "cache")
    before = contents(store)
    (store.folder / file).unlink()
    assert contents(make(texts, tmp_path / "cache")) == before


def test_a_store_whose_tokens_were_cut_short_is_made_again(texts: Path, tmp_path: Path) -> None:
    store = make(texts, tmp_path / "cache")
    before = contents(store)
    os.truncate(store.folder / "train.bin", 10)
    assert contents(make(texts, tmp_path / "cache")) == before


def test_of_two_processes_one_makes_the_store_and_the_other_waits(texts: Path, tmp_path: Path) -> None:
    first, to_first = start(texts, tmp_path / "cache", TRAIN)
    began = told(to_first)
    assert began[0].startswith("tokenizing") and began[-1] == "held"
    second, to_second = start(texts, tmp_path / "cache", FINGERPRINT)
    assert told(to_second)[-1] == "held"
    # It holds the key now and finds no store; the lock alone keeps it from making one.
    to_second.send("go on")
    to_first.send("go on")
    told_first, told_second = told(to_first), told(to_second)
    for process in (first, second):
        process.join()
        assert process.exitcode == 0
    assert told_second == told_first[-1:]
    assert told_second[0].startswith("done")


def test_what_a_killed_process_left_is_never_used(texts: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process, to_process = start(texts, cache, ENCODE)
    assert told(to_process)[-1] == "held"
    process.kill()
    process.join()
    (part,) = cache.glob("*.part")
    assert (part / "tokenizer.json").is_file()
    assert TokenStore.find(part) is None
    (part / "remains").touch()
    store = make(texts, cache)
    assert contents(store) == contents(make(texts, tmp_path / "other"))
    assert not list(cache.glob("*.part"))


def test_a_corpus_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    class Changing:
        name = "the weather"
        passes = 0

        def documents(self) -> Iterator[Document]:
            self.passes += 1
            yield Document("a", "always\n" * 9)
            yield Document("b", f"pass {self.passes}")

    with pytest.raises(RuntimeError, match=r"the weather changed while it was being tokenized; run again"):
        prepare(Changing(), vocab_size=VOCAB_SIZE, val_fraction=0.5, cache_dir=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_the_tokenizer_is_exact_and_its_specials_cannot_be_spelled(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a text to train on"], VOCAB_SIZE)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "größe 日本 \x00 [MASK][EOS] \N{GRINNING FACE}\r\n"
    for each in (tokenizer, load_tokenizer(str(tmp_path / "tokenizer.json"))):
        ids = each.encode(text).ids
        assert min(ids) >= len(SpecialToken)
        assert each.decode(ids, skip_special_tokens=False) == text
        assert [each.token_to_id(token.text) for token in SpecialToken] == list(range(6))


def test_the_tokenizer_fills_its_vocabulary_and_no_more(texts: Path) -> None:
    pieces = [file.read_text() for file in sorted(texts.iterdir())]
    assert train_tokenizer(pieces, 270).get_vocab_size() == 270
    assert train_tokenizer(["ab"], 1000).get_vocab_size() < 270


def test_a_token_file_travels_by_name(tmp_path: Path) -> None:
    np.arange(70_000, dtype=np.uint32).tofile(tmp_path / "ids")
    file = TokenFile(tmp_path / "ids", "uint32")
    assert file.ids[-1] == 69_999
    sent = pickle.dumps(file)
    assert len(sent) < 1000
    assert np.array_equal(pickle.loads(sent).ids, file.ids)
