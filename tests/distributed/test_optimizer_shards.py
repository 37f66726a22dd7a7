"""Optimizer state over all ranks is the plain form with other memory: the same numbers, bytes and checkpoints.

With two replicas a sum has two terms, whose order does not matter, and everything is equal bit for bit. With r replicas
the plain form adds an element's r terms in the order that its place in the buffer gives, and so does this one with
another place: each sum is rounded r-1 times, so that two of them differ by at most 2 (r-1) eps times the sum of their
terms' sizes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics.channels import Channel, Task, Transfer
from lightning_mics.groups import Groups
from lightning_mics.precision import Precision
from lightning_mics.sharding import MiCSModule, shard
from lightning_mics.topology import Topology
from tests.distributed.counting import Call, collectives
from tests.distributed.ranks import run_ranks
from tests.distributed.test_wire import TWO_TIERS, traffic
from tests.distributed.toys import assert_close, local, optimizer_state, parameters, whole, wholes

WIDTH, STEPS = 10, 3
FORMS = ("partition", "world")


class Block(nn.Module):
    """Rows that no number of ranks divides: ten, one and three."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.rand(1) + 0.5)
        self.shift = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.linear(x)) * self.scale
        return x + nn.functional.pad(self.shift, (0, WIDTH - 3))


class Net(nn.Module):
    """Blocks, what lies outside them, something frozen, and something that no rank uses."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.leave = nn.Linear(WIDTH, 5)
        self.unused = nn.Linear(WIDTH, 2)
        self.enter.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return self.leave(x)


def batch_of(step: int, micro: int, dtype: torch.dtype = torch.float32) -> Tensor:
    seed = 10_000 * dist.get_rank() + 100 * step + micro
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    """Matrices decay, vectors do not."""
    groups = [[p for p in module.parameters() if (p.ndim > 1) == matrices] for matrices in (True, False)]
    return torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], lr=1e-2
    )


def adagrad(module: nn.Module) -> torch.optim.Optimizer:
    """Has state before its first step."""
    return torch.optim.Adagrad((p for p in module.parameters() if p.requires_grad), lr=1e-2)


def build(
    partition_size: int,
    dtype: torch.dtype = torch.float32,
    precision: Precision | None = None,
    ranks_per_node: int | None = None,
    **options: Any,
) -> MiCSModule:
    torch.manual_seed(0)
    n = dist.get_world_size()
    groups = Groups.create(Topology(n, ranks_per_node or n, partition_size), "cpu")
    root = shard(Net().to(dtype), groups, precision=precision or Precision(), **options)
    root.one_backward = True
    return root


def backward(root: MiCSModule, step: int, window: int, dtype: torch.dtype = torch.float32) -> list[float]:
    """The micro-steps of a window, without the step; their losses."""
    root.window.begin(step)
    losses = []
    for micro in range(window):
        with nullcontext() if micro == window - 1 else root.window.hop_1_only():
            with torch.autocast("cpu", torch.bfloat16, enabled=root.precision.param_dtype is not None):
                loss = root(batch_of(step, micro, dtype)).square().mean()
            with root.window.backward():
                (loss / window).backward()
            losses.append(loss.item())
    root.window.close()
    return losses


def train(
    root: MiCSModule,
    form: str,
    window: int,
    make: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.optim.Optimizer, list[float]]:
    optimizer = make(root)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    if form == "world":
        root.shard_optimizer(optimizer)
    losses = []
    for step in range(STEPS):
        losses += backward(root, step, window, dtype)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        root.release()
    root.finish_updates()
    return optimizer, losses


# -- the same numbers --------------------------------------------------------------------------------------------------


def _both(
    partition_size: int,
    atol: float,
    window: int = 2,
    dtype: torch.dtype = torch.float32,
    make: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    **options: Any,
) -> None:
    found = []
    for form in FORMS:
        root = build(partition_size, dtype, **options)
        optimizer, losses = train(root, form, window, make, dtype)
        found.append((parameters(root.module), optimizer_state(optimizer), losses, optimizer))
    plain, world = found
    assert_close(world[0], plain[0], "parameters", atol)
    assert_close(world[1], plain[1], "optimizer state", atol)
    assert world[2] == pytest.approx(plain[2], rel=atol, abs=0.0)
    assert world[3].param_groups[0]["lr"] == plain[3].param_groups[0]["lr"]
    if make is adamw:  # what no rank used has no state; nor what is frozen
        kept = [sum(map(bool, optimizer.state.values())) for optimizer in (plain[3], world[3])]
        assert kept == [len([*Net().parameters()]) - 3] * 2


CASES: dict[tuple[int, int], list[dict[str, Any]]] = {
    (4, 2): [
        {"window": 1},
        {"window": 3},
        {"dtype": torch.bfloat16},
        {"precision": Precision(param_dtype=torch.bfloat16)},
        {"rung": "window/whole"},
    ],
    (2, 1): [{}, {"make": adagrad}, {"dtype": torch.float64}, {"rung": "window/whole"}],
}


def _each(partition_size: int, cases: list[dict[str, Any]]) -> None:
    for case in cases:
        _both(partition_size, 0.0, **case)


@pytest.mark.parametrize(("n", "p"), [pytest.param(4, 2, marks=pytest.mark.slow), (2, 1)])
def test_two_replicas_are_equal_bit_for_bit(n: int, p: int) -> None:
    run_ranks(n, _each, p, CASES[n, p])


def _bounded(options: dict[str, Any]) -> None:
    """Each rank's term of the first step's gradients is that of a module of its own."""
    torch.manual_seed(0)
    alone = Net()
    alone(batch_of(0, 0)).square().mean().backward()
    plain, world = build(1, **options), build(1, **options)
    optimizer = adamw(world)
    world.shard_optimizer(optimizer)
    for root in (plain, world):
        backward(root, 0, 1)
    assert all(param.grad is None for param in world.parameters())
    compared = 0
    for group, wanted in zip(optimizer.param_groups, adamw(plain).param_groups, strict=True):
        for piece, param in zip(group["params"], wanted["params"], strict=True):
            assert (piece.grad is None) == (param.grad is None)
            if piece.grad is None:
                continue
            name = next(name for name, p in plain.module.named_parameters() if p is param)
            sizes = alone.get_parameter(name).grad.abs()  # type: ignore[union-attr]
            dist.all_reduce(sizes)
            bound = 2 * 3 * torch.finfo(torch.float32).eps * sizes / 4
            assert ((whole(piece.grad) - whole(param.grad)).abs() <= bound).all(), name
            compared += 1
    assert compared == 4 * 3 + 3


def _within_rounding(options: dict[str, Any]) -> None:
    _bounded(options)
    _both(1, 2e-3, **options)  # Adam divides a gradient by its size, and with it the rounding of one that is near zero


@pytest.mark.parametrize("options", [{}, {"ranks_per_node": 2, "network": TWO_TIERS}], ids=["one node", "two nodes"])
def test_four_replicas_are_equal_within_the_rounding_of_a_sum(options: dict[str, Any]) -> None:
    run_ranks(4, _within_rounding, options)


def _gradients(form: str, then: str) -> list[Tensor | None]:
    """Of two windows: the second begun anew, or added to the first."""
    root = build(1)
    optimizer = adamw(root)
    if form == "world":
        root.shard_optimizer(optimizer)
    backward(root, 0, 1)
    backward(root, 1 if then == "anew" else 0, 1)
    grads = [param.grad for group in optimizer.param_groups for param in group["params"]]
    return [None if grad is None else whole(grad) for grad in grads]


def _windows_without_a_step() -> None:
    for then in ("anew", "added"):
        found = [{i: g for i, g in enumerate(_gradients(form, then)) if g is not None} for form in FORMS]
        assert len(found[0]) == 4 * 3 + 3
        assert_close(found[1], found[0], then, atol=0.0 if then == "anew" else 1e-6)


def test_what_a_window_without_a_step_left_is_dropped_or_added_to() -> None:
    run_ranks(2, _windows_without_a_step)


# -- memory ------------------------------------------------------------------------------------------------------------


def _state_elements(partition_size: int) -> tuple[int, int, bool]:
    """Elements of the state that a rank keeps in each form, and whether a piece is the shard's own memory."""
    counts, shared = [], False
    for form in FORMS:
        root = build(partition_size)
        optimizer, _ = train(root, form, 1)
        tensors = [v for fields in optimizer.state.values() for k, v in fields.items() if k != "step"]
        counts.append(sum(local(tensor).numel() for tensor in tensors))
        pieces = [piece for group in optimizer.param_groups for piece in group["params"]]
        memory = {local(param).untyped_storage().data_ptr() for param in root.parameters()}
        shared = all(local(piece).untyped_storage().data_ptr() in memory for piece in pieces)
    return *counts, shared  # type: ignore[return-value]


