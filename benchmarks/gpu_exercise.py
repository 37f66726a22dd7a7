"""Exercise: the collectives and the memory ladder on one device, in several processes.

NCCL wants a device for each process; gloo's collectives take CUDA tensors of several processes on one, through the
host's memory. So the code that a GPU runs is run, streams and all, on two pretended nodes, but for NCCL itself.
Collectives are compared with arithmetic on integers, which nothing rounds, and training, on every rung and with every
partition size, with a plain loop over all ranks' batches in one process on the CPU.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD

from benchmarks import one_device
from benchmarks.gpu_cases import Case, loss_of
from lightning_mics.channels import Task, channel_for
from lightning_mics.collectives import Collectives
from lightning_mics.groups import Groups, Tiers, backend_for
from lightning_mics.ladder import RUNGS, Rung
from lightning_mics.network import Network, Tier
from lightning_mics.sharding import MiCSModule, shard
from lightning_mics.topology import Topology, allowed_partition_sizes
from lightning_mics.wire import collectives_for

BOUND = 1e-5
"""How far losses (relative) and parameters (absolute) may be from the plain loop's: fp32, summed in another order."""

_NODES = 2
_STEPS, _WINDOW = 3, 2
_NUMELS = (1, 1_000, 300_000)
_SLOW_BETWEEN = Network(Tier(0.0, 1e9), Tier(0.0, 1e8))
_WAYS = (
    ("hierarchical", _SLOW_BETWEEN, None),
    ("bf16 between nodes", _SLOW_BETWEEN, torch.bfloat16),
    ("flat", Network(Tier(1.0, 1e9), Tier(0.0, 1e9)), None),
)
# 50 rows and columns: nothing divides evenly, and slots are padded.
_CASE = Case("a small GPT", "gpt2", layers=3, width=50, heads=2, vocabulary=61, tokens=16, batch=2)


@dataclass(frozen=True)
class Check:
    """Something that was done, and how far the result is from what it should be.

    Attributes:
        device: "cpu" or "cuda".
        what: was done.
        error: of values or parameters: the largest absolute difference on any rank.
        loss_error: the largest relative difference of a loss; 0 where there is none.
        allowed: of both.
    """

    device: str
    what: str
    error: float
    loss_error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """False for what is not a number, too."""
        return self.error <= self.allowed and self.loss_error <= self.allowed


def exercise(device_type: str, ranks: int = 4) -> list[Check]:
    """All checks on the CPU, and on `device_type` if that is another, on rank 0's word for all ranks.

    Raises:
        Exception: if a rank raised.
    """
    kinds = ["cpu"] if device_type == "cpu" else ["cpu", device_type]
    with tempfile.TemporaryDirectory() as place:
        torch.multiprocessing.spawn(_rank, (ranks, kinds, place), nprocs=ranks)
        return [Check(**check) for check in json.loads(Path(place, "checks.json").read_text())]


def table(checks: Sequence[Check]) -> str:
    """The checks for people."""
    lines = [f"{'device':8}{'what':52}{'error':>10}{'losses':>10}{'allowed':>10}"]
    for check in checks:
        verdict = "" if check.passed else "   DIFFERS"
        errors = f"{check.error:10.1e}{check.loss_error:10.1e}{check.allowed:10.0e}"
        lines.append(f"{check.device:8}{check.what:52}{errors}{verdict}")
    return "\n".join(lines)


def _rank(rank: int, ranks: int, kinds: Sequence[str], place: str) -> None:
    torch.set_num_threads(1)
    checks = []
    with one_device.joined(rank, ranks, "gloo", place):
        for kind in kinds:
            device = torch.device(kind) if kind == "cpu" else torch.device(kind, 0)
            checks += [_agreed(check) for each in (check_collectives, check_ladder) for check in each(device)]
        if rank == 0:
            Path(place, "checks.json").write_text(json.dumps([asdict(check) for check in checks]))


def _agreed(check: Check) -> Check:
    """The worst of all ranks."""
    errors = torch.tensor([check.error, check.loss_error], dtype=torch.float64).nan_to_num(float("inf"))
    dist.all_reduce(errors, dist.ReduceOp.MAX)
    error, loss_error = errors.tolist()
    return Check(check.device, check.what, error, loss_error, check.allowed)


