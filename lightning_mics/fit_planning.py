"""Planning a fit of Lightning's: from the LightningModule's training step, its data, and what the Trainer says.

Nothing is taken out of the training data; see `_example`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_hasattr, lightning_setattr
from torch import Tensor, nn

from lightning_mics._compat import train_loader
from lightning_mics.planner.plan import Workload
from lightning_mics.planning import Asked, Decision, Example, Question, Values, shapes_of

_BATCH_SIZE = "batch_size"
_INSTEAD = 'choose partition_size="node" or a number, and no micro_batch'


def question_of(
    trainer: Any, workload: Workload, asked: Asked, computing: Callable[[], AbstractContextManager[Any]]
) -> Question:
    """That of a fit which begins.

    Args:
        trainer: its loaders are not made yet.
        workload: with the LightningModule; batch and step are filled in here.
        asked: what is given.
        computing: the context of a training step (its precision's).
    """

    def made() -> tuple[int, Workload]:
        example = _checked_example(trainer, asked)
        module = shapes_of(trainer.lightning_module, kept=(trainer,))
        return example.size, replace(workload, module=module, batch=example.batch, step=_training_step(computing))

    return Question.of(asked, made, _INSTEAD)


def apply_batch(trainer: Any, decision: Decision) -> None:
    """Give the Trainer's data another batch size, and the Trainer as many micro-steps as keep the samples of a step."""
    lightning_setattr(trainer.lightning_module, _BATCH_SIZE, decision.micro_batch)
    trainer.accumulate_grad_batches = decision.window


def _checked_example(trainer: Any, asked: Asked) -> Example:
    module = trainer.lightning_module
    if not module.automatic_optimization:
        raise ValueError(f"a training step that optimizes by itself cannot be planned; {_INSTEAD}")
    if asked.changes_batch and not lightning_hasattr(module, _BATCH_SIZE):
        raise ValueError(
            'micro_batch="auto" sets `batch_size` of the LightningModule or the LightningDataModule, and neither has '
            "it; read it in train_dataloader(), or leave micro_batch out"
        )
    return _example(trainer)


def _example(trainer: Any) -> Example:
    """By `example_batch(size)` of the data module or the module, or by the loader's first sample."""
    module = trainer.lightning_module
    known = (getattr(owner, "example_batch", None) for owner in (trainer.datamodule, module))
    make = next((each for each in known if each is not None), None)
    if make is not None and lightning_hasattr(module, _BATCH_SIZE):
        return Example(int(lightning_getattr(module, _BATCH_SIZE)), make)
    instead = (
        "give the LightningModule or the LightningDataModule a method example_batch(size) and an attribute batch_size, "
        f"or {_INSTEAD}"
    )
    return Example.of(train_loader(trainer), instead, make)


def _training_step(computing: Callable[[], AbstractContextManager[Any]]) -> Callable[[nn.Module, Any], Tensor]:
    """From a LightningModule and a batch to the loss, as the Trainer has it, but that nothing is logged."""

    def step(module: Any, batch: Any) -> Tensor:
        wants_index = len(inspect.signature(module.training_step).parameters) > 1
        with _silent(module), computing(), Values():
            output = module.training_step(batch, 0) if wants_index else module.training_step(batch)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise ValueError(f"training_step returned {type(loss).__name__} for an example, not a loss; {_INSTEAD}")
        return loss

    return step


@contextmanager
def _silent(module: nn.Module) -> Iterator[None]:
    """What is logged here would be shown as training's."""
    names = ("log", "log_dict", "print")
    before = {name: vars(module)[name] for name in names if name in vars(module)}
    vars(module).update(dict.fromkeys(names, lambda *args, **kwargs: None))
    try:
        yield
    finally:
        for name in names:
            del vars(module)[name]
        vars(module).update(before)