@pytest.mark.parametrize("p", [1, 2])
def test_each_replica_keeps_its_part_of_the_state(p: int) -> None:
    """All n ranks together keep two moments of each parameter once, where r replicas kept them r times."""
    found = run_ranks(4, _state_elements, p)
    trained = sum(param.numel() for name, param in Net().named_parameters() if "unused" not in name) - WIDTH
    assert sum(plain for plain, _, _ in found) == 2 * trained * (4 // p)
    assert sum(world for _, world, _ in found) == 2 * trained
    assert all(shared for _, _, shared in found)


# -- on the wire -------------------------------------------------------------------------------------------------------


def _hop_2_bytes(calls: list[Call], groups: Groups) -> int:
    kinds = traffic(groups)
    assert {call.kind for call in calls} <= {"send", "all_reduce"}  # the latter tells who used what, in its own group
    return sum(call.nbytes for call in calls if call.kind == "send" and kinds[call.group] == "hop 2")


def _bytes_of_each_half(partition_size: int) -> list[tuple[int, int, int]]:
    """For each form, bytes of hop 2 before the step, after it, and by formula."""
    found = []
    for form in FORMS:
        root = build(partition_size)
        optimizer = adamw(root)
        if form == "world":
            root.shard_optimizer(optimizer)
        with collectives() as before:
            backward(root, 0, 1)
        with collectives() as after:
            optimizer.step()
            root.finish_updates()
        halves = [_hop_2_bytes(calls, root.groups) for calls in (before, after)]
        found.append((*halves, root.wire_bytes(1).hop_2))
    return found


@pytest.mark.parametrize("p", [1, 2])
def test_half_of_the_bytes_go_before_the_step_and_half_after_it(p: int) -> None:
    """Every shard is padded to rows for each of the p ranks, and each of those to rows for each of the r replicas."""
    r = 4 // p
    trained = [param for name, param in Net().named_parameters() if name != "enter.bias"]  # the unused goes as zeros
    elements = sum(math.ceil(math.ceil(len(param) / p) / r) * (param.numel() // len(param)) for param in trained)
    usage = 2 * (1 + len([*Net().parameters()])) * (r - 1) / r * 4
    for plain, world in run_ranks(4, _bytes_of_each_half, p):
        half = 4 * (r - 1) * elements
        assert world[2] == 2 * half
        assert world[1] == half
        assert world[0] == pytest.approx(half + usage, abs=8 * r)
        assert plain[1] == 0
        assert world[0] + world[1] < 1.5 * plain[0]  # that much is padding, of rows as few as these


def _between_nodes() -> None:
    """With p = 1 there is nothing else that 16 bits could round."""
    exact = build(1, ranks_per_node=1)
    narrow = [build(1, ranks_per_node=1, precision=Precision(between_nodes=torch.bfloat16)) for _ in FORMS]
    for root, form in zip((exact, *narrow), ("partition", *FORMS), strict=True):
        train(root, form, 1)
    assert_close(parameters(narrow[1].module), parameters(exact.module), "in pieces")
    with pytest.raises(AssertionError, match=r"whole: .* differs"):
        assert_close(parameters(narrow[0].module), parameters(exact.module), "whole")


def test_pieces_cross_between_nodes_as_they_are() -> None:
    run_ranks(2, _between_nodes)


# -- behind the next forward -------------------------------------------------------------------------------------------


class OnRequest:
    """Makes a channel end a task only once somebody waits for it, and notes when that happens."""

    def __init__(self, channel: Channel, events: list[str]) -> None:
        self._channel, self._events, self._submit = channel, events, channel.submit

    def __enter__(self) -> None:
        self._channel.submit = self._held_back  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        self._channel.submit = self._submit  # type: ignore[method-assign]

    def _held_back(self, task: Task, what: str) -> Transfer:
        asked = threading.Event()

        def carry() -> Iterator[None]:
            steps = iter(task() or ())
            yield next(steps, None)
            if not asked.wait(100):
                raise AssertionError(f"nobody waited for {what}")
            yield from steps

        transfer = self._submit(carry, what)
        wait = transfer.wait

        def noted(timeout: Any = None) -> bool:
            self._events.append(what)
            asked.set()
            return wait(timeout)

        transfer.wait = noted  # type: ignore[method-assign]
        return transfer


def _awaited(partition_size: int, dtype: torch.dtype | None) -> list[str]:
    """What is waited for, and the forwards of blocks, in a step's and the next forward's time."""
    precision = Precision(param_dtype=dtype)
    plain, world = build(partition_size, precision=precision), build(partition_size, precision=precision)
    events: list[str] = []
    for block in world.blocks:
        block.module.register_forward_pre_hook(lambda *_, name=block.name: events.append(f"forward of {name}"))
    optimizers = adamw(plain), adamw(world)
    world.shard_optimizer(optimizers[1])
    for root, optimizer in zip((plain, world), optimizers, strict=True):
        backward(root, 0, 1)
        events.clear()
        assert root.wire.hop_2 is not None
        with OnRequest(root.wire.hop_2.channel, events):
            optimizer.step()
        assert events == []
        optimizer.zero_grad()
        root.release()
    losses = []
    for root in (plain, world):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            losses.append(root(batch_of(1, 0)).square().mean().item())
    assert losses[1] == losses[0]
    return events


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("n", "p"), [(2, 1), (4, 2)])
def test_a_forward_awaits_each_update_before_it_reads_it(n: int, p: int, dtype: torch.dtype | None) -> None:
    """Nothing comes unless it is awaited, so that what is not would be read as it was before the step."""
    blocks = [f"layers.{i}" for i in range(3)]
    for events in run_ranks(n, _awaited, p, dtype):
        assert events[0] == "updates of what lies outside the blocks"
        for name in blocks:
            assert events.index(f"updates of {name}") < events.index(f"forward of {name}")
        if p == 1:  # nothing is gathered ahead, so that each block waits for its own alone
            assert events[1:] == [what for name in blocks for what in (f"updates of {name}", f"forward of {name}")]


def _read_between(how: str) -> None:
    plain, world = build(1), build(1)
    optimizers = adamw(plain), adamw(world)
    world.shard_optimizer(optimizers[1])
    states = []
    for root, optimizer in zip((plain, world), optimizers, strict=True):
        backward(root, 0, 1)
        awaited: list[str] = []
        with OnRequest(root.wire.hop_2.channel, awaited):  # type: ignore[union-attr]
            optimizer.step()
        if how == "state_dict":
            states.append(root.module.state_dict())
        elif how == "of a part":
            states.append(root.module.layers[1].state_dict())
        elif how == "load_state_dict":  # an update that came afterwards would undo it
            root.module.load_state_dict({name: torch.zeros_like(p) for name, p in root.module.named_parameters()})
            assert len(awaited) == (4 if root is world else 0)
            states.append(dict(root.module.named_parameters()))
        elif how == "another window":
            root.window.begin(1)
            root.window.close()
            states.append(dict(root.module.named_parameters()))
        else:
            root.finish_updates()
            states.append(dict(root.module.named_parameters()))
    full = [wholes(state) for state in states]
    assert_close(full[1], full[0], how)


@pytest.mark.slow
def test_who_reads_or_writes_parameters_otherwise_finds_them_complete() -> None:
    for how in ("state_dict", "of a part", "load_state_dict", "another window", "finish_updates"):
        run_ranks(2, _read_between, how)


# -- steps that are skipped --------------------------------------------------------------------------------------------


def _scaled(partition_size: int) -> None:
    """A gradient scaler finds an infinity on one rank alone, and all ranks skip the step."""
    found = []
    for form in FORMS:
        root = build(partition_size)
        optimizer = torch.optim.SGD(root.parameters(), lr=0.1, momentum=0.9)
        if form == "world":
            root.shard_optimizer(optimizer)
        scaler, scales = torch.amp.GradScaler("cpu", init_scale=2.0**10), []
        for step in range(STEPS):
            root.window.begin(step)
            loss = root(batch_of(step, 0)).square().mean()
            if step == 1 and dist.get_rank() == 1:
                loss = loss * torch.inf
            with root.window.backward():
                scaler.scale(loss).backward()
            root.window.close()
            scaler.unscale_(optimizer)
            before = parameters(root.module)
            scaler.step(optimizer)
            scaler.update()
            root.finish_updates()
            assert (step == 1) == all(torch.equal(v, before[k]) for k, v in parameters(root.module).items())
            scales.append(scaler.get_scale())
            optimizer.zero_grad()
            root.release()
        found.append((parameters(root.module), scales))
    assert found[1][1] == found[0][1] == [2.0**10, 2.0**9, 2.0**9]
    assert_close(found[1][0], found[0][0], "with a gradient scaler")


def test_an_infinity_on_one_rank_skips_the_step_on_all() -> None:
    run_ranks(4, _scaled, 2)
    run_ranks(2, _scaled, 1)


# -- refusals ----------------------------------------------------------------------------------------------------------


def _engine_refuses() -> None:
    root = build(1)
    optimizer = adamw(root)
    root.one_backward = False
    with pytest.raises(ValueError, match="set one_backward=True"):
        root.shard_optimizer(optimizer)
    root.one_backward = True
    root.shard_optimizer(optimizer)
    with pytest.raises(ValueError, match="sharded over all ranks already; make a new optimizer"):
        root.shard_optimizer(optimizer)
    backward(root, 0, 1)
    root.double()
    with pytest.raises(RuntimeError, match="has got other memory since its optimizer was sharded"):
        optimizer.step()


def test_the_engine_refuses_what_it_cannot_do() -> None:
    run_ranks(2, _engine_refuses)


def _one_replica() -> None:
    root = build(2)
    optimizer, _ = train(root, "world", 2)
    assert all(any(p is q for q in root.parameters()) for group in optimizer.param_groups for p in group["params"])


def test_with_one_replica_nothing_changes() -> None:
    run_ranks(2, _one_replica)
