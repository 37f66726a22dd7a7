"""What travels, to whom, in each micro-step: counted at torch.distributed, on real ranks, against formulas by hand."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_mics.accounting import WireBytes
from lightning_mics.groups import Groups, Tiers
from lightning_mics.ladder import RUNGS, Gradients, Parameters, Rung
from lightning_mics.network import Network, Tier
from lightning_mics.precision import Precision
from lightning_mics.sharding import MiCSModule, shard
from lightning_mics.topology import Topology
from tests.distributed.counting import Call, collectives
from tests.distributed.ranks import run_ranks

LAYERS, VOCAB, SEQ = 4, 64, 8

Steps = list[list[Call]]
Sent = Counter[int]
"""Elements by the global rank they went to."""

# A network on which two tiers are worth their while for every message, and one on which they are for none.
TWO_TIERS = Network(Tier(0.0, 1e9), Tier(0.0, 1e8))
ONE_TIER = Network(Tier(1.0, 1e9), Tier(0.0, 1e9))


def gpt() -> nn.Module:
    """Every first dim is a multiple of four, so that no shard of p = 2 or 4 is padded."""
    config = GPT2Config(n_layer=LAYERS, n_embd=16, n_head=2, vocab_size=VOCAB, n_positions=SEQ)
    config.bos_token_id = config.eos_token_id = 0
    return GPT2LMHeadModel(config)


def numels() -> tuple[int, int, int]:
    """Of a block, of what lies outside the blocks, and of what says who used which parameter.

    The last is a number for each parameter, and one for who came near a memory budget.
    """
    model = gpt()
    block = sum(p.numel() for p in model.transformer.h[0].parameters())
    return block, sum(p.numel() for p in model.parameters()) - LAYERS * block, len([*model.parameters()]) + 1


def window_of_calls(root: MiCSModule, window: int) -> Steps:
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


# -- by hand -----------------------------------------------------------------------------------------------------------

Nodes = tuple[tuple[int, ...], ...]


def gather_sends(nodes: Nodes, rank: int, slots: dict[int, int]) -> Sent:
    """A gather among N nodes of k ranks, of slots of s elements each.

    Between nodes, a rank's slot goes to its place in each of the N-1 others; then the N slots of its place go to each
    of the k-1 others of its node. All in all (N-1) s + N (k-1) s = (p-1) s, of which a node's k ranks send
    k (N-1) s = (p-k) s to others.
    """
    node, place = _node_and_place(nodes, rank)
    sent = Counter({other: slots[rank] for other in place}) | Counter({o: sum(map(slots.get, place)) for o in node})
    del sent[rank]
    return +sent


def reduce_sends(nodes: Nodes, rank: int, slots: dict[int, int]) -> Sent:
    """The mirror: the N slots of each of the k-1 others of the node go there; then N-1 sums go to their nodes."""
    node, place = _node_and_place(nodes, rank)
    sent = Counter({other: slots[other] for other in place})
    sent |= Counter({other: sum(map(slots.get, _node_and_place(nodes, other)[1])) for other in node})
    del sent[rank]
    return +sent


def all_reduce_sends(nodes: Nodes, rank: int, numel: int) -> Sent:
    """A reduce-scatter and a gather of r slots; the first are longer by one where r does not divide `numel`."""
    ranks = [rank for node in nodes for rank in node]
    slots = {rank: len(range(index, numel, len(ranks))) for index, rank in enumerate(ranks)}
    return reduce_sends(nodes, rank, slots) + gather_sends(nodes, rank, slots)


def _node_and_place(nodes: Nodes, rank: int) -> tuple[list[int], list[int]]:
    node = next(list(ranks) for ranks in nodes if rank in ranks)
    return node, [ranks[node.index(rank)] for ranks in nodes]


def times(sent: Sent, count: int) -> Sent:
    return Counter({rank: numel * count for rank, numel in sent.items() if count})


def partition_and_replicas(topology: Topology, two_tiers: bool, rank: int) -> tuple[Nodes, Nodes]:
    """The two groups of a rank, by node; as though on one node where messages go flat."""
    partition = topology.by_node(topology.partition_groups[topology.replica_of(rank)])
    replicas = topology.by_node(topology.replication_groups[topology.shard_of(rank)])
    return (partition, replicas) if two_tiers else ((sum(partition, ()),), (sum(replicas, ()),))


def gathers_of_step(rung: Rung, step: int, spans_nodes: bool) -> list[int]:
    """How often a micro-step gathers each layer, and what lies outside: each forward and each backward does.

    But two layers, or three over several nodes, are whole at a time: the last stay from forward to backward, the first
    from backward to forward.
    """
    whole, first = 3 if spans_nodes else 2, step == 0
    match rung.parameters:
        case Parameters.BLOCK:
            layers = [int(first or i >= whole) + (i < LAYERS - whole) for i in range(LAYERS)]
        case Parameters.MICRO_STEP:
            layers = [int(first or i >= whole) for i in range(LAYERS)]
        case Parameters.WINDOW:
            layers = [int(first)] * LAYERS
    return [*layers, int(first or rung.parameters != Parameters.WINDOW)]


def sends_of_step(
    topology: Topology, two_tiers: bool, rank: int, rung: Rung, step: int, window: int
) -> dict[str, Sent]:
    """What `rank` sends for each kind of traffic in a micro-step, by the table of `Rung` and the formulas above."""
    p, r = topology.partition_size, topology.replicas
    partition, replicas = partition_and_replicas(topology, two_tiers, rank)
    boundary = step == window - 1
    reductions = boundary or rung.gradients == Gradients.SHARDED
    block, outside, usage = numels()
    sent = {"gather": Sent(), "hop 1": Sent(), "hop 2": Sent()}
    spans_nodes = p > topology.ranks_per_node
    for numel, gathers in zip([block] * LAYERS + [outside], gathers_of_step(rung, step, spans_nodes), strict=True):
        slots = dict.fromkeys(sum(partition, ()), numel // p)
        sent["gather"] += times(gather_sends(partition, rank, slots), gathers)
        sent["hop 1"] += times(reduce_sends(partition, rank, slots), reductions)
        sent["hop 2"] += times(all_reduce_sends(replicas, rank, numel // p), boundary and r > 1)
    sent["hop 2"] += times(all_reduce_sends(replicas, rank, usage), boundary and r > 1)  # who used what
    return sent


@pytest.mark.parametrize("nodes", [((0, 1, 2, 3, 4, 5),), ((0, 1, 2), (3, 4, 5)), ((0, 1), (2, 3), (4, 5))])
def test_the_formulas_agree_on_a_whole_cluster(nodes: Nodes) -> None:
    """What all ranks send arrives; a gather, its mirror, and twice a share of an all-reduce cost a rank (p-1) slots."""
    k, p, slots = len(nodes[0]), 6, dict.fromkeys(range(6), 10)
    for sends in (gather_sends, reduce_sends):
        sent = {rank: sends(nodes, rank, slots) for rank in range(p)}
        assert [each.total() for each in sent.values()] == [10 * (p - 1)] * p
        for node in nodes:
            leaves = sum(numel for rank in node for to, numel in sent[rank].items() if to not in node)
            assert leaves == 10 * (p - k)
            enters = sum(sent[rank][mate] for mate in node for rank in range(p) if rank not in node)
            assert enters == leaves
    assert sum(all_reduce_sends(nodes, rank, 61).total() for rank in range(p)) == 2 * 61 * (p - 1)


# -- on real ranks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One rank's micro-step: elements by kind of traffic and destination; dtypes; whatever was not a message."""

    sent: dict[str, Sent]
    dtypes: set[torch.dtype]
    others: list[tuple[str, tuple[int, ...], int]]


