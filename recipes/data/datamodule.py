"""The data of a run: from a path or a dataset's name to batches on every rank."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from recipes.data.corpus import Corpus, Split
from recipes.data.files import TextFiles
from recipes.data.loader import Batch, EpochSampler, ResumableLoader, evaluation_loader
from recipes.data.samples import CausalSamples, MaskedSamples, Objective, Samples
from recipes.data.tokenizer import MIN_VOCAB_SIZE
from recipes.data.tokens import TokenStore, prepare

_MIN_SEQ_LEN = 8


@dataclass(frozen=True)
class CorpusSummary:
    """What the data are, for a person.

    Attributes:
        name: what the corpus is called.
        folder: where its tokens lie.
        documents: documents in it.
        train_tokens: tokens that train.
        validation_tokens: tokens that validate.
        train_samples: samples of an epoch.
        validation_samples: samples of a validation.
        vocab_size: V, the vocabulary that a model needs.
        unigram_entropy: nats; the loss of the best model that ignores context.
    """

    name: str
    folder: Path
    documents: int
    train_tokens: int
    validation_tokens: int
    train_samples: int
    validation_samples: int
    vocab_size: int
    unigram_entropy: float

    @property
    def log_vocab(self) -> float:
        """ln V in nats: the loss of a model that knows nothing."""
        return math.log(self.vocab_size)


class TextDataModule(LightningDataModule):
    """Text, tokenized once per node and cached, as batches for causal or masked language modelling.

    A batch is ``{"input_ids", "labels"}``, both int64 of shape (batch_size, seq_len), in the convention of
    ``transformers``: causal labels are the inputs, masked labels are -100 where nothing is predicted.

    The order of samples and their masks depend on ``seed`` and the epoch alone. Training resumes in mid-epoch
    at the exact sample. The samplers share the samples among all ranks by themselves, whatever
    ``Trainer(use_distributed_sampler)`` says.

    Args:
        path: a text file, a folder or a glob; without it and without ``dataset``, the source of Python's own
            standard library.
        dataset: a Hugging Face dataset instead: a folder written by ``save_to_disk``, or what
            ``datasets.load_dataset`` takes.
        dataset_config: the dataset's configuration.
        split: the dataset's split to read; the validation side is cut from it.
        data_files: files for ``datasets.load_dataset``.
        text_column: the dataset's column of text.
        max_documents: use the first so many documents, ``None`` for all.
        objective: "causal" or "masked".
        seq_len: tokens of a sample, at least 8.
        batch_size: samples that one rank takes per micro-step.
        vocab_size: entries of the vocabulary that is trained on the corpus, at least 262.
        val_fraction: expected share of the documents that validates, in (0, 1).
        seed: of order and masks, at least 0.
        num_workers: processes that load ahead, per rank.
        cache_dir: where tokens are cached; by default ``$LIGHTNING_MICS_CACHE``, or
            ``~/.cache/lightning-mics``.

    Raises:
        ValueError: an argument is out of its range, or ``path`` and ``dataset`` are both given.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        dataset: str | None = None,
        dataset_config: str | None = None,
        split: str = "train",
        data_files: str | Sequence[str] | None = None,
        text_column: str = "text",
        max_documents: int | None = None,
        objective: Objective | str = Objective.CAUSAL,
        seq_len: int = 128,
        batch_size: int = 8,
        vocab_size: int = 8192,
        val_fraction: float = 0.05,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        if path is not None and dataset is not None:
            raise ValueError(f"path={path!r} and dataset={dataset!r} are both given; give one of them")
        _at_least("seq_len", seq_len, _MIN_SEQ_LEN)
        _at_least("batch_size", batch_size, 1)
        _at_least("vocab_size", vocab_size, MIN_VOCAB_SIZE, " (all bytes and the special tokens)")
        _at_least("seed", seed, 0)
        _at_least("num_workers", num_workers, 0)
        if max_documents is not None:
            _at_least("max_documents", max_documents, 1)
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction} is not between 0 and 1; choose such as 0.05")
        if objective not in list(Objective):
            raise ValueError(f"objective={objective!r} is unknown; choose one of {', '.join(Objective)}")
        self.corpus: Corpus = TextFiles(path, max_documents)
        if dataset is not None:
            # Imported here, as only those who name a dataset need its package.
            from recipes.data.huggingface import HuggingFaceText

            self.corpus = HuggingFaceText(dataset, dataset_config, split, data_files, text_column, max_documents)
        self.objective = Objective(objective)
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.vocab_size = vocab_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.num_workers = num_workers
        self.cache_dir = _cache_dir(cache_dir)
        self._store: TokenStore | None = None
        self._share = 0, 1

    def share(self, rank: int, world_size: int) -> None:
        """Say which of the ranks this is, where there is no Trainer to ask."""
        self._share = rank, world_size

    @override
    def prepare_data(self) -> None:
        """Make the tokens, or find them in the cache. Lightning calls it in one process per node."""
        if self._store is None:
            self._store = prepare(
                self.corpus,
                vocab_size=self.vocab_size,
                val_fraction=self.val_fraction,
                cache_dir=self.cache_dir,
            )

    @override
    def setup(self, stage: str | None = None) -> None:
        """Open the tokens. With a trainer it broadcasts rank 0's key, so that all ranks read the same text.

        Raises:
            RuntimeError: this node did not make the tokens that rank 0 made.
            ValueError: a side of the corpus does not fill one sample.
        """
        if self.trainer is None:
            self.prepare_data()
        else:
            key = self._store.folder.name if self._store else None
            self._store = self._agreed_store(self.trainer.strategy.broadcast(key))
        for side in Split:
            self._samples(side)

    def _agreed_store(self, key: str | None) -> TokenStore:
        """The store that rank 0 opened, as it lies on this node."""
        if key is None:
            raise RuntimeError("rank 0 has no tokens; call prepare_data() before setup(), as a Trainer does")
        store = TokenStore.find(self.cache_dir / key)
        if store is None:
            raise RuntimeError(
                f"the tokens that rank 0 trains on are not in {self.cache_dir / key} on this node: "
                f"{self.corpus.name} differs between the nodes; "
                "make text, Python and tokenizers equal on all of them, or give a cache_dir that they share"
            )
        return store

    @override
    def train_dataloader(self) -> ResumableLoader:
        """This rank's shuffled training batches.

        Raises:
            ValueError: the samples do not fill one micro-step of all ranks.
        """
        samples = self._samples(Split.TRAIN)
        sampler = EpochSampler(len(samples), self.batch_size, *self._rank_and_world_size(), seed=self.seed)
        return ResumableLoader(samples, sampler, num_workers=self.num_workers, pin_memory=torch.cuda.is_available())

    def example_batch(self, size: int) -> Batch:
        """What a batch of `size` samples is like, for who plans; its tokens are zeros."""
        ids = torch.zeros(size, self.seq_len, dtype=torch.long)
        return {"input_ids": ids, "labels": ids}

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        """This rank's validation batches, the same in every validation."""
        rank, world_size = self._rank_and_world_size()
        return evaluation_loader(
            self._samples(Split.VALIDATION),
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    @property
    def unigram_entropy(self) -> float:
        """The loss in nats of the best model that ignores context, over the training tokens."""
        return self._opened().unigram_entropy

    def describe(self) -> CorpusSummary:
        """Sizes and names, for a person. Needs ``setup``."""
        store = self._opened()
        return CorpusSummary(
            name=self.corpus.name,
            folder=store.folder,
            documents=store.documents,
            train_tokens=store.train_tokens,
            validation_tokens=store.validation_tokens,
            train_samples=len(self._samples(Split.TRAIN)),
            validation_samples=len(self._samples(Split.VALIDATION)),
            vocab_size=self.vocab_size,
            unigram_entropy=store.unigram_entropy,
        )

    def encode(self, text: str) -> Tensor:
        """Ids of a text, int64 of shape (tokens,), without special tokens."""
        encoding = self._opened().tokenizer.encode(text, add_special_tokens=False)
        return torch.tensor(encoding.ids, dtype=torch.int64)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The text of ids of shape (tokens,); special tokens and unused ids are left out."""
        text: str = self._opened().tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)
        return text

    def _opened(self) -> TokenStore:
        if self._store is None:
            raise RuntimeError("the tokens are not open; call prepare_data() and setup(), as a Trainer does")
        return self._store

    def _samples(self, side: Split) -> Samples:
        store = self._opened()
        tokens = store.tokens(side)
        samples: Samples = CausalSamples(tokens, self.seq_len)
        if self.objective is Objective.MASKED:
            samples = MaskedSamples(tokens, self.seq_len, vocab_size=store.vocab_size, seed=self.seed, split=side)
        if not len(samples):
            raise ValueError(
                f"seq_len={self.seq_len} is longer than the {side} side of {self.corpus.name}, which has "
                f"{len(tokens)} tokens (val_fraction={self.val_fraction}); lower seq_len or give more text"
            )
        return samples

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is None:
            return self._share
        return self.trainer.global_rank, self.trainer.world_size


def _at_least(name: str, value: int, least: int, why: str = "") -> None:
    if value < least:
        raise ValueError(f"{name}={value} is too small; choose at least {least}{why}")


def _cache_dir(given: str | Path | None) -> Path:
    chosen = given or os.environ.get("LIGHTNING_MICS_CACHE") or "~/.cache/lightning-mics"
    return Path(chosen).expanduser().absolute()
