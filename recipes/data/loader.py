"""Loading in an order that belongs to the run, not to the machines it runs on.

An epoch is one permutation of all samples, drawn from (seed, epoch). Each micro-step, the next ``batch_size *
world_size`` of them are dealt out, a contiguous share to each rank. The place in an epoch is therefore one
number, the samples that all ranks together have consumed, and a run resumes there exactly, at another world
size too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from recipes.data.samples import Samples

Batch = dict[str, Tensor]


@dataclass
class EpochSampler:
    """Deals the samples of an epoch to the ranks.

    Args:
        samples: how many there are.
        batch_size: samples that one rank takes per micro-step.
        rank: this rank.
        world_size: ranks that share the samples.
        seed: of the permutations.
        epoch: the trainer's epoch; Lightning sets it through ``set_epoch``.

    Raises:
        ValueError: the samples do not fill one micro-step.
    """

    samples: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    epoch: int = 0

    def __post_init__(self) -> None:
        if self.samples < self.global_batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} on world_size={self.world_size} takes "
                f"{self.global_batch_size} samples a micro-step, and there are {self.samples}; "
                "lower batch_size or seq_len, or give more text"
            )

    @property
    def global_batch_size(self) -> int:
        """Samples that all ranks together take per micro-step."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Micro-steps of an epoch; samples that do not fill one at its end are left out."""
        return self.samples // self.global_batch_size

    def set_epoch(self, epoch: int) -> None:
        """Take note of the trainer's epoch."""
        self.epoch = epoch

    def batches(self, epoch: int, consumed: int = 0) -> Iterator[list[int]]:
        """This rank's sample numbers in an epoch, by micro-step, once all ranks have consumed so many."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.samples)
        for start in range(consumed, self.samples - self.global_batch_size + 1, self.global_batch_size):
            mine = start + self.rank * self.batch_size
            yield order[mine : mine + self.batch_size].tolist()


@dataclass(frozen=True)
class Place:
    """How far training has come.

    Attributes:
        epoch: the epoch of the data, which order and masks are drawn from.
        consumed: samples that all ranks together have consumed in it.
        trainer_epoch: what the trainer called this epoch.
    """

    epoch: int
    consumed: int
    trainer_epoch: int


class ResumableLoader:
    """Training batches that can be resumed in mid-epoch.

    Lightning saves and loads the state of any loader that has one, and wraps only what is a torch
    ``DataLoader``: this is none, so that its sampling is what runs. The state counts batches that were handed
    out, not what workers have fetched ahead; so a checkpoint that an exception writes in the middle of a
    micro-step leaves that micro-step's batch out.

    Its length is that of a whole epoch, also when it resumes in the middle of one. Lightning counts an epoch
    in batches, so after a change of world size or batch size the epoch that was under way may end some
    batches early.

    Args:
        samples: what to load.
        sampler: which of them this rank takes, and in what order.
        num_workers: processes that load ahead, 0 for none.
        pin_memory: whether batches are copied to page-locked memory.
    """

    def __init__(
        self, samples: Samples, sampler: EpochSampler, *, num_workers: int = 0, pin_memory: bool = False
    ) -> None:
        self.sampler = sampler
        self._samples = samples
        self._options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
        self._place = Place(0, 0, 0)
        self._resuming = False
        self._lag = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing is decided before the first batch is asked for, by when Lightning, which makes
        # the iterator first, has set the epoch.
        place = self._place = self._first_place()
        batches = self.sampler.batches(place.epoch, place.consumed)
        for batch in _loader(self._samples, place.epoch, batch_sampler=batches, **self._options):
            self._place = place = replace(place, consumed=place.consumed + self.sampler.global_batch_size)
            yield batch

    def _first_place(self) -> Place:
        trainer_epoch = self.sampler.epoch
        if self._resuming:
            self._resuming = False
            same = trainer_epoch == self._place.trainer_epoch
            # Lightning counts an epoch twice when max_steps is set and the checkpoint was saved at the epoch's
            # end: what follows is the next epoch nevertheless.
            self._lag = trainer_epoch - (self._place.epoch if same else self._place.epoch + 1)
            if same:
                return self._place
        return Place(trainer_epoch - self._lag, 0, trainer_epoch)

    def state_dict(self) -> dict[str, int]:
        """The place, and the order that it is a place in. Equal on all ranks."""
        return {**asdict(self._place), **self._order()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a place; when the trainer is past its epoch, from the beginning of the next.

        Raises:
            ValueError: the place is in another order of samples.
        """
        order = {name: state_dict[name] for name in self._order()}
        if order != self._order():
            raise ValueError(
                f"the checkpoint's data were {order}, these are {self._order()}: no sample to resume at; "
                "give the text, seq_len, val_fraction and seed that it was trained with, "
                "or load its weights alone"
            )
        self._place = Place(**{field.name: state_dict[field.name] for field in fields(Place)})
        self._resuming = True

    def _order(self) -> dict[str, int]:
        return {"samples": self.sampler.samples, "seed": self.sampler.seed}


def evaluation_loader(
    samples: Samples,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """All samples in order, shared by the ranks, the same each time.

    Every rank gets as many batches as the others, as collectives in the model demand; for that up to
    ``world_size - 1`` samples are seen twice.
    """
    # Lightning leaves a sampler of this class alone.
    everything: Dataset[Batch] = _Epoch(samples, 0)
    return _loader(
        samples,
        0,
        batch_size=batch_size,
        sampler=DistributedSampler(everything, world_size, rank, shuffle=False),
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


class _Epoch(Dataset[Batch]):
    """Samples as they are in one epoch."""

    def __init__(self, samples: Samples, epoch: int) -> None:
        self._samples = samples
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Batch:
        return self._samples.sample(index, self._epoch)


def _loader(samples: Samples, epoch: int, **options: Any) -> DataLoader[Batch]:
    # Without a generator of its own, each iterator draws from the global one, and shifts the dropout of a
    # resumed run.
    return DataLoader(_Epoch(samples, epoch), generator=torch.Generator(), **options)
