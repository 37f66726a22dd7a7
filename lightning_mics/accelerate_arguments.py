"""What Accelerate's user gives, and its launcher's configuration says: checked, and as the engine takes it."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from accelerate.utils import DynamoBackend

from lightning_mics.topology import PartitionSize, Topology, equal_node_sizes, ranks_per_node_from_environment

_PLUGINS = (
    "deepspeed_plugin",
    "deepspeed_plugins",
    "fsdp_plugin",
    "megatron_lm_plugin",
    "parallelism_config",
    "torch_tp_plugin",
)
# By which a configuration of `accelerate launch` asks for another sharding.
_VARIABLES = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)


def check_no_other_sharding(arguments: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: if Accelerate's arguments, or its launcher's configuration, ask for another sharding.
    """
    for name in _PLUGINS:
        if arguments.get(name) is not None:
            raise ValueError(f"{name} asks Accelerate to shard the model, which MiCSAccelerator does; leave it out")
    for name in _VARIABLES:
        if os.environ.get(name, "false").lower() in ("1", "true", "yes"):
            raise ValueError(
                f"{name} is set, by the configuration of `accelerate launch`: it asks Accelerate to shard the model, "
                "which MiCSAccelerator does; let distributed_type be MULTI_GPU or MULTI_CPU there"
            )


def of_dynamo(plugin: Any) -> Mapping[str, Any] | None:
    """Arguments of `torch.compile`, by Accelerate's plugin. It is always by region here, whatever that says."""
    return None if plugin.backend == DynamoBackend.NO else plugin.to_kwargs()


def topology_of(partition_size: PartitionSize, ranks_per_node: int | None, world_size: int) -> Topology:
    """Who shards with whom. Collective on the default group if neither an argument nor a launcher tells k.

    Raises:
        ValueError: for a `partition_size` that does not fit the cluster, and for processes that do not form a group.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > world_size:
        raise ValueError(
            f"{started} processes were started, and Accelerate takes this one to be alone, as there is no accelerator "
            "here; to train on CPUs, give cpu=True or set ACCELERATE_USE_CPU=true"
        )
    k = ranks_per_node or ranks_per_node_from_environment(os.environ)
    if k is None:
        k = 1 if world_size == 1 else _ranks_per_host(world_size)
    return Topology.resolve(partition_size, world_size=world_size, ranks_per_node=k)


def _ranks_per_host(world_size: int) -> int:
    hosts: list[str | None] = [None] * world_size
    dist.all_gather_object(hosts, socket.gethostname())
    return equal_node_sizes([*Counter(hosts).values()])
