"""What carries tensors: by device as well as by backend, and the forms that an accelerator gets, run on CPU."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from benchmarks.gpu_exercise import check_collectives, check_ladder
from lightning_mics.channels import InlineChannel
from lightning_mics.collectives import Exchange, Native, collectives_for
from lightning_mics.groups import Groups, backend_for
from lightning_mics.network import Network
from lightning_mics.topology import Topology
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


def differing_by_accelerators_forms() -> list[str]:
    """The checks that fail with the backend's collectives, issued inline, as they are where there are streams."""
    with (
        patch("lightning_mics.wire.channel_for", lambda *_, **__: InlineChannel()),
        patch("lightning_mics.wire.collectives_for", lambda tiers, network, _, narrow: Native(tiers, network, narrow)),
        patch("benchmarks.gpu_exercise.channel_for", lambda *_, **__: InlineChannel()),
        patch(
            "benchmarks.gpu_exercise.collectives_for",
            lambda tiers, network, _, narrow: Native(tiers, network, narrow),
        ),
    ):
        checks = [*check_collectives(CPU), *check_ladder(CPU)]
    assert len(checks) == 18 + 18
    return [f"{check.what}: {check.error}, {check.loss_error}" for check in checks if not check.passed]


@pytest.mark.slow
def test_every_rung_trains_alike_with_what_an_accelerator_gets() -> None:
    assert run_ranks(4, differing_by_accelerators_forms) == [[]] * 4
