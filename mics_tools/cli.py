"""The command line: `mics show | verify | export | migrate | probe | plan | simulate`.

Each command calls what Python users call; nothing can be done here alone. What needs torch is imported by the command
that needs it, so that the others answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from mics_tools.migrate import Target, migrated, read_json, to_yaml
from mics_tools.tables import fates, overview
from mics_tools.units import in_units

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

_WHOLE, _DAMAGED, _IMPOSSIBLE = 0, 1, 2


class Form(StrEnum):
    """What a checkpoint can be exported to."""

    HF = "hf"
    LIGHTNING = "lightning"


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint directory.")]
Words = Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="model=, cluster=, ...; see the command.")]
ConfigDir = Annotated[Path, typer.Option(help="The folder with plan.yaml.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")]
Plots = Annotated[Path | None, typer.Option("--plot", metavar="DIR", help="Write pictures into this folder.")]
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
    model: Annotated[
        str | None, typer.Option(help="package.module:factory, a block of which is timed instead of a tiny one.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a sample, if the factory returns a module.")] = None,
) -> None:
    """Measure the network inside nodes and between them, and the devices, and write it to a file.

    The strategy reads it: MiCSStrategy(network="network.json"); so does mics plan cluster=network.json.
    """
    with _impossible_said():
        from lightning_mics.probe_command import run

        run(output, device, ranks_per_node, model, seq_len)


@app.command()
def plan(
    words: Words,
    config_dir: ConfigDir = Path("conf"),
    as_json: AsJson = False,
    plot: Plots = None,
) -> None:
    """Choose partition size, rung and micro-batch for a model on a cluster, and say why.

    mics plan model=bert_10b cluster=p3dn nodes=16 batch=8192 checkpointing=true

    model= is one of conf/model, or package.module:factory. cluster= is one of the hardware file (p3dn, p4d, p4de, p5,
    dgx-a100, dgx-h100, ethernet-25g, virtual), with nodes=, or a file of `mics probe`, with device=. Besides: batch=,
    or micro_batch= and window=; partition_size=, rung=, memory_budget=, precision=, checkpointing=, optimizer_state=,
    offload=, seq_len=, hardware=FILE. All else overrides the configuration, as Hydra does it.
    """
    with _impossible_said():
        from lightning_mics.plan_command import run

        run(words, config_dir=config_dir, as_json=as_json, plots=plot)


@app.command()
def simulate(
    words: Words,
    gpus: Annotated[str, typer.Option(help="How many: 16..512 (doubling), or 16,64,128.")],
    scaling: Annotated[str, typer.Option(help="weak: samples of a GPU stay the same; strong: of all.")] = "weak",
    config_dir: ConfigDir = Path("conf"),
    as_json: AsJson = False,
    plot: Plots = None,
) -> None:
    """What lightning-mics, FSDP2, DDP and DeepSpeed's ways would do on ever more GPUs.

    mics simulate model=bert_10b cluster=p3dn micro_batch=8 window=4 --gpus 16..512

    Arguments are those of plan, without nodes=.
    """
    with _impossible_said():
        from lightning_mics.simulate_command import run

        run(words, gpus, scaling=scaling, config_dir=config_dir, as_json=as_json, plots=plot)


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


@app.command()
def migrate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="DeepSpeed's JSON configuration.")],
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("mics.yaml"),
    to: Annotated[Target, typer.Option(help="lightning: for LightningCLI; accelerate: MiCSAccelerator's.")] = (
        Target.LIGHTNING
    ),
    ranks: Annotated[int | None, typer.Option(min=1, help="Of the run; the window may follow from them.")] = None,
) -> None:
    """Write what a DeepSpeed configuration means here, and name the keys that have no counterpart.

    mics migrate ds_config.json, then python train.py fit --config mics.yaml, or MiCSAccelerator(**yaml.safe_load(...)).
    """
    with _impossible_said():
        if output.exists():
            raise ValueError(f"{output} exists; give another file by --output")
        migration = migrated(read_json(config), to, ranks)
        output.write_text(to_yaml(migration, config.name), encoding="utf-8")
    Console(markup=False, highlight=False).print(*fates(migration), sep="\n")
    _say(f"written to {output}")


@contextmanager
def _impossible_said() -> Iterator[None]:
    """What cannot be done, or is not there, is told in a line."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        _say(f"error: {error}", err=True)
        raise typer.Exit(_IMPOSSIBLE) from None


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
