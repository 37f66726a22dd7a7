"""Samples: windows over the token file, framed for causal or for masked language modelling.

A sample is a pure function of (seed, epoch, index): no global random state, rank, world size or worker
enters, so that a run that is stopped and resumed, anywhere and at any size, sees what it would have seen.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from recipes.data.corpus import Split
from recipes.data.tokenizer import SpecialToken
from recipes.data.tokens import TokenFile

IGNORED_LABEL = -100


class Objective(StrEnum):
    """What the model learns to predict."""

    CAUSAL = "causal"
    MASKED = "masked"


class Samples(Protocol):
    """Samples by number, each of ``seq_len`` tokens."""

    def __len__(self) -> int: ...

    def sample(self, index: int, epoch: int) -> dict[str, Tensor]:
        """``input_ids`` and ``labels``, both int64 of shape (seq_len,)."""
        ...


class CausalSamples:
    """Contiguous windows; labels are the inputs, which the model itself shifts.

    Args:
        tokens: the ids to cut; what does not fill a window at the end is left out.
        seq_len: tokens of a window.
    """

    def __init__(self, tokens: TokenFile, seq_len: int) -> None:
        self._tokens = tokens
        self._seq_len = seq_len

    def __len__(self) -> int:
        return len(self._tokens) // self._seq_len

    def sample(self, index: int, epoch: int) -> dict[str, Tensor]:
        """The window at ``index * seq_len``, the same in every epoch."""
        ids = torch.from_numpy(_window(self._tokens, index, self._seq_len))
        return {"input_ids": ids, "labels": ids.clone()}


class MaskedSamples:
    """Windows framed as ``[CLS] ... [SEP]``, masked as in BERT (Devlin et al., arXiv 1810.04805, section
    3.1).

    Of a window's ordinary tokens 15 % (rounded, at least one) are to be predicted: 80 % of these become
    ``[MASK]``, 10 % a random ordinary token, 10 % stay. Every other label is -100.

    Args:
        tokens: the ids to cut into windows of ``seq_len - 2``.
        seq_len: tokens of a sample, frame included.
        vocab_size: entries of the tokenizer, from which random tokens are drawn.
        seed: of the masks.
        split: which side the tokens are from; the sides draw from different streams.
    """

    def __init__(self, tokens: TokenFile, seq_len: int, *, vocab_size: int, seed: int, split: Split) -> None:
        self._tokens = tokens
        self._window = seq_len - 2
        self._vocab_size = vocab_size
        self._seed = seed
        self._stream = list(Split).index(split)

    def __len__(self) -> int:
        return len(self._tokens) // self._window

    def sample(self, index: int, epoch: int) -> dict[str, Tensor]:
        """The window at ``index * (seq_len - 2)``, with the masks of this epoch."""
        window = _window(self._tokens, index, self._window)
        ids = np.pad(window, 1, constant_values=(SpecialToken.CLS, SpecialToken.SEP))
        rng = np.random.default_rng([self._seed, self._stream, epoch, index])
        inputs, labels = mask(ids, self._vocab_size, rng)
        return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}


def mask(ids: np.ndarray, vocab_size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Mask as BERT does.

    Args:
        ids: int64 of shape (seq_len,).
        vocab_size: random tokens are drawn from the ordinary ids below it.
        rng: where the masks are drawn from.

    Returns:
        Inputs and labels, int64 of shape (seq_len,).
    """
    ordinary = np.flatnonzero(ids >= len(SpecialToken))
    chosen = rng.permutation(ordinary)[: max(1, round(0.15 * len(ordinary)))]
    labels = np.full_like(ids, IGNORED_LABEL)
    labels[chosen] = ids[chosen]
    fate = rng.random(len(chosen))
    inputs = ids.copy()
    inputs[chosen[fate < 0.8]] = SpecialToken.MASK
    replaced = chosen[fate >= 0.9]
    inputs[replaced] = rng.integers(len(SpecialToken), vocab_size, len(replaced))
    return inputs, labels


def _window(tokens: TokenFile, index: int, length: int) -> np.ndarray:
    return tokens.ids[index * length : (index + 1) * length].astype(np.int64)
