"""Lightning's own FSDP2 as a peer: `Trainer(strategy=ModelParallelStrategy(...))` with a hybrid sharded model.

A Trainer runs its loop from beginning to end, and the peers take turns; so it runs in a thread of its own, which waits
for batches.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from queue import Queue

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from typing_extensions import override

from benchmarks.model import blocks_of, build, loss_of, optimizer_of
from lightning_mics.topology import Topology

_SEEMINGLY_ENDLESS = 1 << 40


class _Batches:
    """What comes through a queue, until None; answers once a window, where the Trainer has nothing left to do.

    It has a length, or the Trainer would wait for the batch after next.
    """

    def __init__(self, window: int) -> None:
        self.queue: Queue[Tensor | None] = Queue()
        self.answers: Queue[float | BaseException] = Queue()
        self.losses: list[float] = []
        self._window = window

    def __len__(self) -> int:
        return _SEEMINGLY_ENDLESS

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            # In front of each batch the Trainer broadcasts, and no collective of another peer may come between.
            if len(self.losses) % self._window == 0:
                self.answers.put(sum(self.losses) / self._window)
                self.losses.clear()
            batch = self.queue.get()
            if batch is None:
                return
            yield batch


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
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        self._batches = _Batches(window)
        self._module = _Module(self._batches.losses)
        self._trainer = Trainer(
            accelerator="cpu",
            devices=topology.ranks_per_node,
            num_nodes=topology.nodes,
            strategy=ModelParallelStrategy(topology.replicas, topology.partition_size),
            accumulate_grad_batches=window,
            max_epochs=1,
            barebones=True,
            use_distributed_sampler=False,
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._answer()

    def _run(self) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._trainer.fit(self._module, self._batches)
        except BaseException as error:
            self._batches.answers.put(error)

    def step(self, batches: Sequence[Tensor]) -> float:
        for batch in batches:
            self._batches.queue.put(batch)
        return self._answer()

    def _answer(self) -> float:
        answer = self._batches.answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        self._batches.queue.put(None)
        self._thread.join()
