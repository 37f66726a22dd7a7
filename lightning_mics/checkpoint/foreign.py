"""Sharded checkpoints of Lightning's own strategies (FSDPStrategy, ModelParallelStrategy), read as ours are.

    DIR/.metadata, *.distcp    model.<name> (FSDPStrategy) or state_dict.<name> (ModelParallelStrategy),
                               optimizer_<number>.state.<name>.<what>, optimizer_<number>.param_groups...
    DIR/meta.pt                what Lightning keeps beside them

They have no manifest, so that nothing tells whether they are whole.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from lightning_mics.checkpoint import metadata
from lightning_mics.checkpoint.flat import MODEL, OPTIMIZER
from lightning_mics.checkpoint.optimizer import StateByName

REST = "meta.pt"
_MODEL = "state_dict."
_STATE = re.compile(r"optimizer_(\d+)\.state\.")
_GROUP = re.compile(r"optimizer_(\d+)\.param_groups\.(\d+)\.(.+)")


def is_foreign(path: Path) -> bool:
    """Whether the directory is a sharded checkpoint that Lightning wrote."""
    return (path / metadata.NAME).is_file() and (path / REST).is_file()


def translated(path: Path, rest: dict[str, Any]) -> tuple[Metadata, dict[str, Any]]:
    """The index of the checkpoint at `path` and what is beside its tensors, as one of ours would have them.

    Args:
        path: of the checkpoint.
        rest: what was in its `meta.pt`.
    """
    index = metadata.Reader(path).read_metadata()
    values = {key: None for key, entry in index.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)}
    plain: dict[str, Any] = dict(values)
    metadata.read(path, index, plain)
    state = {_renamed(key): value for key, value in plain.items()}
    rest = {**rest, "state_dict": {k.removeprefix(MODEL): v for k, v in state.items() if k.startswith(MODEL)}}
    if states := _states(plain):
        rest["optimizer_states"] = states
    entries = {_renamed(key): entry for key, entry in index.state_dict_metadata.items() if key not in plain}
    places = {
        MetadataIndex(_renamed(at.fqn), at.offset, at.index): place
        for at, place in index.storage_data.items()
        if at.fqn not in plain
    }
    planned = {key: (key,) for key in entries}
    return replace(index, state_dict_metadata=entries, storage_data=places, planner_data=planned), rest


def _renamed(key: str) -> str:
    if key.startswith(_MODEL):
        return MODEL + key.removeprefix(_MODEL)
    return _STATE.sub(rf"{OPTIMIZER}\1.", key, count=1)


def _states(plain: dict[str, Any]) -> list[StateByName]:
    """The optimizers' groups, with no tensors of state yet."""
    groups: dict[int, dict[int, dict[str, Any]]] = {}
    for key, value in plain.items():
        if found := _GROUP.fullmatch(key):
            number, group, field = found.groups()
            groups.setdefault(int(number), {}).setdefault(int(group), {})[field] = value
    return [{"state": {}, "param_groups": [of[g] for g in sorted(of)]} for _, of in sorted(groups.items())]
