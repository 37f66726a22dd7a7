"""MiCSAccelerator against Accelerate's own Accelerator, which is DDP on the same ranks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin
from torch import Tensor, nn

from compatibility.accelerate_rank import Order
from compatibility.accelerate_scripts import environment, read
from tests.distributed.accelerating import Net, data, launched, ours, parameters, theirs
from tests.distributed.counting import collectives
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import assert_close, assert_same_losses, device
from tests.ports import reserved_port
from tests.raising import raised

Run = tuple[list[float], dict[str, Tensor]]
mse = nn.functional.mse_loss


def batches(rank: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Of this rank, without end."""
    generator = torch.Generator().manual_seed(dist.get_rank() if rank is None else rank)
    while True:
        x = torch.randn(2, 8, generator=generator).to(device())
        yield x, torch.tanh(x[:, :3].cumsum(1) + x[:, 3:6])


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def same(
    run: Callable[[Accelerator], Run], *accelerators: Callable[[], Accelerator], within: float = 1e-6, **options: Any
) -> None:
    """`run` under DDP, and under each of ours or with p = 1 and p = 2."""
    what = getattr(run, "__name__", "")
    expected = run(theirs(**options))
    for make in accelerators or (lambda: ours(1, **options), lambda: ours(2, **options)):
        losses, params = run(make())
        assert_same_losses(losses, expected[0], what, rtol=within)
        assert_close(params, expected[1], what, atol=within)


# -- windows -----------------------------------------------------------------------------------------------------------


def train(accelerator: Accelerator, *, epochs: int = 2, clip: float | None = None) -> tuple[Any, ...]:
    """Seven micro-steps an epoch: the second window is short."""
    model = Net()
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 20))
    torch.manual_seed(5)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, data(56, shuffle=True), scheduler)
    losses, norms = [], []
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = mse(model(x), y)
                losses.append(loss.item())
                accelerator.backward(loss)
                if clip and accelerator.sync_gradients:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), clip)))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return losses, parameters(accelerator, model), norms, scheduler.get_last_lr()


def _windows() -> None:
    with launched():
        for window, sizes in ((1, [2]), (4, [1, 2, 4])):
            expected = train(theirs(gradient_accumulation_steps=window), clip=0.05)
            for p in sizes:
                what = f"p = {p}, window {window}"
                found = train(ours(p, gradient_accumulation_steps=window), clip=0.05)
                assert_same_losses(found[0], expected[0], what, rtol=1e-6)
                assert_close(found[1], expected[1], what, atol=1e-6)
                assert_same_losses(found[2], expected[2], f"norms, {what}", rtol=1e-6)
                assert found[3] == expected[3]


def test_losses_parameters_and_norms_are_those_of_ddp() -> None:
    run_ranks(4, _windows)


