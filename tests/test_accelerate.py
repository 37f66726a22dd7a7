"""What MiCSAccelerator refuses, before any process group is there."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin, ParallelismConfig
from torch import nn

from lightning_mics.accelerate import MiCSAccelerator
from lightning_mics.successors import check_state


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"partition_size": 2}, r"partition_size=2 does not divide world_size=1; choose one of 1"),
        ({"fsdp_plugin": FullyShardedDataParallelPlugin}, r"fsdp_plugin asks Accelerate to shard .* leave it out"),
        ({"parallelism_config": ParallelismConfig}, r"parallelism_config asks Accelerate to shard"),
        ({"writers": "group", "optimizer_state": "world"}, r'writers="group" needs every partition group'),
        ({"rung": "highest"}, r"rung='highest'"),
        ({"compile": "yes"}, r"compile='yes' must be True, False or a mapping"),
        ({"async_save": "yes"}, r"async_save='yes' must be True or False"),
    ],
)
def test_bad_arguments_are_refused_by_name(options: dict[str, Any], says: str) -> None:
    options = {name: value() if isinstance(value, type) else value for name, value in options.items()}
    with pytest.raises((ValueError, TypeError), match=says):
        MiCSAccelerator(cpu=True, **options)


def test_a_hook_of_ddps_is_told_to_do_nothing(caplog: pytest.LogCaptureFixture) -> None:
    MiCSAccelerator(1, cpu=True, kwargs_handlers=[DistributedDataParallelKwargs()])
    assert not caplog.messages
    MiCSAccelerator(1, cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(comm_hook="bf16")])
    assert "comm_hook=bf16 is DDP's, and does nothing here; between_nodes=torch.bfloat16" in caplog.text


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("ACCELERATE_USE_FSDP", "true", r"ACCELERATE_USE_FSDP is set.*let distributed_type be MULTI_GPU or MULTI_CPU"),
        ("ACCELERATE_USE_DEEPSPEED", "true", r"ACCELERATE_USE_DEEPSPEED is set"),
        ("WORLD_SIZE", "2", r"2 processes were started, and Accelerate takes this one to be alone.*cpu=True"),
    ],
)
def test_a_configuration_that_excludes_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=says):
        MiCSAccelerator()


def test_state_that_cannot_be_sharded_is_refused() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    check_state(optimizer)
    optimizer.state[model.weight]["rows"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"AdamW has state already: rows of a parameter of shape \(4, 4\)"):
        check_state(optimizer)


def test_it_is_pickled_as_accelerates_own_is(tmp_path: Path) -> None:
    accelerator = MiCSAccelerator(1, cpu=True, gradient_accumulation_steps=3)
    accelerator.save_state(tmp_path / "before")
    again = pickle.loads(pickle.dumps(accelerator))
    assert again.topology == accelerator.topology and again.gradient_accumulation_steps == 3
    assert again.state.__dict__ == accelerator.state.__dict__
    model = again.prepare(nn.Linear(2, 2))
    again.save_state(tmp_path / "after")
    assert [*again.roots()] == [model] and (tmp_path / "after").is_dir()


def test_checkpoints_need_a_place() -> None:
    """In one process, which no launcher has started and nothing was prepared in."""
    accelerator = MiCSAccelerator(cpu=True)
    with pytest.raises(ValueError, match=r"no directory was given"):
        accelerator.save_state()
    with pytest.raises(TypeError, match=r"exclude_frozen: save_state takes no arguments"):
        accelerator.save_state("somewhere", exclude_frozen=True)
    with pytest.raises(TypeError, match=r"mmap: load_state takes strict"):
        accelerator.load_state("somewhere", {"mmap": True})


def test_one_process(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    twin = copy.deepcopy(model)
    accelerator = MiCSAccelerator(cpu=True, gradient_accumulation_steps=2)
    make = partial(torch.optim.AdamW, lr=0.1)
    sharded, optimizer = accelerator.prepare(model, make(model.parameters()))
    plain = make(twin.parameters())
    for step in range(4):
        x = torch.randn(2, 4)
        with accelerator.accumulate(sharded):
            accelerator.backward(sharded(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        (twin(x).square().mean() / 2).backward()
        if step % 2:
            plain.step()
            plain.zero_grad()
    assert accelerator.unwrap_model(sharded) is model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    accelerator.save_state(tmp_path / "state")
    with torch.no_grad():
        model[0].weight.zero_()
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(model[0].weight, twin[0].weight)
    accelerator.end_training()
