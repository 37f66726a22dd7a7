"""Both forms of the collectives against their readable twins, on real ranks; the choice between flat and hierarchical.

All ranks go through the same cases, drawn by hypothesis. A check raises nothing but notes what is wrong: a rank that
stopped there would leave the others waiting.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_mics import exchange, pipelined
from lightning_mics.channels import CollectiveError
from lightning_mics.collectives import Collectives, flat_all_gather, flat_reduce_scatter
from lightning_mics.cross_memory import CrossMemory
from lightning_mics.exchange import Exchange
from lightning_mics.groups import Groups, Tiers
from lightning_mics.native import Native
from lightning_mics.network import Network, Tier
from lightning_mics.pipelined import Pipelined
from lightning_mics.sharding import MiCSModule, shard
from lightning_mics.topology import Topology
from tests.distributed.ranks import run_ranks
from tests.distributed.test_wire import ONE_TIER, TWO_TIERS

SHAPES = [(1, 1), (1, 3), (2, 1), (2, 2), (2, 3), (3, 2)]  # nodes, and ranks on each
EXAMPLES = 40
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """One message.

    Attributes:
        shape: nodes, and ranks on each.
        numel: elements of a slot; of the whole buffer in an all-reduce.
        chunk_bytes: in place of `CHUNK_BYTES`.
        dtype: of the buffer.
        stages: in place of `_STAGES`.
        two_tiers: whether the network makes it hierarchical.
        cross_memory: whether ranks of a node read one another's memory.
        narrow: whether values cross between nodes in bf16.
        integers: whether values are small integers, whose sums no rounding changes.
        seed: of the values.
    """

    shape: tuple[int, int]
    numel: int
    chunk_bytes: int
    dtype: torch.dtype
    stages: int
    two_tiers: bool
    cross_memory: bool
    narrow: bool
    integers: bool
    seed: int

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def form(self, cls: type[Collectives], tiers: Tiers) -> Collectives:
        if not self.cross_memory:
            tiers = replace(tiers, cross_memory=None)
        return cls(tiers, TWO_TIERS if self.two_tiers else ONE_TIER, torch.bfloat16 if self.narrow else None)

    def values(self, rank: int, numel: int) -> Tensor:
        """What `rank` contributes: known to every rank."""
        generator = torch.Generator().manual_seed(100 * self.seed + rank)
        if self.integers or not self.dtype.is_floating_point:
            low = -8 if self.dtype.is_floating_point else 0
            return torch.randint(low, 9, (numel,), generator=generator).to(self.dtype)
        return torch.randn(numel, generator=generator).to(self.dtype)


def cases(dtypes: list[torch.dtype], **fixed: Any) -> st.SearchStrategy[Case]:
    drawn = {
        "shape": st.sampled_from(SHAPES),
        "numel": st.integers(0, 67),
        "chunk_bytes": st.sampled_from([1, 16, 40, 1 << 20]),
        "dtype": st.sampled_from(dtypes),
        "stages": st.sampled_from([1, 3]),
        "two_tiers": st.booleans(),
        "cross_memory": st.booleans(),
        "narrow": st.booleans(),
        "integers": st.booleans(),
        "seed": st.integers(0, 99),
    }
    return st.builds(Case, **(drawn | fixed))


def tiers_of(nodes: int, per_node: int) -> Tiers | None:
    """The first ranks of the world on so many nodes. Collective on the default group; None on the other ranks."""
    rank, ranks = dist.get_rank(), tuple(tuple(range(n * per_node, (n + 1) * per_node)) for n in range(nodes))
    everyone, insides = dist.new_group([*range(nodes * per_node)]), [dist.new_group([*node]) for node in ranks]
    betweens = [dist.new_group([node[place] for node in ranks]) for place in range(per_node)]
    if rank >= nodes * per_node:
        return None
    inside = insides[rank // per_node] if per_node > 1 else None
    between = betweens[rank % per_node] if nodes > 1 else None
    return Tiers(ranks, rank, everyone, inside, between, inside and CrossMemory.connect(inside))


def drawn(strategy: st.SearchStrategy[Case]) -> list[Case]:
    """What hypothesis would try: the same in every run."""
    found: list[Case] = []

    @settings(max_examples=EXAMPLES, derandomize=True, database=None)
    @given(strategy)
    def draw(case: Case) -> None:
        found.append(case)

    draw()
    return found


Check = Callable[[Case, type[Collectives], Tiers], str | None]


def go_through(cases: dict[Check, list[Case]]) -> dict[Check, list[str]]:
    """What each check finds wrong in the cases that this rank takes part in."""
    tiers = {shape: tiers_of(*shape) for shape in SHAPES}
    wrong: dict[Check, list[str]] = {check: [] for check in cases}
    for check, each in cases.items():
        for case, form in product(each, (Exchange, Native, Pipelined)):
            if (mine := tiers[case.shape]) is not None:
                with (
                    patch.object(exchange, "CHUNK_BYTES", case.chunk_bytes),
                    patch.object(pipelined, "_STAGES", case.stages),
                ):
                    if problem := check(case, form, mine):
                        wrong[check].append(f"{form.__name__}, {case}: {problem}")
    return wrong


@functools.cache
def found_wrong() -> dict[Check, list[str]]:
    """What each check found, on any rank; all of them in one set of processes."""
    anything = cases([*FLOATS, torch.uint8])
    cases_of = {
        _gathered: anything,
        _gathered_two_at_once: anything,
        _several_at_once: cases(FLOATS, integers=st.just(True)),
        _scattered: cases(FLOATS),
        _all_reduced: cases(FLOATS),
    }
    results = run_ranks(6, go_through, {check: drawn(each) for check, each in cases_of.items()})
    return {check: [problem for result in results for problem in result[check]] for check in cases_of}


# -- what each must give -----------------------------------------------------------------------------------------------


def _gathered(case: Case, form: type[Collectives], tiers: Tiers) -> str | None:
    """The twin's result; where values crossed between nodes in fewer bits, those of other nodes are rounded to them."""
    ours, twin = _to_gather(case, tiers), _to_gather(case, tiers)
    case.form(form, tiers).all_gather(ours)
    return None if torch.equal(ours, _as_gathered(case, tiers, twin)) else f"{ours} for {twin}"


