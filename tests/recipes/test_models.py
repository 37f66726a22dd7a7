"""Models: every configuration on the meta device, counted against a closed formula and the published sizes."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from hydra.utils import instantiate
from torch import nn
from transformers import BertConfig, GPT2Config, PreTrainedConfig, RobertaConfig

from recipes.data import Objective
from recipes.models import LanguageModel, build, grown
from recipes.optim import adamw, warmup_cosine
from tests.recipes.composing import composed, options

# In the paper's table 1 and the models' own papers, to the digits they give.
PUBLISHED = {
    "bert_base": 110e6,
    "bert_large": 336e6,
    "bert_1.5b": 1.5e9,
    "bert_10b": 10e9,
    "bert_15b": 15e9,
    "bert_20b": 20e9,
    "bert_50b": 50e9,
    "roberta_20b": 20e9,
    "gpt2_20b": 20e9,
    "gpt2": 124e6,
    "gpt2_medium": 355e6,
    "gpt2_xl": 1.56e9,
    "gpt_100b": 100e9,
    "gpt_175b": 175e9,
}


def bert_parameters(hidden: int, inner: int, layers: int, vocab: int, positions: int, types: int) -> int:
    norm = 2 * hidden
    embeddings = (vocab + positions + types) * hidden + norm
    attention = 4 * (hidden * hidden + hidden) + norm
    mlp = hidden * inner + inner + inner * hidden + hidden + norm
    # The decoder is tied to the embedding; its bias is not.
    head = hidden * hidden + hidden + norm + vocab
    return embeddings + layers * (attention + mlp) + head


def gpt_parameters(hidden: int, layers: int, vocab: int, positions: int) -> int:
    # Per layer: attention 4 h^2 + 4 h, MLP 8 h^2 + 5 h, two norms 4 h; a norm at the end, and a tied head.
    return (vocab + positions) * hidden + layers * (12 * hidden * hidden + 13 * hidden) + 2 * hidden


SHAPES = {
    "bert_tiny": bert_parameters(128, 512, 4, 8192, 128, 2),
    "bert_base": bert_parameters(768, 3072, 12, 30522, 512, 2),
    "bert_large": bert_parameters(1024, 4096, 24, 30522, 512, 2),
    "bert_1.5b": bert_parameters(1600, 6400, 48, 30522, 512, 2),
    "bert_10b": bert_parameters(2560, 10240, 127, 30522, 512, 2),
    "bert_15b": bert_parameters(2560, 10240, 190, 30522, 512, 2),
    "bert_20b": bert_parameters(5120, 20480, 64, 30522, 512, 2),
    "bert_50b": bert_parameters(8192, 32768, 62, 30522, 512, 2),
    "roberta_20b": bert_parameters(5120, 20480, 62, 50265, 514, 1),
    "gpt_tiny": gpt_parameters(128, 4, 8192, 128),
    "gpt2": gpt_parameters(768, 12, 50257, 1024),
    "gpt2_medium": gpt_parameters(1024, 24, 50257, 1024),
    "gpt2_xl": gpt_parameters(1600, 48, 50257, 1024),
    "gpt2_20b": gpt_parameters(5120, 62, 50257, 1024),
    "gpt_100b": gpt_parameters(10240, 80, 50257, 2048),
    "gpt_175b": gpt_parameters(12288, 96, 50257, 2048),
}


@cache
def on_meta(name: str) -> nn.Module:
    model: LanguageModel = instantiate(composed(f"model={name}").model, _convert_="all")
    with torch.device("meta"):
        return build(model.config, model.objective)


def test_every_configuration_is_counted() -> None:
    assert set(SHAPES) == set(options("model"))


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_closed_formula(name: str) -> None:
    network = on_meta(name)
    assert all(parameter.is_meta for parameter in network.parameters())
    assert sum(parameter.numel() for parameter in network.parameters()) == SHAPES[name]


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_parameters_are_near_the_published_count(name: str, published: float) -> None:
    assert SHAPES[name] == pytest.approx(published, rel=0.025)


@pytest.mark.parametrize("name", SHAPES)
def test_attention_is_sdpa(name: str) -> None:
    assert on_meta(name).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("config", "positions"),
    [(BertConfig(), 600), (RobertaConfig(max_position_embeddings=514), 602), (GPT2Config(n_positions=512), 600)],
    ids=["bert", "roberta", "gpt2"],
)
def test_embeddings_grow_to_the_data(config: PreTrainedConfig, positions: int) -> None:
    bigger = grown(config, seq_len=600, vocab_size=60_000)
    assert (bigger.max_position_embeddings, bigger.vocab_size) == (positions, 60_000)
    same = grown(config, seq_len=64, vocab_size=300)
    assert same.max_position_embeddings == config.max_position_embeddings
    assert same.vocab_size == config.vocab_size


@pytest.mark.parametrize(
    ("config", "objective"),
    [
        (BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2), Objective.MASKED),
        (RobertaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2), Objective.MASKED),
        (GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2), Objective.CAUSAL),
    ],
    ids=["bert", "roberta", "gpt2"],
)
def test_loss_is_the_mean_cross_entropy_of_what_is_to_be_predicted(
    config: PreTrainedConfig, objective: Objective
) -> None:
    config = grown(config, seq_len=520, vocab_size=32)
    network = build(config, objective).eval()
    ids = torch.randint(6, 32, (2, 520))
    labels = ids.clone()
    labels[:, ::2] = -100
    answer = network(input_ids=ids, labels=labels)
    logits = answer.logits
    if objective is Objective.CAUSAL:
        logits, labels = logits[:, :-1], labels[:, 1:]
    chosen = labels != -100
    expected = nn.functional.cross_entropy(logits[chosen], labels[chosen])
    torch.testing.assert_close(answer.loss, expected)


def test_unknown_objective_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objective='seq2seq' is unknown; choose one of causal, masked"):
        LanguageModel(GPT2Config(), "seq2seq", partial(adamw, lr=1e-3), warmup_cosine, seq_len=8, vocab_size=8)
