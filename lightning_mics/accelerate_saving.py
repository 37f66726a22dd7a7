"""Checkpoints under Accelerate: `save_state` and `load_state` in the form that Lightning's runs have, too.

A directory that is there as a whole or not at all, that any number of ranks and any partition size reads; see
`checkpoint.directory`. Beside tensors it keeps what Accelerate would write into files of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.logging import get_logger
from torch import Tensor, nn
from typing_extensions import override

from lightning_mics._compat import Prepared, prepared
from lightning_mics.arguments import sharded_before
from lightning_mics.checkpoint import (
    Checkpoint,
    SaverOwner,
    get_rng_state,
    optimizer_state_by_name,
    set_rng_state,
)
from lightning_mics.checkpoint.agreement import together
from lightning_mics.offload import backend_with_host
from lightning_mics.shards import outside_inference_mode

if TYPE_CHECKING:
    from accelerate import Accelerator as _Base
else:
    _Base = object

_NAMED = re.compile(r"checkpoint_(\d+)")  # as Accelerate names them by itself
_BESIDE = "accelerate"  # the key of what is neither model, optimizer nor scheduler

log = get_logger(__name__)


class AcceleratorSavingMixin(SaverOwner, _Base):
    """Checkpoints of a sharded run; see `MiCSAccelerator` for the arguments."""

    def __getstate__(self) -> dict[str, Any]:
        """Pickled, without what is under way and the process groups that carry it."""
        return {**self.__dict__, "_saver": None}

    def wait_for_save(self) -> None:
        """Return when no save is under way.

        Raises:
            RuntimeError: if it failed.
        """
        if self._saver is not None:
            self._saver.wait()

    # -- save --------------------------------------------------------------------------------------------------------

    @override
    def save_state(
        self, output_dir: str | os.PathLike[str] | None = None, safe_serialization: bool = True, **kwargs: Any
    ) -> str:
        """Save models, optimizers, schedulers, loaders, the scaler, registered objects and random state.

        Collective on the default group. A window's sums are not saved: save where a window has ended.

        Args:
            output_dir: the directory to write, on a file system that all ranks see; one that exists is replaced when
                the new one is whole. By default as `ProjectConfiguration(automatic_checkpoint_naming=True)` says.
            safe_serialization: changes nothing; what is written can always be read without running code, unless an
                object's `state_dict` holds more than plain data.
            kwargs: none are understood.

        Returns:
            The directory.

        Raises:
            RuntimeError, OSError: on every rank if any rank failed; what stood there before is untouched.
        """
        if kwargs:
            raise TypeError(f"{', '.join(kwargs)}: save_state takes no arguments for the functions that save models")
        alone_if_alone(self.device)
        path = self._path_to_save(output_dir)
        log.info(f"Saving current state to {path}")
        what = prepared(self)
        for root in _roots(what):
            root.release()
            root.synchronize_buffers()
        self.saver.save(
            path,
            self._dump(what),
            _together(what.models),
            get_rng_state(),
            loaders=[_state_of_loader(loader) for loader in what.loaders],
            wait=bool(what.before_save),
        )
        if self.is_main_process and self.project_configuration.automatic_checkpoint_naming:
            self.saver.afterwards(partial(_remove_oldest, path.parent, self.project_configuration.total_limit))
        for hook in what.before_save:  # which may write into the directory: there is none before
            hook(what.models, [], str(path))
        self.project_configuration.iteration += 1
        return str(path)

    def _path_to_save(self, output_dir: str | os.PathLike[str] | None) -> Path:
        """The same on every rank."""

        def decide() -> Path:
            if output_dir is not None and not self.project_configuration.automatic_checkpoint_naming:
                return Path(output_dir).expanduser().absolute()
            path = self._folder() / f"checkpoint_{self.save_iteration}"
            if path.exists():
                raise ValueError(
                    f"Checkpoint directory {path} ({self.save_iteration}) already exists. Please manually override "
                    "`self.save_iteration` with what iteration to start with."
                )
            return path

        return _of_rank_zero(together(lambda: decide() if self.is_main_process else None, "cannot save"))

    def _folder(self) -> Path:
        """Where Accelerate names checkpoints by itself."""
        if not self.project_configuration.automatic_checkpoint_naming or self.project_dir is None:
            raise ValueError(
                "no directory was given, and none is named by itself; name one, or make the accelerator with "
                "project_config=ProjectConfiguration(project_dir=..., automatic_checkpoint_naming=True)"
            )
        return Path(self.project_dir).absolute() / "checkpoints"

    @outside_inference_mode
    def _dump(self, what: Prepared) -> dict[str, Any]:
        """As `Snapshot.take` has it."""
        module = _together(what.models)
        return {
            "state_dict": module.state_dict(),
            "optimizer_states": [optimizer_state_by_name(module, each.optimizer) for each in what.optimizers],
            "lr_schedulers": [scheduler.state_dict() for scheduler in what.schedulers],
            "global_step": max((optimizer.steps for optimizer in what.optimizers), default=0),
            "epoch": max((getattr(loader, "iteration", 0) for loader in what.loaders), default=0),
            _BESIDE: {
                "step": self.step,
                "steps": [optimizer.steps for optimizer in what.optimizers],
                "scaler": None if self.scaler is None else self.scaler.state_dict(),
                "objects": [obj.state_dict() for obj in what.objects],
                "loaders": [_epoch_of_loader(loader) for loader in what.loaders],
            },
        }

    # -- load --------------------------------------------------------------------------------------------------------

    @override
    def load_state(
        self,
        input_dir: str | os.PathLike[str] | None = None,
        load_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Load what `save_state` wrote, on any number of ranks and with any partition size.

        Collective on the default group.

        Args:
            input_dir: the directory; by default the newest that is named by itself.
            load_kwargs: `weights_only` of `torch.load`: only False lets it run the code of objects that are not plain
                data.
            kwargs: `strict`, whether names missing on either side are an error.

        Raises:
            FileNotFoundError, ValueError: on every rank if there is no checkpoint, it is damaged, or it does not fit.
        """
        alone_if_alone(self.device)
        strict, weights_only = _arguments_of_load(kwargs, load_kwargs)
        what, checkpoint = prepared(self), Checkpoint(self._path_to_load(input_dir))
        log.info(f"Loading states from {checkpoint.path}")
        self.wait_for_save()
        for root in _roots(what):
            root.finish_updates()
            root.window.drop()
            root.release()
        for hook in what.before_load:
            hook([*what.models], str(checkpoint.path))
        rest = checkpoint.load(
            _together(what.models),
            [optimizer.optimizer for optimizer in what.optimizers],
            strict=strict,
            weights_only=weights_only,
            verify=self._verify,
        )
        own = together(lambda: checkpoint.of_this_rank(weights_only), f"cannot read {checkpoint.path}")
        together(lambda: self._take(rest, own, what), f"cannot load {checkpoint.path}")

    def load_model(self, model: nn.Module, input_dir: str | os.PathLike[str]) -> None:
        """Load the weights of one model that `save_state` wrote, and nothing else. Collective on the default group.

        Args:
            model: that was prepared, or what it was prepared from; the checkpoint has no other.
            input_dir: the directory.

        Raises:
            FileNotFoundError, ValueError: on every rank if there is no checkpoint, it is damaged, or it does not fit.
        """
        alone_if_alone(self.device)
        self.wait_for_save()
        module = self.unwrap_model(model)
        if (root := sharded_before(module)) is not None:
            root.finish_updates()
            root.release()
        Checkpoint(_of_rank_zero(Path(input_dir).absolute())).load(module, (), verify=self._verify)

    def _path_to_load(self, input_dir: str | os.PathLike[str] | None) -> Path:
        def decide() -> Path:
            if input_dir is not None:
                path = Path(input_dir).expanduser().absolute()
                if not path.is_dir():
                    raise ValueError(f"Tried to find {path} but folder does not exist")
                return path
            if not (found := _named(self._folder())):
                raise FileNotFoundError(f"there is no checkpoint in {self._folder()}")
            return found[-1]

        return _of_rank_zero(together(lambda: decide() if self.is_main_process else None, "cannot load"))

    def _take(self, rest: dict[str, Any], own: dict[str, Any], what: Prepared) -> None:
        """All but tensors of models and optimizers."""
        if _BESIDE not in rest:
            raise ValueError(
                "it was not saved by MiCSAccelerator; take its weights alone, by `mics export DIR --to hf` or --to "
                "lightning, before the model is prepared"
            )
        beside = rest[_BESIDE]
        _check_as_many(what.schedulers, rest["lr_schedulers"], "schedulers")
        _check_as_many(what.objects, beside["objects"], "registered objects")
        for scheduler, state in zip(what.schedulers, rest["lr_schedulers"], strict=True):
            scheduler.load_state_dict(state)
        for obj, state in zip(what.objects, beside["objects"], strict=True):
            obj.load_state_dict(state)
        for optimizer, steps in zip(what.optimizers, beside["steps"], strict=False):
            optimizer.steps = steps
        if self.scaler is not None and beside["scaler"] is not None:
            self.scaler.load_state_dict(beside["scaler"])
        for number, loader in enumerate(what.loaders[: len(beside["loaders"])]):
            _take_up(loader, beside["loaders"][number], [*own.get("loaders", [])][number : number + 1])
        self.step = beside["step"]
        if "rng" in own:
            set_rng_state(own["rng"])


