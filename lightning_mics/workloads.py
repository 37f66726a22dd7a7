"""What is to be planned, from the command line: a factory's model or workload, or one of the configuration."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_mics.plan_arguments import Arguments
from lightning_mics.planner.hardware import Cluster
from lightning_mics.planner.plan import Planner, Workload, token_batches
from lightning_mics.precision import Precision

_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", None: "fp32"}


@dataclass(frozen=True)
class Question:
    """A planner, and what it is asked to plan.

    Attributes:
        planner: on the cluster that was named.
        batch: samples of an optimizer step, of all ranks; None if the others are given.
        micro_batch: samples of a rank in a micro-step, if they are given.
        window: micro-steps of an optimizer step, likewise.
    """

    planner: Planner
    batch: int | None
    micro_batch: int | None
    window: int | None


def question(arguments: Arguments, config_dir: Path, *, of_any_size: bool = False) -> Question:
    """What a user asks, with what the configuration tells beside it.

    Args:
        arguments: of the command.
        config_dir: the folder of configurations.
        of_any_size: see `Arguments.planned_cluster`.

    Raises:
        ValueError: for what cannot be; names it.
        ImportError: where a module or an optional package is missing.
    """
    cluster = arguments.planned_cluster(of_any_size=of_any_size)
    micro_batch, window = arguments.micro_batch, arguments.window
    with _importable(Path.cwd(), config_dir.absolute().parent):
        if arguments.model is not None and ":" in arguments.model:
            workload = _of_factory(arguments, cluster)
        else:
            from lightning_mics.hydra_workload import configured

            told = configured(config_dir, _overrides(arguments), _default_precision(cluster))
            workload = told.workload
            if arguments.batch is None:
                micro_batch, window = micro_batch or told.micro_batch, window or told.window
    _check_peak(workload.precision, cluster)
    planner = Planner(workload, cluster, memory_budget=arguments.memory_budget)
    return Question(planner, arguments.batch, micro_batch, window)


def _default_precision(cluster: Cluster) -> str:
    if cluster.backend == "gloo":
        return "32-true"
    return "bf16-mixed" if "bf16" in cluster.device.peak_flops else "16-mixed"


def _check_peak(precision: Precision, cluster: Cluster) -> None:
    dtype, peaks = _NAMES.get(precision.param_dtype), cluster.device.peak_flops
    if dtype is not None and dtype not in peaks:
        raise ValueError(
            f"precision: {cluster.device.name} has no peak for {dtype}, only for {', '.join(peaks)}; give "
            f"precision={_default_precision(cluster)}"
        )


def _overrides(arguments: Arguments) -> list[str]:
    """The command's own words as Hydra's, behind which those of the user stand."""
    own = {
        "model": arguments.model,
        "data.seq_len": arguments.seq_len,
        "workload.precision": arguments.precision,
        "workload.activation_checkpointing": arguments.checkpointing,
        "workload.optimizer_state": arguments.optimizer_state,
        "workload.offload": arguments.offload,
    }
    given = [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in own.items()
        if value is not None
    ]
    return [*given, *arguments.overrides]


def _of_factory(arguments: Arguments, cluster: Cluster) -> Workload:
    """What is given on the command line holds; what is not, the factory's workload tells."""
    assert arguments.model is not None
    if arguments.overrides:
        raise ValueError(f"{', '.join(arguments.overrides)}: model={arguments.model} has no configuration to override")
    made = of_factory(arguments.model, arguments.seq_len, _default_precision(cluster))
    given = {
        "precision": None if arguments.precision is None else Precision.of_trainer(arguments.precision),
        "activation_checkpointing": arguments.checkpointing,
        "optimizer_state": arguments.optimizer_state,
        "offload": arguments.offload,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(made, **changes)


def of_factory(model: str, seq_len: int | None, precision: str) -> Workload:
    """The workload of `package.module:factory`, looked for in the folder where the command was started, too.

    Args:
        model: what it calls with the meta device as default.
        seq_len: tokens of a sample, where the factory returns a module.
        precision: likewise, as the Trainer's.

    Raises:
        ValueError: if it returns neither module nor workload, or `seq_len` is missing or one too many.
        ImportError: if there is no such module.
    """
    with _importable(Path.cwd()):
        made = _called(model)
    if isinstance(made, nn.Module):
        if seq_len is None:
            raise ValueError(
                f"seq_len is missing: how many tokens a sample of {model} has; give it, or let the factory "
                "return a lightning_mics.planner.plan.Workload, which makes its own batches"
            )
        return Workload(made, token_batches(seq_len), precision=Precision.of_trainer(precision))
    if not isinstance(made, Workload):
        raise ValueError(f"model={model} returned a {type(made).__name__}; it must be an nn.Module or a Workload")
    if seq_len is not None:
        raise ValueError(f"seq_len={seq_len}: the workload of {model} makes its own batches")
    return made


def _called(model: str) -> Any:
    module, _, name = model.partition(":")
    factory = getattr(importlib.import_module(module), name, None)
    if not callable(factory):
        raise ValueError(f"model={model}: {module} has no function {name!r}")
    with torch.device("meta"):
        return factory()


@contextmanager
def _importable(*folders: Path) -> Iterator[None]:
    """While a model is made."""
    before = list(sys.path)
    sys.path[:0] = [str(folder) for folder in folders]
    try:
        yield
    finally:
        sys.path[:] = before