def _topology(partition_size: int) -> Topology:
    ranks = dist.get_world_size()
    return Topology(ranks, ranks // _NODES, partition_size)


# -- collectives -------------------------------------------------------------------------------------------------------


def check_collectives(device: torch.device) -> Iterator[Check]:
    """Each collective on two tiers, on this rank. Collective on the default group."""
    groups = Groups.create(_topology(dist.get_world_size()), device.type, one_device.TIMEOUT)
    assert groups.hop_1 is not None
    for way, network, narrow in _WAYS:
        collectives = collectives_for(groups.hop_1, network, device, narrow)
        for name, dtype in product(("all-gather", "reduce-scatter", "all-reduce"), (torch.float32, torch.bfloat16)):
            errors = [_collective_error(name, collectives, groups.hop_1, device, dtype, numel) for numel in _NUMELS]
            yield Check(device.type, f"{name} of {str(dtype)[6:]}, {way}", max(errors), 0.0, 0.0)


def _collective_error(
    name: str, collectives: Collectives, tiers: Tiers, device: torch.device, dtype: torch.dtype, numel: int
) -> float:
    """How far a collective on a channel of its own is from what it should be, on this rank."""
    p, index = tiers.size, tiers.index
    everyone = [_integers(rank, p * numel, dtype) for rank in range(p)]
    total = torch.stack([each.float() for each in everyone]).sum(dim=0)
    slots = [each.view(p, -1)[rank] for rank, each in enumerate(everyone)]
    expected = {"all-gather": torch.cat(slots).float(), "reduce-scatter": total.view(p, -1)[index], "all-reduce": total}
    channel = channel_for(device, backend_for(device), name, own_stream=True)
    results: list[Tensor] = []
    busy = torch.ones(512, 512, device=device)
    for _ in range(20):  # what a collective is given is made long after it was handed over, unless it waits
        busy = busy @ busy / 512
    buffer = torch.zeros(p * numel, dtype=dtype, device=device)
    if name == "all-gather":
        buffer.view(p, -1)[index] = slots[index].to(device) * busy[0, 0].to(dtype)
    else:
        buffer.copy_(everyone[index].to(device) * busy[0, 0].to(dtype))
    tasks: dict[str, Task] = {
        "all-gather": partial(collectives.all_gather, buffer),
        "reduce-scatter": lambda: results.append(collectives.reduce_scatter(buffer)),
        "all-reduce": partial(collectives.all_reduce, buffer),
    }
    channel.submit(tasks[name], name).wait()
    result = (results or [buffer])[0]
    return (result.float().cpu() - expected[name]).abs().max().item()


def _integers(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    """What `rank` contributes: small integers, exact in 16 bits, as their sums are."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-8, 9, (numel,), generator=generator).to(dtype)


# -- the ladder --------------------------------------------------------------------------------------------------------


def check_ladder(device: torch.device) -> Iterator[Check]:
    """Each rung at each partition size, on this rank. Collective on the default group."""
    expected, losses = _train_plain()
    for size in allowed_partition_sizes(dist.get_world_size(), dist.get_world_size() // _NODES):
        for rung in RUNGS:
            root, own = _train(_topology(size), rung, device)
            parameters = {name.removeprefix("module."): param for name, param in root.named_parameters()}
            error = max(_distance(parameters[name], whole, root) for name, whole in expected.items())
            loss_error = max(abs(a - b) / abs(b) for a, b in zip(own, losses[dist.get_rank()], strict=True))
            yield Check(device.type, f"training, p = {size}, {rung}", error, loss_error, BOUND)


def _distance(param: nn.Parameter, whole: Tensor, root: MiCSModule) -> float:
    """How far this rank's shard is from its part of `whole`."""
    topology = root.groups.topology
    chunks = whole.chunk(topology.partition_size)
    place = topology.shard_of(dist.get_rank())
    own = (param.to_local() if isinstance(param, DTensor) else param).detach().cpu()
    part = chunks[place] if place < len(chunks) else whole[:0]
    if own.shape != part.shape:
        return float("inf")
    return (own - part).abs().max().item() if own.numel() else 0.0


def _batches(rank: int, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1_000 * step + rank)
    shape = (_CASE.batch, _CASE.tokens)
    return [torch.randint(_CASE.vocabulary, shape, generator=generator) for _ in range(_WINDOW)]


def _train_plain() -> tuple[dict[str, Tensor], list[list[float]]]:
    """Parameters by name and each rank's losses, from all ranks' batches in one loop on the CPU."""
    model, ranks = _model(), dist.get_world_size()
    optimizer = _optimizer(model)
    losses: list[list[float]] = [[] for _ in range(ranks)]
    for step in range(_STEPS):
        for rank in range(ranks):
            for ids in _batches(rank, step):
                loss = loss_of(model, ids)
                (loss / (_WINDOW * ranks)).backward()
                losses[rank].append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}, losses


def _train(topology: Topology, rung: Rung, device: torch.device) -> tuple[MiCSModule, list[float]]:
    root = shard(
        _model(),
        Groups.create(topology, device.type, one_device.TIMEOUT),
        rung=rung,
        activation_checkpointing=True,
        network=_SLOW_BETWEEN,
    )
    root.one_backward = True
    optimizer, losses = _optimizer(root), []
    for step in range(_STEPS):
        batches = [ids.to(device) for ids in _batches(dist.get_rank(), step)]
        losses += one_device.optimizer_step(root, optimizer, loss_of, batches, step)
    return root, [float(loss) for loss in losses]


def _model() -> nn.Module:
    return _CASE.build(torch.device("cpu")).float()


def _optimizer(model: nn.Module) -> SGD:
    # Not Adam, which makes a whole step of a gradient that is all rounding.
    return SGD(model.parameters(), lr=0.1, momentum=0.9)
