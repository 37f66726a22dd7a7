"""Every rule of the topology, without a process."""

from __future__ import annotations

import time
import timeit
from itertools import chain, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mics.topology import (
    Topology,
    allowed_partition_sizes,
    divisors,
    equal_node_sizes,
    ranks_per_node_from_environment,
)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """n up to 144; k any divisor of n; p any divisor of n that fits."""
    k, nodes = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    n = k * nodes
    p = draw(st.sampled_from([p for p in range(1, n + 1) if n % p == 0 and (k % p == 0 or p % k == 0)]))
    return Topology(world_size=n, ranks_per_node=k, partition_size=p)


@given(topologies())
def test_each_kind_of_group_holds_every_rank_once(topology: Topology) -> None:
    everyone = list(range(topology.world_size))
    for groups in (topology.partition_groups, topology.replication_groups):
        assert sorted(chain(*groups)) == everyone
        assert len({len(group) for group in groups}) == 1


@given(topologies())
def test_a_partition_group_and_a_replication_group_cross_in_one_rank(topology: Topology) -> None:
    assert len(topology.partition_groups) == len(topology.replication_groups[0]) == topology.replicas
    assert len(topology.replication_groups) == len(topology.partition_groups[0]) == topology.partition_size
    for (replica, partition), (shard, replication) in product(
        enumerate(topology.partition_groups), enumerate(topology.replication_groups)
    ):
        (rank,) = set(partition) & set(replication)
        assert (topology.replica_of(rank), topology.shard_of(rank)) == (replica, shard)
        assert partition[shard] == replication[replica] == rank


@given(topologies())
def test_each_group_lies_evenly_on_its_nodes(topology: Topology) -> None:
    """Tuples are nodes, places in them local ranks; read one after the other they are the group again."""
    k = topology.ranks_per_node
    for group in (*topology.partition_groups, *topology.replication_groups):
        by_node = topology.by_node(group)
        assert tuple(chain(*by_node)) == group
        nodes = [{rank // k for rank in ranks} for ranks in by_node]
        assert [len(each) for each in nodes] == [1] * len(by_node)
        assert len(set().union(*nodes)) == len(by_node)
        for same_place in zip(*by_node, strict=True):
            assert len({rank % k for rank in same_place}) == 1
    assert topology.spans_nodes == (len(topology.by_node(topology.partition_groups[0])) > 1)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 150))
def test_a_partition_size_is_allowed_exactly_where_the_rule_says(k: int, nodes: int, p: int) -> None:
    n = k * nodes
    fits = n % p == 0 and (k % p == 0 or p % k == 0)
    assert (p in allowed_partition_sizes(n, k)) == fits
    if fits:
        assert Topology(n, k, p).replicas * p == n
    else:
        with pytest.raises(ValueError, match=f"partition_size={p} "):
            Topology(n, k, p)


@given(st.integers(1, 5000))
def test_divisors(number: int) -> None:
    assert divisors(number) == tuple(d for d in range(1, number + 1) if number % d == 0)


def test_two_nodes_of_four_by_hand() -> None:
    topology = Topology(world_size=8, ranks_per_node=2, partition_size=4)
    assert topology.partition_groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert topology.replication_groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert topology.by_node((4, 5, 6, 7)) == ((4, 5), (6, 7))
    assert topology.by_node((1, 5)) == ((1,), (5,))
    assert Topology(world_size=8, ranks_per_node=4, partition_size=2).by_node((1, 3, 5, 7)) == ((1, 3), (5, 7))
    assert (topology.nodes, topology.replicas, topology.spans_nodes) == (4, 2, True)
    assert str(topology) == "8 ranks on 4 nodes of 2: 2 partition groups of 4"
    assert str(Topology(1, 1, 1)) == "1 rank on 1 node of 1: 1 partition group of 1"


@pytest.mark.parametrize(("given_size", "size"), [(1, 1), (8, 8), ("node", 4), (None, 8), (2, 2)])
def test_what_a_partition_size_names(given_size: object, size: int) -> None:
    topology = Topology.resolve(given_size, world_size=8, ranks_per_node=4)  # type: ignore[arg-type]
    assert topology == Topology(8, 4, size)


def test_pure_replication_and_one_replica() -> None:
    replicated, sharded = Topology(8, 4, 1), Topology(8, 4, 8)
    assert replicated.partition_groups == tuple((rank,) for rank in range(8))
    assert replicated.replication_groups == (tuple(range(8)),)
    assert sharded.partition_groups == (tuple(range(8)),)
    assert sharded.replication_groups == tuple((rank,) for rank in range(8))


def test_a_size_that_does_not_divide_the_world() -> None:
    with pytest.raises(ValueError, match=r"^partition_size=3 does not divide world_size=8; choose one of 1, 2, 4, 8$"):
        Topology(8, 4, 3)


def test_a_size_that_straddles_nodes() -> None:
    message = (
        r"partition_size=4 neither divides ranks_per_node=6 nor is a multiple of it; choose one of 1, 2, 3, 6, 12$"
    )
    with pytest.raises(ValueError, match=message):
        Topology(12, 6, 4)