def alone_if_alone(device: torch.device) -> None:
    """Make a process group of one process, where Accelerate has made none."""
    if not dist.is_initialized():
        dist.init_process_group(backend_with_host(device), store=dist.HashStore(), rank=0, world_size=1)


def _roots(what: Prepared) -> list[Any]:
    return [root for model in what.models if (root := sharded_before(model)) is not None]


def _together(models: list[nn.Module]) -> nn.Module:
    """What a checkpoint is of: the model, or of several a module whose names begin with their numbers."""
    return models[0] if len(models) == 1 else nn.ModuleList(models)


def _of_rank_zero(path: Path | None) -> Path:
    paths = [path]
    dist.broadcast_object_list(paths, src=0)
    assert paths[0] is not None
    return paths[0]


def _arguments_of_load(kwargs: dict[str, Any], load_kwargs: Mapping[str, Any] | None) -> tuple[bool, bool | None]:
    unknown = [*(kwargs.keys() - {"strict", "map_location"}), *((load_kwargs or {}).keys() - {"weights_only"})]
    if unknown:
        raise TypeError(
            f"{', '.join(unknown)}: load_state takes strict, and weights_only among load_kwargs; tensors are read "
            "where they are to be"
        )
    return kwargs.get("strict", True), (load_kwargs or {}).get("weights_only")


