"""The order of samples: complete, the same for every world size, and resumable at the exact sample."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice

import pytest
import torch
from torch import Tensor

from recipes.data.loader import EpochSampler, ResumableLoader, evaluation_loader

SAMPLES = 53


class Numbers:
    """Samples that are their own number, and their epoch."""

    def __len__(self) -> int:
        return SAMPLES

    def sample(self, index: int, epoch: int) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([index]), "labels": torch.tensor([epoch])}


def sampler(batch_size: int = 3, rank: int = 0, world_size: int = 1, seed: int = 1) -> EpochSampler:
    return EpochSampler(SAMPLES, batch_size, rank, world_size, seed)


def loader(workers: int = 0, **options: int) -> ResumableLoader:
    return ResumableLoader(Numbers(), sampler(**options), num_workers=workers)


def numbers(batches: object) -> list[list[int]]:
    return [batch["input_ids"].flatten().tolist() for batch in batches]  # type: ignore[attr-defined]


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def of_all_ranks(batch_size: int, world_size: int, consumed: int = 0) -> list[list[int]]:
    """Per micro-step, the samples of all ranks."""
    ranks = [sampler(batch_size, rank, world_size).batches(0, consumed) for rank in range(world_size)]
    return [flat(shares) for shares in zip(*ranks, strict=True)]


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (3, 1), (2, 4), (1, 8), (5, 2), (53, 1)])
def test_each_sample_is_dealt_once_save_what_fills_no_micro_step(batch_size: int, world_size: int) -> None:
    steps = of_all_ranks(batch_size, world_size)
    dealt = flat(steps)
    assert len(set(dealt)) == len(dealt) > SAMPLES - batch_size * world_size
    assert set(dealt) <= set(range(SAMPLES))
    assert len(steps) == len(sampler(batch_size, 0, world_size))


def test_micro_steps_take_the_same_samples_at_every_world_size() -> None:
    steps = of_all_ranks(8, 1)
    assert of_all_ranks(4, 2) == of_all_ranks(2, 4) == of_all_ranks(1, 8) == steps


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    one = loader()
    first = numbers(one)
    one.sampler.set_epoch(1)
    second = numbers(one)
    one.sampler.set_epoch(0)
    assert numbers(one) == first
    assert numbers(loader()) == first
    assert len({str(order) for order in (first, second, numbers(loader(seed=2)))}) == 3


def test_samples_are_made_for_their_epoch() -> None:
    one = loader()
    one.sampler.set_epoch(7)
    assert {int(epoch) for batch in one for epoch in batch["labels"]} == {7}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_loader_resumes_after_the_last_batch_that_it_handed_out(workers: int, rank: int) -> None:
    whole = numbers(loader(rank=rank, world_size=2))
    for stop in (0, 1, 5, len(whole)):
        stopped = loader(workers, rank=rank, world_size=2)
        iterator = iter(stopped)
        assert numbers(islice(iterator, stop)) == whole[:stop]
        resumed = loader(workers, rank=rank, world_size=2)
        resumed.load_state_dict(stopped.state_dict())
        assert resumed.state_dict() == stopped.state_dict()
        assert len(resumed) == len(whole)
        assert numbers(resumed) == whole[stop:]


def test_all_ranks_have_the_same_state() -> None:
    states = []
    for rank in range(2):
        one = loader(rank=rank, world_size=2)
        list(islice(one, 4))
        states.append(one.state_dict())
    assert states[0] == states[1]
    assert states[0] == {"epoch": 0, "consumed": 24, "trainer_epoch": 0, "samples": SAMPLES, "seed": 1}


def test_another_world_size_goes_on_with_the_next_sample() -> None:
    first = of_all_ranks(2, 4)[:3]
    rest = of_all_ranks(1, 2, consumed=24)
    dealt = flat(first + rest)
    assert dealt == flat(of_all_ranks(1, 1))[: len(dealt)]
    assert len(dealt) == 52

    stopped = loader(batch_size=2, rank=3, world_size=4)
    list(islice(stopped, 3))
    resumed = loader(batch_size=1, rank=1, world_size=2)
    resumed.load_state_dict(stopped.state_dict())
    assert numbers(resumed) == [step[1:] for step in rest]


def test_a_place_counts_once() -> None:
    whole = numbers(loader())
    resumed = loader()
    resumed.load_state_dict({**resumed.state_dict(), "consumed": 9})
    assert numbers(resumed) == whole[3:]
    assert numbers(resumed) == whole


@pytest.mark.parametrize("trainer_epoch", [1, 2])
def test_after_the_end_of_an_epoch_comes_the_next_whatever_the_trainer_calls_it(trainer_epoch: int) -> None:
    one = loader()
    epochs = []
    for epoch in range(4):
        one.sampler.set_epoch(epoch)
        epochs.append(numbers(one))

    stopped = loader()
    list(stopped)
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    resumed.sampler.set_epoch(trainer_epoch)
    assert numbers(resumed) == epochs[1]
    resumed.sampler.set_epoch(trainer_epoch + 1)
    list(islice(resumed, 4))
    again = loader()
    again.load_state_dict(resumed.state_dict())
    again.sampler.set_epoch(trainer_epoch + 1)
    assert numbers(again) == epochs[2][4:]
    again.sampler.set_epoch(trainer_epoch + 2)
    assert numbers(again) == epochs[3]


def test_the_epoch_may_be_set_after_the_iterator_was_made() -> None:
    expected = loader()
    expected.sampler.set_epoch(4)
    late = loader()
    iterator = iter(late)
    late.sampler.set_epoch(4)
    assert numbers(iterator) == numbers(expected)


def test_a_place_in_other_data_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'samples': 9, 'seed': 1.*'samples': 53, 'seed': 1.*give the text"):
        loader().load_state_dict({"epoch": 0, "consumed": 0, "samples": 9, "seed": 1})


def test_samples_that_fill_no_micro_step_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size=7 on world_size=8 takes 56 samples a micro-step.*there are 53"):
        sampler(batch_size=7, world_size=8)


@pytest.mark.parametrize("world_size", [1, 2, 4, 5])
def test_evaluation_covers_all_samples_with_as_many_batches_on_each_rank(world_size: int) -> None:
    ranks = [
        numbers(evaluation_loader(Numbers(), batch_size=4, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = flat(flat(batches) for batches in ranks)
    assert set(seen) == set(range(SAMPLES))
    assert len(seen) - SAMPLES < world_size


def test_evaluation_is_the_same_each_time() -> None:
    one = evaluation_loader(Numbers(), batch_size=4, rank=0, world_size=2)
    first = numbers(one)
    one.sampler.set_epoch(3)  # type: ignore[attr-defined]
    assert numbers(one) == first
    assert {int(epoch) for batch in one for epoch in batch["labels"]} == {0}


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_draws_nothing_from_the_global_generator(workers: int) -> None:
    before = torch.get_rng_state()
    list(loader(workers))
    list(evaluation_loader(Numbers(), batch_size=4, rank=0, world_size=1, num_workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
