"""Verification: before anything of a checkpoint is loaded, its files are compared with its manifest.

Each file is read once: ranks share the reading where they see the same files, and learn of one another's findings.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from lightning_mics.checkpoint.flat import OPTIMIZER
from lightning_mics.checkpoint.pieces import Writers
from lightning_mics.choice import Choice
from mics_tools.manifest import DamagedCheckpoint, Manifest

_OPTIMIZER_FILES = OPTIMIZER.removesuffix(".") + "-"


class Verify(Choice):
    """How much of a checkpoint is compared with its manifest before it is loaded."""

    AUTO = "auto"
    """Sizes and checksums of all files that will be read: without those of optimizers where none is resumed."""
    FULL = "full"
    """Sizes and checksums of all files."""
    OFF = "off"
    """Nothing: the disk is trusted."""


def verify_together(folder: Path, manifest: Manifest, how: Verify, *, optimizers: bool) -> None:
    """Compare the files of a checkpoint with its manifest. Collective on the default group.

    Args:
        folder: of the checkpoint.
        manifest: of the checkpoint.
        how: how much of it.
        optimizers: whether their state will be read.

    Raises:
        DamagedCheckpoint: on every rank, with all that any rank found.
    """
    names = _names(manifest, how, optimizers)
    if manifest.writers == Writers.ALL:  # otherwise each node may have a copy of its own
        names = _share(manifest, names)
    damage: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(damage, manifest.damage(folder, names))
    if found := {name: reason for part in damage for name, reason in part.items()}:
        raise DamagedCheckpoint(folder, found)


def verify_alone(folder: Path, manifest: Manifest, how: Verify, *, optimizers: bool) -> None:
    """The same in one process, which will read all of it. No communication."""
    if found := manifest.damage(folder, _names(manifest, how, optimizers)):
        raise DamagedCheckpoint(folder, found)


def _names(manifest: Manifest, how: Verify, optimizers: bool) -> list[str]:
    if how == Verify.OFF:
        return []
    return [name for name in manifest.files if optimizers or how == Verify.FULL or not _is_optimizers(name)]


def _share(manifest: Manifest, names: Iterable[str]) -> list[str]:
    """This rank's, of about as many bytes as every other's."""
    by_size = sorted(names, key=lambda name: (-manifest.files[name].size, name))
    return by_size[dist.get_rank() :: dist.get_world_size()]


def _is_optimizers(name: str) -> bool:
    return name.startswith(_OPTIMIZER_FILES)
