"""Samples: their windows, BERT's masks, and that nothing but (seed, epoch, index) decides them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.data.corpus import Split
from recipes.data.samples import IGNORED_LABEL, CausalSamples, MaskedSamples, mask
from recipes.data.tokenizer import SpecialToken
from recipes.data.tokens import TokenFile

VOCAB_SIZE = 1000
SEQ_LEN = 66


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    ids = np.random.default_rng(0).integers(len(SpecialToken), VOCAB_SIZE, 64 * 500 + 13).astype(np.uint16)
    ids[::50] = SpecialToken.EOS
    ids.tofile(tmp_path / "ids")
    return TokenFile(tmp_path / "ids", "uint16")


def masked(tokens: TokenFile, seed: int = 3, split: Split = Split.TRAIN) -> MaskedSamples:
    return MaskedSamples(tokens, SEQ_LEN, vocab_size=VOCAB_SIZE, seed=seed, split=split)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in ("input_ids", "labels"))


def test_causal_windows_are_contiguous_and_label_themselves(tokens: TokenFile) -> None:
    samples = CausalSamples(tokens, 64)
    assert len(samples) == 500
    read = [samples.sample(index, epoch=0) for index in range(len(samples))]
    assert all(torch.equal(each["input_ids"], each["labels"]) for each in read)
    assert all(each["input_ids"].dtype == torch.int64 for each in read)
    together = torch.cat([each["input_ids"] for each in read])
    assert np.array_equal(together.numpy(), tokens.ids[: 64 * 500])


def test_masked_windows_are_framed_and_labelled_with_what_was_there(tokens: TokenFile) -> None:
    samples = masked(tokens)
    assert len(samples) == 500
    for index in range(len(samples)):
        sample = samples.sample(index, epoch=0)
        inputs, labels = sample["input_ids"].numpy(), sample["labels"].numpy()
        assert inputs.dtype == labels.dtype == np.int64
        assert (inputs[0], inputs[-1]) == (SpecialToken.CLS, SpecialToken.SEP)
        window = tokens.ids[index * 64 : (index + 1) * 64]
        chosen = labels[1:-1] != IGNORED_LABEL
        assert labels[0] == labels[-1] == IGNORED_LABEL
        assert np.array_equal(np.where(chosen, labels[1:-1], inputs[1:-1]), window)
        # A window has 62 or 63 ordinary tokens here; 15 % of them is 9.
        assert chosen.sum() == 9
        assert SpecialToken.EOS not in labels


def test_masks_follow_the_papers_shares() -> None:
    ids = np.full(100_000, 7)
    inputs, labels = mask(ids, VOCAB_SIZE, np.random.default_rng(0))
    chosen = labels != IGNORED_LABEL
    assert chosen.sum() == 15_000
    share = {
        "masked": (inputs[chosen] == SpecialToken.MASK).mean(),
        "kept": (inputs[chosen] == 7).mean(),
        "replaced": ((inputs[chosen] != 7) & (inputs[chosen] != SpecialToken.MASK)).mean(),
    }
    # The standard deviation of each is at most sqrt(0.16 / 15000) = 0.0033.
    assert share == pytest.approx({"masked": 0.8, "kept": 0.1, "replaced": 0.1}, abs=0.014)
    others = inputs[chosen & (inputs != 7) & (inputs != SpecialToken.MASK)]
    assert others.min() >= len(SpecialToken) and others.max() < VOCAB_SIZE
    assert len(np.unique(others)) > 700
    # Chosen places are spread evenly: halves differ by less than five standard deviations.
    assert abs(chosen[:50_000].sum() - 7_500) < 5 * 57


def test_a_sample_with_few_ordinary_tokens_still_predicts_one() -> None:
    ids = np.array([SpecialToken.CLS, SpecialToken.EOS, 9, SpecialToken.SEP])
    _, labels = mask(ids, VOCAB_SIZE, np.random.default_rng(0))
    assert labels.tolist() == [IGNORED_LABEL, IGNORED_LABEL, 9, IGNORED_LABEL]


def test_masks_depend_on_seed_split_epoch_and_index_and_on_nothing_else(tokens: TokenFile) -> None:
    sample = masked(tokens).sample(5, epoch=2)
    torch.manual_seed(99)
    np.random.seed(99)
    again = masked(tokens)
    again.sample(4, epoch=2)
    assert equal(again.sample(5, epoch=2), sample)
    assert not equal(again.sample(5, epoch=3), sample)
    assert not equal(masked(tokens, seed=4).sample(5, epoch=2), sample)
    assert not equal(masked(tokens, split=Split.VALIDATION).sample(5, epoch=2), sample)


def test_masks_of_two_windows_with_the_same_text_differ(tmp_path: Path) -> None:
    np.full(64 * 2, 9, np.uint16).tofile(tmp_path / "same")
    samples = masked(TokenFile(tmp_path / "same", "uint16"))
    assert not equal(samples.sample(0, epoch=0), samples.sample(1, epoch=0))


def test_masks_are_those_that_earlier_runs_saw(tokens: TokenFile) -> None:
    # NumPy may change its streams between releases; a run must then not be resumed across them unawares.
    labels = masked(tokens).sample(0, epoch=0)["labels"]
    assert torch.nonzero(labels != IGNORED_LABEL).flatten().tolist() == [2, 4, 5, 6, 19, 25, 41, 43, 53]
