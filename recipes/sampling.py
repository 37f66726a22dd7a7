"""Sampling: text that a causal model continues.

A sharded model gathers its parameters in collectives, so every rank runs the same forwards, as many times as the
others: all ranks get all prompts, no rank stops early, and one seed makes them draw the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from recipes.data import TextDataModule


class Prompts(NamedTuple):
    """What to continue, and how.

    Attributes:
        ids: int64 of shape (prompts, longest prompt + tokens to add), padded on the right.
        lengths: int64 of shape (prompts,), tokens of each prompt.
        top_k: how many of the likeliest tokens are drawn from; 1 is greedy.
        temperature: above 0; higher is bolder.
        seed: of the draws.
    """

    ids: Tensor
    lengths: Tensor
    top_k: int
    temperature: float
    seed: int


def continued(logits_of: Callable[[Tensor], Tensor], prompts: Prompts) -> Tensor:
    """Add the same number of tokens to every prompt, as many as there is room for after the longest.

    Runs one forward per token over the whole padded length, so that the number and the shapes of the forwards
    depend on the prompts alone.

    Args:
        logits_of: a causal model, from ids of shape (prompts, length) to logits (prompts, length, vocab_size).
        prompts: what to continue.

    Returns:
        int64 of the shape of `prompts.ids`; row i holds `prompts.lengths[i]` and the added tokens, then padding.
    """
    ids, rows = prompts.ids.clone(), torch.arange(len(prompts.ids), device=prompts.ids.device)
    generator = torch.Generator(device=ids.device).manual_seed(prompts.seed)
    for step in range(ids.shape[1] - int(prompts.lengths.max())):
        place = prompts.lengths + step
        best, candidates = logits_of(ids)[rows, place - 1].float().topk(prompts.top_k)
        drawn = torch.multinomial((best / prompts.temperature).softmax(-1), 1, generator=generator)
        ids[rows, place] = candidates.gather(1, drawn).squeeze(1)
    return ids


def continue_text(
    trainer: Trainer,
    model: LightningModule,
    data: TextDataModule,
    prompts: Sequence[str],
    *,
    tokens: int,
    top_k: int,
    temperature: float,
    seed: int = 0,
) -> list[tuple[str, str]]:
    """Prompts and what the model adds to them. Collective: every rank calls it and gets the same.

    Args:
        trainer: that has trained `model`.
        model: whose `predict_step` takes `Prompts`.
        data: its tokenizer; its `seq_len` bounds prompt and addition together.
        prompts: texts of at least one token.
        tokens: to add; fewer where they do not fit.
        top_k: how many of the likeliest tokens are drawn from.
        temperature: above 0.
        seed: of the draws.
    """
    encoded = [data.encode(prompt)[: data.seq_len - 1] for prompt in prompts]
    lengths = torch.tensor([len(ids) for ids in encoded])
    length = min(int(lengths.max()) + tokens, data.seq_len)
    ids = torch.stack([torch.nn.functional.pad(row, (0, length - len(row))) for row in encoded])
    batch = Prompts(ids, lengths, top_k, temperature, seed)
    answers: list[Any] = trainer.predict(model, DataLoader(_Once(batch), batch_size=None)) or []
    added = length - int(lengths.max())
    return [
        (prompt, data.decode(row[n : n + added]))
        for prompt, row, n in zip(prompts, answers[0], lengths.tolist(), strict=True)
    ]


class _Once(IterableDataset[Prompts]):
    """One batch for every rank: Lightning shares out what has a length, and leaves an iterable alone."""

    def __init__(self, batch: Prompts) -> None:
        self._batch = batch

    def __iter__(self) -> Iterator[Prompts]:
        yield self._batch
