"""Export: the memory and the time that `mics export --to hf` takes for a large checkpoint.

    python -m benchmarks.export --size 10GB

A GPT-2 of random weights of that size is saved; the command runs in a process of its own, which tells the peak of its
resident set as Linux counts it; and every tensor that it wrote is compared with what was saved. Needs twice the size
on the disk.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from subprocess import run
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config

from lightning_mics import memory
from lightning_mics.checkpoint import Checkpoint, Snapshot
from lightning_mics.topology import Topology
from mics_tools.cli import app as mics
from mics_tools.units import in_bytes, in_units

_WIDTH = 2560
app = typer.Typer(add_completion=False)


def _model(size: int) -> nn.Module:
    """A GPT-2 whose weights take about so many bytes, on the meta device."""
    embeddings, layer = (50257 + 1024) * _WIDTH, 12 * _WIDTH**2
    config = GPT2Config(n_embd=_WIDTH, n_head=20, n_layer=max(1, round((size / 4 - embeddings) / layer)))
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def _values(model: nn.Module) -> dict[str, Tensor]:
    """Random values for a model: each tensor begins elsewhere in the same memory."""
    state = model.state_dict()
    random = torch.randn(max(tensor.numel() for tensor in state.values()) + len(state))
    return {name: random[i : i + tensor.numel()].view(tensor.shape) for i, (name, tensor) in enumerate(state.items())}


def _save(path: Path, model: nn.Module, values: dict[str, Tensor]) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    Checkpoint(path).write(Snapshot.take({"state_dict": values}, model, Topology(1, 1, 1)))
    dist.destroy_process_group()


def _compare(folder: Path, values: dict[str, Tensor]) -> int:
    """The number of tensors; raises where one is not what was saved."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 it is no mapping
                if not torch.equal(opened.get_tensor(name), values[name]):
                    raise AssertionError(f"{name} is not what was saved")
                count += 1
    return count


def _export(*arguments: str) -> None:
    """In a process of its own: the command, and what it took."""
    began = time.perf_counter()
    mics(["export", *arguments, "--to", "hf"], standalone_mode=False)
    print(f"{time.perf_counter() - began:.0f} s, peak resident set {in_units(memory.peak(torch.device('cpu')), 'B')}")


@app.command()
def main(
    size: Annotated[str, typer.Option(help="Of the weights.")] = "10GB",
    folder: Annotated[Path | None, typer.Option(help="Where both go while it runs.")] = None,
) -> None:
    """Save a checkpoint of this size, export it, and compare."""
    model = _model(in_bytes(size))
    values = _values(model)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        saved, out = Path(place, "saved"), Path(place, "out")
        _save(saved, model, values)
        manifest = Checkpoint(saved).manifest
        print(f"saved {in_units(manifest.size, 'B')} in {len(manifest.tensors)} tensors")
        run([sys.executable, "-m", "benchmarks.export", "run", str(saved), str(out)], check=True)
        print(f"{_compare(out, values)} tensors in {len([*out.glob('*.safetensors')])} files are what was saved")


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        _export(*sys.argv[2:])
    else:
        app()