def traffic(groups: Groups) -> dict[str, str]:
    """Names of process groups, and what travels on each."""
    kinds: dict[str, str] = {}
    for kind, tiers in (("gather", groups.gather), ("hop 1", groups.hop_1), ("hop 2", groups.hop_2)):
        if isinstance(tiers, Tiers):
            groups_of_kind = {tiers.everyone, tiers.intra_node, tiers.inter_node} - {None}
            kinds |= {group.group_name: kind for group in groups_of_kind}
    return kinds


def measured(calls: list[Call], kinds: dict[str, str]) -> Measured:
    sent = {"gather": Sent(), "hop 1": Sent(), "hop 2": Sent()}
    messages = [call for call in calls if call.kind == "send"]
    for call in messages:
        sent[kinds[call.group]][call.to] += call.numel
    others = [(call.kind, call.ranks, call.numel) for call in calls if call.kind != "send"]
    return Measured(sent, {call.dtype for call in messages}, others)


WINDOWS = (3, 2, 1)


def _measure(
    topology: Topology, network: Network, rungs: tuple[Rung, ...]
) -> list[tuple[list[list[Measured]], list[tuple[int, ...]]]]:
    """For each rung: the steps of windows of `WINDOWS`, one after the other, and the bytes foretold for each."""
    groups = Groups.create(topology, "cpu")
    kinds = traffic(groups)
    results = []
    for rung in rungs:
        root = shard(gpt(), groups, rung=rung, network=network)
        windows = [[measured(calls, kinds) for calls in window_of_calls(root, window)] for window in WINDOWS]
        told = [root.wire_bytes(window) for window in WINDOWS]
        results.append((windows, [(each.gather, each.hop_1, each.hop_2, each.inter_node) for each in told]))
    return results