def test_nodes_that_do_not_divide_the_world() -> None:
    with pytest.raises(
        ValueError, match=r"ranks_per_node=3 does not divide world_size=8: .* choose one of 1, 2, 4, 8,"
    ):
        Topology(8, 3, 1)


@pytest.mark.parametrize("bad", [0, -1, True, "auto", 2.0])
def test_what_is_no_partition_size_at_all(bad: object) -> None:
    with pytest.raises(ValueError) as caught:
        Topology.resolve(bad, world_size=8, ranks_per_node=4)  # type: ignore[arg-type]
    message = str(caught.value)
    assert f"partition_size={bad!r}" in message
    assert "world_size=8" in message
    assert "1, 2, 4, 8" in message
    assert '"node"' in message


@pytest.mark.parametrize("name", ["world_size", "ranks_per_node", "partition_size"])
@pytest.mark.parametrize("bad", [0, -1, True, "2", 2.0, None])
def test_numbers_are_positive_integers(name: str, bad: object) -> None:
    numbers = {"world_size": 8, "ranks_per_node": 4, "partition_size": 2} | {name: bad}
    with pytest.raises(ValueError, match=f"^{name}={bad!r} must be a positive integer"):
        Topology(**numbers)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_outside_the_world(rank: int) -> None:
    topology = Topology(8, 4, 4)
    for ask in (topology.shard_of, topology.replica_of, lambda each: topology.by_node([each])):
        with pytest.raises(ValueError, match=rf"rank={rank} is not in world_size=8; ranks are 0\.\.7"):
            ask(rank)


def test_nodes_of_unequal_size() -> None:
    assert equal_node_sizes([4, 4, 4]) == 4
    with pytest.raises(ValueError, match=r"ranks per node \[4, 4, 3\].*Start 3 on each"):
        equal_node_sizes([4, 4, 3])


def torchrun(**extra: str) -> dict[str, str]:
    return {"TORCHELASTIC_RUN_ID": "a", "RANK": "0", "LOCAL_RANK": "0"} | extra


def test_torchrun_tells_ranks_per_node() -> None:
    assert ranks_per_node_from_environment(torchrun(LOCAL_WORLD_SIZE="4", WORLD_SIZE="8", GROUP_WORLD_SIZE="2")) == 4
    assert ranks_per_node_from_environment(torchrun(LOCAL_WORLD_SIZE="4", WORLD_SIZE="8")) == 4


@pytest.mark.parametrize("local", ["4", "3"])  # what each of the two nodes sees
def test_torchrun_with_unequal_nodes_fails_on_both(local: str) -> None:
    environ = torchrun(LOCAL_WORLD_SIZE=local, WORLD_SIZE="7", GROUP_WORLD_SIZE="2")
    with pytest.raises(ValueError, match=f"this one runs {local} of world_size=7 ranks on 2 nodes"):
        ranks_per_node_from_environment(environ)


@pytest.mark.parametrize(("tasks", "size"), [("4", 4), ("4(x2)", 4), ("8(x128)", 8), ("2,2", 2), ("4(x2),4", 4)])
def test_slurm_tells_ranks_per_node(tasks: str, size: int) -> None:
    assert ranks_per_node_from_environment({"SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": tasks}) == size


def test_a_slurm_step_goes_before_its_job() -> None:
    environ = {"SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
    assert ranks_per_node_from_environment(environ) == 8


def test_slurm_with_unequal_nodes() -> None:
    with pytest.raises(ValueError, match=r"unequal size: ranks per node \[4, 4, 3\]"):
        ranks_per_node_from_environment({"SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "4(x2),3"})


@pytest.mark.parametrize("tasks", ["four", "4(2)", "4,,4", "(x2)"])
def test_slurm_gone_wrong(tasks: str) -> None:
    with pytest.raises(ValueError, match="give ranks_per_node instead"):
        ranks_per_node_from_environment({"SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": tasks})


@pytest.mark.parametrize(
    "environ",
    [{}, {"LOCAL_WORLD_SIZE": "4"}, {"SLURM_TASKS_PER_NODE": "4"}, {"SLURM_PROCID": "0"}],
    ids=["nothing", "not torchrun", "an allocation, no step", "slurm without counts"],
)
def test_no_launcher_no_answer(environ: dict[str, str]) -> None:
    assert ranks_per_node_from_environment(environ) is None


@pytest.mark.parametrize("world_size", [512, 4096])
def test_thousands_of_ranks_take_no_time(world_size: int) -> None:
    def look_at_all() -> None:
        for size in allowed_partition_sizes(world_size, 8):
            topology = Topology(world_size, 8, size)
            for kind in (topology.partition_groups, topology.replication_groups):
                assert sum(len(ranks) for group in kind for ranks in topology.by_node(group)) == world_size

    # This thread's own time, without the garbage that other tests left.
    assert min(timeit.repeat(look_at_all, timer=time.thread_time, number=1, repeat=3)) < 1
