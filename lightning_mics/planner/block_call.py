"""Block call: one block of a model, called as training calls it, that can be timed on the device at hand.

How a block is called is found out on fake tensors; then copies of the block alone get values, as many as it takes for
each to find the processor's caches full of the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mics._compat import FakeTensor, FakeTensorMode, tree_flatten, tree_unflatten
from lightning_mics.blocks import BlockChoice, find_blocks
from lightning_mics.planner.fakes import Integers, as_inputs, fakes_of, run_on
from lightning_mics.precision import Precision

_VALUES = (bool, int, float, str, torch.dtype, torch.device, type(None))
_SCALE = 0.02  # of parameters' values: as models begin with
_TINY = 8  # features of a block that has next to nothing to compute
_MORE_THAN_CACHES = 1 << 26  # bytes


@dataclass(frozen=True)
class BlockCall:
    """A block with parameters and inputs on a device.

    Attributes:
        blocks: copies of it, called in turn with `args` and `kwargs`.
        args: some of which take gradients.
        kwargs: likewise.
        autocast: the dtype of autocast; None without it.
    """

    blocks: tuple[nn.Module, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: torch.dtype | None = None
    _turns: cycle[nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_turns", cycle(self.blocks))

    @classmethod
    def tiny(cls, device: torch.device) -> BlockCall:
        """A transformer's block that has next to nothing to compute."""
        return cls((TinyBlock(_TINY).to(device),), (torch.ones(1, 4, _TINY, device=device),), {})

    @classmethod
    def of(
        cls,
        module: nn.Module,
        batch: Any,
        step: Callable[[nn.Module, Any], Tensor],
        device: torch.device,
        blocks: BlockChoice = None,
        precision: Precision | None = None,
    ) -> BlockCall:
        """The first block of a model that is trained; see `trace` for what its arguments mean.

        Raises:
            ValueError: if there is no block, or it is called with something that a single block cannot be called with
                over and over.
        """
        precision = precision or Precision()
        found = find_blocks(module, blocks)
        if not found:
            raise ValueError(f"{type(module).__name__} has no blocks of which one could be timed; give blocks")
        args, kwargs, autocast = _called(module, found[0].module, batch, step, device, precision)
        nbytes = sum(param.nbytes for param in found[0].module.parameters())
        copies = min(len(found), 1 + _MORE_THAN_CACHES // max(1, nbytes))
        made = tuple(_with_values(found[0].module, device, precision) for _ in range(copies))
        return cls(made, _real(args, device), _real(kwargs, device), autocast)

    def run(self) -> None:
        """The next one's forward and backward; gradients are added up, but those of inputs."""
        block = next(self._turns)
        device = next(block.parameters()).device
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            output = block(*self.args, **self.kwargs)
        differentiable = [leaf for leaf in _tensors(output) if leaf.requires_grad]
        torch.autograd.backward(differentiable, [torch.ones_like(leaf) for leaf in differentiable])
        for tensor in _tensors((self.args, self.kwargs)):
            tensor.grad = None

    def drop_gradients(self) -> None:
        """Of parameters, as before the first micro-step of a window."""
        for block in self.blocks:
            block.zero_grad()


class TinyBlock(nn.Module):
    """A transformer's block with all that it calls, and, if it is narrow, next to nothing to compute."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.behind = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.activation, self.dropout = nn.GELU(), nn.Dropout(0.0)

    def forward(self, batch: Tensor) -> Tensor:
        """Of shape (samples, tokens, width), as what comes."""
        queries, keys, values = (
            each.view(*each.shape[:2], 2, -1).transpose(1, 2) for each in self.attend(self.before(batch)).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        batch = batch + self.dropout(self.project(mixed.transpose(1, 2).reshape(batch.shape)))
        wide = self.narrow(self.activation(self.widen(self.behind(batch))))
        output: Tensor = batch + self.dropout(wide)
        return output


class _Reached(BaseException):
    """The block is about to run: nothing is needed of what is behind it. Models do not catch it."""

    def __init__(self, *called: Any) -> None:
        super().__init__()
        self.called = called


def _called(
    module: nn.Module,
    block: nn.Module,
    batch: Any,
    step: Callable[[nn.Module, Any], Tensor],
    device: torch.device,
    precision: Precision,
) -> tuple[Any, Any, torch.dtype | None]:
    """The arguments of a block's first call, fakes and integers, and the dtype of autocast."""

    def reached(_: nn.Module, args: Any, kwargs: Any) -> None:
        enabled = torch.is_autocast_enabled(device.type)
        raise _Reached(args, kwargs, torch.get_autocast_dtype(device.type) if enabled else None)

    hook = block.register_forward_pre_hook(reached, with_kwargs=True, prepend=True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Integers():
            inputs = as_inputs(batch)
            run_on(fakes_of(module, precision), module, lambda it: step(it, inputs))
    except _Reached as reached_block:
        return reached_block.called  # type: ignore[return-value]
    finally:
        hook.remove()
    raise ValueError(f"{type(block).__name__} is a block, and the training step does not call it; give blocks")


def _with_values(block: nn.Module, device: torch.device, precision: Precision) -> nn.Module:
    parameters = {
        id(param): nn.Parameter(
            _SCALE * torch.randn(param.shape, dtype=precision.travels(param.dtype), device=device),
            requires_grad=param.requires_grad,
        )
        for param in block.parameters()
    }
    buffers = {id(buffer): _value(buffer, device) for buffer in block.buffers()}
    return copy.deepcopy(block, parameters | buffers)  # type: ignore[arg-type]


def _real(values: Any, device: torch.device) -> Any:
    leaves, spec = tree_flatten(values)
    if strange := [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, (Tensor, *_VALUES))]:
        raise ValueError(f"a block that is called with {', '.join(strange)} cannot be timed by itself")
    return tree_unflatten([_value(leaf, device) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def _value(tensor: Tensor, device: torch.device) -> Tensor:
    """One like it; integers that have values keep them."""
    if not (tensor.is_floating_point() or tensor.is_meta or isinstance(tensor, FakeTensor)):
        return tensor.to(device, copy=True)
    made = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    if tensor.is_floating_point():
        made.normal_()
    return made.requires_grad_(tensor.requires_grad)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]
