"""Two-hop: what synchronises in a micro-step, and what at the boundary.

Hop 1 is the engine's own: after every backward each rank holds the mean gradient of its shard over the partition
group, added to the shard's `.grad`. Hop 2 happens once a window: `.grad` is averaged over the replication group,
block by block, behind the rest of the boundary's backward (MiCS, arXiv 2205.00119, section 3.4):

    g = 1/r * sum over replicas ( sum over micro-steps ( 1/p * sum over the partition group ( g_local ) ) )

The window's sums are nowhere but in `.grad`. What clears gradients clears them, and nothing else is left to leak.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics._compat import allow_wide_gradients
from lightning_mics.block_order import BlockOrder
from lightning_mics.groups import Groups
from lightning_mics.usage import Usage


@dataclass(frozen=True)
class Bucket:
    """Sharded parameters whose gradients cross hop 2 together: one block's, or what lies outside all blocks.

    Attributes:
        parameters: DTensors on the partition mesh, of one dtype.
        block: index of the block in the order of execution, or None for what lies outside.
    """

    parameters: tuple[nn.Parameter, ...]
    block: int | None

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Those that take a gradient now."""
        return [p for p in self.parameters if p.requires_grad]


@dataclass(frozen=True, eq=False)
class _InFlight:
    """A hop 2 under way: `flat` holds the gradients of `parameters`, one after the other, and whatever follows."""

    parameters: list[nn.Parameter]
    flat: Tensor
    work: dist.Work


