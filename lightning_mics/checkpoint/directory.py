"""A checkpoint is a directory that every rank writes into.

    DIR/.metadata, *.distcp   model and optimizer tensors, in the format of torch.distributed.checkpoint
    DIR/lightning.pt          what Lightning keeps beside them: loops, callbacks, hyperparameters, optimizer settings
    DIR/rng/00003.pt          random state of rank 3

Tensors are one replica's worth in all: ranks that hold the same shard share the writing. It is written aside and
renamed when every rank is done, so that a directory of this name is a whole checkpoint. Any number of ranks and any
partition size reads it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from lightning_mics.checkpoint.agreement import tensors_together, together
from lightning_mics.checkpoint.optimizer import (
    StateByName,
    check_same_parameters,
    empty_like_saved,
    held_by_name,
    number_parameters,
    paired,
)
from lightning_mics.checkpoint.rng import get_rng_state

_REST = "lightning.pt"
_MODEL = "model."
_OPTIMIZER = "optimizer"
_EXTRA = "_extra_state"  # torch's key for what a module keeps by get_extra_state
_TIED = "tied"


class Checkpoint:
    """A checkpoint directory.

    Args:
        path: the same on every rank, on a file system that all ranks see.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    # -- save --------------------------------------------------------------------------------------------------------

    def save(self, checkpoint: dict[str, Any], module: nn.Module, rng: dict[str, Any] | None = None) -> None:
        """Write `checkpoint`, as Lightning dumps it, atomically. Collective on the default group.

        Args:
            checkpoint: "state_dict", "optimizer_states" (by name), and anything else that torch.save takes.
            module: the module of the state dict; tells which names are tied and hence one tensor.
            rng: this rank's random state; by default that of its generators now.

        Raises:
            RuntimeError: on every rank if any rank failed; what stood at `path` before is untouched.
        """
        tensors, rest = _split(checkpoint, _aliases(module))
        aside = self.path.with_name(f".{self.path.name}.partial")
        together(lambda: _make_empty(aside) if dist.get_rank() == 0 else None, f"cannot create {aside}")
        tensors_together(lambda: dcp.save(tensors, checkpoint_id=aside), f"cannot write tensors into {aside}")

        def write() -> None:
            if dist.get_rank() == 0:
                torch.save(rest, aside / _REST)
            torch.save(rng or get_rng_state(), aside / "rng" / f"{dist.get_rank():05d}.pt")

        together(write, f"cannot write into {aside}")
        together(lambda: _replace(aside, self.path) if dist.get_rank() == 0 else None, f"cannot rename {aside}")

    # -- load --------------------------------------------------------------------------------------------------------

    def load(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read tensors into `module` and `optimizers` in place, and return the rest. Collective on the default group.

        Args:
            module: sharded; its parameters and buffers take the saved values, whatever partition size saved them.
            optimizers: as saved, in number and in parameters; none to leave them out.
            strict: whether names missing on either side are an error.
            weights_only: of `torch.load`, for Lightning's part.

        Returns:
            What Lightning keeps beside optimizer state; "state_dict" is empty, as all of it is loaded.

        Raises:
            FileNotFoundError, ValueError: on every rank if there is no checkpoint, or it does not fit; names what, and
                leaves everything as it was.
            RuntimeError: on every rank if any rank could not read its part.
        """
        saved, rest = together(lambda: self._open(weights_only), f"cannot read {self.path}")
        states = rest.pop("optimizer_states", None)
        rest.pop(_TIED, None)

        def fit() -> dict[str, Any]:
            targets = self._model_targets(module, saved, strict)
            return targets | self._optimizer_targets(module, optimizers, saved, states) if optimizers else targets

        targets = together(fit, f"cannot load {self.path}")
        tensors_together(lambda: dcp.load(targets, checkpoint_id=self.path), f"cannot read tensors of {self.path}")
        for optimizer, state in zip(optimizers, states or (), strict=False):  # as many, or no optimizer
            optimizer.load_state_dict(number_parameters(state))
        extra = {key.removeprefix(_MODEL): value for key, value in targets.items() if key.endswith(_EXTRA)}
        module.load_state_dict(rest["state_dict"] | extra, strict=False)  # a copy of what modules keep elsewhere
        return {**rest, "state_dict": {}}

    def read(self, weights_only: bool | None = None) -> dict[str, Any]:
        """All of it, with whole tensors in this process's memory, as `save` was given it. Needs no process group.

        Args:
            weights_only: of `torch.load`, for Lightning's part.

        Raises:
            FileNotFoundError, ValueError: if there is no checkpoint.
        """
        saved, rest = self._open(weights_only)
        entries = {key: meta for key, meta in saved.items() if isinstance(meta, TensorStorageMetadata)}
        tensors = {key: torch.empty(meta.size, dtype=meta.properties.dtype) for key, meta in entries.items()}
        dcp.load(tensors, checkpoint_id=self.path, no_dist=True)
        return _join(tensors, rest)

    def rng_state(self) -> dict[str, Any] | None:
        """This rank's random state at the save; None if fewer ranks saved."""
        path = self.path / "rng" / f"{dist.get_rank():05d}.pt"
        return torch.load(path, weights_only=True) if path.exists() else None

    def remove(self) -> None:
        """Delete it; nothing happens if it is not there."""
        if self.path.is_symlink() or self.path.is_file():
            self.path.unlink()
        elif self.path.is_dir():
            shutil.rmtree(self.path)

    def _open(self, weights_only: bool | None) -> tuple[dict[str, Any], dict[str, Any]]:
        if self.path.is_file():
            raise ValueError(
                f"{self.path} is a single file, not a checkpoint directory; use it as it is: load_from_checkpoint and "
                "ckpt_path take it"
            )
        if not (self.path / ".metadata").exists():
            raise FileNotFoundError(
                f"{self.path} is not a checkpoint: it has no .metadata; give the directory that was saved"
            )
        saved = dcp.FileSystemReader(self.path).read_metadata().state_dict_metadata
        rest = torch.load(self.path / _REST, map_location="cpu", weights_only=weights_only)
        return dict(saved), rest

    def _model_targets(self, module: nn.Module, saved: dict[str, Any], strict: bool) -> dict[str, Any]:
        aliases = _aliases(module)
        wanted = {_MODEL + k: v for k, v in module.state_dict().items() if k not in aliases and isinstance(v, Tensor)}
        held = {key for key in saved if key.startswith(_MODEL)}
        missing, unexpected = sorted(wanted.keys() - held), sorted(held - wanted.keys())
        if strict and (missing or unexpected):
            raise ValueError(
                f"names differ: missing in the checkpoint {_listed(missing)}; not in the module {_listed(unexpected)}; "
                "build the model that was saved, or set strict_loading=False on the LightningModule"
            )
        targets = {key: tensor for key, tensor in wanted.items() if key in held}
        for key, tensor in targets.items():
            meta = saved[key]
            if meta.size != tensor.shape or meta.properties.dtype != tensor.dtype:
                raise ValueError(
                    f"{key.removeprefix(_MODEL)}: saved with shape {tuple(meta.size)} and {meta.properties.dtype}, "
                    f"the module has {tuple(tensor.shape)} and {tensor.dtype}; build the model that was saved"
                )
        return targets

    def _optimizer_targets(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        saved: dict[str, Any],
        states: list[StateByName] | None,
    ) -> dict[str, Any]:
        """Tensors to read optimizer state into, each entered in `states` as well."""
        targets: dict[str, Any] = {}
        for i, (optimizer, state) in enumerate(paired(self.path, optimizers, states)):
            check_same_parameters(module, optimizer, state)
            held = held_by_name(module, optimizer)
            prefix = f"{_OPTIMIZER}.{i}."
            for key, meta in saved.items():
                if key.startswith(prefix) and isinstance(meta, TensorStorageMetadata):
                    name, field = key.removeprefix(prefix).rsplit(".", 1)
                    tensor = empty_like_saved(held[name], meta.size, meta.properties.dtype)
                    targets[key] = state["state"].setdefault(name, {})[field] = tensor
        return targets


def _split(checkpoint: dict[str, Any], aliases: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, flat, for the distributed writer; and the rest, without them."""
    state = checkpoint.get("state_dict", {})
    tensors = {_MODEL + k: v for k, v in state.items() if isinstance(v, Tensor) and k not in aliases}
    rest = {**checkpoint, "state_dict": {k: v for k, v in state.items() if not isinstance(v, Tensor)}}
    rest[_TIED] = {k: aliases[k] for k in state if k in aliases}
    if "optimizer_states" in checkpoint:
        rest["optimizer_states"] = []
    for i, optimizer in enumerate(checkpoint.get("optimizer_states", ())):
        values: dict[str, dict[str, Any]] = {}
        for name, fields in optimizer["state"].items():
            tensors |= {f"{_OPTIMIZER}.{i}.{name}.{k}": v for k, v in fields.items() if isinstance(v, Tensor)}
            values[name] = {k: v for k, v in fields.items() if not isinstance(v, Tensor)}
        rest["optimizer_states"].append({"state": values, "param_groups": optimizer["param_groups"]})
    return tensors, rest


def _join(tensors: Mapping[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The reverse of `_split`, in place of `rest`."""
    state = rest["state_dict"]
    for key, tensor in tensors.items():
        if key.startswith(_MODEL):
            state[key.removeprefix(_MODEL)] = tensor
        else:
            _, i, name_and_field = key.split(".", 2)
            name, field = name_and_field.rsplit(".", 1)
            rest["optimizer_states"][int(i)]["state"].setdefault(name, {})[field] = tensor
    state |= {alias: state[name] for alias, name in rest.pop(_TIED, {}).items() if name in state}
    return rest


def _aliases(module: nn.Module) -> dict[str, str]:
    """Names of tied parameters after the first, and the first."""
    first: dict[int, str] = {}
    names = module.named_parameters(remove_duplicate=False)
    return {name: first[id(param)] for name, param in names if first.setdefault(id(param), name) != name}


def _make_empty(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        shutil.rmtree(path)
    (path / "rng").mkdir(parents=True)


def _replace(aside: Path, path: Path) -> None:
    """Put `aside` where `path` is, which stays whole until then."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # of a process that was killed here
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        os.replace(path, old)
    os.replace(aside, path)
    shutil.rmtree(old, ignore_errors=True)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(name.removeprefix(_MODEL) for name in names[:5])
    return f"[{shown}{f', and {len(names) - 5} more' if len(names) > 5 else ''}]"
