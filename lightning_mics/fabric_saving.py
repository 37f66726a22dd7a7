"""Checkpoints under Fabric: `fabric.save`, `load` and `load_raw`, in the form that a Trainer's runs have, too.

What a user's state holds is taken apart: set-up modules and their optimizers go into shards; all else is kept beside
them, under the user's own keys.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_mics._compat import tree_flatten
from lightning_mics.arguments import sharded_before
from lightning_mics.checkpoint import (
    Checkpoint,
    SaverOwner,
    SingleFile,
    Verify,
    is_remote,
    load_whole_optimizer_state,
    load_whole_state_dict,
    optimizer_state_by_name,
)
from lightning_mics.checkpoint.agreement import together
from lightning_mics.checkpoint.flat import aliases_in
from lightning_mics.checkpoint.user_keys import RECORD, under_user_keys
from lightning_mics.optimizer_shards import parameter_of
from lightning_mics.sharding import MiCSModule
from lightning_mics.shards import outside_inference_mode

Filter = Mapping[str, Callable[[str, Any], bool]]

# Under which a user counts steps, and epochs; a manifest tells the first that there is.
_STEPS = ("global_step", "step", "step_count", "iter", "iter_num", "iteration")
_EPOCHS = ("epoch", "current_epoch")


@dataclass(frozen=True)
class State:
    """What a user gives to save or to load, taken apart.

    Attributes:
        roots: sharded modules by their keys.
        optimizers: by their keys.
        rest: all else.
    """

    roots: Mapping[str, MiCSModule]
    optimizers: Mapping[str, Optimizer]
    rest: Mapping[str, Any]

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> State:
        """Take a state apart.

        Raises:
            ValueError: if there is no set-up module in it, or an optimizer of another one.
        """
        found = {key: root for key, value in state.items() if (root := root_of(value)) is not None}
        optimizers = {key: value for key, value in state.items() if isinstance(value, Optimizer)}
        if not found:
            raise ValueError(
                f"state={list(state)} holds no module that was set up; give it with what belongs to it, as "
                'state={"model": model, "optimizer": optimizer}'
            )
        known = {id(param) for root in found.values() for param in root.module.parameters()}
        for key, optimizer in optimizers.items():
            if any(id(parameter_of(p)) not in known for group in optimizer.param_groups for p in group["params"]):
                raise ValueError(f"state[{key!r}] steps parameters of no module in the state; add their module")
        return cls(found, optimizers, {k: v for k, v in state.items() if k not in found and k not in optimizers})

    @property
    def module(self) -> nn.Module:
        """What the checkpoint is of: the module, or of several one whose names begin with their keys."""
        modules = {key: root.module for key, root in self.roots.items()}
        return next(iter(modules.values())) if len(modules) == 1 else nn.ModuleDict(modules)


def root_of(value: object) -> MiCSModule | None:
    """The sharded root that is meant by a module, if it was sharded."""
    if isinstance(value, MiCSModule):
        return value
    return sharded_before(value) if isinstance(value, nn.Module) else None


class FabricSavingMixin(SaverOwner):
    """Checkpoints of a sharded run under Fabric; see `MiCSFabricStrategyMixin` for the arguments."""

    if TYPE_CHECKING:

        def broadcast(self, obj: Any, src: int = 0) -> Any: ...

        def roots_of(self, optimizer: Optimizer) -> list[MiCSModule]: ...

    # -- save --------------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        path: str | Path,
        state: dict[str, Any],
        storage_options: Any | None = None,
        filter: Filter | None = None,
    ) -> None:
        """Write a checkpoint directory: on the disk as a whole when this returns, or not there at all.

        Collective on the default group. A window's sums are not saved: save where a window has ended.

        Args:
            path: of the directory, on a file system that all ranks see; one that exists is replaced.
            state: modules that were set up, their optimizers, and anything else: what has a state dict by that, and
                plain data as it is.
            storage_options: none are understood.
            filter: by key, what to keep of a module's state dict, or of another mapping.

        Raises:
            ValueError: on every rank for a state that cannot be saved so.
            RuntimeError, OSError: on every rank if any rank failed; what stood at `path` before is untouched.
        """
        if storage_options is not None:
            raise TypeError(
                f"storage_options={storage_options!r}: a sharded checkpoint is written by every rank to a shared file "
                "system and takes no storage options; leave it out"
            )
        where = self._local(path)
        parts = together(lambda: State.of(state), f"cannot save {where}")
        for root in parts.roots.values():
            root.finish_updates()
            root.release()
            root.synchronize_buffers()
        dump = together(lambda: _dump(parts, filter or {}), f"cannot save {where}")
        self.saver.save(where, dump, parts.module)

    def _local(self, path: str | Path) -> Path:
        where = self.broadcast(path)
        if is_remote(where):
            raise ValueError(
                f"path={os.fspath(where)!r} is on no file system of this machine, and there alone can a directory be "
                "put in its place in one move; use a file system that all ranks see, and copy what was saved"
            )
        return Path(where)

    # -- load --------------------------------------------------------------------------------------------------------

    def load_checkpoint(
        self,
        path: str | Path,
        state: nn.Module | Optimizer | dict[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint directory, or a single file that Fabric wrote where nothing is sharded.

        Collective on the default group. Any number of ranks and any partition size may have written it.

        Args:
            path: of the directory or the file.
            state: what to load in place, by the keys that it was saved under; a module or an optimizer for a raw state
                dict; none to get all of it, whole, in every process's memory.
            strict: whether keys and names missing on either side are an error.
            weights_only: of `torch.load`. Only False lets it run the code of objects that are not plain data.

        Returns:
            What was saved and not asked for, beside modules and optimizers; without `state`, everything.

        Raises:
            FileNotFoundError, ValueError, KeyError: on every rank if there is no checkpoint, it is damaged, or it does
                not fit; of a directory, nothing has been loaded then.
        """
        where = self.broadcast(path)
        file = SingleFile(where) if is_remote(where) or Path(where).is_file() else None
        if isinstance(state, nn.Module | Optimizer):
            self._load_raw(where, file, state, strict, weights_only)
            return {}
        if not state:
            if file is not None:
                return file.read(weights_only)
            read = partial(Checkpoint(where).read, weights_only, verify=self._verify)
            whole = together(read, f"cannot read {where}")
            return under_user_keys(whole) if RECORD in whole else whole
        parts = together(lambda: State.of(state), f"cannot load {where}")
        for root in parts.roots.values():
            _begin_anew(root)
        if file is not None:
            saved = file.read(weights_only)
            together(lambda: _load_whole(saved, parts, strict), f"cannot load {where}")
        else:
            saved = self._load_directory(Checkpoint(where), parts, strict, weights_only)
        for key in parts.rest:
            if key in saved:
                value, obj = saved.pop(key), state[key]
                if hasattr(obj, "load_state_dict"):
                    obj.load_state_dict(value)
                else:
                    state[key] = value
        return saved

    def _load_directory(
        self, checkpoint: Checkpoint, parts: State, strict: bool, weights_only: bool | None
    ) -> dict[str, Any]:
        checkpoint.verify(self._verify, optimizers=bool(parts.optimizers))
        beside = checkpoint.beside(weights_only)
        record = beside.get(RECORD, {})
        optimizers = together(lambda: _fitting(parts, record, strict), f"cannot load {checkpoint.path}")
        checkpoint.load(parts.module, optimizers, strict=strict, weights_only=weights_only, verify=Verify.OFF)
        kept: dict[str, Any] = record.get("state", {})
        return kept

    def _load_raw(
        self,
        where: str | Path,
        file: SingleFile | None,
        obj: nn.Module | Optimizer,
        strict: bool,
        weights_only: bool | None,
    ) -> None:
        if isinstance(obj, Optimizer):
            if file is None:
                raise ValueError(
                    f"{where} is no file: load_raw takes an optimizer's state from a file of its state dict; from a "
                    'checkpoint, fabric.load(path, {"model": model, "optimizer": optimizer})'
                )
            roots = self.roots_of(obj)
            modules = nn.ModuleList(root.module for root in roots)
            saved = file.read(weights_only)
            together(lambda: load_whole_optimizer_state(modules, obj, saved), f"cannot load {where}")
            return
        root = root_of(obj)
        if root is not None:
            _begin_anew(root)
        module = obj if root is None else root.module
        if file is None:
            Checkpoint(where).load(module, (), strict=strict, weights_only=weights_only, verify=self._verify)
        else:
            saved = file.read(weights_only)
            together(lambda: load_whole_state_dict(module, saved, strict), f"cannot load {where}")