ENDS = (RUNGS[0], RUNGS[-1])


@pytest.mark.parametrize(
    ("ranks_per_node", "partition_size", "network", "rungs"),
    [
        pytest.param(2, 1, TWO_TIERS, ENDS, id="p=1"),
        pytest.param(2, 1, ONE_TIER, ENDS, id="p=1, flat"),
        pytest.param(2, 2, TWO_TIERS, RUNGS, id="p=2, a node each"),
        pytest.param(4, 2, TWO_TIERS, ENDS, id="p=2, in one node"),
        pytest.param(2, 4, TWO_TIERS, RUNGS, id="p=4"),
        pytest.param(2, 4, ONE_TIER, ENDS, id="p=4, flat"),
    ],
)
def test_every_element(ranks_per_node: int, partition_size: int, network: Network, rungs: tuple[Rung, ...]) -> None:
    """To whom how much, in every micro-step; that `wire_bytes` foretells it; and that hop 2 alone leaves the group.

    What a rung does depends on whether a partition group spans nodes, and not on the groups or the network otherwise.
    """
    topology, two_tiers, usage = Topology(4, ranks_per_node, partition_size), network is TWO_TIERS, numels()[2]
    for rank, results in enumerate(run_ranks(4, _measure, topology, network, rungs)):
        partition = topology.partition_groups[topology.replica_of(rank)]
        replicas = partition_and_replicas(topology, two_tiers, rank)[1]
        riders = all_reduce_sends(replicas, rank, usage) if topology.replicas > 1 else Sent()
        for rung, (windows, told) in zip(rungs, results, strict=True):
            for window, steps, foretold in zip(WINDOWS, windows, told, strict=True):
                assert len(steps) == window
                total = {"gather": Sent(), "hop 1": Sent(), "hop 2": Sent()}
                for number, step in enumerate(steps):
                    expected = sends_of_step(topology, two_tiers, rank, rung, number, window)
                    assert step.sent == expected, f"{rung}, window {window}, micro-step {number}"
                    assert step.dtypes <= {torch.float32}
                    who_used_what = ("all_reduce", partition, usage)
                    boundary = number == window - 1
                    assert step.others == [who_used_what] * (boundary and partition_size > 1)
                    total = {kind: total[kind] + step.sent[kind] for kind in total}
                total["hop 2"] -= riders
                inter_node = sum(
                    numel
                    for sent in total.values()
                    for to, numel in sent.items()
                    if to // ranks_per_node != rank // ranks_per_node
                )
                assert (*(4 * each.total() for each in total.values()), 4 * inter_node) == foretold


