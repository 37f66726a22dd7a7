"""Offload without processes: an optimizer's step on the host, what is refused, and two memories that do not mix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lightning_mics import MiCSFabricStrategy, MiCSStrategy, offload
from lightning_mics._compat import FakeTensorMode
from lightning_mics.accelerate import MiCSAccelerator
from lightning_mics.channels import InlineChannel
from lightning_mics.comms import HopOne
from lightning_mics.flat import ShardGradient
from lightning_mics.groups import Groups
from lightning_mics.offload import Offload, backend_with_host, check_backend, step_on_host, stepped_for
from lightning_mics.sharding import shard
from lightning_mics.topology import Topology
from lightning_mics.two_hop import Window
from tests.distributed.toys import whole

CUDA = torch.device("cuda", 0)


def net(device: torch.device | str = "cpu") -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 4, device=device), nn.Linear(4, 2, device=device))


def gradients(module: nn.Module, step: int) -> None:
    module.zero_grad()
    x = torch.ones(3, 4, device=next(module.parameters()).device) * (step + 1)
    module(x).square().mean().backward()


def pair(**options: Any) -> list[tuple[nn.Module, Any]]:
    """The same training twice, and the second one's optimizer steps on the host."""
    made = [(module, torch.optim.AdamW(module.parameters(), lr=0.1, **options)) for module in (net(), net())]
    step_on_host(made[1][1])
    return made


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def held(optimizer: Any) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


# -- an optimizer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_steps_are_those_on_the_device_whatever_changes_a_parameter_between_them(options: dict[str, Any]) -> None:
    (plain, there), (module, here) = pair(**options)
    scheduler = [torch.optim.lr_scheduler.StepLR(each, 1, 0.5) for each in (there, here)]
    for step in range(3):
        for each, optimizer, schedule in zip((plain, module), (there, here), scheduler, strict=True):
            gradients(each, step)
            if step == 1:
                optimizer.step(lambda each=each: gradients(each, 7))
            else:
                optimizer.step()
            schedule.step()
            with torch.no_grad():
                each[0].weight.mul_(0.5)
    assert same(plain, module) and not same(module, net())
    assert all(param is own for param, own in zip(held(here), module.parameters(), strict=True))
    assert all(param.grad is not None for param in held(here))
    assert [*here.state] == held(here)


def test_gradients_of_a_closure_are_computed_on_the_parameters_themselves() -> None:
    """And cleared there, as Lightning does it within the step; a step that raises leaves them in their places, too."""
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    step_on_host(optimizer)
    seen: list[bool] = []

    def closure() -> None:
        seen.append(all(param is own for param, own in zip(held(optimizer), module.parameters(), strict=True)))
        optimizer.zero_grad()
        gradients(module, 0)

    optimizer.step(closure)
    optimizer.param_groups[0]["lr"] = "none"
    with pytest.raises(TypeError):
        optimizer.step(closure)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step(closure)
    assert seen == [True] * 3


def test_loaded_state_is_where_the_step_is() -> None:
    (_, there), (module, here) = pair()
    for optimizer, each in ((there, _), (here, module)):
        gradients(each, 0)
        optimizer.step()
    fresh = torch.optim.AdamW(module.parameters())
    step_on_host(fresh)
    with patch.object(offload.HostStep, "_take", autospec=True, side_effect=offload.HostStep._take) as take:
        fresh.load_state_dict(there.state_dict())
    assert take.call_count == 1
    assert [*fresh.state] == held(fresh) == [*module.parameters()]
    assert all(stepped_for(fresh, param) is not param for param in held(fresh))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        fresh.load_state_dict({"state": {}, "param_groups": []})
    assert held(fresh) == [*module.parameters()]


