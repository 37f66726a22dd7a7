"""A checkpoint is a directory that the ranks write together.

    DIR/manifest.json                    what there is, with sizes and checksums; for people too
    DIR/model-00003-0.distcp             tensors of the model that rank 3 wrote
    DIR/optimizer-00003-0.distcp         optimizer state that rank 3 wrote
    DIR/.metadata                        where each tensor is, as torch.distributed.checkpoint has it
    DIR/lightning.pt                     what Lightning keeps beside tensors: loops, callbacks, hyperparameters
    DIR/ranks.pt                         what each rank keeps for itself: random state, the place of its loaders

It is written aside, flushed, checked and put in its place in one move, so that a directory of this name is a whole
checkpoint. Any number of ranks and any partition size reads it, and so does any reader of the library.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from lightning_mics.averages import Averages
from lightning_mics.checkpoint import metadata
from lightning_mics.checkpoint.agreement import gathered, together
from lightning_mics.checkpoint.flat import AVERAGES, MODEL, OPTIMIZER, aliases_in, join, parts_of
from lightning_mics.checkpoint.foreign import REST as FOREIGN_REST
from lightning_mics.checkpoint.foreign import is_foreign, translated
from lightning_mics.checkpoint.garbage import uncollected
from lightning_mics.checkpoint.optimizer import (
    StateByName,
    check_same_parameters,
    empty_like_saved,
    held_by_name,
    load_state,
    paired,
)
from lightning_mics.checkpoint.plain import load_plain, reason
from lightning_mics.checkpoint.snapshot import Snapshot, Written
from lightning_mics.checkpoint.verification import Verify, verify_alone, verify_together
from lightning_mics.shards import outside_inference_mode
from mics_tools import atomic
from mics_tools.manifest import NAME as MANIFEST
from mics_tools.manifest import File, Manifest, TensorEntry, check_kind, file_as_written

REST = "lightning.pt"
_RANKS = "ranks.pt"
_EXTRA = "_extra_state"  # torch's key for what a module keeps by get_extra_state


class Checkpoint:
    """A checkpoint directory.

    Args:
        path: the same on every rank, on a file system that all ranks see.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    # -- save --------------------------------------------------------------------------------------------------------

    def write(
        self,
        snapshot: Snapshot,
        group: dist.ProcessGroup | None = None,
        at_work: AbstractContextManager[None] | None = None,
    ) -> None:
        """Write what the ranks took snapshots of, atomically. Collective on `group`, of all ranks.

        Args:
            snapshot: this rank's.
            group: by default the default group.
            at_work: entered for as long as this rank writes, and none waits for another.

        Raises:
            OSError, RuntimeError: on every rank if any rank failed; what stood at `path` before is untouched.
        """
        first = dist.get_rank() == 0
        failure = f"cannot save {self.path}"
        at_work = at_work or nullcontext()

        def pieces() -> tuple[dict[str, File], Written, bytes]:
            with at_work:
                return *snapshot.write_pieces(folder), snapshot.own

        def finish() -> None:
            with at_work:
                if first:
                    self._finish(folder, snapshot, written, stack)

        with ExitStack() as stack:
            opened = together(lambda: stack.enter_context(self._aside()) if first else None, failure, group)
            folder = opened or atomic.aside(self.path)
            written = gathered(pieces, failure, group)
            together(finish, failure, group)

    def _aside(self) -> Any:
        atomic.restore(self.path.parent)
        if gone := atomic.clean(self.path.parent):
            rank_zero_info(f"deleted what saves that did not end had left: {', '.join(map(str, gone))}")
        return atomic.written_aside(self.path)

    def _finish(
        self,
        folder: Path,
        snapshot: Snapshot,
        written: Sequence[tuple[dict[str, File], Written, bytes]],
        stack: ExitStack,
    ) -> None:
        """On rank 0: what belongs to no rank, then the manifest; checked, and put in place."""
        with uncollected():
            index = metadata.metadata_of(snapshot.tensors, [place for _, places, _ in written for place in places])
            FileSystemWriter(folder).finish(index, [[result for result, _ in places] for _, places, _ in written])
        (folder / REST).write_bytes(snapshot.rest)
        torch.save(dict(enumerate(own for _, _, own in written)), folder / _RANKS)
        files = {name: file for mine, _, _ in written for name, file in mine.items()}
        files |= {name: file_as_written(folder / name) for name in (metadata.NAME, REST, _RANKS)}
        manifest = _manifest(snapshot, files)
        if damage := manifest.damage(folder, contents=False):
            name, reason = next(iter(damage.items()))
            raise RuntimeError(
                f"{folder / name} is {reason} as rank 0 sees it, though another rank has written it; save to a file "
                'system that all ranks see, or let one group write: writers="group"'
            )
        (folder / MANIFEST).write_text(manifest.to_text())
        for name in (REST, _RANKS, MANIFEST):
            atomic.flush(folder / name)
        _warn_if_unsafe(self.path, snapshot.rest)
        stack.close()

    # -- load --------------------------------------------------------------------------------------------------------

    @outside_inference_mode
    def load(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        strict: bool = True,
        weights_only: bool | None = None,
        verify: Verify = Verify.AUTO,
        averages: Averages | None = None,
    ) -> dict[str, Any]:
        """Read tensors into `module` and `optimizers` in place, and return the rest. Collective on the default group.

        Args:
            module: sharded; its parameters and buffers take the saved values, whatever partition size saved them.
            optimizers: as saved, in number and in parameters; none to leave them out.
            strict: whether names missing on either side are an error.
            weights_only: of `torch.load`, for Lightning's part. Only False lets it run code.
            verify: how much is compared with the manifest first.
            averages: of the module, to be read as well if there are any.

        Returns:
            What Lightning keeps beside optimizer state; "state_dict" is empty, as all of it is loaded.

        Raises:
            FileNotFoundError, ValueError: on every rank if there is no checkpoint, it is damaged, or it does not fit;
                names what, and leaves everything as it was.
            RuntimeError: on every rank if any rank could not read its part.
        """
        self.verify(verify, optimizers=bool(optimizers))
        index, rest = together(lambda: self._open(weights_only), f"cannot read {self.path}")
        saved = index.state_dict_metadata
        states = rest.pop("optimizer_states", None)

        def fit() -> dict[str, Any]:
            targets = self._model_targets(module, saved, strict)
            if averages is not None:
                targets |= {key: averages.target(*_of_average(key)) for key in saved if key.startswith(AVERAGES)}
            return targets | self._optimizer_targets(module, optimizers, saved, states) if optimizers else targets

        targets = together(fit, f"cannot load {self.path}")
        together(lambda: metadata.read(self.path, index, targets), f"cannot read tensors of {self.path}")
        for optimizer, state in zip(optimizers, states or (), strict=False):  # as many, or no optimizer
            load_state(optimizer, state)
        extra = {key.removeprefix(MODEL): value for key, value in targets.items() if key.endswith(_EXTRA)}
        module.load_state_dict(rest["state_dict"] | extra, strict=False)  # a copy of what modules keep elsewhere
        return {**rest, "state_dict": {}}

    def verify(self, how: Verify, *, optimizers: bool) -> None:
        """Compare it with its manifest, as `load` does. Collective on the default group.

        Args:
            how: how much of it.
            optimizers: whether their state will be read.

        Raises:
            FileNotFoundError, ValueError: on every rank if there is no checkpoint, or it is damaged.
        """
        manifest = together(self._described, f"cannot read {self.path}")
        if manifest is not None:
            verify_together(self.path, manifest, how, optimizers=optimizers)

    def beside(self, weights_only: bool | None = None) -> dict[str, Any]:
        """What it keeps beside tensors, unverified. Collective on the default group.

        Args:
            weights_only: of `torch.load`. Only False lets it run code.
        """
        return together(lambda: self._open(weights_only)[1], f"cannot read {self.path}")

    def read(self, weights_only: bool | None = None, *, verify: Verify = Verify.AUTO) -> dict[str, Any]:
        """All of it, with whole tensors in this process's memory, as it was dumped. Needs no process group.

        Args:
            weights_only: of `torch.load`, for Lightning's part. Only False lets it run code.
            verify: how much is compared with the manifest first.

        Raises:
            FileNotFoundError, ValueError: if there is no checkpoint, or it is damaged.
        """
        if (manifest := self._described()) is not None:
            verify_alone(self.path, manifest, verify, optimizers=True)
        index, rest = self._open(weights_only)
        entries = {
            key: meta for key, meta in index.state_dict_metadata.items() if isinstance(meta, TensorStorageMetadata)
        }
        tensors = {key: torch.empty(meta.size, dtype=meta.properties.dtype) for key, meta in entries.items()}
        metadata.read(self.path, index, tensors)
        return join(tensors, rest)

    def of_this_rank(self, weights_only: bool | None = None) -> dict[str, Any]:
        """What this rank kept for itself at the save: "rng", and "loaders" if as many ranks saved.

        Nothing if fewer ranks saved, or Lightning did, which keeps none.

        Args:
            weights_only: of `torch.load`. Only False lets it run code.
        """
        if is_foreign(self.path):
            return {}
        states: dict[int, bytes] = load_plain(self.path / _RANKS, self.path / _RANKS, weights_only)
        if dist.get_rank() not in states:
            return {}
        own: dict[str, Any] = load_plain(io.BytesIO(states[dist.get_rank()]), self.path / _RANKS, weights_only)
        return own if len(states) == dist.get_world_size() else {"rng": own["rng"]}

    @property
    def manifest(self) -> Manifest:
        """What it says it holds.

        Raises:
            DamagedCheckpoint: if that cannot be told.
        """
        return Manifest.of(self.path)

    @property
    def ranks(self) -> int | None:
        """How many ranks saved it; None if Lightning did, which does not say."""
        return None if is_foreign(self.path) else self.manifest.topology["world_size"]

    def remove(self) -> None:
        """Delete it; nothing happens if it is not there."""
        atomic.remove(self.path)

    def _described(self) -> Manifest | None:
        """The manifest; None for a checkpoint of Lightning's own, which has none."""
        check_kind(self.path)
        if unfinished := atomic.left_over(self.path.parent):
            rank_zero_warn(f"left by saves that did not end, and not loaded: {', '.join(map(str, unfinished))}")
        return None if is_foreign(self.path) else self.manifest

    def _open(self, weights_only: bool | None) -> tuple[Metadata, dict[str, Any]]:
        if is_foreign(self.path):
            return translated(self.path, _plain(self.path / FOREIGN_REST, weights_only))
        return metadata.Reader(self.path).read_metadata(), _plain(self.path / REST, weights_only)

    def _model_targets(self, module: nn.Module, saved: dict[str, Any], strict: bool) -> dict[str, Any]:
        aliases = aliases_in(module)
        wanted = {
            MODEL + k: v for k, v in module.state_dict().items() if k not in aliases and isinstance(v, torch.Tensor)
        }
        held = {key for key in saved if key.startswith(MODEL) and key.removeprefix(MODEL) not in aliases}
        missing, unexpected = sorted(wanted.keys() - held), sorted(held - wanted.keys())
        if strict and (missing or unexpected):
            raise ValueError(
                f"names differ: missing in the checkpoint {_listed(missing)}; not in the module {_listed(unexpected)}; "
                "build the model that was saved, or set strict_loading=False on the LightningModule"
            )
        targets = {key: tensor for key, tensor in wanted.items() if key in held}
        differences = [
            f"{key.removeprefix(MODEL)}: saved with shape {tuple(saved[key].size)} and {saved[key].properties.dtype}, "
            f"the module has {tuple(tensor.shape)} and {tensor.dtype}"
            for key, tensor in targets.items()
            if saved[key].size != tensor.shape or saved[key].properties.dtype != tensor.dtype
        ]
        if differences:
            raise ValueError(f"{_first(differences, '; ')}; build the model that was saved")
        return targets

    def _optimizer_targets(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        saved: dict[str, Any],
        states: list[StateByName] | None,
    ) -> dict[str, Any]:
        """Tensors to read optimizer state into, each entered in `states` as well."""
        held = []
        for optimizer, state in paired(self.path, optimizers, states):
            check_same_parameters(module, optimizer, state)
            held.append((held_by_name(module, optimizer), state["state"]))
        targets: dict[str, Any] = {}
        for key, meta in saved.items():
            if key.startswith(OPTIMIZER) and isinstance(meta, TensorStorageMetadata):
                number, name, field = parts_of(key)
                params, state = held[number]
                tensor = empty_like_saved(params[name], meta.size, meta.properties.dtype)
                targets[key] = state.setdefault(name, {})[field] = tensor
        return targets


