"""Compiled blocks compute what plain ones do; a compiled LightningModule is refused before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters  # torch's own count of what was compiled

from lightning_mics import MiCSStrategy
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import Batches, Toy, assert_same_losses, assert_same_training, mics, seeded, trainer

OPTIONS: list[dict[str, Any]] = [
    {},
    {"precision": "bf16-mixed"},
    {"partition_size": 1},
    {"activation_checkpointing": True, "rung": "window/whole"},
]
EAGER: Mapping[str, Any] = {"backend": "aot_eager", "fullgraph": True}


def _fit(partition_size: int = 2, precision: str = "32-true", module: Toy | None = None, **options: Any) -> Toy:
    module = seeded(Toy) if module is None else module
    run = trainer(mics(partition_size, **options), accumulate_grad_batches=2, precision=precision)
    run.fit(module, Batches(4), Batches(1, first=900))
    return module


def _compiled(compile: bool | Mapping[str, Any], in_bf16: float, every: Sequence[dict[str, Any]] = OPTIONS) -> None:
    """In any partition size, precision and rung, and with activation checkpointing; two graphs for three layers."""
    for options in every:
        torch.compiler.reset()
        counters.clear()
        compiled = _fit(compile=compile, **options)
        graphs, breaks = counters["stats"]["unique_graphs"], dict(counters["graph_break"])
        if (graphs, breaks) != (2, {}):
            raise AssertionError(f"{graphs} graphs (of training and of validation: 2), broken at {breaks}")
        rtol = in_bf16 if "precision" in options else 1e-6
        assert_same_training(compiled, _fit(**options), f"{options}", rtol, atol=10 * rtol)


def test_compiled_blocks_compute_what_plain_ones_do() -> None:
    run_ranks(4, _compiled, EAGER, 1e-6)


@pytest.mark.slow
def test_with_torchs_own_compiler() -> None:
    run_ranks(2, _compiled, True, 1e-2, OPTIONS[:2])  # which rounds to bf16 less often


def test_compile_takes_a_bool_or_arguments() -> None:
    with pytest.raises(TypeError, match=r"compile='inductor' must be True, False or a mapping of torch\.compile's"):
        MiCSStrategy(compile="inductor")  # type: ignore[arg-type]


class CompiledByUser(Toy):
    """Its layers are compiled before the strategy sees them, wrapped or in place."""

    def __init__(self, wrapped: bool) -> None:
        super().__init__()
        for i, layer in enumerate(self.layers):
            if wrapped:
                self.layers[i] = torch.compile(layer, backend="aot_eager")  # type: ignore[assignment]
            else:
                layer.compile(backend="aot_eager")


def _compiled_by_user() -> None:
    plain = _fit()
    for wrapped in (False, True):
        module = _fit(module=seeded(CompiledByUser, wrapped=wrapped))
        assert_same_losses(module.losses + module.validated, plain.losses + plain.validated, f"{wrapped=}", rtol=1e-6)


@pytest.mark.slow
def test_layers_that_the_user_compiled() -> None:
    run_ranks(4, _compiled_by_user)


class NeverRuns(Toy):
    def setup(self, stage: str) -> None:
        raise AssertionError("the module was set up")


def _whole_module() -> None:
    module: nn.Module = torch.compile(seeded(NeverRuns), backend="eager")  # type: ignore[assignment]
    for entry in ("fit", "validate", "test", "predict"):
        with pytest.raises(
            RuntimeError, match="compiled model is incompatible with the current strategy: `MiCSStrategy`"
        ):
            getattr(trainer(mics()), entry)(module, Batches(1))


def test_a_compiled_lightning_module_is_refused_before_anything_runs() -> None:
    """Lightning's own refusal, which no strategy can precede; if it goes away, ours has to come."""
    run_ranks(2, _whole_module)