def _narrow(partition_size: int) -> tuple[Counter[tuple[str, bool, torch.dtype]], WireBytes]:
    """Bytes of a window of one micro-step by kind, whether they left the node, and dtype; and what was foretold."""
    groups = Groups.create(Topology(4, 2, partition_size), "cpu")
    root = shard(gpt(), groups, precision=Precision(between_nodes=torch.bfloat16), network=ONE_TIER)
    (calls,), kinds, sent = window_of_calls(root, 1), traffic(groups), Counter[tuple[str, bool, torch.dtype]]()
    for call in calls:
        if call.kind == "send":
            sent[kinds[call.group], call.to // 2 != dist.get_rank() // 2, call.dtype] += call.nbytes
    return sent, root.wire_bytes(1)


@pytest.mark.parametrize("partition_size", [1, 4])
def test_16_bits_between_nodes(partition_size: int) -> None:
    """Gathers and hop 2 go over two tiers on any network, and cross in bf16; inside a node, and in hop 1, all is fp32.

    Of four slots of s bytes in fp32, a rank sends 2 s inside the node and s/2 out of it for a gather, and twice that
    for an all-reduce; for a reduce-scatter, which takes the four ranks as one on this network, s and 2 s.
    """
    block, outside, usage = numels()
    slot, bf16, fp32 = LAYERS * block + outside, torch.bfloat16, torch.float32  # bytes of a quarter of the model
    for rank, (sent, told) in enumerate(run_ranks(4, _narrow, partition_size)):
        if partition_size == 1:
            riders = all_reduce_sends(((0, 1), (2, 3)), rank, usage)
            inside, crossing = riders[rank ^ 1], riders[(rank + 2) % 4]
            assert sent == {("hop 2", False, fp32): 4 * (slot + inside), ("hop 2", True, bf16): slot + 2 * crossing}
            assert (told.hop_2, told.inter_node) == (5 * slot, slot)
        else:
            gathers = (2 * LAYERS - 3) * block + outside  # in elements, and so bytes of slots of a quarter
            assert sent == {
                ("gather", False, fp32): 2 * gathers,
                ("gather", True, bf16): gathers // 2,
                ("hop 1", False, fp32): slot,
                ("hop 1", True, fp32): 2 * slot,
            }
            assert (told.gather, told.hop_1) == (gathers * 5 // 2, 3 * slot)
            assert told.inter_node == gathers // 2 + 2 * slot


def _no_window() -> tuple[Measured, Measured]:
    """A forward for evaluation, and a boundary that had no backward on any rank."""
    groups = Groups.create(Topology(4, 4, 2), "cpu")
    root = shard(gpt(), groups)
    root.one_backward = True
    tokens = torch.zeros(2, SEQ, dtype=torch.long)
    with collectives() as evaluation, torch.no_grad():
        root.eval()(input_ids=tokens)
        root.release()
    with collectives() as empty:
        root.window.close()
    return measured(evaluation, traffic(groups)), measured(empty, traffic(groups))


def test_evaluation_stays_in_the_partition_group() -> None:
    topology, (block, outside, usage) = Topology(4, 4, 2), numels()
    for rank, (evaluation, empty) in enumerate(run_ranks(4, _no_window)):
        neighbour, replica = rank ^ 1, (rank + 2) % 4
        once = (LAYERS * block + outside) // 2
        assert evaluation.sent == {"gather": Counter({neighbour: once}), "hop 1": Sent(), "hop 2": Sent()}
        assert evaluation.others == []
        # Other replicas may have gradients: this one takes part in hop 2 all the same, and in who used what.
        assert empty.sent == {"gather": Sent(), "hop 1": Sent(), "hop 2": Counter({replica: once + usage})}
        assert empty.others == [("all_reduce", topology.partition_groups[rank // 2], usage)]


# -- when --------------------------------------------------------------------------------------------------------------


class Asking(nn.Module):
    """A layer that calls a function when it computes, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.on_forward: Callable[[], None] = lambda: None
        self.on_backward: Callable[[], None] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        self.on_forward()
        x = self.linear(x)
        if x.requires_grad:  # not the output, at which the engine has hooks of its own
            x.register_hook(lambda gradient: self.on_backward())
        return torch.tanh(x)


class Chain(nn.Module):
    """Six blocks between two layers outside; where it is told to, it ends after the second block, without an output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(8, 8)
        self.layers = nn.ModuleList(Asking() for _ in range(6))
        self.leave = nn.Linear(8, 8)
        self.stops = False

    def forward(self, x: Tensor) -> Tensor | None:
        x = self.enter(x)
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if self.stops and index == 1:
                return None
        return self.leave(x)


def chain(rung: Rung | str = "block/sharded") -> MiCSModule:
    root = shard(Chain(), Groups.create(Topology(4, 2, 4), "cpu"), rung=rung, network=TWO_TIERS)
    root.one_backward = True
    return root


def _begun_ahead() -> tuple[list[str], list[str], list[str]]:
    """Blocks that were on their way, and not used yet, when the one ahead of them computed: forward, backward, eval."""
    root, begun = chain(), list[str]()
    names = {block.module: block.name for block in root.blocks}
    modules = [block.module for block in root.blocks]

    def ask(module: nn.Module) -> None:
        if root.gathers[module].prefetched:
            begun.append(names[module])

    for before, after in pairwise(modules):
        before.on_forward, after.on_backward = partial(ask, after), partial(ask, before)
    root.module.enter.register_forward_pre_hook(lambda *_: ask(modules[0]))

    def taken() -> list[str]:
        copy = [*begun]
        begun.clear()
        return copy

    loss = root(torch.ones(2, 8)).sum()
    forward = taken()
    with root.window.backward():
        loss.backward()
    backward = taken()
    with torch.no_grad():
        root.eval()(torch.ones(2, 8))
    return forward, backward, taken()


def test_a_gather_is_begun_before_the_block_ahead_computes() -> None:
    for forward, backward, evaluation in run_ranks(4, _begun_ahead):
        in_order = [f"layers.{index}" for index in range(6)]  # the first while what lies outside the blocks computes
        assert forward == evaluation == in_order
        assert backward == in_order[2::-1]  # the last three have stayed


def _stopped_early(rung: Rung) -> tuple[bool, float, float]:
    """A window that ends with a forward that ended early on all ranks, and the optimizer's step after it.

    Returns:
        Whether a gather was on its way by then; how far the step moved a value of that block; how far the next output
        is from that of a whole copy of the new values.
    """
    root, x = chain(rung), torch.ones(2, 8)
    optimizer = torch.optim.SGD(root.parameters(), lr=1.0)
    fourth = root.module.layers[3]
    root.window.begin(0)
    with root.window.hop_1_only():
        loss = root(x).sum()
        with root.window.backward():
            loss.backward()
    root.module.stops = True
    assert root(x) is None
    root.module.stops = False
    under_way = root.gathers[fourth].prefetched
    root.window.close()
    optimizer.step()
    root.release()
    moved = fourth.linear.bias.grad.full_tensor()
    whole = Chain()
    whole.load_state_dict({name: p.detach().full_tensor() for name, p in root.module.named_parameters()})
    with torch.no_grad():
        return under_way, float(moved.abs().max()), float((root(x) - whole(x)).abs().max())


@pytest.mark.parametrize("rung", [RUNGS[0], RUNGS[-1]], ids=str)
def test_a_gather_that_no_forward_used_is_not_used_after_the_step(rung: Rung) -> None:
    for under_way, moved, difference in run_ranks(4, _stopped_early, rung):
        assert under_way == (rung.parameters == Parameters.BLOCK)
        assert moved > 0.1
        assert difference < 1e-5


def tensors_alive() -> list[Tensor]:
    gc.collect()
    return [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]


def alive() -> int:
    """Bytes of memory behind all tensors of this process."""
    storages = [each.untyped_storage() for each in tensors_alive()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _kept(root: MiCSModule) -> tuple[list[int], int, bool]:
    """Bytes beyond the shards after each micro-step of a window and after its end; those of the gradients' shards."""
    kept: list[int] = []
    held = tensors_alive()  # and so until the end, though threads of gloo's let go of what they have sent
    before = alive()
    for boundary in (False, False, True):
        with contextlib.nullcontext() if boundary else root.window.hop_1_only():
            loss = root(torch.ones(2, 8)).sum()
            with root.window.backward():
                loss.backward()
        del loss
        kept.append(alive() - before)
    root.window.close()
    root.release()
    kept.append(alive() - before)
    gradients = {p.grad.to_local().untyped_storage() for p in root.parameters()}
    sizes = {storage.data_ptr(): storage.nbytes() for storage in gradients}
    del held
    return kept, sum(sizes.values()), all(isinstance(p, DTensor) for p in root.parameters())


def _kept_on_each_rung() -> list[tuple[list[int], int, bool]]:
    gc.freeze()  # what the imports made need not be searched
    return [_kept(root) for root in [chain(rung) for rung in RUNGS]]  # all are made before the first is measured


def test_what_stays_in_memory_between_micro_steps_and_after_the_window() -> None:
    """Eight layers of 8 x 8 + 8 values of four bytes: a quarter in gradients' shards, and whole what the rung says.

    Three of six blocks stay whole inside a window in any case. At the boundary all that was whole is freed behind the
    backward. Who used what stays until the next window begins.
    """
    model, usage = 4 * 8 * (8 * 8 + 8), 4 * (8 * 2 + 1)
    for results in run_ranks(4, _kept_on_each_rung):
        for rung, (kept, gradients, sharded) in zip(RUNGS, results, strict=True):
            parameters = model if rung.parameters == Parameters.WINDOW else model * 3 // 8
            sums = model if rung.gradients == Gradients.WHOLE else 0
            shards = gradients if rung.gradients == Gradients.SHARDED else 0  # there are none before the boundary
            between, after = shards + parameters + sums, gradients + usage
            assert kept == [between, between, after, after], rung
            assert gradients == model // 4
            assert sharded