class Window:
    """The micro-steps of one optimizer step, and the two hops of their gradients.

    Every rank of a replication group runs the same windows. Within one, ranks may differ: a rank on which a parameter
    got no gradient takes part in hop 2 with zeros, and a parameter that got none on any rank keeps `grad=None`.

    Args:
        buckets: in the order in which backward finishes them; the order of hop 2 on every rank. The last lies outside
            all blocks.
        groups: hop 2 goes over `groups.replication_group`; where there is none, there is no hop 2.
        order: tells how often a block was called, and hence when its gradient is complete.
        usage: tells which parameters got a gradient on this rank.
        sum_dtype: the window's sums are kept in this dtype where the parameter's own is narrower.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        groups: Groups,
        order: BlockOrder,
        usage: Usage,
        *,
        sum_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.buckets = tuple(buckets)
        self.one_backward = False
        """Whether each micro-step is one forward and one backward over the whole module (automatic optimization).

        Then hop 2 covers every parameter, whether or not this rank has a gradient for it, and overlaps with the
        boundary's backward. Otherwise (manual optimization) it covers what has gathered gradients since the last hop
        2, after each backward that synchronises, as DDP does.
        """
        self._groups = groups
        self._order = order
        self._usage = usage
        self._sum_dtype = sum_dtype
        self._key: object = None
        self._stale = False
        self._hop_1_only = False
        self._overlapping = False
        self._arrived = [0] * len(self.buckets)
        self._unsynced: set[int] = set()
        self._complete = False
        self._launched = 0
        self._in_flight: list[_InFlight] = []
        for index, bucket in enumerate(self.buckets):
            for param in bucket.parameters:
                self._watch(param, index)

    # -- the schedule ------------------------------------------------------------------------------------------------

    def begin(self, key: object) -> None:
        """Say which window the next micro-step belongs to. What another window left behind will be dropped.

        Args:
            key: anything that differs from window to window, and is the same for the micro-steps of one.
        """
        if key != self._key:
            self._key, self._stale = key, True

    @contextmanager
    def hop_1_only(self) -> Iterator[None]:
        """Backward passes in here are not the boundary: their gradients stay in the partition group."""
        before, self._hop_1_only = self._hop_1_only, True
        try:
            yield
        finally:
            self._hop_1_only = before

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Around one backward pass. At the boundary, hop 2 of every parameter is complete when it exits."""
        self._drop_stale()
        boundary = not self._hop_1_only
        self._complete = False
        self._launched = 0
        self._arrived = [0] * len(self.buckets)
        self._overlapping = boundary and self.one_backward and self._groups.replication_group is not None
        try:
            yield
        finally:
            self._overlapping = False
        if boundary:
            self._hop_2()

    def close(self) -> None:
        """Before the optimizer's step: hop 2 on all that lacks it, and gradients in their parameters' dtype.

        A boundary without a backward (a skipped batch) has its hop 2 here.
        """
        self._drop_stale()
        if self._unsynced or (self.one_backward and not self._complete):
            self._launched = 0
            self._hop_2()
        for param in self._parameters():
            if param.grad is not None and param.grad.dtype != param.dtype:
                param.grad = param.grad.to(param.dtype)

    def drop(self) -> None:
        """Forget the window: no gradient, nothing under way."""
        for param in self._parameters():
            param.grad = None
        self._in_flight.clear()
        self._unsynced.clear()
        self._usage.forget()
        self._stale = self._complete = False

    def _drop_stale(self) -> None:
        if self._stale:
            self.drop()

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (param for bucket in self.buckets for param in bucket.parameters)

    # -- hop 1 arrives -----------------------------------------------------------------------------------------------

    def _watch(self, param: nn.Parameter, index: int) -> None:
        trains = param.requires_grad
        param.requires_grad_(True)  # a frozen parameter may be unfrozen later, and takes no hook while it is frozen
        param.register_post_accumulate_grad_hook(partial(self._arrive, index))
        param.requires_grad_(trains)
        if self._is_narrow(param):
            allow_wide_gradients(param)

    def _arrive(self, index: int, param: Tensor) -> None:
        """The engine has added a micro-step's gradient to `param.grad`."""
        if param.grad is not None and self._is_narrow(param) and param.grad.dtype != self._sum_dtype:
            param.grad = param.grad.to(self._sum_dtype)
        self._unsynced.add(index)
        if self._overlapping:
            self._arrived[index] += 1
            while self._is_whole(self._launched):
                self._launch(self._launched)

    def _is_whole(self, index: int) -> bool:
        """Whether no more gradient will come for a block in this backward."""
        bucket = self.buckets[index]
        if bucket.block is None:
            return False
        calls = self._order.calls[bucket.block]
        return self._arrived[index] >= calls * len(bucket.trainable) > 0

    # -- hop 2 -------------------------------------------------------------------------------------------------------

    def _hop_2(self) -> None:
        used = self._used_in_partition_group()
        while self._launched < len(self.buckets):
            last = self._launched == len(self.buckets) - 1
            self._launch(self._launched, used if last else None)
        self._clear_unused(self._land(used))
        self._unsynced.clear()
        self._complete = True

    @torch.no_grad()
    def _launch(self, index: int, rider: Tensor | None = None) -> None:
        """All-reduce a bucket's gradients over the replication group, asynchronously, and `rider` with them."""
        self._launched = index + 1
        if self._groups.replication_group is None:
            return
        self._land(None, finished_only=True)  # their memory serves the next
        params = self.buckets[index].trainable
        if not self.one_backward:
            params = [p for p in params if p.grad is not None and index in self._unsynced]
        parts = [self._local_gradient(p).reshape(-1) for p in params]
        if rider is not None:
            parts.append(rider.to(parts[0].dtype if parts else rider.dtype))
        if not parts:
            return
        flat = torch.cat(parts)
        work = dist.all_reduce(flat, group=self._groups.replication_group, async_op=True)
        self._in_flight.append(_InFlight(params, flat, work))

    @torch.no_grad()
    def _land(self, used: Tensor | None, *, finished_only: bool = False) -> Tensor | None:
        """Wait for hop 2, write the means into `.grad`, and return what rode with it."""
        replicas = self._groups.topology.replicas
        landing = [flight for flight in self._in_flight if not finished_only or flight.work.is_completed()]
        self._in_flight = [flight for flight in self._in_flight if flight not in landing]
        while landing:
            flight = landing.pop()
            flight.work.wait()
            if flight.flat.device.type != "cpu":
                flight.flat.record_stream(torch.accelerator.current_stream(flight.flat.device))
            locals_ = [self._local_gradient(p) for p in flight.parameters]
            sizes = [local.numel() for local in locals_]
            *means, rest = flight.flat.split([*sizes, flight.flat.numel() - sum(sizes)])
            for local, mean in zip(locals_, means, strict=True):
                torch.div(mean.view_as(local), replicas, out=local)
            used = rest if rest.numel() else used
        return used

    def _local_gradient(self, param: nn.Parameter) -> Tensor:
        """This rank's part of `param.grad`, made of zeros where there is none."""
        if param.grad is None:
            param.grad = torch.zeros_like(param, dtype=self._sum_dtype if self._is_narrow(param) else param.dtype)
        return param.grad.to_local()  # type: ignore[attr-defined,no-any-return]

    # -- parameters without a gradient -------------------------------------------------------------------------------

    def _used_in_partition_group(self) -> Tensor | None:
        """On how many ranks of the partition group each parameter got a gradient in this window.

        One all-reduce of four bytes a parameter in the partition group; over the replicas the answer rides with the
        last bucket. None in manual optimization, where ranks are taken to run the same code.
        """
        if not self.one_backward:
            return None
        device = self._groups.device
        used = torch.tensor([self._usage.saw(p) for p in self._parameters()], dtype=torch.float32, device=device)
        if self._groups.topology.partition_size > 1:
            dist.all_reduce(used, group=self._groups.partition_group)
        return used

    def _clear_unused(self, used: Tensor | None) -> None:
        """A parameter without a gradient on any rank has none, rather than one of zeros: its optimizer skips it."""
        params = list(self._parameters())
        seen = [self._usage.saw(p) for p in params]
        if all(seen):
            return  # no need to wait for the device
        if used is not None:
            seen = [count > 0 for count in used.tolist()]
        for param, was_seen in zip(params, seen, strict=True):
            if not was_seen:
                param.grad = None

    # -- dtypes ------------------------------------------------------------------------------------------------------

    def _is_narrow(self, param: Tensor) -> bool:
        return param.dtype.is_floating_point and param.dtype.itemsize < self._sum_dtype.itemsize