def _gathered_two_at_once(case: Case, form: type[Collectives], tiers: Tiers) -> str | None:
    """Ranks may be early or late: some begin the second gather while the first is under way, some after it."""

    def backwards(buffer: Tensor) -> Tensor:
        return buffer.view(case.size, -1).flip(1).reshape(-1)

    first, second = _to_gather(case, tiers), backwards(_to_gather(case, tiers))
    gather = case.form(form, tiers)
    if tiers.rank % 2:
        gather.all_gather(first)
        gather.all_gather(second)
    else:
        ends = [gather.begin_all_gather(first), gather.begin_all_gather(second)]
        for end in ends:
            end()
    twin = _as_gathered(case, tiers, _to_gather(case, tiers))
    right = torch.equal(first, twin) and torch.equal(second, backwards(twin))
    return None if right else f"{first} and {second} for {twin} and its reverse"


def _several_at_once(case: Case, form: type[Collectives], tiers: Tiers) -> str | None:
    """Of all kinds, begun in one order and ended in it; how many each rank begins ahead differs."""
    collectives = case.form(form, tiers)
    whole = [case.values(rank, case.size * case.numel) for rank in range(case.size)]
    own = slice(tiers.rank * case.numel, (tiers.rank + 1) * case.numel)
    sums, mine = torch.stack(whole).sum(0), whole[tiers.rank]
    gathered = torch.cat([case.values(rank, case.numel) for rank in range(case.size)])

    def in_place(begin: Callable[[Tensor], Callable[[], None]], buffer: Tensor) -> Callable[[], Tensor]:
        end = begin(buffer)
        return lambda: (end(), buffer)[1]  # type: ignore[func-returns-value]

    begins = [
        partial(in_place, collectives.begin_all_reduce, mine.clone()),
        partial(collectives.begin_reduce_scatter, mine.clone()),
        partial(in_place, collectives.begin_all_gather, _to_gather(case, tiers)),
        partial(in_place, collectives.begin_all_reduce, mine.flip(0)),
        partial(in_place, collectives.begin_all_reduce, mine.clone()),
    ]
    wanted = [sums, sums[own], gathered, sums.flip(0), sums]
    ends: deque[Callable[[], Tensor]] = deque()
    results = []
    for begin in begins:
        ends.append(begin())
        if len(ends) > tiers.rank % 3:
            results.append(ends.popleft()())
    results += [end() for end in ends]
    wrong = [f"{ours} for {right}" for ours, right in zip(results, wanted, strict=True) if not torch.equal(ours, right)]
    return "; ".join(wrong) or None


