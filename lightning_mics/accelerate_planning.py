"""Planning a loop under Accelerate: from the model, the loader that is prepared with it, and a batch's way to a loss.

Nothing is taken out of the training data; see `Example`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mics._compat import tree_flatten
from lightning_mics.blocks import has_parameters
from lightning_mics.planner.plan import Workload
from lightning_mics.planning import Asked, Example, Question, Values, shapes_of

TrainingStep = Callable[[nn.Module, Any], Tensor]

_INSTEAD = 'choose partition_size="node" or a number'
_TOGETHER = f'partition_size="auto" plans from one model and its data loader, prepared in one call; {_INSTEAD}'


def what_to_plan(objects: Sequence[object]) -> tuple[nn.Module, DataLoader[Any]]:
    """The model and the loader among what is prepared.

    Raises:
        ValueError: if there are not one of the former and some of the latter.
    """
    models = [obj for obj in objects if isinstance(obj, nn.Module) and has_parameters(obj)]
    loaders = [obj for obj in objects if isinstance(obj, DataLoader)]
    if len(models) != 1 or not loaders:
        raise ValueError(f"{_TOGETHER} ({len(models)} models and {len(loaders)} loaders were given)")
    return models[0], loaders[0]


def question_of(
    model: nn.Module,
    loader: DataLoader[Any],
    workload: Workload,
    asked: Asked,
    step: TrainingStep | None,
    computing: Callable[[], AbstractContextManager[Any]],
    shares: int = 1,
) -> Question:
    """That of a loop which is prepared.

    Args:
        model: that will be sharded.
        loader: of its training data.
        workload: module, batch and step are filled in here.
        asked: what is given.
        step: from model and batch to the loss; by default `loss_of_call`.
        computing: the context of a forward.
        shares: ranks among which a batch of the loader is divided.
    """

    def computed(module: nn.Module, batch: Any) -> Tensor:
        with computing(), Values():
            return (step or loss_of_call)(module, batch)

    def made() -> tuple[int, Workload]:
        example = Example.of(loader, _INSTEAD)
        size = max(1, example.size // shares)
        return size, replace(workload, module=shapes_of(model), batch=example.batch, step=computed)

    return Question.of(asked, made, f"{_INSTEAD}, or give training_step, from model and batch to the loss")


def loss_of_call(model: nn.Module, batch: Any) -> Tensor:
    """What a model that is called with a batch says is its loss; else the sum of all that it returns, whatever it is.

    A mapping is given by its names; of a tuple or list, of inputs and targets, the first.
    """
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(batch[0] if isinstance(batch, tuple | list) else batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    floats = [each for each in tree_flatten(output)[0] if isinstance(each, Tensor) and each.requires_grad]
    if not floats:
        raise ValueError(f"{type(model).__name__} returns nothing that could be trained on")
    return sum((each.float().sum() for each in floats[1:]), floats[0].float().sum())
