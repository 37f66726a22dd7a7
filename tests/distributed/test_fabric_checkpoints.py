"""Checkpoints of Fabric: saved at one partition size, loaded at another, from and into DDP's and a Trainer's too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from typer.testing import CliRunner

from lightning_mics import MiCSStrategy, consolidate
from lightning_mics.checkpoint import Checkpoint
from mics_tools.cli import app
from tests.distributed.fabrics import Net, adamw, ddp, mics, seeded, set_up, train
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import (
    Batches,
    Toy,
    assert_close,
    assert_same_losses,
    optimizer_state,
    parameters,
    trainer,
)
from tests.distributed.toys import seeded as seeded_toy
from tests.raising import raised

RANKS = 4


def fresh(made: Any, seed: int = 11) -> tuple[Any, Any]:
    """A model of other values, and an optimizer without state."""
    module = seeded(seed=seed)
    return made.setup(module, adamw(module.parameters()))


def numbers(model: Any, optimizer: Any) -> dict[Any, torch.Tensor]:
    return {**parameters(model.module), **optimizer_state(optimizer.optimizer)}


def saved(folder: Path) -> None:
    """Two windows, saved at p = 2; then a third, at every p."""
    made = mics(2)
    model, optimizer = set_up(made)
    train(made, model, optimizer, windows=2)
    made.save(folder / "p2", {"model": model, "optimizer": optimizer, "iter": 5, "epoch": 1, "notes": {"lr": [0.1]}})
    made.save(folder / "bare", {"model": model}, filter={"model": lambda name, value: "leave" not in name})
    with torch.inference_mode():
        made.save(folder / "within", {"model": model, "optimizer": optimizer})
    before = numbers(model, optimizer)
    losses = train(made, model, optimizer, windows=1, first=2)

    for p in (2, 1, 4):
        other = mics(p)
        again, stepped = fresh(other)
        state = {"model": again, "optimizer": stepped, "iter": 0}
        rest = other.load(folder / "p2", state)
        assert state["iter"] == 5 and rest == {"epoch": 1, "notes": {"lr": [0.1]}}
        assert_close(numbers(again, stepped), before, f"loaded at p={p}")
        ours = train(other, again, stepped, windows=1, first=2)
        assert_same_losses(ours, losses, f"resumed at p={p}", rtol=0.0 if p == 2 else 1e-6)

    within, stepped = fresh(made)
    with torch.inference_mode():
        made.load(folder / "within", {"model": within, "optimizer": stepped})
    assert_close(numbers(within, stepped), before, "saved and loaded within inference mode")

    over_all, stepped = fresh(mics(2, optimizer_state="world"))
    mics(2, optimizer_state="world").load(folder / "p2", {"model": over_all, "optimizer": stepped})
    ours = train(mics(2, optimizer_state="world"), over_all, stepped, windows=1, first=2)
    assert_same_losses(ours, losses, "resumed over all ranks", rtol=1e-6)

    partly, _ = fresh(made, seed=13)
    values = parameters(partly.module)
    assert "names differ" in raised(lambda: made.load(folder / "bare", {"model": partly}))
    assert_close(parameters(partly.module), values, "an error leaves all as it was")
    made.load(folder / "bare", {"model": partly}, strict=False)
    kept = {name: values[name] if "leave" in name else before[name] for name in values}
    assert_close(parameters(partly.module), kept, "filtered")

    everything = made.load(folder / "p2")
    assert everything["iter"] == 5 and set(everything) == {"model", "optimizer", "iter", "epoch", "notes"}
    plain = Net()
    plain.load_state_dict(everything["model"])
    step = adamw(plain.parameters())
    step.load_state_dict(everything["optimizer"])
    assert_close({**parameters(plain), **optimizer_state(step)}, before, "whole, without a strategy")
    made.load_raw(folder / "p2", partly)
    assert_close(parameters(partly.module), {name: before[name] for name in values}, "raw, from a directory")


def shown(folder: Path) -> None:
    """The commands know what Fabric wrote."""
    if dist.get_rank() == 0:
        told = CliRunner().invoke(app, ["show", str(folder / "p2")])
        assert told.exit_code == 0 and re.search(r"step +5, in epoch 1\b", told.output), told.output
        assert re.search("4 ranks, [14] a node, in partition groups of 2", told.output)  # one where each has a GPU
        told = CliRunner().invoke(app, ["verify", str(folder / "p2"), str(folder / "bare")])
        assert told.exit_code == 0, told.output
    dist.barrier()


def damaged(folder: Path) -> None:
    made = mics(2)
    model, _ = fresh(made)
    values = parameters(model.module)
    made.save(folder / "damaged", {"model": model, "iter": 1})
    if dist.get_rank() == 0:
        with next((folder / "damaged").glob("model-*")).open("r+b") as file:
            file.seek(40)
            file.write(b"\xff\xff\xff\xff")
    dist.barrier()
    assert raised(lambda: made.load(folder / "damaged", {"model": model})).startswith("DamagedCheckpoint")
    assert_close(parameters(model.module), values, "a damaged checkpoint")


def from_ddp(folder: Path) -> None:
    """A single file of Fabric's DDP goes on here, and what it wrote raw is loaded."""
    reference = ddp()
    model, optimizer = set_up(reference)
    train(reference, model, optimizer, windows=2)
    reference.save(folder / "ddp.ckpt", {"model": model, "optimizer": optimizer, "iter": 5})
    expected = numbers(model, optimizer)
    if dist.get_rank() == 0:
        torch.save(model.module.state_dict(), folder / "model.pt")
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    dist.barrier()
    losses = train(reference, model, optimizer, windows=1, first=2)
    for p in (1, 2, 4):
        made = mics(p)
        ours, stepped = fresh(made)
        state = {"model": ours, "optimizer": stepped, "iter": 0}
        assert made.load(folder / "ddp.ckpt", state) == {} and state["iter"] == 5
        assert_close(numbers(ours, stepped), expected, f"from DDP, p={p}")
        assert_same_losses(train(made, ours, stepped, windows=1, first=2), losses, f"after DDP, p={p}", rtol=1e-6)
        ours, stepped = fresh(made)
        made.load_raw(folder / "model.pt", ours)
        made.load_raw(folder / "optimizer.pt", stepped)
        assert_close(numbers(ours, stepped), expected, f"raw, p={p}")


