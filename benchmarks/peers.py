"""The peers: each way to train one model on many ranks, behind the same two methods.

All start from the same values and take the same batches, in fp32 with AdamW, and differ only in what they shard and in
when they synchronise. `PEERS` names them; what a peer is may depend on the topology, and where it is nothing of its
own (a hybrid with one replica, say) it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks import deepspeed_peers
from benchmarks.model import blocks_of, build, loss_of, optimizer_of
from lightning_mics.groups import Groups
from lightning_mics.ladder import RUNGS, Gradients, Parameters, Rung
from lightning_mics.optimizer_shards import OptimizerState
from lightning_mics.sharding import shard
from lightning_mics.topology import Topology


class Peer(Protocol):
    """A model, its optimizer and its way to synchronise, on this rank."""

    def step(self, batches: Sequence[Tensor]) -> float:
        """One optimizer step over a window of micro-steps; the mean of this rank's losses, in nats."""
        ...

    def close(self) -> None:
        """Give back what outlives the object."""
        ...


class _Loop:
    """A plain training loop; subclasses say what happens around each micro-step.

    Args:
        model: called for the loss; the optimizer has its parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = optimizer_of(model.parameters())

    def step(self, batches: Sequence[Tensor]) -> float:
        total = 0.0
        for index, ids in enumerate(batches):
            with self.micro_step(boundary=index == len(batches) - 1):
                loss = loss_of(self.model, ids)
                self.backward(loss / len(batches))
            total += loss.item()
        self.update()
        return total / len(batches)

    def micro_step(self, boundary: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> None:
        pass


class Alone(_Loop):
    """No communication: what computing costs while all ranks share the machine. Each rank's losses go their own way."""

    def __init__(self) -> None:
        super().__init__(build())


class DDP(_Loop):
    """`DistributedDataParallel`, which reduces at the boundary only."""

    def __init__(self) -> None:
        super().__init__(DistributedDataParallel(build()))

    def micro_step(self, boundary: bool) -> AbstractContextManager[Any]:
        assert isinstance(self.model, DistributedDataParallel)
        return nullcontext() if boundary else self.model.no_sync()


class FSDP2(_Loop):
    """`fully_shard` by its public switches.

    Args:
        mesh: one axis to shard over, or ("replicate", "shard").
        rung: which of FSDP2's own switches keep what whole.
        hop_2_every_micro_step: all-reduce between replicas in each micro-step, as it does by itself.
    """

    def __init__(self, mesh: DeviceMesh, rung: Rung, *, hop_2_every_micro_step: bool = False) -> None:
        model = build()
        keep = rung.parameters != Parameters.BLOCK
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh, reshard_after_forward=not keep)
        fully_shard(model, mesh=mesh)
        super().__init__(model)
        self._rung = rung
        self._two_hop = mesh.ndim > 1 and not hop_2_every_micro_step

    def micro_step(self, boundary: bool) -> AbstractContextManager[Any]:
        assert isinstance(self.model, FSDPModule)
        if self._rung.gradients == Gradients.WHOLE:
            self.model.set_requires_gradient_sync(boundary)
        elif self._two_hop:
            self.model.set_requires_all_reduce(boundary)
        if self._rung.parameters == Parameters.WINDOW:
            self.model.set_reshard_after_backward(boundary)
        return nullcontext()


class MiCS(_Loop):
    """lightning-mics without a Trainer.

    Args:
        topology: of the partition groups.
        rung: of the memory ladder.
        optimizer_state: over which ranks it is sharded.
    """

    def __init__(
        self, topology: Topology, rung: Rung, optimizer_state: OptimizerState = OptimizerState.PARTITION
    ) -> None:
        root = shard(build(), Groups.create(topology, "cpu"), rung=rung)
        root.one_backward = True
        super().__init__(root)
        if optimizer_state == OptimizerState.WORLD:
            root.shard_optimizer(self.optimizer)
        self.root = root
        self._steps = 0

    def micro_step(self, boundary: bool) -> AbstractContextManager[Any]:
        self.root.window.begin(self._steps)
        return nullcontext() if boundary else self.root.window.hop_1_only()

    def backward(self, loss: Tensor) -> None:
        with self.root.window.backward():
            super().backward(loss)

    def update(self) -> None:
        self.root.window.close()
        super().update()
        self.root.finish_updates()  # otherwise they would travel in another peer's turn
        self.root.release()
        self._steps += 1