def _to_gather(case: Case, tiers: Tiers) -> Tensor:
    buffer = torch.full((case.size * case.numel,), 77).to(case.dtype)
    buffer[tiers.rank * case.numel : (tiers.rank + 1) * case.numel] = case.values(tiers.rank, case.numel)
    return buffer


def _as_gathered(case: Case, tiers: Tiers, twin: Tensor) -> Tensor:
    flat_all_gather(twin, tiers)
    if case.narrow and case.dtype == torch.float32:
        by_node = twin.view(case.shape[0], -1)
        rounded = by_node.bfloat16().float()
        rounded[tiers.node] = by_node[tiers.node]
        twin = rounded.view(-1)
    return twin


def rounding(case: Case, form: type[Collectives], tiers: Tiers, *, all_reduce: bool) -> float:
    """How far a sum over p ranks may be from the exact one, relative to the sum of magnitudes.

    With u half the spacing of numbers just above 1, a rounding changes a value by a factor within 1 +- u. `Exchange`
    adds in fp32 at least, p-1 times, and rounds to the dtype once a stage; an all-reduce that crosses between nodes in
    bf16 rounds partial sums to it before, and the sum after. gloo, under `Native`, rounds to the dtype at each of p-1
    additions. m roundings one after the other give a factor within (1 + u)**m.
    """
    u, u32, u_narrow = (torch.finfo(dtype).eps / 2 for dtype in (case.dtype, torch.float32, torch.bfloat16))
    hierarchical = min(case.shape) > 1 and (case.two_tiers or case.narrow)
    stages = (2 if hierarchical else 1) if form is Exchange else case.size - 1
    factor = (1 + u32) ** (case.size - 1) * (
        1 if case.dtype == torch.float32 and form is Exchange else (1 + u) ** stages
    )
    if all_reduce and case.narrow and case.dtype == torch.float32 and tiers.nodes > 1:
        factor *= (1 + u_narrow) ** 2
    return factor - 1


def off(ours: Tensor, contributions: list[Tensor], relative: float) -> str | None:
    """Whether a sum is further from the exact one (in fp64) than `relative` allows, of the sum of magnitudes."""
    exact = torch.stack([each.double() for each in contributions])
    tiny = torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps  # where no relative precision is left
    far = (ours.double() - exact.sum(0)).abs() - relative * exact.abs().sum(0) - 2 * tiny
    return None if ours.numel() == 0 or far.max() <= 0 else f"{ours} for {exact.sum(0)}: {far.max():.2g} too far"


def _scattered(case: Case, form: type[Collectives], tiers: Tiers) -> str | None:
    whole = [case.values(rank, case.size * case.numel) for rank in range(case.size)]
    ours = case.form(form, tiers).reduce_scatter(whole[tiers.rank].clone())
    twin = flat_reduce_scatter(whole[tiers.rank], tiers)
    own = slice(tiers.rank * case.numel, (tiers.rank + 1) * case.numel)
    if ours.shape != twin.shape or ours.dtype != twin.dtype:
        return f"{ours.dtype}, {tuple(ours.shape)}"
    if case.integers:
        return None if torch.equal(ours, twin) else f"{ours} for {twin}"
    mine = [each[own] for each in whole]
    twins = (1 + torch.finfo(torch.float32).eps / 2) ** (case.size - 1) * (1 + torch.finfo(case.dtype).eps / 2) - 1
    return off(twin, mine, twins) or off(ours, mine, rounding(case, form, tiers, all_reduce=False))


def _all_reduced(case: Case, form: type[Collectives], tiers: Tiers) -> str | None:
    """Any length, fewer than the ranks as well; the same bits everywhere."""
    contributions = [case.values(rank, case.numel) for rank in range(case.size)]
    ours = contributions[tiers.rank].clone()
    case.form(form, tiers).all_reduce(ours)
    digest = torch.tensor(list(hashlib.sha1(ours.view(torch.uint8).numpy().tobytes()).digest()))
    digests = [torch.empty_like(digest) for _ in range(case.size)]
    dist.all_gather(digests, digest, group=tiers.everyone)
    if any(not torch.equal(each, digest) for each in digests):
        return f"not the same on all ranks; here {ours}"
    if case.integers:  # at most 9 x 8, which bf16 still holds
        exact = torch.stack(contributions).sum(0)
        return None if torch.equal(ours, exact) else f"{ours} for {exact}"
    return off(ours, contributions, rounding(case, form, tiers, all_reduce=True))


