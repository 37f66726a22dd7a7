"""Lightning's own FSDP2 as a peer: `Trainer(strategy=ModelParallelStrategy(...))` with a hybrid sharded model."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from typing_extensions import override

from benchmarks.model import blocks_of, build, loss_of, optimizer_of
from benchmarks.stepped import SteppedTrainer
from lightning_mics.topology import Topology


class _Module(LightningModule):
    """Shards itself in `configure_model`, as the strategy asks of its users."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.network: nn.Module | None = None
        self._losses = losses

    @override
    def configure_model(self) -> None:
        if self.network is None:
            self.network = build()
            for block in blocks_of(self.network):
                fully_shard(block, mesh=self.device_mesh)
            fully_shard(self.network, mesh=self.device_mesh)

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert self.network is not None
        loss = loss_of(self.network, batch)
        self._losses.append(loss.item())
        return loss

    @override
    def configure_optimizers(self) -> Optimizer:
        return optimizer_of(self.parameters())


class ModelParallel:
    """A Trainer with `ModelParallelStrategy(data_parallel_size=r, tensor_parallel_size=p)`.

    Args:
        topology: with both replicas and shards; the module is sharded over the strategy's mesh of the two.
        window: `accumulate_grad_batches`.
    """

    def __init__(self, topology: Topology, window: int) -> None:
        self._losses: list[float] = []
        # In front of each batch the Trainer broadcasts; it stands still before that, so that no collective of another
        # peer comes between.
        self._trainer = SteppedTrainer(
            _Module(self._losses),
            accelerator="cpu",
            devices=topology.ranks_per_node,
            num_nodes=topology.nodes,
            strategy=ModelParallelStrategy(topology.replicas, topology.partition_size),
            accumulate_grad_batches=window,
        )

    def step(self, batches: Sequence[Tensor]) -> float:
        self._losses.clear()
        self._trainer.turn(batches)
        return sum(self._losses) / len(self._losses)

    def close(self) -> None:
        self._trainer.close()
