"""Scaling: what lightning-mics and its peers do on ever more of a cluster's nodes.

Peers run the micro-batch and window that were planned for lightning-mics, on their own defaults, but that FSDP2 adds
gradients up in the same dtype (in 16 bits it would send half as much). Whether they fit is
told by the same account of memory, as if they held what it says of the nearest that the engine has:

=========  ==========================================================================================
peer       taken to hold
=========  ==========================================================================================
DDP        p = 1
ZeRO-2     p = n with all parameters whole: gradients, fp32 parameters and optimizer over all ranks
ZeRO-3     p = n
HSDP       its p
hpZ        p = n, and the node's second copy of the shards
=========  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from lightning_mics.choice import Choice as Word
from lightning_mics.ladder import Gradients, Parameters, Rung
from lightning_mics.optimizer_shards import OptimizerState
from lightning_mics.planner import peers
from lightning_mics.planner.plan import DoesNotFit, Planner
from lightning_mics.planner.step import Walker
from lightning_mics.topology import allowed_partition_sizes

OURS = "lightning-mics"
_LOWEST = Rung()


class Scaling(Word):
    """What stays the same on more devices."""

    WEAK = "weak"
    """Samples of each device in a step."""
    STRONG = "strong"
    """Samples of all devices in a step."""


@dataclass(frozen=True)
class Point:
    """A system on a number of devices.

    Attributes:
        system: `OURS`, or a peer.
        devices: n.
        micro_batch: samples of a rank in a micro-step.
        window: micro-steps of an optimizer step.
        partition_size: ranks that share what is sharded; None where nothing fits.
        rung: what stays whole; None for peers.
        memory: bytes of a rank at its peak.
        seconds: of an optimizer step; None if it does not fit.
        samples: a second, of all devices.
        flops: a second, of each.
    """

    system: str
    devices: int
    micro_batch: int
    window: int
    partition_size: int | None
    rung: Rung | None
    memory: float | None
    seconds: float | None = None
    samples: float = 0.0
    flops: float = 0.0

    @property
    def fits(self) -> bool:
        return self.seconds is not None


@dataclass(frozen=True)
class Asked:
    """What is planned at each size.

    Attributes:
        batch: samples of an optimizer step at the smallest size; None if the others are given.
        micro_batch: samples of a rank in a micro-step; None to choose it.
        window: micro-steps of an optimizer step; likewise.
        partition_size: p of lightning-mics; None to choose it.
        rung: of lightning-mics; None to choose it.
        scaling: what stays the same.
    """

    batch: int | None = None
    micro_batch: int | None = None
    window: int | None = None
    partition_size: int | None = None
    rung: Rung | None = None
    scaling: Scaling = Scaling.WEAK


def scale(planner: Planner, devices: Sequence[int], asked: Asked) -> list[Point]:
    """Each system at each size, in ascending order of sizes.

    Args:
        planner: on any number of nodes.
        devices: numbers of devices, each a multiple of the node's.
        asked: what is planned.

    Raises:
        ValueError: for a number that does not fill nodes, batches that do not divide, or a strong scaling without one.
        DoesNotFit: if no system fits at any size.
    """
    per_node = planner.cluster.devices_per_node
    sizes = sorted(set(devices))
    if wrong := [each for each in sizes if each < 1 or each % per_node]:
        raise ValueError(
            f"gpus={wrong[0]} must be a positive multiple of {per_node}: {planner.cluster.name} has so many a node"
        )
    if asked.scaling == Scaling.STRONG and asked.batch is None:
        raise ValueError(
            "strong scaling needs the batch that stays the same; give batch=, samples of an optimizer step"
        )
    if asked.batch is not None and asked.batch % sizes[0]:
        raise ValueError(f"batch={asked.batch} must be a multiple of {sizes[0]}, the smallest number of devices")
    points: list[Point] = []
    error: DoesNotFit | None = None
    for size in sizes:
        grows = size if asked.scaling == Scaling.WEAK else sizes[0]
        batch = None if asked.batch is None else asked.batch // sizes[0] * grows
        here = planner.on(size // per_node)
        try:
            ours = _ours(here, replace(asked, batch=batch))
        except DoesNotFit as not_there:
            error = not_there
            ours = _nothing(here, replace(asked, batch=batch))
        points += [ours, *_peers(here, ours.micro_batch, ours.window)]
    if error is not None and not any(point.fits for point in points):
        raise error
    return points


def efficiency(point: Point, points: Sequence[Point]) -> float | None:
    """Samples a second of a device, as a share of what the system did with the fewest devices on which it fits."""
    if not point.fits:
        return None
    first = next(each for each in points if each.system == point.system and each.fits)
    return (point.samples / point.devices) / (first.samples / first.devices)


def _ours(planner: Planner, asked: Asked) -> Point:
    best = planner.plan(
        global_batch=asked.batch,
        micro_batch=asked.micro_batch,
        window=asked.window,
        partition_size=asked.partition_size,
        rung=asked.rung,
    ).best
    point = Point(
        OURS,
        planner.cluster.devices,
        best.micro_batch,
        best.window,
        best.partition_size,
        best.rung,
        best.memory.total,
    )
    return _timed(planner, point, best.seconds)


def _nothing(planner: Planner, asked: Asked) -> Point:
    """The least micro-batch, for the peers to try."""
    n = planner.cluster.devices
    micro_batch = asked.micro_batch or 1
    window = asked.window or (1 if asked.batch is None else asked.batch // (n * micro_batch))
    return Point(OURS, n, micro_batch, window, None, None, None)


def _peers(planner: Planner, micro_batch: int, window: int) -> Iterator[Point]:
    work = planner.workload
    sums = replace(work.precision, reduce_dtype=work.precision.sum_dtype(torch.float32))
    workload = replace(work, optimizer_state=OptimizerState.PARTITION, precision=sums, offload=None)
    planner = Planner(workload, planner.cluster, memory_budget=planner.budget)
    n = planner.cluster.devices
    at = partial(_peer, planner, micro_batch, window)
    if n > 1:  # else there is nobody to share with
        yield at("ZeRO-3", n, peers.fsdp2)
        yield at("HSDP", _hybrid(planner, micro_batch, window), peers.fsdp2)
        yield at("hpZ", n, peers.hpz, more=_second_copy(planner))
    yield at("ZeRO-2", n, partial(peers.zero, stage=2), Rung(Parameters.WINDOW, Gradients.SHARDED))
    yield at("DDP", 1, peers.ddp)


def _peer(
    planner: Planner,
    micro_batch: int,
    window: int,
    system: str,
    partition_size: int,
    walk: Walker,
    held: Rung = _LOWEST,
    more: int = 0,
) -> Point:
    topology = planner.topology(partition_size)
    memory = planner.memory(topology, held, micro_batch, window).total + more
    point = Point(system, topology.world_size, micro_batch, window, partition_size, None, memory)
    if memory > planner.budget:
        return point
    return _timed(planner, point, planner.step(topology, _LOWEST, micro_batch, window, walk).seconds)


def _timed(planner: Planner, point: Point, seconds: float) -> Point:
    samples, flops = planner.throughput(point.micro_batch, point.window, seconds)
    return replace(point, seconds=seconds, samples=samples, flops=flops)


def _hybrid(planner: Planner, micro_batch: int, window: int) -> int:
    """A node, or the fewest nodes on which a replica fits; two devices at least."""
    n, k = planner.cluster.devices, planner.cluster.devices_per_node
    sizes = [size for size in allowed_partition_sizes(n, k) if size >= max(k, 2)]
    fitting = (
        size
        for size in sizes
        if planner.memory(planner.topology(size), _LOWEST, micro_batch, window).total <= planner.budget
    )
    return next(fitting, n)


def _second_copy(planner: Planner) -> int:
    """Bytes of a node's copy of all shards, in the dtype that travels."""
    state = planner.state(planner.topology(planner.cluster.devices))
    whole = sum(bucket.whole.parameters for bucket in (*state.blocks, state.outside))
    return whole // planner.cluster.devices_per_node
