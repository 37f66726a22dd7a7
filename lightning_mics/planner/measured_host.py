"""Measured host: what collectives cost the processors at hand, by models of next to nothing, sharded.

Blocks of two sizes are trained on a few rungs, inside a node and over several. Of the processor's seconds that this
takes, those of the same blocks unsharded are subtracted; how many gathers and reductions there were, and of how many
bytes, is known from the schedule. What is left is a line over bytes for each of them, by least squares.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_mics.groups import Groups
from lightning_mics.ladder import Gradients, Parameters, Rung
from lightning_mics.planner import peers
from lightning_mics.planner.block_call import TinyBlock
from lightning_mics.planner.host import Cost, Host, Line, Part, Thread
from lightning_mics.planner.model import Model
from lightning_mics.planner.schedule import Case, Task, schedule
from lightning_mics.planner.step import PARTS, keeps_apart
from lightning_mics.sharding import MiCSModule, shard
from lightning_mics.topology import Topology, divisors

_BLOCKS, _WINDOW = 4, 4
_WIDTHS = (8, 256)  # of blocks: next to nothing, and 3 MB
_SMALL = 1 << 16  # bytes of a message that takes no time but its latency
_STEPS = 6  # of which the median is taken
_RUNGS = tuple(map(Rung.parse, ("block/sharded", "window/sharded", "block/whole", "window/whole")))
_TIMES, _BYTES = "times", "bytes"

Step = Callable[[], None]
Features = Counter[tuple[Cost, str]]
"""How many of each cost there are, and of how many bytes in all."""


class Blocks(nn.Module):
    """Blocks one behind the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TinyBlock(width) for _ in range(_BLOCKS))
        self.batch = torch.ones(1, 4, width)

    def forward(self) -> Tensor:
        """A scalar."""
        batch = self.batch
        for block in self.blocks:
            batch = block(batch)
        total: Tensor = batch.sum()
        return total


@dataclass(frozen=True)
class Seconds:
    """Of a step: the mean of all ranks.

    Attributes:
        computing: in which the rank's own thread was on a processor.
        beside: likewise, its other threads together.
        passed: by the clock.
    """

    computing: float
    beside: float
    passed: float

    def more(self, other: Seconds, busy: float) -> dict[Thread, float]:
        """Than another step took, by thread, where `busy` seconds pass for one of a processor's."""
        computing, beside = busy * (self.computing - other.computing), busy * (self.beside - other.beside)
        told = {
            Thread.COMPUTING: computing,
            Thread.BESIDE: beside,
            Thread.NONE: self.passed - other.passed - computing - beside,
        }
        return {thread: max(0.0, seconds) for thread, seconds in told.items()}


def measure_hosts(
    ranks_per_node: int, busy: float, engines: Iterable[str] = ("mics", "fsdp2"), steps: int | None = None
) -> dict[str, Host]:
    """What each engine's collectives cost on the CPU ranks of the default group, in some three seconds a step of each.

    Collective on the default group, and makes others.

    Args:
        ranks_per_node: k.
        busy: seconds that pass for a second of a processor, with all ranks at work: ranks over cores.
        engines: "mics", "fsdp2".
        steps: of each sample; by default 6.

    Returns:
        By engine. The same on every rank.
    """
    steps = steps or _STEPS
    plain = {width: _timed(_Plain(width).step, steps) for width in _WIDTHS}
    hosts: dict[str, Host] = {}
    for name in engines:
        samples = [*_sharded(_ENGINES[name], ranks_per_node, plain, busy, steps)]
        hosts[name] = Host({c: line for thread in Thread for c, line in _solved(_of_thread(samples, thread)).items()})
    return hosts


# -- what runs ---------------------------------------------------------------------------------------------------------


class _Plain:
    """Nothing is sharded, and gradients are added up all the time."""

    def __init__(self, width: int) -> None:
        self._module = Blocks(width)

    def step(self) -> None:
        for _ in range(_WINDOW):
            self._module().backward()


class _MiCS:
    """Ours."""

    walk = staticmethod(schedule)

    groups = staticmethod(lambda topology: Groups.create(topology, "cpu"))

    def __init__(self, width: int, groups: Groups) -> None:
        self._root: MiCSModule = shard(Blocks(width), groups, blocks=TinyBlock)
        self._root.one_backward = True
        self._windows = 0

    def set_rung(self, rung: Rung) -> None:
        self._root.set_rung(rung)

    def step(self) -> None:
        window = self._root.window
        for number in range(_WINDOW):
            window.begin(self._windows)
            inside: AbstractContextManager[object] = nullcontext()
            with inside if number == _WINDOW - 1 else window.hop_1_only():
                loss = self._root()
                with window.backward():
                    loss.backward()
        window.close()
        self._root.zero_grad()
        self._root.release()
        self._windows += 1


