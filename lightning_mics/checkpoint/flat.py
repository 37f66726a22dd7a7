"""A checkpoint as Lightning dumps it, and the same as flat tensors with the rest beside them.

model.<name>                       a parameter or buffer; a tied one under its first name
optimizer.<number>.<name>.<what>   state of an optimizer for a parameter
averages.<name>.<what>             of a parameter whose average is in its place in the model; see `averages`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_mics.averages import KEY

MODEL = "model."
OPTIMIZER = "optimizer."
AVERAGES = "averages."
TIED = "tied"


def split(checkpoint: dict[str, Any], module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, flat, and the rest without them."""
    aliases, state = aliases_in(module), checkpoint.get("state_dict", {})
    tensors = {MODEL + k: v for k, v in state.items() if isinstance(v, Tensor) and k not in aliases}
    rest = {**checkpoint, "state_dict": {k: v for k, v in state.items() if not isinstance(v, Tensor)}}
    rest[TIED] = {k: aliases[k] for k in state if k in aliases}
    if "optimizer_states" in checkpoint:
        rest["optimizer_states"] = []
    for i, optimizer in enumerate(checkpoint.get("optimizer_states", ())):
        values: dict[str, dict[str, Any]] = {}
        for name, fields in optimizer["state"].items():
            tensors |= {f"{OPTIMIZER}{i}.{name}.{k}": v for k, v in fields.items() if isinstance(v, Tensor)}
            values[name] = {k: v for k, v in fields.items() if not isinstance(v, Tensor)}
        rest["optimizer_states"].append({"state": values, "param_groups": optimizer["param_groups"]})
    if averages := checkpoint.get(KEY):
        for name, fields in averages["state"].items():
            tensors |= {f"{AVERAGES}{name}.{k}": v for k, v in fields.items()}
        rest[KEY] = {**averages, "state": {}}
    return tensors, rest


def join(tensors: Mapping[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The reverse of `split`, in place of `rest`."""
    state = rest["state_dict"]
    for key, tensor in tensors.items():
        if key.startswith(MODEL):
            state[key.removeprefix(MODEL)] = tensor
        elif key.startswith(AVERAGES):
            name, field = key.removeprefix(AVERAGES).rsplit(".", 1)
            rest[KEY]["state"].setdefault(name, {})[field] = tensor
        else:
            i, name, field = parts_of(key)
            rest["optimizer_states"][i]["state"].setdefault(name, {})[field] = tensor
    state |= {alias: state[name] for alias, name in rest.pop(TIED, {}).items() if name in state}
    return rest


def loader_states(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of the training loaders that have state, where Lightning keeps them among its loops; to be changed in place."""
    loops: Mapping[str, Any] = checkpoint.get("loops", {}).get("fit_loop", {})
    states: list[dict[str, Any]] = loops.get("state_dict", {}).get("combined_loader", [])
    return states


def parts_of(key: str) -> tuple[int, str, str]:
    """The optimizer's number, the parameter's name and the state's, of a key of optimizer state."""
    number, name_and_field = key.removeprefix(OPTIMIZER).split(".", 1)
    name, field = name_and_field.rsplit(".", 1)
    return int(number), name, field


def aliases_in(module: nn.Module) -> dict[str, str]:
    """Names of tied parameters after the first, and the first."""
    first: dict[int, str] = {}
    names = module.named_parameters(remove_duplicate=False)
    return {name: first[id(param)] for name, param in names if first.setdefault(id(param), name) != name}
