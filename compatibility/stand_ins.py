"""Tiny things in the place of what scripts fetch from a hub: pairs of sentences, a metric, and a model with its words.

The numbers that they give mean nothing; that they are the same in another run, or on other ranks, does.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PAIRS = {"train": 320, "validation": 104, "test": 32}


class Metric:
    """Accuracy and F1 of class 1, as the hub's metric for pairs of sentences."""

    def __init__(self) -> None:
        self._pairs: list[tuple[int, int]] = []

    def add_batch(self, *, predictions: Iterable[Any], references: Iterable[Any]) -> None:
        self._pairs += [(int(p), int(r)) for p, r in zip(predictions, references, strict=True)]

    def compute(self) -> dict[str, float]:
        pairs, self._pairs = self._pairs, []
        hits = sum(p == r for p, r in pairs)
        positive, both = sum(p + r for p, r in pairs), sum(p * r for p, r in pairs)
        return {"accuracy": hits / len(pairs), "f1": 2 * both / positive if positive else 0.0}


def pairs(count: int, seed: int) -> dict[str, list[Any]]:
    """Pairs of sentences, and whether the second is the first in another order."""
    chance = random.Random(seed)
    columns: dict[str, list[Any]] = {"sentence1": [], "sentence2": [], "label": [], "idx": []}
    for index in range(count):
        first = chance.choices(_WORDS, k=chance.randint(3, 9))
        same = chance.random() < 0.5
        second = chance.sample(first, len(first)) if same else chance.choices(_WORDS, k=len(first))
        for name, value in zip(columns, (" ".join(first), " ".join(second), int(same), index), strict=True):
            columns[name].append(value)
    return columns


def load_dataset(*names: str, split: Any = None, **options: Any) -> Any:
    """In the place of `datasets.load_dataset`."""
    import datasets

    made = {name: datasets.Dataset.from_dict(pairs(n, seed)) for seed, (name, n) in enumerate(_PAIRS.items())}
    if isinstance(split, str):
        return made[split]
    return datasets.DatasetDict(made)


def install() -> None:
    """Let `evaluate` and `datasets.load_dataset` be these in this process."""
    import datasets

    datasets.load_dataset = load_dataset
    evaluate = ModuleType("evaluate")
    evaluate.load = lambda *names: Metric()  # type: ignore[attr-defined]
    sys.modules["evaluate"] = evaluate


def write_model(folder: Path) -> Path:
    """A BERT of two layers for two classes, and its tokenizer, as `from_pretrained` reads them."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: i for i, word in enumerate((*_SPECIAL, *_WORDS))}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **names).save_pretrained(folder)
    torch.manual_seed(1)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(_SPECIAL) + len(_WORDS), max_position_embeddings=64, **size)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder
