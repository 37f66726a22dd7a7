"""What carries tensors: by device as well as by backend, and the forms that an accelerator gets, run on CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.gpu_exercise import check_collectives, check_ladder
from lightning_mics.channels import InlineChannel
from lightning_mics.collectives import Collectives
from lightning_mics.comms import HopOne
from lightning_mics.exchange import Exchange
from lightning_mics.groups import Groups, backend_for
from lightning_mics.ladder import RUNGS, Rung
from lightning_mics.native import Native
from lightning_mics.network import Network
from lightning_mics.pipelined import Pipelined
from lightning_mics.topology import Topology
from lightning_mics.wire import Traffic, collectives_for
from tests.distributed.ranks import run_ranks

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def chosen() -> list[tuple[str, str]]:
    """What carries tensors on the CPU and on an accelerator, and in which form."""
    tiers = Groups.create(Topology(2, 1, 2), "cpu").hop_1
    assert tiers is not None
    forms = [type(collectives_for(tiers, Network.default(1, "cpu"), device)).__name__ for device in (CPU, CUDA)]
    return [*zip([backend_for(CPU, tiers.everyone), backend_for(CUDA, tiers.everyone)], forms, strict=True)]


def test_gloo_exchanges_messages_between_hosts_and_never_from_an_accelerator() -> None:
    assert run_ranks(2, chosen) == [[("gloo", Exchange.__name__), ("gloo", Native.__name__)]] * 2


def chosen_for_nccl() -> str:
    tiers = Groups.create(Topology(2, 1, 2), "cpu").hop_1
    assert tiers is not None
    with patch.object(dist, "get_backend_config", return_value="cpu:gloo,cuda:nccl"):
        return type(collectives_for(tiers, Network.default(1, "cpu"), CUDA)).__name__


def test_nccl_sends_from_an_accelerator() -> None:
    assert run_ranks(2, chosen_for_nccl) == [Pipelined.__name__] * 2


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("cpu:gloo,cuda:nccl", ("gloo", "nccl")),
        ("cuda:nccl", ("cuda:nccl", "nccl")),
        ("cpu:gloo,cuda:gloo", ("gloo", "gloo")),
    ],
)
def test_a_group_may_have_a_backend_for_each_device(config: str, expected: tuple[str, str]) -> None:
    with (
        patch.object(dist, "get_backend_config", return_value=config),
        patch.object(dist, "get_backend", return_value=config),
    ):
        assert (backend_for(CPU), backend_for(CUDA)) == expected


def differing_by_accelerators_forms(form: type[Collectives], rungs: Sequence[Rung]) -> list[str]:
    """The checks that fail with the backend's collectives, issued inline, as they are where there are streams."""
    with (
        patch("lightning_mics.wire.channel_for", lambda *_, **__: InlineChannel()),
        patch("lightning_mics.wire.collectives_for", lambda tiers, network, _, narrow: form(tiers, network, narrow)),
        patch("benchmarks.gpu_exercise.RUNGS", rungs),
        patch("benchmarks.gpu_exercise.channel_for", lambda *_, **__: InlineChannel()),
        patch(
            "benchmarks.gpu_exercise.collectives_for",
            lambda tiers, network, _, narrow: form(tiers, network, narrow),
        ),
    ):
        checks = [*check_collectives(CPU), *check_ladder(CPU)]
    assert len(checks) == 18 + 3 * len(rungs)  # collectives; p = 1, 2 and 4
    return [f"{check.what}: {check.error}, {check.loss_error}" for check in checks if not check.passed]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "rungs"), [(Native, (RUNGS[0], RUNGS[-1])), (Pipelined, RUNGS[::3] + RUNGS[-2:])])
def test_rungs_train_alike_with_what_an_accelerator_gets(form: type[Collectives], rungs: Sequence[Rung]) -> None:
    assert run_ranks(4, differing_by_accelerators_forms, form, rungs) == [[]] * 4


# -- memory on an accelerator ------------------------------------------------------------------------------------------


class _Stream:
    """Stands for an accelerator's stream, and notes what is asked of it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    def record_event(self) -> str:
        self.log.append(f"{self.name} records")
        return f"what {self.name} had to do"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


class _Elsewhere(Tensor):
    """A tensor that says that it is on an accelerator."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA


class _Sum:
    """Of one rank."""

    def begin_reduce_scatter(self, buffer: Tensor) -> Callable[[], Tensor]:
        return buffer.as_subclass(Tensor).clone


def buffers_under_way() -> tuple[list[str], list[bool]]:
    """What streams are told, and whether a block's buffer is alive behind hop 1 and behind the next allocation."""
    log: list[str] = []
    streams = {name: _Stream(name, log) for name in ("computing", "reducing", "hop 2")}
    tiers = Groups.create(Topology(1, 1, 1), "cpu").partition_group
    traffic = Traffic(_Sum(), InlineChannel())  # type: ignore[arg-type]
    shard = nn.Parameter(DTensor.from_local(torch.ones(4), DeviceMesh.from_group(tiers, "cpu"), [Shard(0)]))
    hop_1 = HopOne("a block", [shard], traffic, partition_size=1, most_under_way=1)
    shard.grad = torch.zeros_like(shard)
    with patch("torch.accelerator.current_stream", lambda *_: streams[log_of[-1]]):
        log_of = ["computing"]
        buffer = hop_1.allocate((4,), dtype=torch.float32, device=CPU).as_subclass(_Elsewhere)
        alive = weakref.ref(buffer)
        log_of.append("reducing")
        hop_1(torch.empty(4), buffer, tiers, None)
        del buffer
        hop_1.arrived(shard)
        log_of.append("hop 2")
        assert hop_1.transfer is not None
        hop_1.transfer.wait()
        kept = [alive() is not None]
        log_of.append("computing")
        hop_1.allocate((4,), dtype=torch.float32, device=CPU)
    return log, [*kept, alive() is not None]


def test_a_buffer_is_free_when_the_computing_stream_is_behind_its_hop_1() -> None:
    """And not when hop 2, on another stream, has waited for it."""
    [(log, alive)] = run_ranks(1, buffers_under_way)
    assert log == [
        "reducing records",
        "computing waits for what reducing had to do",
    ]
    assert alive == [True, False]