def from_a_trainer(folder: Path) -> None:
    toy = seeded_toy(Toy)
    run = trainer(MiCSStrategy(2), max_steps=2)
    run.fit(toy, Batches(2))
    run.save_checkpoint(folder / "trainer.ckpt")
    made = mics(4)
    other = seeded_toy(Toy, seed=12)
    model, optimizer = made.setup(other, adamw(other.parameters()))
    told = raised(lambda: made.load(folder / "trainer.ckpt", {"model": model, "iter": 0}))
    assert "no value 'iter'" in told
    made.load(folder / "trainer.ckpt", {"model": model, "optimizer": optimizer})
    assert_close(numbers(model, optimizer), {**parameters(toy), **optimizer_state(run.optimizers[0])}, "a Trainer's")


def several(folder: Path) -> None:
    """Two modules, their optimizers, a scheduler and a module that was not set up."""
    made = mics(2)
    (a, a_step), (b, b_step) = set_up(made), fresh(made)
    scheduler = torch.optim.lr_scheduler.StepLR(a_step.optimizer, 1)
    train(made, a, a_step, windows=1)
    train(made, b, b_step, windows=1)
    scheduler.step()
    metric = torch.nn.Linear(1, 1)
    state = {"a": a, "b": b, "of_a": a_step, "of_b": b_step, "scheduler": scheduler, "metric": metric}
    made.save(folder / "two", state)
    before = numbers(a, a_step), numbers(b, b_step)
    (x, x_step), (y, y_step) = fresh(mics(4), 21), fresh(mics(4), 22)
    again = torch.optim.lr_scheduler.StepLR(x_step.optimizer, 1)
    other = torch.nn.Linear(1, 1)
    state = {"of_b": y_step, "of_a": x_step, "b": y, "a": x, "scheduler": again, "metric": other}
    mics(4).load(folder / "two", state)
    assert_close(numbers(x, x_step), before[0], "the first of two")
    assert_close(numbers(y, y_step), before[1], "the second of two")
    assert again.last_epoch == 1 and torch.equal(other.weight, metric.weight)
    assert "load all of ['a', 'b']" in raised(lambda: mics(4).load(folder / "two", {"a": x}))
    assert "state lacks the optimizers ['of_b']" in raised(
        lambda: mics(4).load(folder / "two", {"a": x, "b": y, "of_a": x_step})
    )