class Twice(torch.optim.SGD):
    """Looks around before it steps, as SAM does."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        closure()
        return super().step(closure)


def test_optimizers_of_several_forwards_are_refused() -> None:
    module = net()
    with pytest.raises(ValueError, match=r'offload="optimizer" copies .* LBFGS runs several forwards'):
        step_on_host(torch.optim.LBFGS(module.parameters()))
    optimizer = Twice(module.parameters(), lr=0.1)
    step_on_host(optimizer)
    with pytest.raises(RuntimeError, match=r"Twice runs several forwards"):
        optimizer.step(lambda: gradients(module, 0))


# -- two memories: tensors that tell where they are, and have no values -----------------------------------------------


@contextmanager
def two_memories() -> Iterator[None]:
    stream = SimpleNamespace(synchronize=lambda: None, record_event=lambda: None, wait_event=lambda event: None)
    with (
        patch.object(offload, "_pins", return_value=False),
        patch.object(Tensor, "copy_", lambda self, other, non_blocking=False: self),  # what may go anywhere
        patch("torch.accelerator.current_stream", return_value=stream),
        FakeTensorMode(),
    ):
        yield


@pytest.fixture
def one_of_two() -> Iterator[Groups]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield Groups.create(Topology(2, 2, 2), "cpu")
    dist.destroy_process_group()


def test_an_optimizers_state_is_on_the_host_and_its_parameters_are_not() -> None:
    def given() -> None:
        for param in module.parameters():
            param.grad = torch.ones_like(param)

    def where() -> set[str]:
        return {value.device.type for state in optimizer.state.values() for value in state.values()}

    with two_memories():
        module = net(CUDA)
        optimizer = torch.optim.AdamW(module.parameters())
        given()
        optimizer.step()
        assert where() == {"cuda", "cpu"}, "steps are counted on the CPU"
        step_on_host(optimizer)
        optimizer.step()
        assert where() == {"cpu"}
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step(given)
        assert where() == {"cpu"} and {param.device.type for param in held(optimizer)} == {"cuda"}


def test_hop_1_comes_to_the_host(one_of_two: Groups) -> None:
    """As the engine calls it: memory for gradients, for their sum, the collective, and each parameter's arrival."""
    traffic: Any = SimpleNamespace(
        collectives=SimpleNamespace(begin_reduce_scatter=lambda whole: lambda: whole.view(2, -1).sum(0)),
        channel=InlineChannel(),
    )
    with two_memories():
        mesh = one_of_two.partition_mesh
        part = DTensor.from_local(torch.ones(3, 4), mesh, [Shard(0)], run_check=False, shape=(6, 4), stride=(4, 1))
        param = nn.Parameter(part)
        hop_1 = HopOne("block", [param], traffic, 2, 1, partial(offload.empty_on_host, device=CUDA))
        for _ in range(2):
            whole, sums = (hop_1.allocate((n,), dtype=torch.float32, device=CUDA) for n in (24, 12))
            assert (whole.device.type, sums.device.type) == ("cuda", "cpu")
            hop_1(sums, whole, one_of_two.partition_group, None)
            new = DTensor.from_local(sums.view(3, 4), mesh, [Shard(0)], run_check=False, shape=(6, 4), stride=(4, 1))
            param.grad = new if param.grad is None else param.grad + new
            hop_1.arrived(param)
            hop_1.finish()


def test_hop_2_goes_by_the_device() -> None:
    went: list[str] = []

    def all_reduce(buffer: Tensor) -> Iterator[None]:
        went.append(buffer.device.type)
        yield

    groups = SimpleNamespace(device=CUDA, topology=Topology(4, 4, 2))
    window: Any = SimpleNamespace(_on_host=True, _groups=groups, _all_reduce=all_reduce)
    with two_memories(), patch("lightning_mics.two_hop.together", lambda shards: shards[0].local.view(-1)):
        [*Window._average(window, [ShardGradient(torch.ones(3, 4), 12)], None)]
    assert went == ["cuda"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("how", ["parameters", "optimizer"])
def test_on_cuda_by_nccl_a_rank_alone_trains_as_without_it(how: str) -> None:
    """And with clipping, whose norm is of what is on the host. More ranks than one need more devices than one."""
    dist.init_process_group(backend_with_host(CUDA), store=dist.HashStore(), rank=0, world_size=1, device_id=CUDA)
    try:
        trained = []
        for each in (None, how):
            root = shard(net(), Groups.create(Topology(1, 1, 1), "cuda"), offload=each)
            root.one_backward = True
            optimizer = torch.optim.AdamW(root.parameters(), lr=0.1)
            if each == "optimizer":
                step_on_host(optimizer)
            for step in range(3):
                with root.window.backward():
                    root(torch.ones(3, 4, device=CUDA) * step).square().mean().backward()
                root.window.close()
                torch.nn.utils.clip_grad_norm_(root.parameters(), 0.5)
                optimizer.step()
                root.release()
                root.zero_grad()
            where = {value.device.type for state in optimizer.state.values() for value in state.values()}
            assert where == {"cpu"} or each is None
            assert {param.device.type for param in root.parameters()} == {"cpu" if each == "parameters" else "cuda"}
            trained.append([whole(param).cpu() for param in root.parameters()])
        for ours, plain in zip(*trained, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    finally:
        dist.destroy_process_group()


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_excludes_it_is_refused_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (MiCSStrategy, MiCSFabricStrategy, MiCSAccelerator):
        with pytest.raises(ValueError, match="offload='disk' is not understood; choose one of optimizer, parameters"):
            make(offload="disk")
        with pytest.raises(ValueError, match=r'offload="optimizer" with optimizer_state="world": .* choose'):
            make(offload="optimizer", optimizer_state="world")
    with pytest.raises(ValueError, match="offload='disk' is not understood"):
        shard(net(), None, offload="disk")  # type: ignore[arg-type]


def test_a_process_group_without_the_hosts_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match=r'backend \'nccl\' does not carry; .* "cpu:gloo,cuda:nccl"'):
        check_backend(Offload.PARAMETERS, CUDA, "nccl")
    for backend in ("gloo", "cpu:gloo,cuda:nccl"):
        check_backend(Offload.PARAMETERS, CUDA, backend)
    check_backend(None, CUDA, "nccl")
    check_backend(Offload.OPTIMIZER, torch.device("cpu"), "gloo")