@dataclass(frozen=True)
class Entry:
    """A peer by name.

    Attributes:
        says: what it is, in a line.
        make: the peer on a topology, for windows of so many micro-steps; made by all ranks together.
        rung: what it keeps whole.
        fixed: the partition size that it has whatever is asked for, for a world size; None if it takes any.
        applies: whether it is a peer of its own on a topology, if it takes any.
        missing: why it cannot be made here, or None.
    """

    says: str
    make: Callable[[Topology, int], Peer]
    rung: Rung
    fixed: Callable[[int], int] | None = None
    applies: Callable[[Topology], bool] = lambda topology: True
    missing: Callable[[], str | None] = lambda: None

    def topologies(self, asked: Sequence[Topology]) -> list[Topology]:
        """Those of `asked` that it takes part in, or the one that it has in any case."""
        if self.fixed is None:
            return [topology for topology in asked if self.applies(topology)]
        n, k = asked[0].world_size, asked[0].ranks_per_node
        return [Topology(n, k, self.fixed(n))]


def one_rank(world_size: int) -> int:
    """p = 1."""
    return 1


def all_ranks(world_size: int) -> int:
    """p = n."""
    return world_size


def is_hybrid(topology: Topology) -> bool:
    """Whether there are both replicas and shards."""
    return 1 < topology.partition_size < topology.world_size


def _is_sharded(topology: Topology) -> bool:
    return topology.partition_size > 1


def mesh_of(topology: Topology) -> DeviceMesh:
    """FSDP2's mesh: one axis where there is one replica, two otherwise. Collective."""
    n, p = topology.world_size, topology.partition_size
    if p == n:
        return init_device_mesh("cpu", (n,), mesh_dim_names=("shard",))
    return init_device_mesh("cpu", (n // p, p), mesh_dim_names=("replicate", "shard"))


def _alone(topology: Topology, window: int) -> Peer:
    return Alone()


def _ddp(topology: Topology, window: int) -> Peer:
    return DDP()


def _fsdp2(rung: Rung, topology: Topology, window: int) -> Peer:
    return FSDP2(mesh_of(topology), rung)


def _hsdp_every(topology: Topology, window: int) -> Peer:
    return FSDP2(mesh_of(topology), Rung(), hop_2_every_micro_step=True)


def _mics(rung: Rung, topology: Topology, window: int) -> Peer:
    return MiCS(topology, rung)


def _mics_world(rung: Rung, topology: Topology, window: int) -> Peer:
    return MiCS(topology, rung, OptimizerState.WORLD)


def _deepspeed(zero: dict[str, Any], topology: Topology, window: int) -> Peer:
    return deepspeed_peers.DeepSpeed(window, **zero)


def _lightning(topology: Topology, window: int) -> Peer:
    from benchmarks.lightning_peer import ModelParallel

    return ModelParallel(topology, window)


def _hpz(topology: Topology, window: int) -> Peer:
    return deepspeed_peers.DeepSpeed(window, stage=3, zero_hpz_partition_size=topology.ranks_per_node)


_KEEP = Rung(Parameters.MICRO_STEP)
_WHOLE = Rung(Parameters.WINDOW, Gradients.WHOLE)

PEERS: dict[str, Entry] = {
    "alone": Entry("no communication: computing alone", _alone, _WHOLE, one_rank),
    "ddp": Entry("DistributedDataParallel", _ddp, _WHOLE, one_rank),
    "zero3": Entry("FSDP2 over all ranks", partial(_fsdp2, Rung()), Rung(), all_ranks),
    "zero3-keep": Entry("the same, reshard_after_forward=False", partial(_fsdp2, _KEEP), _KEEP, all_ranks),
    "hsdp-every": Entry("FSDP2 hybrid, all-reduce in each micro-step", _hsdp_every, Rung(), applies=is_hybrid),
    "lightning": Entry("a Trainer with ModelParallelStrategy, hybrid", _lightning, Rung(), applies=is_hybrid),
}
for _rung in RUNGS:
    PEERS[f"fsdp2:{_rung}"] = Entry(
        f"FSDP2 by its public switches, {_rung}",
        partial(_fsdp2, _rung),
        _rung,
        # Over all ranks, the first two are called zero3.
        applies=is_hybrid if _rung in (Rung(), _KEEP) else _is_sharded,
    )
for _name, _says, _make, _rung in (
    ("zero2", "DeepSpeed ZeRO-2", partial(_deepspeed, {"stage": 2}), Rung(Parameters.WINDOW)),
    ("zero3", "DeepSpeed ZeRO-3", partial(_deepspeed, {"stage": 3}), Rung()),
    # Its forward gathers over all ranks, its backward in the node: between nodes, as though they were kept.
    ("hpz", "DeepSpeed ZeRO-3 with a copy of the parameters in each node", _hpz, _KEEP),
):
    PEERS[f"deepspeed:{_name}"] = Entry(_says, _make, _rung, all_ranks, missing=deepspeed_peers.missing)
for _rung in RUNGS:
    PEERS[f"mics:{_rung}"] = Entry(f"lightning-mics, {_rung}", partial(_mics, _rung), _rung, applies=_is_sharded)
for _rung in (Rung(), _WHOLE):
    PEERS[f"mics-world:{_rung}"] = Entry(
        f"the same, optimizer state over all ranks, {_rung}", partial(_mics_world, _rung), _rung, applies=is_hybrid
    )
