"""Activations: the bytes that a micro-step holds beside the model, traced from the real module.

Forward and backward run on fake tensors, which have shapes and no memory, and every storage is counted from its making
to its end. What autograd saves, what operators make on their way, and the gradients that a backward leaves are all in
it, at the moment at which they are alive. Of blocks that are alike, four are run; see `trace`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_mics._compat import (
    FakeTensorMode,
    tree_flatten,
    tree_unflatten,
)
from lightning_mics.blocks import Block, BlockChoice, find_blocks, parameters_at, slots_by_owner
from lightning_mics.ladder import Phase
from lightning_mics.planner.compute import Operator
from lightning_mics.planner.fakes import Integers, as_inputs, fakes_of, run_on
from lightning_mics.planner.meter import Live, Meter, Recorded
from lightning_mics.precision import Precision
from lightning_mics.recompute import checkpoint_activations

Step = Callable[[nn.Module, Any], Tensor]

_UNCHANGED = Precision()
_FORWARD = (Phase.FORWARD, Phase.HEAD)
_FEWEST_ALIKE = 5  # fewer are run one by one: four of them are needed to know what the rest do


@dataclass(frozen=True)
class Stretch:
    """A part of a micro-step, from the moment at which one block begins to that at which the next does.

    Attributes:
        phase: any but the handing over.
        block: which computes; None for what lies outside: before the first block, or after it in backward.
        peak: the most that is alive at once.
        end: what is alive at its end, the block's own gradients among it.
        after: the same when the block's own gradients have been handed over.
        operators: that run, in order.
    """

    phase: Phase
    block: int | None
    peak: Live
    end: Live
    after: Live
    operators: tuple[Operator, ...] = ()


@dataclass(frozen=True)
class Activations:
    """A micro-step in stretches, in order."""

    stretches: tuple[Stretch, ...]

    def at(self, phase: Phase, block: int | None) -> Live:
        """The most that is alive in a stretch, as a moment of the memory ladder names it; nothing if it has none."""
        handing_over = phase == Phase.HANDING_OVER
        return self._one(Phase.BACKWARD if handing_over else phase, block, "end" if handing_over else "peak")

    def _one(self, phase: Phase, block: int | None, which: str) -> Live:
        found = [getattr(each, which) for each in self.stretches if (each.phase, each.block) == (phase, block)]
        return max(found, key=lambda live: live.total, default=Live())

    @property
    def saved(self) -> int:
        """Bytes alive between forward and backward: what autograd has saved, and the batch."""
        return next(each.end.activations for each in reversed(self.stretches) if each.phase in _FORWARD)

    @property
    def peak(self) -> Live:
        """The most that is alive at once, gradients included."""
        return max((each.peak for each in self.stretches), key=lambda live: live.total, default=Live())


def loss_of(module: nn.Module, batch: Any) -> Tensor:
    """The default training step: a mapping becomes keyword arguments, a tuple or list positional ones.

    The loss is the output's `loss`, as Hugging Face's models give it, or the mean of the first tensor in it.
    """
    if isinstance(batch, Mapping):
        output = module(**batch)
    else:
        output = module(*batch) if isinstance(batch, tuple | list) else module(batch)
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    return next(leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)).float().mean()


def trace(
    module: nn.Module,
    batch: Any,
    *,
    step: Step = loss_of,
    blocks: BlockChoice = None,
    activation_checkpointing: bool = False,
    precision: Precision = _UNCHANGED,
    device_type: str = "cpu",
    every_block: bool = False,
) -> Activations:
    """One micro-step of `module`, without memory, devices or process groups.

    Blocks that follow one another and have the same class, the same printed form (torch prints sizes, dropout rates and
    the like) and parameters of the same names, shapes and dtypes are taken to be alike, if the second and the last but
    one come out alike to the byte, and if each is called with the same numbers and with tensors of the same shapes and
    dtypes. Then only the first two and the last two run (at both ends, neighbours are others); the rest hand on a
    tensor of the right shape, and their bytes are the second's. Where any of that fails, all are run. (Blocks that
    differ in none of this, and yet in what they keep, would go unnoticed, as if every third had another attention by an
    attribute that is not printed: `every_block` then.)

    Args:
        module: any module, on any device, the meta device as well; in the mode (training or not) in which it is. It is
            left as it was.
        batch: an example of a micro-batch: tensors, on any device, in any nesting. Integers keep their values, at
            which models look (attention keeps no mask that hides nothing); all else has none.
        step: from module and batch to the loss.
        blocks: see `find_blocks`.
        activation_checkpointing: as `shard` applies it.
        precision: parameters are in the dtype in which they travel.
        device_type: whose kernels are meant. On CPU, dropout keeps a mask in the activations' dtype, and attention with
            dropout is composed of single operators; elsewhere a mask has a byte a value, and attention keeps none.
        every_block: run all blocks, alike or not.

    Raises:
        RuntimeError: if the training step depends on values, which fake tensors do not have.
    """
    found = find_blocks(module, blocks)
    alike = {} if every_block else _alike(found)
    for attempt in (alike, {}):
        run = _Run(module, found, attempt, precision)
        fuses = device_type != "cpu"
        with run.prepared(activation_checkpointing, fuses):
            recorded = run.micro_step(batch, step, fuses)
        if run.twins_agree(recorded):
            break
    return Activations(run.whole(recorded))


def _alike(found: Sequence[Block]) -> dict[int, int]:
    """Blocks that need not run, and for each the one that runs in its place."""
    twins: dict[int, int] = {}
    for _, group in groupby(range(len(found)), key=lambda index: _described(found[index].module)):
        run = [*group]
        if len(run) >= _FEWEST_ALIKE:
            twins |= dict.fromkeys(run[2:-2], run[1])
    return twins


def _described(module: nn.Module) -> tuple[object, ...]:
    parameters = [(name, param.shape, param.dtype, param.requires_grad) for name, param in module.named_parameters()]
    buffers = [(name, buffer.shape, buffer.dtype) for name, buffer in module.named_buffers()]
    return (type(module), repr(module), module.training, tuple(parameters), tuple(buffers))


class _Run:
    """One run of a micro-step on fake tensors."""

    def __init__(
        self, module: nn.Module, found: Sequence[Block], twins: Mapping[int, int], precision: Precision
    ) -> None:
        self._module = module
        self._found = found
        self._twins = dict(twins)
        self._precision = precision
        slots = slots_by_owner(module, found)
        self._own = [parameters_at(slots[block.name]) for block in found]
        self._fakes: dict[int, Tensor] = {}
        self._meter = Meter()
        self._calls: dict[int, _Call] = {}
        self._ran_after_all = False

    @contextmanager
    def prepared(self, checkpointing: bool, fuses: bool) -> Iterator[None]:
        """Marks where blocks begin and end, stand-ins for those that need not run, and checkpointing."""
        with ExitStack() as stack:
            for index, block in enumerate(self._found):
                stack.enter_context(_restored(block.module, "forward"))
                if fuses:
                    _fuse(block.module)  # each by itself, as a backward that runs it again leaves such modes
                if checkpointing:
                    checkpoint_activations(block.module)
                if index in self._twins:
                    self._stand_in(index)
                elif index in self._twins.values():
                    self._remember(index)
                begins = functools.partial(self._forward_begins, index)
                ends = functools.partial(self._forward_ends, index)
                stack.callback(block.module.register_forward_pre_hook(begins, with_kwargs=True).remove)
                stack.callback(block.module.register_forward_hook(ends).remove)
            yield

    def micro_step(self, batch: Any, step: Step, fuses: bool) -> list[Recorded]:
        with FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
            fakes = fakes_of(self._module, self._precision)
            for name, param in self._module.named_parameters():
                self._fakes[id(param)] = fake = fakes[name]
                if param.requires_grad:
                    fake.register_post_accumulate_grad_hook(self._meter.is_gradient)
            fake_batch = as_inputs(batch)
            self._meter.begin(Phase.FORWARD, None, tree_flatten(fake_batch)[0])
            stack.enter_context(Integers())
            stack.enter_context(self._meter)
            if fuses:
                stack.enter_context(_Fused())
            run_on(fakes, self._module, lambda module: self._backward(step(module, fake_batch)))
            recorded = self._meter.finish()
        return recorded

    def _backward(self, loss: Tensor) -> None:
        self._meter.mark(Phase.LOSS, None)
        loss.backward()

    # -- marks -------------------------------------------------------------------------------------------------------

    def _forward_begins(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._meter.mark(Phase.FORWARD, index)
        if index == 0:
            for tensor in _differentiable((args, kwargs))[:1]:
                tensor.register_hook(lambda gradient: self._backward_begins(None, gradient))

    def _forward_ends(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        for tensor in _differentiable(output)[:1]:
            tensor.register_hook(functools.partial(self._backward_begins, index))
        if index == len(self._found) - 1:
            self._meter.mark(Phase.HEAD, None)

    def _backward_begins(self, index: int | None, gradient: Tensor) -> None:
        self._meter.mark(Phase.BACKWARD, index, handed_over=self._hand_over)

    def _hand_over(self, block: int) -> None:
        for param in self._own[block]:
            self._fakes[id(param)].grad = None

    # -- stand-ins ---------------------------------------------------------------------------------------------------

    def _remember(self, index: int) -> None:
        plain = self._found[index].module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = plain(*args, **kwargs)
            self._calls[index] = _Call.of((args, kwargs), output)
            return output

        self._found[index].module.forward = forward  # type: ignore[method-assign]

    def _stand_in(self, index: int) -> None:
        plain, twin = self._found[index].module.forward, self._twins[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = self._calls.get(twin)
            if call is None or call.arguments != _signature((args, kwargs)):
                self._ran_after_all = True
                return plain(*args, **kwargs)
            return call.imitate((args, kwargs))

        self._found[index].module.forward = forward  # type: ignore[method-assign]

    def twins_agree(self, recorded: Sequence[Recorded]) -> bool:
        """Whether each one that stood for others ran like the next that ran, and all were called alike."""
        if not self._twins:
            return True
        if self._ran_after_all:
            return False
        by_place = {(each.phase, each.block): each.growth() for each in recorded}
        last = {twin: index + 1 for index, twin in self._twins.items()}
        return all(
            by_place.get((phase, first)) == by_place.get((phase, other))
            for phase in (Phase.FORWARD, Phase.BACKWARD)
            for first, other in last.items()
        )

    def whole(self, recorded: Sequence[Recorded]) -> tuple[Stretch, ...]:
        """All stretches, those of stand-ins with the bytes of their twins."""
        by_place = {(each.phase, each.block): each for each in recorded}
        stretches, now = [], recorded[0].begin
        for each in recorded:
            ran = each if each.block is None else by_place[each.phase, self._twins.get(each.block, each.block)]
            peak, end, after = (now + growth for growth in ran.growth())
            stretches.append(Stretch(each.phase, each.block, peak, end, after, tuple(ran.operators)))
            now = after
        return tuple(stretches)


@dataclass(frozen=True)
class _Call:
    """How a block was called, and what came of it, without the tensors."""

    arguments: tuple[Any, ...]
    leaves: list[Any]
    spec: Any

    @classmethod
    def of(cls, arguments: Any, output: Any) -> _Call:
        leaves, spec = tree_flatten(output)
        kept = [_Shape.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cls(_signature(arguments), kept, spec)

    def imitate(self, arguments: Any) -> Any:
        """The same output, connected with the arguments."""
        inputs = _differentiable(arguments)
        shapes = [leaf for leaf in self.leaves if isinstance(leaf, _Shape) and leaf.requires_grad]
        made = iter(_StandIn.apply(shapes, *inputs) if shapes and inputs else ())
        leaves = [
            (next(made) if leaf.requires_grad else leaf.empty()) if isinstance(leaf, _Shape) else leaf
            for leaf in self.leaves
        ]
        return tree_unflatten(leaves, self.spec)


@dataclass(frozen=True)
class _Shape:
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> _Shape:
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad)

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


class _StandIn(torch.autograd.Function):
    """Tensors out of nothing, with gradients for all inputs."""

    @staticmethod
    def forward(ctx: Any, shapes: Sequence[_Shape], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.inputs = [_Shape.of(tensor) for tensor in inputs]
        return tuple(shape.empty() for shape in shapes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return (None, *(shape.empty() for shape in ctx.inputs))


def _signature(arguments: Any) -> tuple[Any, ...]:
    leaves, spec = tree_flatten(arguments)
    return (str(spec), *map(_described_argument, leaves))


def _described_argument(leaf: Any) -> object:
    if isinstance(leaf, Tensor):
        return _Shape.of(leaf)
    return leaf if isinstance(leaf, int | float | str | None) else type(leaf)


def _differentiable(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor) and leaf.requires_grad]


@contextmanager
def _restored(owner: Any, name: str) -> Iterator[None]:
    """Put an instance's attribute back as it was, or was not, there."""
    before = vars(owner).get(name)
    try:
        yield
    finally:
        vars(owner).pop(name, None)
        if before is not None:
            vars(owner)[name] = before


class _Fused(TorchFunctionMode):
    """What accelerators' kernels keep, where those of the CPU keep more; see `trace`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is nn.functional.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs = kwargs | ({"dropout_p": 0.0} if "dropout_p" in kwargs else {})
        if func is nn.functional.dropout:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _fuse(module: nn.Module) -> None:
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Fused():
            return plain(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p else input
