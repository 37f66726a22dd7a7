"""The command line: `mics show | verify | export | probe`.

Each command calls what Python users call; nothing can be done here alone. What needs torch is imported by the command
that needs it, so that the others answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from mics_tools import atomic
from mics_tools.manifest import DamagedCheckpoint, Manifest, check_kind
from mics_tools.tables import overview
from mics_tools.units import in_units

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

_WHOLE, _DAMAGED, _IMPOSSIBLE = 0, 1, 2


class Form(StrEnum):
    """What a checkpoint can be exported to."""

    HF = "hf"
    LIGHTNING = "lightning"


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint directory.")]
Folders = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Checkpoint directories.")]


@app.callback()
def main() -> None:
    """MiCS: sharded data parallelism whose traffic stays inside small groups."""


@app.command()
def show(directory: Folder) -> None:
    """What a checkpoint holds, by its manifest and the sizes of its files; exits as verify does."""

    def sizes(manifest: Manifest) -> dict[str, str]:
        Console(markup=False, highlight=False).print(*overview(manifest), sep="\n")
        return manifest.damage(directory, contents=False)

    raise typer.Exit(_examined(directory, sizes, "whole by the sizes of its files"))


@app.command()
def verify(
    directories: Folders,
    quick: Annotated[bool, typer.Option("--quick", help="Compare sizes alone, not checksums.")] = False,
) -> None:
    """Compare every file of checkpoints with its size and checksum.

    Exits with 0 where all are whole, 1 on damage, 2 where a directory is no checkpoint.
    """

    how = "whole by the sizes of its files" if quick else "whole"
    raise typer.Exit(max([_examined(each, partial(_damage, each, quick), how) for each in directories]))


@app.command()
def probe(
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("network.json"),
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default an accelerator if there is one.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(help="By default as torchrun or SLURM tell.")] = None,
) -> None:
    """Measure the network inside nodes and between them, and write it to a file.

    The strategy reads it: MiCSStrategy(network="network.json").
    """
    from lightning_mics.probe_command import run

    run(output, device, ranks_per_node)


@app.command()
def export(
    directory: Folder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder (hf) or the file (lightning) to write.")],
    to: Annotated[Form, typer.Option(help="A folder for from_pretrained, or a file for any Lightning Trainer.")],
    model: Annotated[str | None, typer.Option(help="hf: which of several models, by its name in the module.")] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="hf: of a file of tensors; by default 5GB.")] = None,
    dtype: Annotated[str | None, typer.Option(help="hf: cast to float32, bfloat16 or float16.")] = None,
    weights_only: Annotated[
        bool, typer.Option(help="lightning: refuse objects that are not plain data, whose code would run.")
    ] = True,
    verify: Annotated[str, typer.Option(help="auto (what is read), full, or off.")] = "auto",
) -> None:
    """Write a checkpoint in another form; 1 is the exit code on damage, 2 where it cannot be done."""
    of_hf = {"model": model, "max_shard_size": max_shard_size, "dtype": dtype}
    given = {name: value for name, value in of_hf.items() if value is not None}
    if given and to is Form.LIGHTNING:
        raise typer.BadParameter(f"{', '.join(given)}: only of --to hf")
    if not weights_only and to is Form.HF:
        raise typer.BadParameter("weights_only: only of --to lightning; --to hf reads tensors alone")
    from lightning_mics.checkpoint import consolidate, export_hugging_face

    try:
        if to is Form.HF:
            export_hugging_face(directory, out, verify=verify, **given)
        else:
            consolidate(directory, out, verify=verify, weights_only=weights_only)
    except (OSError, ValueError, UnpicklingError) as error:
        _say(f"error: {error}", err=True)
        raise typer.Exit(_DAMAGED if isinstance(error, DamagedCheckpoint) else _IMPOSSIBLE) from None
    _say(f"written to {out}, {in_units(_size(out), 'B')}")


def _damage(directory: Path, quick: bool, manifest: Manifest) -> dict[str, str]:
    """What is damaged, with a bar on a terminal while files are read."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quick or not console.is_terminal) as bar:
        task = bar.add_task(str(directory), total=manifest.size)
        return manifest.damage(directory, contents=not quick, on_read=partial(bar.advance, task))


def _examined(directory: Path, damage_of: Callable[[Manifest], dict[str, str]], how: str) -> int:
    """Print whether a checkpoint is whole, or what is wrong with it; the exit code."""
    _warn_of_left_overs(directory)
    try:
        check_kind(directory)
    except (FileNotFoundError, ValueError) as error:
        _say(f"error: {error}", err=True)
        return _IMPOSSIBLE
    try:
        manifest = Manifest.of(directory)
        damage = damage_of(manifest)
    except DamagedCheckpoint as error:
        damage = error.damage
    if not damage:
        _say(f"{directory}: {how}, {len(manifest.files)} files, {in_units(manifest.size, 'B')}")
        return _WHOLE
    _say(f"{directory}: damaged")
    for name, reason in damage.items():
        _say(f"  {name}: {reason}")
    return _DAMAGED


def _warn_of_left_overs(directory: Path) -> None:
    try:
        left = atomic.left_over(Path(os.path.abspath(directory)).parent)
    except OSError:  # a folder of somebody else's
        return
    for path in left:
        _say(f"note: {path} was left by a save that did not end; the next save there deletes it", err=True)


def _size(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files)


def _say(text: str, *, err: bool = False) -> None:
    print(text, file=sys.stderr if err else sys.stdout)
