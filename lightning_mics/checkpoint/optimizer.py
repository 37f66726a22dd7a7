"""Optimizer state by parameter name.

torch numbers parameters; a checkpoint that outlives the code names them. The live optimizer is only read: asking the
distributed checkpoint library for its state would take a step to create what is not there yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mics._compat import quantized_state
from lightning_mics.offload import stepped_for
from lightning_mics.optimizer_shards import parameter_of
from lightning_mics.shards import local_part, outside_inference_mode, sharded_as

StateByName = dict[str, Any]

_NOTHING: StateByName = {"state": {}, "param_groups": []}


@outside_inference_mode
def optimizer_state_by_name(module: nn.Module, optimizer: Optimizer) -> StateByName:
    """The optimizer's state dict, with parameter names for indices.

    Returns:
        "state": for each name a dict of tensors (DTensors where the parameter's shape is kept; of those that an
        optimizer keeps in fewer bits, the values) and values; "param_groups": each with the names in its "params".
    """
    state = optimizer.state_dict() or _NOTHING  # where Lightning has none, its stand-in says less than any other
    named = name_parameters(module, optimizer, state)
    state = {name: {key: _values(value) for key, value in each.items()} for name, each in named["state"].items()}
    return {**named, "state": state}


@torch.no_grad()
def load_state(optimizer: Optimizer, by_name: StateByName) -> None:
    """Load state by name, of which each rank has its part; what an optimizer keeps in fewer bits is rounded to them."""
    optimizer.load_state_dict(number_parameters(by_name))
    for param, fields in optimizer.state.items():
        for name, value in fields.items():
            if isinstance(value, Tensor) and value.shape == param.shape and param.ndim:
                made = quantized_state(optimizer, stepped_for(optimizer, param), name)
                if made is not None:
                    local_part(made).copy_(local_part(value))
                    fields[name] = made


def paired(
    path: str | Path, optimizers: Sequence[Optimizer], states: Sequence[Mapping[str, Any]] | None
) -> Iterator[tuple[Optimizer, Mapping[str, Any]]]:
    """Each optimizer with its saved state.

    Raises:
        ValueError: if the checkpoint at `path` holds no optimizer state, or that of more or fewer optimizers.
    """
    if states is None:
        raise ValueError(
            f"{path} holds weights only, no optimizer state to resume from; load it by validate/test/predict, or save "
            "with save_weights_only=False"
        )
    if len(states) != len(optimizers):
        raise ValueError(
            f"{path} was saved with {len(states)} optimizers, there are {len(optimizers)} now; return as many from "
            "configure_optimizers"
        )
    return zip(optimizers, states, strict=True)


def check_same_parameters(module: nn.Module, optimizer: Optimizer, by_name: Mapping[str, Any]) -> None:
    """Before `by_name` is loaded.

    Raises:
        ValueError: if the optimizer's groups do not hold the parameters they held when it was saved.
    """
    names = _names(module, optimizer)
    saved = [group["params"] for group in by_name["param_groups"]]
    if names != saved:
        raise ValueError(
            f"the optimizer holds {sum(map(len, names))} parameters in {len(names)} groups, the checkpoint "
            f"{sum(map(len, saved))} in {len(saved)}, first different: {_first_difference(names, saved)}; build the "
            "optimizer as it was built when the checkpoint was saved"
        )


def number_parameters(by_name: StateByName) -> dict[str, Any]:
    """State by name as torch's optimizers load it: parameters numbered in the order of the groups."""
    names = (name for group in by_name["param_groups"] for name in group["params"])
    order = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [order[name] for name in group["params"]]} for group in by_name["param_groups"]]
    return {"state": {order[name]: state for name, state in by_name["state"].items()}, "param_groups": groups}


def name_parameters(module: nn.Module, optimizer: Optimizer, numbered: Mapping[str, Any]) -> StateByName:
    """The reverse of `number_parameters`, with the names of `optimizer`'s parameters in their order.

    Raises:
        ValueError: if the optimizer's groups do not hold as many parameters.
    """
    names, saved = _names(module, optimizer), [group["params"] for group in numbered["param_groups"]]
    if [len(group) for group in names] != [len(group) for group in saved]:
        raise ValueError(
            f"the optimizer holds groups of {[len(group) for group in names]} parameters, the checkpoint "
            f"{[len(group) for group in saved]}; build the optimizer as it was built when the checkpoint was saved"
        )
    name_of = {n: name for ns, named in zip(saved, names, strict=True) for n, name in zip(ns, named, strict=True)}
    groups = [{**group, "params": named} for group, named in zip(numbered["param_groups"], names, strict=True)]
    return {"state": {name_of[n]: state for n, state in numbered["state"].items()}, "param_groups": groups}


def held_by_name(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """What the optimizer has state for, for each parameter: that, this rank's piece of it, or its copy on the host."""
    held = (stepped_for(optimizer, param) for group in optimizer.param_groups for param in group["params"])
    names = (name for group in _names(module, optimizer) for name in group)
    return dict(zip(names, held, strict=True))


def empty_like_saved(held: Tensor, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor to read a saved state into: sharded as what the optimizer holds where the shape is its own."""
    if size == held.shape:
        return torch.empty_like(held, dtype=dtype, requires_grad=False)
    return torch.empty(size, dtype=dtype)


def _names(module: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    name_of = {id(p): name for name, p in module.named_parameters()}
    groups = [[name_of.get(id(parameter_of(p))) for p in group["params"]] for group in optimizer.param_groups]
    if any(name is None for group in groups for name in group):
        raise ValueError(
            "the optimizer holds a parameter that is not the sharded module's; make optimizers in "
            "configure_optimizers, from self.parameters()"
        )
    return groups  # type: ignore[return-value]


def _values(value: Any) -> Any:
    """Of a tensor that is kept in fewer bits than its dtype says, as torchao's, which can be sharded otherwise."""
    if not isinstance(value, Tensor):
        return value
    own = local_part(value)
    if type(own).dequantize is Tensor.dequantize:
        return value
    return sharded_as(own.dequantize(), value)


def _first_difference(ours: list[list[str]], saved: list[list[str]]) -> str:
    flat = [name for group in ours for name in group], [name for group in saved for name in group]
    pair = next(((a, b) for a, b in zip_longest(*flat, fillvalue="nothing") if a != b), ("another grouping", "its own"))
    return f"{pair[0]} here, {pair[1]} there"
