"""Running: what a strategy of Lightning's Trainer and one of Fabric have in common.

Where the ranks are and how they were started, the groups, how a module is sharded, and the collectives that Lightning
asks of a strategy. Both trees of either kind have the attributes that this reads: `cluster_environment`,
`parallel_devices` and `num_nodes`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from lightning_mics._compat import log_as, script_launcher
from lightning_mics.arguments import compile_arguments, root_of
from lightning_mics.blocks import BlockChoice
from lightning_mics.climb import Budget
from lightning_mics.groups import Groups
from lightning_mics.ladder import AUTO, Rung
from lightning_mics.network import Network
from lightning_mics.offload import Offload, backend_with_host, check_backend, check_scaler
from lightning_mics.optimizer_shards import OptimizerState
from lightning_mics.own_loop import OwnLoop
from lightning_mics.precision import OF_TRAINERS, Precision
from lightning_mics.sharding import MiCSModule
from lightning_mics.topology import PartitionSize, Topology, ranks_per_node_from_environment

_AVERAGES = ("mean", "avg")
_REDUCE_OPS = {
    "sum": dist.ReduceOp.SUM,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "product": dist.ReduceOp.PRODUCT,
}


class RunningMixin:
    """The ranks of a run, its sharding, and its collectives; see `MiCSStrategyMixin` for the arguments."""

    _tree: str
    """The package whose launcher starts further processes."""

    if TYPE_CHECKING:
        cluster_environment: Any
        parallel_devices: Any
        global_rank: int
        local_rank: int
        node_rank: int
        world_size: int
        num_nodes: int

    def _set_running(
        self,
        partition_size: PartitionSize,
        *,
        ranks_per_node: int | None,
        blocks: BlockChoice,
        activation_checkpointing: bool,
        compile: bool | Mapping[str, Any],
        param_dtype: torch.dtype | None,
        reduce_dtype: torch.dtype | None,
        between_nodes: torch.dtype | None,
        rung: Rung | str,
        memory_budget: int | float,
        optimizer_state: OptimizerState | str,
        offload: Offload | str | None,
        network: Network | str | Path | None,
        process_group_backend: str | None,
        timeout: timedelta | None,
    ) -> None:
        log_as(self._tree.split(".")[0])
        self._partition_size: PartitionSize = partition_size
        self._ranks_per_node = ranks_per_node
        self._blocks = blocks
        self._activation_checkpointing = activation_checkpointing
        self._compile = compile_arguments(compile)
        self._precision_of_shards = Precision(param_dtype, reduce_dtype, between_nodes)
        self._rung = rung if rung == AUTO else Rung.parse(rung)
        self._planned_rung: Rung | None = None
        self._memory_budget = Budget(memory_budget).amount
        self._optimizer_state = OptimizerState.parse(optimizer_state, "optimizer_state")
        self._offload = Offload.of(offload, self._optimizer_state)
        self._network = Network.load(network) if isinstance(network, str | Path) else network
        self._process_group_backend = process_group_backend
        self._timeout = timeout
        self._groups: Groups | None = None

    # -- the cluster -------------------------------------------------------------------------------------------------

    @property
    def topology(self) -> Topology:
        """Who shards with whom. Known as soon as the Trainer, or Fabric, is made."""
        k = self._ranks_per_node or ranks_per_node_from_environment(os.environ) or self.num_processes
        return Topology.resolve(self._partition_size, world_size=self.num_nodes * self.num_processes, ranks_per_node=k)

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        device: torch.device = self.parallel_devices[self.local_rank]
        return device

    @property
    def num_processes(self) -> int:
        """Processes on this node."""
        return len(self.parallel_devices or ())

    @property
    def process_group_backend(self) -> str | None:
        """The backend asked for, or the one in use."""
        return self._process_group_backend

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.num_nodes * self.num_processes, "rank": self.global_rank}

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        _ = self.topology  # refuses what does not fit before any process is started
        if not self.cluster_environment.creates_processes_externally:
            launcher = script_launcher(self._tree)
            self._launcher = launcher(self.cluster_environment, self.num_processes, self.num_nodes)

    def _set_world_ranks(self) -> None:
        assert self.cluster_environment is not None
        self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = self.global_rank

    def _init_process_group(self) -> None:
        if dist.is_initialized():
            return
        assert self.cluster_environment is not None
        device = self.root_device
        check_backend(self._offload, device, self._process_group_backend or backend_with_host(device))
        default = backend_with_host(device) if self._offload else dist.get_default_backend_for_device(device)
        backend = self._process_group_backend or default
        self._process_group_backend = backend
        os.environ["MASTER_ADDR"] = self.cluster_environment.main_address
        os.environ["MASTER_PORT"] = str(self.cluster_environment.main_port)
        dist.init_process_group(
            backend,
            rank=self.global_rank,
            world_size=self.world_size,
            timeout=self._timeout,
            device_id=device if device.type != "cpu" and "nccl" in backend else None,
        )

    # -- the model ---------------------------------------------------------------------------------------------------

    def _sharded(self, model: nn.Module, plugin: Any, *, one_backward: bool) -> MiCSModule:
        """The root of a module, which was sharded before or is now, at the beginning of a window."""
        groups = self._groups
        assert groups is not None
        check_scaler(self._offload, getattr(plugin, "scaler", None))
        root = root_of(
            model,
            groups.topology,
            self._precision_for(plugin, whole=self.topology.partition_size == 1),
            lambda: groups,
            blocks=self._blocks,
            activation_checkpointing=self._activation_checkpointing,
            compile=self._compile,
            network=self._network,
            offload=self._offload,
        )
        if (loop := OwnLoop.of(root)) is not None:
            loop.end()
        root.set_rung(self._rung, self._memory_budget, self._planned_rung)
        root.one_backward = one_backward
        return root

    def _precision_for(self, plugin: Any, whole: bool) -> Precision:
        if self._precision_of_shards.param_dtype is not None or whole:  # autocast does for whole ones
            return self._precision_of_shards
        return replace(self._precision_of_shards, param_dtype=OF_TRAINERS.get(str(plugin.precision)))

    # -- collectives of Lightning's own ------------------------------------------------------------------------------

    def barrier(self, name: str | None = None) -> None:
        if dist.is_initialized():
            device = self.root_device
            dist.barrier(device_ids=[device.index] if dist.get_backend() == "nccl" else None)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not dist.is_initialized():
            return obj
        objects = [obj]
        dist.broadcast_object_list(objects, src)
        return objects[0]

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduce a tensor over `group` (all ranks by default); anything else comes back as it is.

        Args:
            tensor: of any shape; integers are averaged as floats.
            group: a process group.
            reduce_op: "mean" (or "avg"), "sum", "min", "max", "product", or a `torch.distributed.ReduceOp`.
        """
        if not isinstance(tensor, Tensor) or not dist.is_initialized():
            return tensor
        op = reduce_op.lower() if isinstance(reduce_op, str) else reduce_op
        averages = op is None or op in _AVERAGES or op == dist.ReduceOp.AVG
        if isinstance(op, str) and not averages and op not in _REDUCE_OPS:
            allowed = ", ".join((*_AVERAGES, *_REDUCE_OPS))
            raise ValueError(f"reduce_op={reduce_op!r} is not understood; choose one of {allowed}")
        tensor = tensor.to(self.root_device, copy=True).contiguous()
        if averages and not tensor.is_floating_point():
            tensor = tensor.float()
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM if averages else _REDUCE_OPS.get(op, op), group=group)
        return tensor / dist.get_world_size(group) if averages else tensor


def register_in(*places: tuple[Any, Any]) -> None:
    """Make strategies known by their names to registries of Lightning's, unless they are.

    Args:
        places: pairs of a registry and a strategy.
    """
    for registry, strategy in places:
        if strategy.strategy_name not in registry.available_strategies():
            registry.register(
                strategy.strategy_name, strategy, description="MiCS: sharded in groups, two-hop gradients"
            )
