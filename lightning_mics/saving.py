"""What Lightning asks of a strategy about checkpoints, as `MiCSStrategyMixin` answers it.

Lightning names the paths and says what to save and to delete; here is when that is safe. Under `async_save` it is told
"done" before it is, so what it then does to older checkpoints waits until the new one has committed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mics._compat import link_by, mark_saved
from lightning_mics.averages import KEY, Averages
from lightning_mics.checkpoint import (
    Checkpoint,
    DamagedCheckpoint,
    SaverOwner,
    SingleFile,
    TrainingRng,
    is_remote,
    load_whole_state_dict,
    optimizer_state_by_name,
)
from lightning_mics.checkpoint.agreement import together
from lightning_mics.checkpoint.flat import loader_states
from lightning_mics.loaders import Place, take_up
from lightning_mics.sharding import MiCSModule
from lightning_mics.shards import outside_inference_mode
from mics_tools import atomic

if TYPE_CHECKING:
    from lightning.pytorch.strategies import ParallelStrategy as _Base
else:
    _Base = object

_LAST = "last"  # ModelCheckpoint.CHECKPOINT_NAME_LAST, unless a user changed it


class SavingMixin(SaverOwner, _Base):
    """Checkpoints of a sharded run; see `MiCSStrategyMixin` for the arguments."""

    if TYPE_CHECKING:

        @property
        def mics(self) -> MiCSModule: ...

    def _set_training_state(self) -> None:
        self._rng = TrainingRng()
        self._still_named: list[Path] = []
        self._place: Place | None = None  # in the training data, to be taken up
        self.averages: Averages | None = None
        """Of the weights, if a callback keeps them."""

    # -- save --------------------------------------------------------------------------------------------------------

    @override
    @outside_inference_mode
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        self.mics.release()
        self.mics.synchronize_buffers()
        state: dict[str, Any] = self.lightning_module.state_dict()
        return state

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self.lightning_module is not None
        return optimizer_state_by_name(self.lightning_module, getattr(optimizer, "optimizer", optimizer))

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            raise TypeError(
                f"storage_options={storage_options!r}: a sharded checkpoint is written by every rank to a shared file "
                "system and takes no storage options; leave it out"
            )
        assert self.lightning_module is not None
        where, module = self.broadcast(filepath), self.lightning_module
        if is_remote(where):
            raise ValueError(
                f"filepath={os.fspath(where)!r} is on no file system of this machine, and there alone can a directory "
                "be put in its place in one move; save to a file system that all ranks see, and copy what was saved"
            )
        path = Path(where)
        state = module.trainer.state
        goes_on = state.fn == "fit" and state.status == "running"
        self.saver.save(path, checkpoint, module, self._rng.state, wait=not goes_on)

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self.is_global_zero:
            self.saver.afterwards(partial(self._remove, Path(filepath)))

    def _remove(self, path: Path) -> None:
        """Lightning deletes before it links: what a link names stays until the link has moved."""
        if atomic.links_to(path):
            self._still_named.append(path)
            return
        names_another = path.is_symlink()
        Checkpoint(path).remove()
        if names_another:
            self._remove_unnamed()

    def _take_over_links(self, callbacks: list[Any]) -> None:
        """`ModelCheckpoint(save_last="link")` moves its link in one move, when what it names is there."""
        for callback in callbacks:
            link_by(callback, self._link)

    def _link(self, trainer: Any, filepath: str, link: str) -> None:
        if self.is_global_zero:
            self.saver.afterwards(partial(self._move_link, Path(filepath), Path(link)))
        if not self._async_save:
            self.barrier()

    def _move_link(self, path: Path, link: Path) -> None:
        if path != link:
            atomic.link(path, link)
        self._remove_unnamed()

    def _remove_unnamed(self) -> None:
        waiting, self._still_named = self._still_named, []
        for former in waiting:
            self._remove(former)

    def _end_saving(self, exception: BaseException | None = None) -> None:
        """Wait for the save under way. If it fails where something else has failed already, that is told with it."""
        try:
            self.saver.wait() if exception is None else self.saver.wait_after_failure()
        except RuntimeError as failure:
            if exception is None:
                rank_zero_warn(str(failure))
            else:
                exception.add_note(str(failure))

    # -- load --------------------------------------------------------------------------------------------------------

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return False

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        where, module = self.broadcast(checkpoint_path), self.lightning_module
        fits = module.trainer.state.fn == "fit"  # the optimizers of a fit outlive it
        self.saver.wait()
        self.mics.finish_updates()
        self.mics.release()
        if is_remote(where) or Path(where).is_file():
            file = SingleFile(where)
            if fits and self._finetuning:
                self._group_as_saved(file.read(weights_only))
            rest = file.load(module, self.optimizers if fits else (), weights_only=weights_only)
            self._place = Place.of(rest) if fits else None
        else:
            checkpoint, rest = self._load_directory(Path(where), module, fits, weights_only)
            self._place = self._resume(checkpoint, rest, weights_only) if fits else None
        if fits and KEY in rest and self.averages is None:
            rank_zero_warn(
                f"{where} holds averaged weights, and training goes on from them; to go on from those that it had, add "
                "the callback WeightAveraging"
            )
        for callback in module.trainer.checkpoint_callbacks if fits else ():
            mark_saved(callback, rest["global_step"])
        return rest

    def _load_directory(
        self, path: Path, module: Any, fits: bool, weights_only: bool | None
    ) -> tuple[Checkpoint, dict[str, Any]]:
        def load(checkpoint: Checkpoint) -> dict[str, Any]:
            if fits and self._finetuning:
                checkpoint.verify(self._verify, optimizers=True)
                self._group_as_saved(checkpoint.beside(weights_only))
            return checkpoint.load(
                module=module,
                optimizers=self.optimizers if fits else (),
                strict=module.strict_loading,
                weights_only=weights_only,
                verify=self._verify,
                averages=self.averages if fits else None,
            )

        checkpoint = Checkpoint(path)
        try:
            return checkpoint, load(checkpoint)
        except DamagedCheckpoint as damaged:
            if not path.stem.startswith(_LAST):
                raise
            return self._newest_before(path, damaged, load)

    @property
    def _finetuning(self) -> list[Any]:
        """Lightning's callbacks that add parameters to optimizers while training."""
        assert self.lightning_module is not None
        found: Iterable[Any] = self.lightning_module.trainer.callbacks  # type: ignore[attr-defined]
        return [each for each in found if any(base.__name__ == "BaseFinetuning" for base in type(each).__mro__)]

    def _group_as_saved(self, beside: Mapping[str, Any]) -> None:
        """Have them do so again before optimizer state is loaded.

        Lightning restores callbacks later, where a strategy is restored after its setup.
        """
        assert self.lightning_module is not None
        for callback in self._finetuning:
            if (state := beside.get("callbacks", {}).get(callback.state_key)) is not None:
                callback.load_state_dict(state)
                callback.on_fit_start(self.lightning_module.trainer, self.lightning_module)

    def _newest_before(
        self, last: Path, damaged: DamagedCheckpoint, load: Callable[[Checkpoint], dict[str, Any]]
    ) -> tuple[Checkpoint, dict[str, Any]]:
        """The newest other checkpoint beside a damaged last one that is whole."""
        for path in self.broadcast(_others(last)):
            try:
                rest = load(Checkpoint(path))
            except DamagedCheckpoint as also:
                rank_zero_warn(str(also))
                continue
            rank_zero_warn(f"{damaged}. {path} is the newest that is whole, and was taken instead")
            return Checkpoint(path), rest
        raise damaged

    def _resume(self, checkpoint: Checkpoint, rest: dict[str, Any], weights_only: bool | None) -> Place:
        """Give this rank what is its own, its loaders' state within `rest`; where the run goes on in its data."""
        own = together(lambda: checkpoint.of_this_rank(weights_only), f"cannot read {checkpoint.path}")
        self._rng.load(own.get("rng"))
        loaders = loader_states(rest)
        loaders[:] = own.get("loaders", loaders)  # Lightning keeps those of rank 0
        place, before, now = Place.of(rest), checkpoint.ranks, self.topology.world_size
        if before in (None, now):
            return place
        midst = (
            f". It was saved after batch {place.batches} of an epoch: a loader whose state counts samples over all "
            "ranks goes on with the next one; with any other some samples of this epoch come twice or not at all, "
            "which a checkpoint of an epoch's end avoids"
        )
        rank_zero_warn(
            f"{checkpoint.path} was saved by {before} ranks and is resumed by {now}: parameters and optimizer state "
            f"are the same, random numbers and batches are divided anew{midst if place.batches else ''}"
        )
        return Place(place.epoch, 0)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        assert self.lightning_module is not None
        if self._place is not None and self.lightning_module.trainer.training:
            take_up(dataloader, self._place, self._rng.go_on)
        return dataloader

    @override
    def on_train_start(self) -> None:
        self._place = None  # loaders of later epochs begin where they begin

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """What a single file holds; of a directory, `load_checkpoint` has read each rank's shards in place."""
        if checkpoint["state_dict"]:
            assert self.lightning_module is not None
            load_whole_state_dict(self.lightning_module, checkpoint["state_dict"], strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing to do: `load_checkpoint` has read each rank's shards in place."""


def _others(last: Path) -> list[Path]:
    """The other checkpoints in the folder of `last`, the one of most steps first."""
    steps = {}
    for path in last.parent.iterdir():
        if path.is_dir() and not path.name.startswith(".") and path.resolve() != last.resolve():
            try:
                manifest = Checkpoint(path).manifest
            except DamagedCheckpoint:
                continue
            steps[path] = (manifest.step, manifest.saved)
    return sorted(steps, key=lambda path: steps[path], reverse=True)