def _begin_anew(root: MiCSModule) -> None:
    root.finish_updates()
    root.window.drop()
    root.release()


# -- what a checkpoint keeps -------------------------------------------------------------------------------------------


def _dump(parts: State, filter: Filter) -> dict[str, Any]:
    """As `Snapshot.take` has it."""
    if filtered := [key for key in filter if key in parts.optimizers]:
        raise ValueError(
            f"filter={filtered}: an optimizer's state is saved whole or not at all; leave it out of the state, or the "
            "filter out"
        )
    module, rest = parts.module, {key: _kept(key, value, filter) for key, value in parts.rest.items()}
    return {
        "state_dict": _filtered(module, parts, filter),
        "optimizer_states": [optimizer_state_by_name(module, optimizer) for optimizer in parts.optimizers.values()],
        "global_step": _counted(rest, _STEPS),
        "epoch": _counted(rest, _EPOCHS),
        "pytorch-lightning_version": lightning.__version__,
        RECORD: {"modules": [*parts.roots], "optimizers": [*parts.optimizers], "state": rest},
    }


@outside_inference_mode
def _filtered(module: nn.Module, parts: State, filter: Filter) -> dict[str, Any]:
    state = module.state_dict()
    keep = set()
    for key, root in parts.roots.items():
        prefix, wanted = "" if root.module is module else f"{key}.", filter.get(key, lambda name, value: True)
        names = [name for name in state if name.startswith(prefix)]
        keep |= {name for name in names if wanted(name.removeprefix(prefix), state[name])}
    aliases = aliases_in(module)
    keep |= {aliases[name] for name in keep & aliases.keys()}  # where a tied tensor is
    return {name: value for name, value in state.items() if name in keep}