def _check_as_many(ours: list[Any], saved: list[Any], what: str) -> None:
    if len(ours) != len(saved):
        raise ValueError(f"it was saved with {len(saved)} {what}, there are {len(ours)} now; prepare as many")


# -- folders that are named by themselves ------------------------------------------------------------------------------


def _named(folder: Path) -> list[Path]:
    """The oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("*") if (match := _NAMED.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _remove_oldest(folder: Path, limit: int | None) -> None:
    for path in _named(folder)[:-limit] if limit else ():
        Checkpoint(path).remove()


# -- loaders -----------------------------------------------------------------------------------------------------------


def _state_of_loader(loader: Any) -> dict[str, Any] | None:
    """This rank's; None of a loader that has none."""
    stateful = getattr(loader, "use_stateful_dataloader", False)
    return loader.state_dict() if stateful else None


def _epoch_of_loader(loader: Any) -> dict[str, Any]:
    """What all ranks share: the epoch that comes next or is under way, and what shuffles."""
    generator = getattr(loader, "synchronized_generator", None)
    return {
        "iteration": getattr(loader, "iteration", 0),
        "generator": None if generator is None else generator.get_state(),
    }


def _take_up(loader: Any, shared: dict[str, Any], own: list[dict[str, Any] | None]) -> None:
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(shared["iteration"])
    generator, state = getattr(loader, "synchronized_generator", None), shared["generator"]
    if generator is not None and isinstance(state, Tensor):
        generator.set_state(state)
    if own and own[0] is not None and hasattr(loader, "load_state_dict"):
        loader.load_state_dict(own[0])
