"""Fakes: tensors with shapes and without memory, on which a training step runs as it would on real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mics._compat import FakeTensor, TorchDispatchMode, tree_flatten, tree_unflatten, unset_fake_temporarily
from lightning_mics.precision import Precision


def fakes_of(module: nn.Module, precision: Precision) -> dict[str, Tensor]:
    """By name, what takes the place of a module's parameters, in the dtype in which they travel, and of its buffers.

    Inside a `FakeTensorMode`.
    """
    parameters = {
        name: torch.empty(param.shape, dtype=precision.travels(param.dtype), requires_grad=param.requires_grad)
        for name, param in module.named_parameters()
    }
    return parameters | {name: as_input(buffer) for name, buffer in module.named_buffers()}


def run_on(fakes: dict[str, Tensor], module: nn.Module, function: Callable[[nn.Module], object]) -> None:
    """Call a function of a module that has `fakes` in place of its own tensors.

    Forward and backward are to be one such function, so that a block's forward that runs again in backward finds the
    same values.
    """
    named = {f"module.{name}": fake for name, fake in fakes.items()}
    torch.func.functional_call(_Holder(module), named, (function,))


class _Holder(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[nn.Module], object]) -> None:
        function(self.module)


def as_input(tensor: Tensor) -> Tensor:
    """A fake tensor of the same shape and dtype; integers keep the values that they have, or are 0, see `Integers`."""
    if _is_integral(tensor):
        with unset_fake_temporarily():
            return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.detach().cpu().clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def as_inputs(batch: Any) -> Any:
    """A batch, of any structure, with `as_input` of each of its tensors."""
    leaves, spec = tree_flatten(batch)
    return tree_unflatten([as_input(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def _is_integral(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


class Integers(TorchDispatchMode):
    """Integers and truth values have values even where all else is fake.

    Models look at them: a mask that hides nothing is not made, and attention keeps none of it then.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) or not _is_integral(tensor) for tensor in tensors):
            return func(*args, **kwargs)
        if not tensors and not _all_integral(func(*args, **kwargs)):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            result = func(*args, **kwargs)
        return result if _all_integral(result) else func(*args, **kwargs)


def _all_integral(result: Any) -> bool:
    return all(_is_integral(leaf) for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor))