def test_a_gather_is_the_twins_bit_for_bit() -> None:
    assert found_wrong()[_gathered] == []


def test_a_gather_may_begin_while_another_is_under_way() -> None:
    assert found_wrong()[_gathered_two_at_once] == []


def test_several_of_all_kinds_may_be_under_way_and_more_on_one_rank_than_on_another() -> None:
    assert found_wrong()[_several_at_once] == []


def test_a_reduce_scatter_is_the_twins_but_for_rounding() -> None:
    assert found_wrong()[_scattered] == []


def test_an_all_reduce_of_any_length_is_the_same_on_every_rank() -> None:
    assert found_wrong()[_all_reduced] == []


# -- flat or hierarchical ----------------------------------------------------------------------------------------------


def both(form: type[Collectives], nodes: int, per_node: int, network: Network) -> Collectives:
    """On no process group at all: the choice is arithmetic."""
    ranks = tuple(tuple(range(n * per_node, (n + 1) * per_node)) for n in range(nodes))
    return form(Tiers(ranks, 0, None, None, None), network)  # type: ignore[arg-type]


def test_exchange_goes_the_faster_way() -> None:
    """2 x 2, 1 ms on each tier, 1 GB/s inside, 0.1 GB/s between; s in bytes, in chunks of 64 KiB up to 4 of them:

    hierarchical 1 ms + s/1e8 + 1 ms + 2**16/1e9 (only the last chunk is passed on behind the crossing), flat
    1 ms + 2 s/1e8; even at s = (1e-3 + 2**16/1e9) * 1e8 = 106,553.6. The chunks of a long slot are of 1 MiB.
    """
    form = both(Exchange, 2, 2, Network(Tier(1e-3, 1e9), Tier(1e-3, 1e8)))
    assert form.seconds(100_000) == pytest.approx((2e-3 + 1e-3 + 2**16 / 1e9, 1e-3 + 2e-3))
    assert form.seconds(10_000_000) == pytest.approx((2e-3 + 0.1 + 2**20 / 1e9, 1e-3 + 0.2))
    assert (form.tiers_for(106_500).nodes, form.tiers_for(106_600).nodes) == (1, 2)


def test_native_goes_the_faster_way() -> None:
    """The same with 3 ms inside the nodes. Rings of one step each, then two slots; or of three, each past one door:

    hierarchical 1 ms + s/1e8 + 3 ms + 2 s/1e9, flat 3 (1 ms + s/2/1e8); even at s = 1e-3 / (1.5e-8 - 1.2e-8) = 333,333.
    """
    form = both(Native, 2, 2, Network(Tier(3e-3, 1e9), Tier(1e-3, 1e8)))
    assert form.seconds(1_000_000) == pytest.approx((4e-3 + 12e-3, 3e-3 + 15e-3))
    assert (form.tiers_for(333_000).nodes, form.tiers_for(333_700).nodes) == (1, 2)


def test_pipelined_goes_the_faster_way() -> None:
    """5 x 2, 6 ms inside the nodes: of four crossings, the last two are passed on behind them; flat as `Native`.

    4 (1 ms + s/1e8) + 6 ms + 2 s/1e9 = 9 (1 ms + s/2/1e8); even at s = 1e-3 / (4.5e-8 - 4.2e-8) = 333,333.
    """
    form = both(Pipelined, 5, 2, Network(Tier(6e-3, 1e9), Tier(1e-3, 1e8)))
    assert form.seconds(1_000_000) == pytest.approx((4e-3 + 40e-3 + 6e-3 + 2e-3, 9e-3 + 45e-3))
    assert (form.tiers_for(333_000).nodes, form.tiers_for(333_700).nodes) == (1, 5)


@pytest.mark.parametrize("form", [Exchange, Native, Pipelined])
@pytest.mark.parametrize("shape", [(1, 4), (4, 1)])
def test_one_tier_leaves_no_choice(form: type[Collectives], shape: tuple[int, int]) -> None:
    tiers = both(form, *shape, ONE_TIER).tiers_for(1)
    assert (tiers.nodes, tiers.per_node) == shape


# -- ranks that die, or never come -------------------------------------------------------------------------------------

RANKS = Topology(4, 2, 4)
MISSING = 3