class _FSDP2:
    """PyTorch's, with an all-reduce behind each reduce-scatter where there are replicas."""

    walk = staticmethod(peers.fsdp2)

    @staticmethod
    def groups(topology: Topology) -> DeviceMesh:
        n, p = topology.world_size, topology.partition_size
        shape, names = ((n,), ("shard",)) if p == n else ((n // p, p), ("replicate", "shard"))
        return init_device_mesh("cpu", shape, mesh_dim_names=names)

    def __init__(self, width: int, mesh: DeviceMesh) -> None:
        self._module = Blocks(width)
        for block in self._module.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self._module, mesh=mesh)
        self._rung = Rung()

    def set_rung(self, rung: Rung) -> None:
        self._rung = rung
        for block in self._module.blocks:
            block.set_reshard_after_forward(rung.parameters == Parameters.BLOCK)  # type: ignore[operator]

    def step(self) -> None:
        for number in range(_WINDOW):
            boundary = number == _WINDOW - 1
            self._module.set_requires_gradient_sync(boundary or self._rung.gradients == Gradients.SHARDED)  # type: ignore[operator]
            self._module.set_reshard_after_backward(boundary or self._rung.parameters != Parameters.WINDOW)  # type: ignore[operator]
            self._module().backward()
        self._module.zero_grad()


_Engine = type[_MiCS] | type[_FSDP2]
_ENGINES: dict[str, _Engine] = {"mics": _MiCS, "fsdp2": _FSDP2}


def _sharded(
    engine: _Engine, ranks_per_node: int, plain: Mapping[int, Seconds], busy: float, steps: int
) -> Iterator[tuple[Features, dict[Thread, float]]]:
    """What a window held of each cost, and its seconds beside those of the blocks themselves."""
    for topology in _topologies(ranks_per_node):
        groups: Any = engine.groups(topology)
        for width in _WIDTHS:
            here = engine(width, groups)
            for rung in _RUNGS:
                here.set_rung(rung)
                yield (
                    _features(engine.walk, width, topology, rung),
                    _timed(here.step, steps).more(plain[width], busy),
                )


def _topologies(ranks_per_node: int) -> Iterator[Topology]:
    """Groups of a node, and of the fewest nodes that make several alike."""
    n, k = dist.get_world_size(), ranks_per_node
    sizes = [k] if k > 1 else []
    if n > k:
        sizes.append(k * next(nodes for nodes in divisors(n // k) if nodes > 1))
    return (Topology(n, k, size) for size in sizes)


def _timed(step: Step, count: int) -> Seconds:
    """The median step, of several that all ranks begin together."""
    step()
    taken: list[tuple[float, ...]] = []
    for _ in range(count):
        dist.barrier()
        before = _clocks()
        step()
        taken.append(tuple(after - earlier for after, earlier in zip(_clocks(), before, strict=True)))
    mean = torch.tensor([median(each) for each in zip(*taken, strict=True)], dtype=torch.float64)
    dist.all_reduce(mean)
    own, everywhere, passed = (mean / dist.get_world_size()).tolist()
    return Seconds(own, everywhere - own, passed)


def _clocks() -> tuple[float, float, float]:
    return time.thread_time(), time.process_time(), time.perf_counter()


# -- how much of what --------------------------------------------------------------------------------------------------


def _features(walk: Callable[..., tuple[Task, ...]], width: int, topology: Topology, rung: Rung) -> Features:
    with torch.device("meta"):
        model = Model.of(Blocks(width), TinyBlock)
    case = Case(topology, window=_WINDOW, rung=rung, device_type="cpu")
    tasks = walk(model, case, dist.get_rank())
    nbytes = sum(param.nbytes for param in model.blocks[0].parameters)
    found: Features = Counter()
    found[Cost(Part.HOOKS), _TIMES] = _WINDOW * _BLOCKS
    if keeps_apart(case):
        found[Cost(Part.KEEP), _TIMES] = (_WINDOW - 1) * _BLOCKS
        found[Cost(Part.KEEP), _BYTES] = (_WINDOW - 1) * _BLOCKS * nbytes
    for task in tasks:
        if task.kind in PARTS and task.collective is not None:
            between = task.collective.nodes_joined(topology.ranks_per_node) > 1
            for thread in Thread:
                cost = Cost(PARTS[task.kind], between, thread)
                found[cost, _TIMES] += 1
                found[cost, _BYTES] += task.collective.nbytes
    return found


def _of_thread(samples: Iterable[tuple[Features, dict[Thread, float]]], thread: Thread) -> list[tuple[Features, float]]:
    """Waiting grows with messages, not with their bytes, which tiers tell: the smallest blocks' counts."""
    mine = []
    for features, seconds in samples:
        counts = {key: n for key, n in features.items() if key[0].thread == thread}
        if thread == Thread.NONE:
            if any(n > _SMALL * counts[cost, _TIMES] for (cost, of), n in counts.items() if of == _BYTES):
                continue
            counts = {(cost, of): n for (cost, of), n in counts.items() if of == _TIMES}
        mine.append((Counter(counts), seconds[thread]))
    return mine


def _solved(samples: list[tuple[Features, float]]) -> dict[Cost, Line]:
    """Lines that tell the samples' seconds best, by squares of relative errors; none of them negative."""
    names = [*dict.fromkeys(name for features, _ in samples for name in features)]
    while True:
        rows = torch.tensor([[float(features[name]) for name in names] for features, _ in samples], dtype=torch.float64)
        told = torch.tensor([seconds for _, seconds in samples], dtype=torch.float64)
        weights = 1 / told.clamp(min=0.05 * float(told.max()) or 1.0)
        scale = rows.norm(dim=0)
        found = torch.linalg.lstsq(rows * weights[:, None] / scale, (told * weights)[:, None], driver="gelsd").solution
        values = found.flatten() / scale
        if not len(names) or float(values.min()) >= 0:
            break
        del names[int((values * scale).argmin())]
    lines: defaultdict[Cost, dict[str, float]] = defaultdict(dict)
    for (cost, of), value in zip(names, values.tolist(), strict=True):
        lines[cost]["seconds" if of == _TIMES else "per_byte"] = value
    return {cost: Line(**line) for cost, line in lines.items()}