def _of_average(key: str) -> tuple[str, str]:
    """The parameter's name, and what is saved of it."""
    name, field = key.removeprefix(AVERAGES).rsplit(".", 1)
    return name, field


def _manifest(snapshot: Snapshot, files: Mapping[str, File]) -> Manifest:
    return Manifest(
        step=snapshot.step,
        epoch=snapshot.epoch,
        saved=snapshot.saved,
        writers=snapshot.writers,
        versions=snapshot.versions,
        topology=asdict(snapshot.topology),
        files=dict(sorted(files.items())),
        tensors={
            key: TensorEntry(str(dtype).removeprefix("torch."), tuple(size))
            for key, (dtype, size) in snapshot.tensors.items()
        },
        tied=snapshot.tied,
        models=snapshot.models,
    )


def _plain(path: Path, weights_only: bool | None) -> dict[str, Any]:
    rest: dict[str, Any] = load_plain(path, path, weights_only)
    return rest


def _warn_if_unsafe(path: Path, rest: bytes) -> None:
    try:
        torch.load(io.BytesIO(rest), map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        rank_zero_warn(
            f"{path} opens with weights_only=False alone, as it holds objects that are not plain data: {reason(error)}"
        )


def _listed(names: Sequence[str]) -> str:
    return f"[{_first([name.removeprefix(MODEL) for name in names], ', ')}]"


def _first(texts: Sequence[str], between: str) -> str:
    return between.join(texts[:5]) + (f"{between}and {len(texts) - 5} more" if len(texts) > 5 else "")