def _traffic(partition_size: int) -> None:
    """In a window's midst nothing leaves the partition group, and no gradient is all-reduced."""
    accelerator = ours(partition_size, gradient_accumulation_steps=3)
    model = Net()
    model, optimizer = accelerator.prepare(model, adam(model))
    replica = set(next(g for g in accelerator.topology.partition_groups if dist.get_rank() in g))
    data = batches()
    for micro_step in range(6):
        x, y = next(data)
        with accelerator.accumulate(model), collectives() as calls:
            accelerator.backward(mse(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        boundary = micro_step % 3 == 2
        assert accelerator.sync_gradients == boundary
        peers = {call.to for call in calls if call.to is not None} | {r for call in calls for r in call.ranks}
        assert bool(calls) == (boundary or partition_size > 1)
        if not boundary:
            assert peers <= replica, calls
            assert not [call for call in calls if call.kind == "all_reduce"], calls
        elif partition_size < 4:
            assert not peers <= replica


# -- the user's loop ---------------------------------------------------------------------------------------------------


def prepared_late(accelerator: Accelerator) -> Run:
    """The optimizer first, the model by itself and last, two optimizers of one model."""
    model = Net()
    first = torch.optim.AdamW(model.layers.parameters(), lr=1e-2)
    second = torch.optim.SGD([*model.enter.parameters(), *model.leave.parameters()], lr=0.1, momentum=0.9)
    first = accelerator.prepare(first)
    second, model = accelerator.prepare(second, model)
    return loop(accelerator, model, first, second)


def loop(accelerator: Accelerator, model: nn.Module, *optimizers: Any, steps: int = 8) -> Run:
    losses = []
    data = batches()
    for _ in range(steps):
        x, y = next(data)
        with accelerator.accumulate(model):
            loss = mse(model(x), y)
            losses.append(loss.item())
            accelerator.backward(loss)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return losses, parameters(accelerator, model)


def with_state(accelerator: Accelerator) -> Run:
    """An optimizer that has stepped before it is prepared."""
    model = Net().to(device())
    optimizer = adam(model)
    x, y = next(batches(0))
    mse(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    model, optimizer = accelerator.prepare(model, optimizer)
    return loop(accelerator, model, optimizer)


def rivals(accelerator: Accelerator) -> Run:
    """Two models, each with its optimizer and its turn."""
    torch.manual_seed(1)
    maker, judge = Net(), nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    makers, judges = adam(maker), torch.optim.SGD(judge.parameters(), lr=0.1, momentum=0.9)
    maker, judge, makers, judges = accelerator.prepare(maker, judge, makers, judges)
    losses, data, score = [], batches(), nn.functional.softplus
    for _ in range(4):
        noise, real = next(data)
        loss = score(-judge(maker(noise))).mean()
        losses.append(loss.item())
        accelerator.backward(loss)
        makers.step()
        makers.zero_grad()
        judges.zero_grad()
        with torch.no_grad():
            fake = maker(noise)
        loss = score(torch.cat([-judge(real), judge(fake)])).mean()
        losses.append(loss.item())
        accelerator.backward(loss)
        judges.step()
        judges.zero_grad()
    return losses, parameters(accelerator, maker) | {f"judge.{k}": v for k, v in parameters(accelerator, judge).items()}


def two_views(accelerator: Accelerator) -> Run:
    """Two forwards before a backward, and then one."""
    model = Net()
    model, optimizer = accelerator.prepare(model, adam(model))
    losses, data = [], batches()
    for step in range(6):
        with accelerator.accumulate(model):
            x, y = next(data)
            loss = mse(model(x), y)
            if step % 3:
                loss = loss + (model(x) - model(-x)).square().mean()
            losses.append(loss.item())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return losses, parameters(accelerator, model)


def two_backwards(accelerator: Accelerator) -> Run:
    """Two losses of one forward, of which DDP would not synchronise the second; gradients that nobody has cleared."""
    model = Net()
    model, optimizer = accelerator.prepare(model, adam(model))
    losses, data = [], batches()
    for step in range(4):
        x, y = next(data)
        output = model(x)
        parts = mse(output, y), output.square().mean()
        losses.append(parts[0].item())
        if isinstance(model, nn.parallel.DistributedDataParallel):
            accelerator.backward(sum(parts))
        else:
            accelerator.backward(parts[0], retain_graph=True)
            accelerator.backward(parts[1])
        optimizer.step()
        if step % 2:
            optimizer.zero_grad()
    return losses, parameters(accelerator, model)


def plain_backward(accelerator: Accelerator) -> Run:
    """`loss.backward()`, as in some examples of Accelerate's."""
    model = Net()
    model, optimizer = accelerator.prepare(model, adam(model))
    losses, data = [], batches()
    for _ in range(8):
        x, y = next(data)
        with accelerator.accumulate(model):
            loss = mse(model(x), y)
            losses.append(loss.item())
            loss.backward()
            if accelerator.sync_gradients:
                accelerator.clip_grad_value_(model.parameters(), 1e-3)
            optimizer.step()
            optimizer.zero_grad()
    return losses, parameters(accelerator, model)


def cut_short(accelerator: Accelerator) -> Run:
    """A window that is given up in its midst, by hand, leaves nothing to the next."""
    model = Net()
    model, optimizer = accelerator.prepare(model, adam(model))
    losses, data = [], batches()
    for step in range(4):
        for micro_step in range(3):
            x, y = next(data)
            with accelerator.no_sync(model) if micro_step < 2 else nullcontext():
                loss = mse(model(x), y)
                losses.append(loss.item())
                accelerator.backward(loss)
            if step == 1 and micro_step == 1:
                optimizer.zero_grad()
            if step == 2 and micro_step == 0:
                model.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
    return losses, parameters(accelerator, model)


class Failed(Exception):
    pass


def failing(accelerator: Accelerator) -> Run:
    """A micro-step that fails on every rank; the user goes on with the next window."""
    model = Net()
    model, optimizer = accelerator.prepare(model, adam(model))
    losses, data = [], batches()
    for step in range(9):
        x, y = next(data)
        try:
            with accelerator.accumulate(model):
                output = model(x)
                loss = mse(output, y)
                losses.append(loss.item())
                if step == 4:
                    output.register_hook(_fail)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        except Failed:
            accelerator.step = 0
            model.zero_grad()
    return losses, parameters(accelerator, model)


def _fail(gradient: Tensor) -> None:
    raise Failed


def evaluates(accelerator: Accelerator) -> Run:
    """Between two steps with other values in the parameters, as of an average; and with buffers that differ."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 3))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    losses, data = [], batches()
    for step in range(6):
        x, y = next(data)
        if step % 2:
            model.eval()
            with torch.no_grad():
                for factor in (0.5, 2.0, 1.0):
                    for param in accelerator.unwrap_model(model).parameters():
                        param.mul_(factor)
                    losses.append(mse(model(x), y).item())
            model.train()
        loss = mse(model(x), y)
        losses.append(loss.item())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return losses, parameters(accelerator, model)


def _loops() -> None:
    with launched():
        for partition_size in (1, 2):
            _traffic(partition_size)
        same(prepared_late)
        same(with_state, lambda: ours(2, gradient_accumulation_steps=2), gradient_accumulation_steps=2)
        same(rivals)
        same(two_views, gradient_accumulation_steps=2)
        same(two_backwards)
        same(plain_backward, gradient_accumulation_steps=4)
        same(cut_short, lambda: ours(1), lambda: ours(2, rung="window/whole"))
        same(failing, gradient_accumulation_steps=3)
        same(evaluates, within=1e-5)  # a variance of two samples magnifies what is rounded
        each = GradientAccumulationPlugin(num_steps=4, sync_each_batch=True)
        same(lambda accelerator: train(accelerator, epochs=1)[:2], gradient_accumulation_plugin=each)


def test_loops_of_the_users_own() -> None:
    run_ranks(4, _loops)


# -- precision, compilation, optimizer state over all ranks ------------------------------------------------------------


def _variants() -> None:
    with launched():
        expected = train(theirs(gradient_accumulation_steps=4), clip=0.05, epochs=1)
        eager = TorchDynamoPlugin(backend="eager")
        for options in (
            {"optimizer_state": "world"},
            {"rung": "auto", "memory_budget": 10**12, "activation_checkpointing": True},
            {"dynamo_plugin": eager, "ranks_per_node": 2, "partition_size": 4},
        ):
            found = train(ours(gradient_accumulation_steps=4, **options), clip=0.05, epochs=1)
            assert_same_losses(found[0], expected[0], str(options), rtol=1e-6)
            assert_close(found[1], expected[1], str(options), atol=1e-6)
            assert_same_losses(found[2], expected[2], f"norms, {options}", rtol=1e-6)
        expected = train(theirs(mixed_precision="bf16"), epochs=1)
        for p, tolerance in ((1, 1e-6), (2, 0.02)):
            accelerator = ours(p, mixed_precision="bf16")
            found = train(accelerator, epochs=1)
            assert_same_losses(found[0], expected[0], f"bf16, p = {p}", rtol=tolerance)
            assert {value.dtype for value in found[1].values()} == {torch.float32}
        scaled()
        meta()
        refused()


def scaled() -> None:
    """An infinity on one rank alone has all ranks skip the step; in fp16 the gradient scaler runs on CUDA alone."""
    for options in ({}, {"optimizer_state": "world"}):
        accelerator = ours(**options)
        accelerator.scaler = torch.amp.GradScaler(device().type, init_scale=1024.0)
        model = Net()
        model, optimizer = accelerator.prepare(model, adam(model))
        skipped, before, data = [], parameters(accelerator, model), batches()
        for step in range(3):
            x, y = next(data)
            accelerator.backward(mse(model(x), y) * (torch.inf if step == 1 and dist.get_rank() == 3 else 1.0))
            optimizer.step()
            skipped.append(accelerator.optimizer_step_was_skipped)
            optimizer.zero_grad()
            after = parameters(accelerator, model)
            assert skipped[-1] == torch.equal(before["enter.weight"], after["enter.weight"])
            before = after
        assert skipped == [False, True, False]
        assert optimizer.steps == 2


def meta() -> None:
    """A model without values is given some, the same on every rank."""
    with init_empty_weights():
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator = ours()
    model, optimizer = accelerator.prepare(model, optimizer)
    before = parameters(accelerator, model)
    x, y = next(batches())
    accelerator.backward(mse(model(x), y))
    optimizer.step()
    after = parameters(accelerator, model)
    assert not torch.equal(before["0.weight"], after["0.weight"])
    for name, value in after.items():
        assert all(torch.equal(value, each) for each in accelerator.gather(value[None])), name


def refused() -> None:
    """Before any collective, and so alike on all ranks."""
    accelerator = ours(optimizer_state="world")
    model = Net()
    model = accelerator.prepare(model)
    layers, rest = [*model.module.layers.parameters()], [*model.module.enter.parameters()]
    accelerator.prepare(torch.optim.SGD(layers, lr=0.1))
    says = raised(lambda: accelerator.prepare(torch.optim.SGD(rest, lr=0.1)))
    assert "shards one optimizer of a model, and this is its second" in says, says
    fresh = Net()
    says = raised(lambda: accelerator.prepare(fresh, torch.optim.Adafactor(fresh.parameters())))
    assert "Adafactor takes norms of whole rows and columns" in says, says
    x, _ = next(batches())
    model(x)
    says = raised(lambda: model(x))
    assert "needs a backward after each forward" in says, says
    says = raised(lambda: accelerator.prepare(torch.compile(Net(), backend="eager")))
    assert "compiled already" in says, says
    says = raised(lambda: accelerator.join_uneven_inputs([model], even_batches=False).__enter__())
    assert "even_batches=False leaves ranks with different numbers of batches" in says, says


def test_precision_compilation_and_optimizer_state() -> None:
    run_ranks(4, _variants)


# -- launched by Accelerate --------------------------------------------------------------------------------------------

CONFIGURATION = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 2
machine_rank: 0
mixed_precision: "no"
main_process_port: {port}
"""


@pytest.mark.slow
def test_accelerates_own_script_as_accelerate_launches_it(tmp_path: Path) -> None:
    """Its launcher starts several processes without MPI for GPUs only, and they train on CPUs when told so."""
    order = Order("test_script", report=str(tmp_path), partition_size=2).dump()
    with reserved_port() as port:
        (tmp_path / "config.yaml").write_text(CONFIGURATION.format(port=port))
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "config.yaml"]
        command = [*launch, "--module", "compatibility.accelerate_rank", order]
        env = environment(world_size=2)
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for part in ("Training yielded the same results", "BF16 training check", "Breakpoint trigger test"):
        assert part in done.stdout
    found = read(tmp_path, "")
    assert "training_check(use_seedable_sampler=True)" in found
    assert {outcome.result for outcome in found.values()} == {"passes"}
