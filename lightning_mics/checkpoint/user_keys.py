"""User keys: what Fabric saved, under the keys of the user's state, as Fabric has it where nothing is sharded.

In a directory modules and optimizers have the form that a Trainer's have; a record beside them tells their keys.
"""

from __future__ import annotations

from typing import Any

from lightning_mics.checkpoint.optimizer import number_parameters

RECORD = "fabric"
"""Beside tensors: the keys of "modules" and "optimizers", in their order, and the rest of the "state"."""


def under_user_keys(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A whole checkpoint with a record, under the user's keys; optimizer state numbered, as torch numbers it."""
    record = checkpoint[RECORD]
    state, keys = checkpoint["state_dict"], record["modules"]
    prefixes = {keys[0]: ""} if len(keys) == 1 else {key: f"{key}." for key in keys}
    modules = {
        key: {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for key, prefix in prefixes.items()
    }
    optimizers = zip(record["optimizers"], checkpoint["optimizer_states"], strict=True)
    return {**modules, **{key: number_parameters(each) for key, each in optimizers}, **record["state"]}
