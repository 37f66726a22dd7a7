"""`mics probe` as it runs on every rank that torchrun or srun started."""

from __future__ import annotations

import os
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import typer
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from rich import get_console
from rich.table import Table

from lightning_mics.network import Network
from lightning_mics.planner.block_call import BlockCall
from lightning_mics.planner.hardware import Device
from lightning_mics.planner.measured import busy, measure
from lightning_mics.planner.measured_host import measure_hosts
from lightning_mics.probe import probe
from lightning_mics.topology import ranks_per_node_from_environment
from lightning_mics.version import __version__
from mics_tools.units import in_units

_HOW = "start it on every rank: torchrun --nproc-per-node 8 -m lightning_mics probe, or srun mics probe"


def run(
    output: Path,
    device: str | None,
    ranks_per_node: int | None,
    model: str | None = None,
    seq_len: int | None = None,
) -> None:
    """Measure network and device with the other ranks, and on rank 0 write a file. Makes the default process group.

    Args:
        output: the file to write.
        device: cpu or cuda; by default an accelerator if there is one.
        ranks_per_node: by default as torchrun or SLURM tell.
        model: `package.module:factory`, of which a block is timed; by default a tiny one is.
        seq_len: tokens of a sample, where the factory returns a module.

    Raises:
        ValueError: for a model that is none, or of which no block can be timed; before anything is measured.
        typer.BadParameter: if no launcher started this process, or it does not tell how many ranks a node runs.
    """
    cluster = _cluster()
    kind = device or (str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu")
    own = torch.device(kind) if kind == "cpu" else torch.device(kind, cluster.local_rank())
    block = None if model is None else _block_of(model, seq_len, own)
    _join(cluster, own)
    try:
        k = ranks_per_node or ranks_per_node_from_environment(os.environ)
        if k is None:
            raise typer.BadParameter("the launcher does not tell how many ranks a node runs; give --ranks-per-node")
        network, figures = probe(k, own), measure(own, k, block)
        hosts = measure_hosts(k, busy()) if own.type == "cpu" else {}  # accelerators' hosts run ahead
        if dist.get_rank() == 0:
            told = {"figures": asdict(figures), "hosts": {engine: host.as_json() for engine, host in hosts.items()}}
            network.save(output, **_circumstances(k, own), **told)
            _show(network, figures, output)
    finally:
        dist.destroy_process_group()


def _block_of(model: str, seq_len: int | None, device: torch.device) -> BlockCall:
    from lightning_mics.workloads import of_factory

    work = of_factory(model, seq_len, "32-true" if device.type == "cpu" else "bf16-mixed")
    return BlockCall.of(work.module, work.batch(1), work.step, device, work.blocks, work.precision)


def _cluster() -> ClusterEnvironment:
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect():
            return environment()
    raise typer.BadParameter(f"this is not one of several ranks; {_HOW}")


def _join(cluster: ClusterEnvironment, device: torch.device) -> None:
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = cluster.main_address, str(cluster.main_port)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    dist.init_process_group(
        dist.get_default_backend_for_device(device), rank=cluster.global_rank(), world_size=cluster.world_size()
    )


def _circumstances(ranks_per_node: int, device: torch.device) -> dict[str, Any]:
    return {
        "date": str(date.today()),
        "nodes": dist.get_world_size() // ranks_per_node,
        "ranks_per_node": ranks_per_node,
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "backend": dist.get_backend(),
        "versions": {"lightning-mics": __version__, "torch": torch.__version__},
    }


def _show(network: Network, figures: Device, output: Path) -> None:
    table = Table("tier", "latency", "bandwidth of a rank", "error of the fit", title=network.source)
    tiers = {"inside a node": network.intra, "inside, by messages": network.messages, "between nodes": network.inter}
    for name, tier in tiers.items():
        if tier is None:
            continue
        error = f"{100 * tier.relative_error:.0f} %" if tier.samples else "not measured"
        table.add_row(name, f"{1e6 * tier.latency:,.0f} us", in_units(tier.bandwidth, "B/s"), error)
    get_console().print(table)
    peaks = ", ".join(f"{in_units(peak, 'FLOP/s')} in {dtype}" for dtype, peak in figures.peak_flops.items())
    kernel = f"{1e6 * figures.kernel:,.1f} us an operator"
    get_console().print(f"{figures.name}: {peaks}; memory {in_units(figures.memory_bandwidth, 'B/s')}; {kernel}")
    get_console().print(f"written to {output}", markup=False, highlight=False, soft_wrap=True)
