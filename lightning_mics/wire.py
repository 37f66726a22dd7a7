"""Wire: the three kinds of traffic of a sharded model, each with its communicators and its channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from lightning_mics.channels import Channel, channel_for
from lightning_mics.collectives import Collectives
from lightning_mics.exchange import Exchange
from lightning_mics.groups import Groups, Tiers, backend_for, travels_by_messages
from lightning_mics.native import Native
from lightning_mics.network import Network, Tier
from lightning_mics.pipelined import Pipelined


@dataclass(frozen=True)
class Traffic:
    """One kind of traffic.

    Attributes:
        collectives: how it goes, and among whom.
        channel: what carries it, beside the computation.
    """

    collectives: Collectives
    channel: Channel


@dataclass(frozen=True)
class Wire:
    """All of it.

    Attributes:
        gather: parameters, in the partition group; None where p is 1.
        hop_1: gradients, in the partition group; None where p is 1.
        hop_2: gradients, over the replication group; None where r is 1.
    """

    gather: Traffic | None
    hop_1: Traffic | None
    hop_2: Traffic | None

    @classmethod
    def create(cls, groups: Groups, network: Network | None, between_nodes: torch.dtype | None) -> Wire:
        """Collective on the default group: all ranks take rank 0's network, so that they choose alike.

        Args:
            groups: whose communicators are used.
            network: decides for each message between flat and hierarchical; by default `Network.default`.
            between_nodes: see `Precision`.
        """
        device = groups.device
        backend = backend_for(device)
        network = _agreed(network or Network.default(groups.topology.ranks_per_node, device.type), device)

        def traffic(tiers: Tiers | None, name: str, narrow: torch.dtype | None = None) -> Traffic | None:
            if tiers is None:
                return None
            channel = channel_for(device, backend, f"mics-{name}", own_stream=name == "hop-2")
            return Traffic(collectives_for(tiers, network, device, narrow), channel)

        return cls(
            gather=traffic(groups.gather, "gather", between_nodes),
            hop_1=traffic(groups.hop_1, "hop-1"),
            hop_2=traffic(groups.hop_2, "hop-2", between_nodes),
        )


def _agreed(network: Network, device: torch.device) -> Network:
    tiers = [network.intra.latency, network.intra.bandwidth, network.inter.latency, network.inter.bandwidth]
    numbers = torch.tensor(tiers, dtype=torch.float64, device=device)
    if dist.get_world_size() > 1:
        dist.broadcast(numbers, src=0)
    intra_latency, intra_bandwidth, inter_latency, inter_bandwidth = numbers.tolist()
    return Network(Tier(intra_latency, intra_bandwidth), Tier(inter_latency, inter_bandwidth), network.source)


def collectives_for(
    tiers: Tiers, network: Network, device: torch.device, between_nodes: torch.dtype | None = None
) -> Collectives:
    """The form that suits tensors on `device` and the backend of `tiers` there; see `Collectives`."""
    if travels_by_messages(device, tiers.everyone):
        return Exchange(tiers, network, between_nodes)
    by_host = backend_for(device, tiers.everyone) == "gloo"  # its messages do not take an accelerator's memory
    return (Native if by_host else Pipelined)(tiers, network, between_nodes)