def exported(folder: Path) -> None:
    """One file, with the user's keys: Fabric's DDP takes it, and so do we."""
    if dist.get_rank() == 0:
        consolidate(folder / "p2", folder / "p2.ckpt")
        consolidate(folder / "two", folder / "two.ckpt")
    dist.barrier()
    assert [*torch.load(folder / "p2.ckpt")] == ["model", "optimizer", "iter", "epoch", "notes"]
    assert [*torch.load(folder / "two.ckpt")] == ["a", "b", "of_a", "of_b", "scheduler", "metric"]
    found = []
    for made, path in ((mics(2), folder / "p2"), (ddp(), folder / "p2.ckpt"), (mics(4), folder / "p2.ckpt")):
        model, optimizer = fresh(made)
        state = {"model": model, "optimizer": optimizer, "iter": 0}
        assert made.load(path, state) == {"epoch": 1, "notes": {"lr": [0.1]}} and state["iter"] == 5
        found.append(numbers(model, optimizer))
    for other in found[1:]:
        assert_close(other, found[0], "exported")


def mistakes(folder: Path) -> None:
    made = mics(2)
    model, optimizer = fresh(made)
    other, _ = fresh(made)
    path = folder / "p2"
    assert "no value 'itr'" in raised(lambda: made.load(path, {"model": model, "itr": 0}))
    made.load(path, {"model": model, "itr": 0}, strict=False)
    assert "no module 'net'" in raised(lambda: made.load(path, {"net": model}))
    assert "no optimizer 'adam'" in raised(lambda: made.load(path, {"model": model, "adam": optimizer}))
    assert "holds no module" in raised(lambda: made.save(folder / "x", {"iter": 1}))
    assert "of no module in the state" in raised(lambda: made.save(folder / "x", {"model": other, "opt": optimizer}))
    sharded = {"model": model, "ema": [p.detach() for p in model.parameters()]}
    assert "state['ema'] holds sharded tensors" in raised(lambda: made.save(folder / "x", sharded))
    told = raised(lambda: made.save(folder / "x", {"model": model, "o": optimizer}, filter={"o": lambda *_: True}))
    assert "saved whole or not at all" in told
    assert "no file system" in raised(lambda: made.save("s3://bucket/x", {"model": model}))
    assert "takes no storage options" in raised(lambda: made.strategy.save_checkpoint(folder, {}, {"a": 1}))
    assert "is not a checkpoint" in raised(lambda: made.load(folder / "nowhere", {"model": model}))
    assert "is no file: load_raw" in raised(lambda: made.load_raw(path, optimizer))
    assert not (folder / "x").exists()


def everything(folder: str) -> None:
    for check in (saved, shown, damaged, from_ddp, from_a_trainer, several, exported, mistakes):
        check(Path(folder))


def by_fewer(folder: str) -> None:
    """Two ranks, one replica over both."""
    made = mics(None)
    model, optimizer = fresh(made)
    state = {"model": model, "optimizer": optimizer, "iter": 0}
    made.load(Path(folder) / "p2", state)
    assert state["iter"] == 5
    saved = Checkpoint(Path(folder) / "p2").read()["state_dict"]
    assert_close(parameters(model.module), saved, "loaded by two ranks")


def test_checkpoints_go_on_at_any_size(tmp_path: Path) -> None:
    run_ranks(RANKS, everything, str(tmp_path))
    run_ranks(2, by_fewer, str(tmp_path))
