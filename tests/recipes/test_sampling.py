"""Sampling: what continues a prompt, and that the forwards depend on the prompts alone."""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.sampling import Prompts, continued

VOCAB = 10


class Counting:
    """After token t comes t + 1, with token t + 2 close behind."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []

    def __call__(self, ids: Tensor) -> Tensor:
        self.shapes.append(ids.shape)
        one, two = (torch.nn.functional.one_hot((ids + n) % VOCAB, VOCAB) for n in (1, 2))
        return 5.0 * one + 4.9 * two


def prompts(top_k: int, seed: int = 0) -> Prompts:
    return Prompts(torch.tensor([[3, 4, 5, 0, 0, 0], [7, 0, 0, 0, 0, 0]]), torch.tensor([3, 1]), top_k, 1.0, seed)


def test_greedy_continues_each_prompt_from_its_own_end() -> None:
    ids = continued(Counting(), prompts(top_k=1))
    assert ids.tolist() == [[3, 4, 5, 6, 7, 8], [7, 8, 9, 0, 0, 0]]


def test_forwards_are_as_many_as_tokens_and_of_one_shape() -> None:
    model = Counting()
    continued(model, prompts(top_k=3))
    assert model.shapes == [torch.Size([2, 6])] * 3


def test_one_seed_draws_the_same_on_every_rank_whatever_its_own_state() -> None:
    torch.manual_seed(1)
    first = continued(Counting(), prompts(top_k=2))
    torch.manual_seed(2)
    assert torch.equal(first, continued(Counting(), prompts(top_k=2)))
    draws = [continued(Counting(), prompts(top_k=2, seed=seed)) for seed in range(1, 9)]
    assert any(not torch.equal(first, draw) for draw in draws)


def test_only_the_likeliest_are_drawn() -> None:
    for seed in range(20):
        ids = continued(Counting(), prompts(top_k=2, seed=seed))
        steps = (ids[0, 3:] - ids[0, 2:-1]) % VOCAB
        assert set(steps.tolist()) <= {1, 2}
