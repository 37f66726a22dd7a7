"""Hugging Face's Trainers: `MiCSTrainer(model, args, mics={"partition_size": 8}, train_dataset=...)`.

A `transformers.Trainer`, or `Seq2SeqTrainer`, whose accelerator is a `MiCSAccelerator`. What it overrides has names
with an underscore, as Trainer leaves no others for these: the arguments of the accelerator that it makes, the model
that it trains and evaluates, and the files of a checkpoint that would hold one rank's shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Seq2SeqTrainer, Trainer
from typing_extensions import override

from lightning_mics.accelerate import MiCSAccelerator
from lightning_mics.accelerate_arguments import check_no_other_sharding
from lightning_mics.arguments import sharded_before

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

STATE = "mics"
"""The folder of a Trainer's checkpoint in which `MiCSAccelerator.save_state` writes."""
_SCHEDULER = "scheduler.pt"  # as Trainer names it


class MiCSTrainerMixin(_Base):
    """Model state sharded in partition groups; to stand before the Trainer's class.

    Args:
        args: as of the Trainer.
        mics: arguments of `MiCSAccelerator`, as `{"partition_size": 8}`.
        kwargs: as of the Trainer.

    Raises:
        ValueError: for arguments of `TrainingArguments` that ask for another sharding, or for several devices in one
            process; and for best models of which only the weights are saved.
    """

    def __init__(self, *args: Any, mics: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self._mics = dict(mics or {})
        self._of_accelerator: dict[str, Any] = {}
        super().__init__(*args, **kwargs)

    @override
    def create_accelerator_and_postprocess(self) -> None:
        """Make a `MiCSAccelerator` of what Trainer would make an `Accelerator` of."""
        _check(self.args)
        super().create_accelerator_and_postprocess()
        self.accelerator = MiCSAccelerator(**self._mics, **self._of_accelerator)
        options = getattr(vars(self)["gather_function"], "keywords", {})
        self.gather_function = partial(self.accelerator.gather_for_metrics, **options)

    @override
    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        self._of_accelerator = super()._build_accelerator_args(**kwargs)
        check_no_other_sharding(self._of_accelerator)
        return self._of_accelerator

    @override
    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """The user's module, to be prepared for training; what it was prepared to be, for evaluation."""
        model = self.accelerator.unwrap_model(model)
        return model if training else self.accelerator.prepare_model(model)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @override
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Whole tensors, gathered one at a time, on the first process of each node. Collective."""
        if state_dict is None and sharded_before(self.model) is not None:
            state_dict = self.accelerator.get_state_dict(self.model)
        super()._save(output_dir, state_dict)

    @override
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.accelerator.save_state(Path(output_dir, STATE))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, _SCHEDULER))

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing yet: the weights come with the optimizer, each rank's shards."""
        if not Path(resume_from_checkpoint, STATE).is_dir():
            raise ValueError(
                f"{resume_from_checkpoint} has no folder {STATE!r}: it was not saved by MiCSTrainer, or with "
                "save_only_model=True; to begin with its weights, load the model by from_pretrained and leave out "
                "resume_from_checkpoint"
            )

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.accelerator.load_state(Path(checkpoint, STATE))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, _SCHEDULER), weights_only=True))

    @override
    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        self.accelerator.load_model(self.model, Path(best, STATE))


class MiCSTrainer(MiCSTrainerMixin, Trainer):
    """`transformers.Trainer` with model state sharded in partition groups; see `MiCSTrainerMixin`."""


class MiCSSeq2SeqTrainer(MiCSTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` so; ranks whose sequences have ended go on until those of all ranks have."""

    @override
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        found: dict[str, float] = super().evaluate(*args, **self._in_step(kwargs))
        return found

    @override
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        return super().predict(*args, **self._in_step(kwargs))

    def _in_step(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"synced_gpus": True, **kwargs} if self.args.predict_with_generate else kwargs


def _check(args: Any) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} devices in one process; start one process for each, by `torchrun` or `accelerate launch`"
        )
    if args.save_only_model and args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end=True loads each rank's shards, which save_only_model=True leaves out; set it to "
            "False"
        )
