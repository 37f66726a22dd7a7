"""What runs on each rank of the virtual cluster: peers side by side in time, or one by one for their memory.

Started by `benchmarks.wire` under torchrun with a plan (JSON) and the file to write rows to (rank 0).
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.bound import bytes_leaving_a_node
from benchmarks.cluster import bytes_sent
from benchmarks.model import batches, build, size_of
from benchmarks.peers import PEERS, Peer
from benchmarks.results import Row
from benchmarks.stepped import quiet
from lightning_mics import memory
from lightning_mics.topology import Topology

LOSS_TOLERANCE = 2e-5
"""Relative; fp32 sums in another order, over a few AdamW steps."""
_REFERENCES = ("ddp", "zero3")
_UNLIKE_OTHERS = ("alone",)
_CPU = torch.device("cpu")
_MICRO_STEPS_FOR_MEMORY = 2  # from the second on, a window holds what it ever will


@dataclass(frozen=True)
class Plan:
    """What to measure on one cluster.

    Attributes:
        link: as `str(Link)`, for the rows.
        nodes: number of nodes.
        ranks_per_node: k.
        partition_sizes: of the peers that take any.
        windows: one case each, in which all peers take turns.
        peers: names.
        repetitions: optimizer steps that count, after one that does not.
        memory: whether to measure memory instead of time.
        apart: whether one peer is alive at a time, as in a training, instead of taking turns with all others.
    """

    link: str
    nodes: int
    ranks_per_node: int
    partition_sizes: list[int]
    windows: list[int]
    peers: list[str]
    repetitions: int
    memory: bool = False
    apart: bool = False

    def variants(self) -> list[tuple[str, Topology]]:
        """The names of all peers with the topologies on which each is one of its own."""
        n, k = self.nodes * self.ranks_per_node, self.ranks_per_node
        asked = [Topology(n, k, p) for p in self.partition_sizes]
        return [(name, topology) for name in self.peers for topology in PEERS[name].topologies(asked)]

    def row(self, name: str, topology: Topology, window: int) -> Row:
        """A row without measurements."""
        rung = PEERS[name].rung
        bound = bytes_leaving_a_node(size_of(build()), topology, window, rung)
        if name in _UNLIKE_OTHERS:
            bound = 0.0  # it sends nothing
        p = topology.partition_size
        return Row(self.link, self.nodes, self.ranks_per_node, p, window, name, str(rung), bound)


class LossesDiffer(RuntimeError):
    """A peer trained something else, so that its times mean nothing."""


def check_losses(rows: Sequence[Row], tolerance: float = LOSS_TOLERANCE) -> None:
    """Hold every peer's losses against one peer's (DDP where it takes part).

    Raises:
        LossesDiffer: naming the first peer and step that are further than `tolerance` (relative) away.
    """
    comparable = {row.peer: row for row in rows if row.peer not in _UNLIKE_OTHERS}
    if not comparable:
        return
    reference = next((comparable[name] for name in _REFERENCES if name in comparable), next(iter(comparable.values())))
    for row in comparable.values():
        for step, (loss, expected) in enumerate(zip(row.losses, reference.losses, strict=True)):
            if not abs(loss - expected) <= tolerance * abs(expected):
                raise LossesDiffer(
                    f"{row.peer} at p={row.partition_size}, window {row.window}: its loss {loss:.7f} in step {step} is "
                    f"not {reference.peer}'s {expected:.7f} (tolerance {tolerance:g}); no time is reported"
                )


def time_case(plan: Plan, window: int) -> list[Row]:
    """All peers, one optimizer step each in turn, over and over; the turn begins with another each time."""
    variants = plan.variants()
    rows = [plan.row(name, topology, window) for name, topology in variants]
    peers = [PEERS[name].make(topology, window) for name, topology in variants]
    for step in range(1 + plan.repetitions):
        for turn in range(len(rows)):
            index = (turn + step) % len(rows)
            _one_step(plan, rows[index], peers[index], step)
    for peer in peers:
        peer.close()
    check_losses(rows)
    return rows


def time_case_apart(plan: Plan, window: int) -> list[Row]:
    """The peers, one alive at a time, in rounds: each is made anew, and its second step counts.

    A machine that is slower for some minutes is so for all of them.
    """
    variants = plan.variants()
    rows = [plan.row(name, topology, window) for name, topology in variants]
    for _ in range(plan.repetitions):
        for row, (name, topology) in zip(rows, variants, strict=True):
            peer = PEERS[name].make(topology, window)
            for step in range(2):
                _one_step(plan, row, peer, step)
            peer.close()
    check_losses(rows)
    return rows


def _one_step(plan: Plan, row: Row, peer: Peer, step: int) -> None:
    data = batches(step, dist.get_rank(), row.window)
    gc.collect()
    dist.barrier()
    before = bytes_sent()
    dist.barrier()
    start, on_core = time.perf_counter(), time.process_time()
    loss = peer.step(data)
    seconds = time.perf_counter() - start
    on_core = time.process_time() - on_core
    dist.barrier()
    told = [seconds, loss, float(bytes_sent() - before), on_core]
    mine = torch.tensor(told, dtype=torch.float64)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    everyone = torch.stack(gathered)
    row.losses.append(everyone[:, 1].mean().item())
    if step:  # the first one warms up
        row.seconds.append(everyone[:, 0].max().item())
        row.cpu.append(everyone[:, 3].mean().item())
        row.sent.append([int(count) for count in everyone[:: plan.ranks_per_node, 2]])


# -- memory ------------------------------------------------------------------------------------------------------------


def weigh_case(plan: Plan, window: int) -> list[Row]:
    """The peers, one alive at a time: what the process grows by, from before it is made to its peak.

    The peak is the kernel's own (VmHWM), reset when the first step, in which the optimizer makes its state, is over.
    """
    micro_steps = min(window, _MICRO_STEPS_FOR_MEMORY)
    return [_weigh(plan, name, topology, window, micro_steps) for name, topology in plan.variants()]


def _weigh(plan: Plan, name: str, topology: Topology, window: int, micro_steps: int) -> Row:
    row = plan.row(name, topology, window)
    _trim()
    before = memory.in_use(_CPU)
    peer = PEERS[name].make(topology, micro_steps)
    losses = [peer.step(batches(0, dist.get_rank(), micro_steps))]
    _trim()
    memory.reset_peak(_CPU)
    losses.append(peer.step(batches(1, dist.get_rank(), micro_steps)))
    most = torch.tensor(memory.peak(_CPU) - before)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    peer.close()
    return replace(row, peak_memory=int(most), losses=losses)


def _trim() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


# -- the process -------------------------------------------------------------------------------------------------------


def _how(plan: Plan) -> Callable[[Plan, int], list[Row]]:
    if plan.memory:
        return weigh_case
    return time_case_apart if plan.apart else time_case


def main(plan_file: str, rows_file: str) -> None:
    """Measure the plan; rank 0 appends a line of JSON a row, case by case."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    plan = Plan(**json.loads(Path(plan_file).read_text()))
    gc.freeze()  # what is imported need not be searched for garbage before every step
    if plan.memory:
        weigh_case(plan, plan.windows[0])  # what a process loads once is no peer's
    for window in plan.windows:
        with quiet():
            rows = _how(plan)(plan, window)
        gc.collect()
        if dist.get_rank() == 0:
            with Path(rows_file).open("a") as file:
                file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # the interpreter's own end can hang on threads of a process group


if __name__ == "__main__":
    main(*sys.argv[1:])
