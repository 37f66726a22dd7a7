"""A byte-level BPE tokenizer, trained on the corpus itself.

Bytes are its alphabet, so that every text can be written and read back exactly. Its special tokens have the
same ids in every vocabulary, and cannot be spelled: a text that contains "[MASK]" is six plain characters to
it.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_ALPHABET = 256


class SpecialToken(IntEnum):
    """Special tokens by id, the same for every vocabulary."""

    PAD = 0
    UNK = 1
    CLS = 2
    SEP = 3
    MASK = 4
    EOS = 5

    @property
    def text(self) -> str:
        """How the token is written in a vocabulary file."""
        return f"[{self.name}]"


MIN_VOCAB_SIZE = _ALPHABET + len(SpecialToken)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train on texts until the vocabulary is full.

    Args:
        texts: pieces of the corpus.
        vocab_size: entries of the vocabulary, at least ``MIN_VOCAB_SIZE``; a small corpus may fill fewer.

    Returns:
        The tokenizer; it adds no special tokens by itself.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=SpecialToken.UNK.text))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[token.text for token in SpecialToken],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _deaf_to_specials(tokenizer)


def load_tokenizer(path: str) -> Tokenizer:
    """Load a tokenizer that was saved to a JSON file."""
    return _deaf_to_specials(Tokenizer.from_file(path))


def _deaf_to_specials(tokenizer: Tokenizer) -> Tokenizer:
    # Not saved with the tokenizer; without it, a corpus that spells "[EOS]" would end documents in the
    # middle.
    tokenizer.encode_special_tokens = True
    return tokenizer
