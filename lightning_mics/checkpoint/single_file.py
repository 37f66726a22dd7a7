"""A checkpoint in a single file, as Lightning writes it where nothing is sharded.

`consolidate` makes one of a checkpoint directory, in one process. `SingleFile` reads one into shards: every rank maps
the file into its memory and takes its own part, so that no rank holds the whole.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_mics.checkpoint.agreement import together
from lightning_mics.checkpoint.directory import Checkpoint
from lightning_mics.checkpoint.optimizer import (
    StateByName,
    check_same_parameters,
    held_by_name,
    load_state,
    name_parameters,
    number_parameters,
    paired,
)
from lightning_mics.checkpoint.plain import load_plain
from lightning_mics.checkpoint.user_keys import RECORD, under_user_keys
from lightning_mics.checkpoint.verification import Verify
from mics_tools import atomic


def consolidate(
    directory: str | Path,
    file: str | Path,
    *,
    weights_only: bool | None = None,
    verify: Verify | str = Verify.AUTO,
) -> None:
    """Write a checkpoint directory as one Lightning checkpoint file, for one process without this package.

    `MyModule.load_from_checkpoint(file)` reads it, and `trainer.fit(model, ckpt_path=file)` resumes from it under any
    strategy that Lightning's own checkpoints resume under: parameters, optimizers, schedulers, loops and callbacks are
    as they were; random state is left out, as Lightning keeps none. Needs no process group; the whole checkpoint has
    to fit this process's memory.

    What `fabric.save` wrote becomes the file that Fabric writes where nothing is sharded, with the user's keys.

    Args:
        directory: what `Trainer(strategy="mics")` or `Fabric(strategy="mics")` saved.
        file: to write; one that exists is replaced when the new one is complete.
        weights_only: of `torch.load`, for what Lightning keeps beside tensors. False lets it run the code of objects
            that a module saved, so only for a checkpoint from a trusted source.
        verify: whether the directory is compared with its manifest first: "auto" and "full" all of it, or "off".

    Raises:
        FileNotFoundError, ValueError: if `directory` is not a checkpoint directory, or is damaged.
        IsADirectoryError: if `file` is a directory.
    """
    file = Path(file)
    if file.is_dir():
        raise IsADirectoryError(f"file={str(file)!r} is a directory; name a file, as {str(file / 'whole.ckpt')!r}")
    checkpoint = Checkpoint(directory).read(weights_only, verify=Verify.parse(verify, "verify"))
    if RECORD in checkpoint:
        checkpoint = under_user_keys(checkpoint)
    elif "optimizer_states" in checkpoint:
        checkpoint["optimizer_states"] = [number_parameters(state) for state in checkpoint["optimizer_states"]]
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = atomic.aside(file)
    try:
        torch.save(checkpoint, aside)
        atomic.flush(aside)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL."""
    return "://" in str(path)


class SingleFile:
    """A Lightning checkpoint file, to be loaded into a sharded module.

    Args:
        path: the same on every rank, on a file system that all ranks see, or a URL that fsspec opens.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path if is_remote(path) else Path(path)

    def load(
        self, module: nn.Module, optimizers: Sequence[Optimizer], *, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read optimizer state in place, and return the rest. Collective on the default group.

        Args:
            module: sharded.
            optimizers: as saved, in number and in the order of their parameters; none to leave them out.
            weights_only: of `torch.load`.

        Returns:
            What Lightning keeps beside optimizer state; the tensors in it are in the file until they are looked at.

        Raises:
            ValueError: on every rank if the optimizers do not fit; leaves them as they were.
            RuntimeError: on every rank if any rank could not read the file.
        """
        checkpoint = self.read(weights_only)
        states = checkpoint.pop("optimizer_states", None)
        fitting = together(lambda: self._fit(module, optimizers, states), f"cannot load {self.path}")
        for optimizer, state in zip(optimizers, fitting, strict=True):
            _take(module, optimizer, state)
        return checkpoint

    def read(self, weights_only: bool | None = None) -> dict[str, Any]:
        """What is in it, on every rank; tensors are in the file until they are looked at. Collective.

        Raises:
            RuntimeError: on every rank if any rank could not read the file.
        """
        return together(lambda: self._open(weights_only), f"cannot read {self.path}")

    def _open(self, weights_only: bool | None) -> dict[str, Any]:
        if is_remote(self.path):  # there is nothing to map: each rank holds all of it until it has taken its part
            with fsspec.open(self.path, "rb") as stream:
                checkpoint = load_plain(stream, self.path, weights_only)
        else:
            mmap = zipfile.is_zipfile(self.path)  # torch's older files cannot be mapped
            checkpoint = load_plain(Path(self.path), self.path, weights_only, mmap=mmap)
        return dict(checkpoint)

    def _fit(
        self, module: nn.Module, optimizers: Sequence[Optimizer], states: list[Mapping[str, Any]] | None
    ) -> list[StateByName]:
        """The state of each optimizer by name."""
        if not optimizers:
            return []
        return [_by_name(module, optimizer, state) for optimizer, state in paired(self.path, optimizers, states)]


def load_whole_state_dict(module: nn.Module, state: Mapping[str, Any], strict: bool = True) -> None:
    """Load whole tensors into a sharded module, each rank its part. No communication.

    Raises:
        RuntimeError: as `load_state_dict`, if names or shapes differ.
        ValueError: if a dtype differs.
    """
    targets = module.state_dict()
    module.load_state_dict({key: _as_in(targets.get(key), value, key) for key, value in state.items()}, strict=strict)


def load_whole_optimizer_state(module: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load an optimizer's whole state dict, numbered as torch does, into shards, each rank its part. No communication.

    Args:
        module: sharded; the optimizer's parameters are among its.
        optimizer: with as many parameters in each group as when it was saved.
        state: its state dict.

    Raises:
        ValueError: if the groups differ; leaves everything as it was.
    """
    _take(module, optimizer, _by_name(module, optimizer, state))


def _take(module: nn.Module, optimizer: Optimizer, state: StateByName) -> None:
    held = held_by_name(module, optimizer)
    load_state(optimizer, _sharded_state(held, state))


def _as_in(target: object, value: object, key: str) -> object:
    if not isinstance(value, Tensor) or not isinstance(target, Tensor):
        return value
    if value.dtype != target.dtype:
        raise ValueError(
            f"{key}: saved as {value.dtype}, the module has {target.dtype}; build the model that was saved"
        )
    return part_of(value, target)


def _by_name(module: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> StateByName:
    """State that is numbered, or named as Lightning's sharded strategies do in a single file."""
    if any(isinstance(key, str) for group in state["param_groups"] for key in group["params"]):
        check_same_parameters(module, optimizer, state)
        return dict(state)
    return name_parameters(module, optimizer, state)


def _sharded_state(held: Mapping[str, Tensor], state: StateByName) -> StateByName:
    sharded = {
        name: {k: part_of(v, held[name]).clone() if isinstance(v, Tensor) else v for k, v in fields.items()}
        for name, fields in state["state"].items()
    }
    return {**state, "state": sharded}


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `whole`, sharded as `like` is where it has its shape. No communication."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    mesh, local = like.device_mesh, whole
    for axis, placement in enumerate(like.placements):
        dim, rank = placement.dim, mesh.get_local_rank(axis)  # type: ignore[attr-defined]
        chunks = local.chunk(mesh.size(axis), dim)
        local = chunks[rank] if rank < len(chunks) else local.narrow(dim, 0, 0)
    local = local.to(like.device)
    return DTensor.from_local(local, mesh, like.placements, shape=like.shape, stride=like.stride())
