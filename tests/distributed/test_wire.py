"""What travels, and between whom, in each micro-step: counted at torch.distributed, on real ranks."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_mics.groups import Groups
from lightning_mics.sharding import MiCSModule, shard
from lightning_mics.topology import Topology
from tests.distributed.counting import Call, collectives
from tests.distributed.ranks import run_ranks

LAYERS, VOCAB, SEQ, WINDOW = 3, 64, 8, 4
# The blocks, and what lies outside them: each travels in a collective of its own.
BUCKETS = LAYERS + 1

Steps = list[list[Call]]


def gpt() -> nn.Module:
    config = GPT2Config(n_layer=LAYERS, n_embd=16, n_head=2, vocab_size=VOCAB, n_positions=SEQ)
    config.bos_token_id = config.eos_token_id = 0
    return GPT2LMHeadModel(config)


def window_of_calls(root: MiCSModule, window: int = WINDOW) -> Steps:
    """The collectives of each micro-step of one window; those of the boundary include the window's end."""
    root.one_backward = True
    tokens = torch.zeros(2, SEQ, dtype=torch.long)

    def micro_step() -> None:
        loss = root(input_ids=tokens, labels=tokens).loss
        with root.window.backward():
            loss.backward()

    steps: Steps = []
    for _ in range(window - 1):
        with collectives() as calls, root.window.hop_1_only():
            micro_step()
        steps.append(calls)
    with collectives() as calls:
        micro_step()
        root.window.close()
        root.release()
    return [*steps, calls]


def assert_wire(steps: Steps, topology: Topology, rank: int, numels: list[int], local_numel: int) -> None:
    """The whole rule, for the steps that `rank` saw.

    Args:
        numels: elements of each parameter, which hop 1 and the gathers pad to a multiple of p in dim 0.
        local_numel: elements of this rank's shards.
    """
    p, r = topology.partition_size, topology.replicas
    partition = topology.partition_groups[topology.replica_of(rank)]
    replication = topology.replication_groups[topology.shard_of(rank)]
    for calls in steps:
        hop_1 = [call for call in calls if call.kind != "all_reduce"]
        # A block is gathered for forward and again for backward, the rest once; each is reduced once.
        gathers_and_reductions = {"all_gather": 2 * LAYERS + 1, "reduce_scatter": BUCKETS} if p > 1 else {}
        assert Counter(call.kind for call in hop_1) == gathers_and_reductions
        assert {call.ranks for call in hop_1} <= {partition}
        assert sum(call.numel * p for call in hop_1 if call.kind == "reduce_scatter") >= (p > 1) * sum(numels)
    *others, boundary = ([call for call in calls if call.kind == "all_reduce"] for calls in steps)
    assert others == [[]] * (WINDOW - 1)
    usage = [call for call in boundary if call.ranks == partition and p > 1]
    assert [call.numel for call in usage] == [len(numels)] * (p > 1)
    hop_2 = [call for call in boundary if call not in usage]
    assert {call.ranks for call in hop_2} <= {replication}
    assert len(hop_2) == (BUCKETS if r > 1 else 0)
    # Which parameters were used rides with the last bucket.
    assert sum(call.numel for call in hop_2) == (local_numel + len(numels) if r > 1 else 0)


def local_numel(root: MiCSModule) -> int:
    return sum(param.to_local().numel() for param in root.parameters())


def _steps(partition_size: int) -> tuple[Steps, Steps, int]:
    root = shard(gpt(), Groups.create(Topology(4, 4, partition_size), "cpu"))
    return window_of_calls(root), window_of_calls(root), local_numel(root)


@pytest.mark.parametrize("partition_size", [1, 2, 4])
def test_hop_1_each_micro_step_and_hop_2_once_a_window(partition_size: int) -> None:
    topology = Topology(4, 4, partition_size)
    numels = [param.numel() for param in gpt().parameters()]
    for rank, (first, second, local) in enumerate(run_ranks(4, _steps, partition_size)):
        assert local == sum(numels) / partition_size
        assert_wire(first, topology, rank, numels, local)
        assert second == first


def _no_window() -> tuple[list[Call], list[Call]]:
    """A forward for evaluation, and a boundary that had no backward on any rank."""
    root = shard(gpt(), Groups.create(Topology(4, 4, 2), "cpu"))
    root.one_backward = True
    tokens = torch.zeros(2, SEQ, dtype=torch.long)
    with collectives() as evaluation, torch.no_grad():
        root.eval()(input_ids=tokens)
        root.release()
    with collectives() as empty:
        root.window.close()
    return evaluation, empty


def test_evaluation_stays_in_the_partition_group() -> None:
    for rank, (evaluation, empty) in enumerate(run_ranks(4, _no_window)):
        partition = Topology(4, 4, 2).partition_groups[rank // 2]
        assert [(call.kind, call.ranks) for call in evaluation] == [("all_gather", partition)] * BUCKETS
        # Other replicas may have gradients: this one takes part in hop 2 all the same.
        assert Counter(call.ranks for call in empty) == {(rank % 2, rank % 2 + 2): BUCKETS, partition: 1}