class Layer(nn.Linear):
    """Notes on the class, and so for one rank, which layers were computed."""

    computed: ClassVar[list[int]] = []

    def __init__(self, index: int) -> None:
        super().__init__(4, 4)
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        Layer.computed.append(self.index)
        return super().forward(x)


def sharded(topology: Topology, rung: str) -> MiCSModule:
    torch.manual_seed(0)
    groups = Groups.create(topology, "cpu")
    root = shard(nn.Sequential(*(Layer(i) for i in range(3))), groups, blocks=Layer, rung=rung, network=TWO_TIERS)
    root.one_backward = True
    return root


class Impatient:
    """A message that is waited for one second instead of its group's timeout."""

    def __init__(self, work: dist.Work) -> None:
        self._work = work

    def wait(self) -> bool:
        return self._work.wait(timedelta(seconds=1))


@contextmanager
def impatient() -> Iterator[None]:
    """Messages that begin in here are `Impatient`: for when a rank is gone, and not for one that is merely slow."""

    def hurried(name: str) -> Callable[..., Impatient]:
        begin = getattr(dist, name)
        return lambda *args, **kwargs: Impatient(begin(*args, **kwargs))

    with (
        patch.object(dist, "isend", hurried("isend")),
        patch.object(dist, "irecv", hurried("irecv")),
        patch.object(CrossMemory, "timeout", property(lambda memory: 1.0), create=True),
    ):
        yield


def raised(action: Callable[[], object]) -> str:
    """The message of its CollectiveError."""
    with pytest.raises(CollectiveError) as error:
        action()
    return str(error.value)


def _gather_alone(dies: bool, folder: Path) -> None:
    """Rank 3 is gone after a first forward, in which all went well; what the others are told goes to files."""
    root = sharded(RANKS, "block/sharded")
    with torch.no_grad():
        root(torch.ones(2, 4))
        root.release()
    if dist.get_rank() == MISSING:
        if dies:
            os._exit(1)
        return
    Layer.computed.clear()
    with impatient():
        told = [raised(lambda: root(torch.ones(2, 4)))]
        root.abort()
        told.append(raised(lambda: root(torch.ones(2, 4))))
    (folder / str(dist.get_rank())).write_text(json.dumps([told, len(Layer.computed)]))
    if dies:
        os._exit(0)  # nobody is left to end together with


TIER = r"(between nodes, ranks \[(0, 2|1, 3)\]|inside the node, ranks \[(0, 1|2, 3)\]): .+"


@pytest.mark.parametrize("dies", [True, False], ids=["dies", "never comes"])
def test_a_gather_without_one_of_its_ranks_is_never_used(dies: bool, tmp_path: Path) -> None:
    """Nor is the next, with or without that rank: what it would get might be meant for the one that failed."""
    try:
        run_ranks(4, _gather_alone, dies, tmp_path, grace=300)
    except AssertionError:
        assert dies
    for rank in set(range(4)) - {MISSING}:
        told, computed = json.loads((tmp_path / str(rank)).read_text())
        assert len(told) == 2
        # The next one's is begun before the first one's is waited for, and may be the first to find out.
        assert all(re.fullmatch(f"all-gather of [01]: {TIER}", message) for message in told), told
        assert computed == 0


def _backward_alone(topology: Topology, rung: str) -> list[str]:
    """Rank 3 comes to the forward, and not to the backward."""
    root = sharded(topology, rung)
    loss = root(torch.ones(2, 4)).sum()
    if dist.get_rank() == MISSING:
        return []

    def backward(loss: Tensor) -> None:
        with root.window.backward():
            loss.backward()

    with impatient():
        told = [raised(lambda: backward(loss))]
        if topology.partition_size == 1:  # where a forward needs nobody
            root.abort()
            told.append(raised(lambda: backward(root(torch.ones(2, 4)).sum())))
    return told


@pytest.mark.parametrize(
    ("partition_size", "rung", "what"),
    [(4, "micro_step/sharded", "reduce-scatter of 2"), (1, "block/sharded", "hop 2 of 2")],
    ids=["hop 1", "hop 2"],
)
def test_a_hop_without_one_of_its_ranks_raises_on_the_others(partition_size: int, rung: str, what: str) -> None:
    results = run_ranks(4, _backward_alone, Topology(4, 2, partition_size), rung)
    assert [len(told) for told in results] == [2 if partition_size == 1 else 1] * MISSING + [0]
    for message in chain(*results):
        assert re.fullmatch(f"{what}: {TIER}", message), message