def _kept(key: str, value: Any, filter: Filter) -> Any:
    if hasattr(value, "state_dict"):
        value = value.state_dict()
    if key in filter and isinstance(value, dict):
        value = {name: each for name, each in value.items() if filter[key](name, each)}
    if any(isinstance(leaf, DTensor) for leaf in tree_flatten(value)[0]):
        raise ValueError(
            f"state[{key!r}] holds sharded tensors, which are saved with the module or the optimizer that they belong "
            "to; give that instead"
        )
    return value


def _counted(rest: Mapping[str, Any], names: Iterable[str]) -> int:
    return next((rest[name] for name in names if type(rest.get(name)) is int), 0)


# -- what is asked for -------------------------------------------------------------------------------------------------


def _fitting(parts: State, record: Mapping[str, Any], strict: bool) -> list[Optimizer]:
    """The optimizers in the order in which they were saved, none if none are asked for.

    Raises:
        KeyError: if something is asked for that was not saved.
        ValueError: for some of several modules or optimizers that were saved together.
    """
    if strict:
        _check_saved(parts.rest, record.get("state", ()), "value", ", or set strict=False to leave it as it is")
    if not record:  # a Trainer's, which has no keys
        return [*parts.optimizers.values()]
    saved, asked = record["modules"], [*parts.roots]
    _check_saved(parts.roots, saved, "module")
    if len(saved) > 1 and len(asked) == 1:
        raise ValueError(f"state has the module {asked[0]!r} alone, saved together with others: load all of {saved}")
    if parts.optimizers:
        _check_saved(parts.optimizers, record["optimizers"], "optimizer")
        if missing := [key for key in record["optimizers"] if key not in parts.optimizers]:
            raise ValueError(f"state lacks the optimizers {missing}, saved with the others; load all of them or none")
    return [parts.optimizers[key] for key in record["optimizers"] if key in parts.optimizers]


def _check_saved(asked: Iterable[str], saved: Iterable[str], what: str, otherwise: str = "") -> None:
    for key in asked:
        if key not in saved:
            raise KeyError(f"the checkpoint has no {what} {key!r}; choose of {[*saved]}{otherwise}")


def _load_whole(saved: dict[str, Any], parts: State, strict: bool) -> None:
    """From a file with whole tensors under the user's keys, as Fabric's DDP writes it."""
    _check_saved([*parts.roots, *parts.optimizers, *(parts.rest if strict else ())], saved, "value")
    for key, root in parts.roots.items():
        load_whole_state_dict(root.module, saved.pop(key), strict)
    for key, optimizer in parts.optimizers.items():
        load_whole_optimizer_state(parts.module, optimizer, saved.pop(key))
