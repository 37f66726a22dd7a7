"""Two-hop: what synchronises in a micro-step, and what at the boundary.

Hop 1 is the engine's own: after every backward each rank holds the mean gradient of its shard over the partition
group, added to the shard's `.grad`. Hop 2 happens once a window: `.grad` is averaged over the replication group,
block by block, behind the rest of the boundary's backward (MiCS, arXiv 2205.00119, section 3.4):

    g = 1/r * sum over replicas ( sum over micro-steps ( 1/p * sum over the partition group ( g_local ) ) )

The window's sums are nowhere but in `.grad`. What clears gradients clears them, and nothing else is left to leak.

Where an optimizer's state is sharded over all ranks, hop 2 takes the sums from `.grad` and leaves each replica the mean
of its own piece, with the optimizer; see `optimizer_shards`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from weakref import WeakMethod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mics._compat import allow_wide_gradients, hooks_on
from lightning_mics.block_order import BlockOrder
from lightning_mics.channels import Task, Transfer
from lightning_mics.climb import Climb
from lightning_mics.comms import HopOne, padded_numel
from lightning_mics.flat import ShardGradient, together
from lightning_mics.groups import Groups
from lightning_mics.held import HeldGradients
from lightning_mics.ladder import Gradients, Rung
from lightning_mics.optimizer_shards import Mean, OptimizerShards
from lightning_mics.residency import Residency
from lightning_mics.shards import local_part, sharded_as
from lightning_mics.usage import Usage
from lightning_mics.wire import Traffic

HOOKED = (
    "{} has a hook (register_hook, register_post_accumulate_grad_hook), which {}: a shard's gradient is there when "
    "backward is over; look at gradients, change them and step optimizers then (on_before_optimizer_step, "
    "configure_optimizers), or keep parameters whole: partition_size=1"
)


@dataclass(frozen=True)
class Bucket:
    """Sharded parameters whose gradients cross hop 2 together: one block's, or what lies outside all blocks.

    Attributes:
        name: the block's, for people.
        parameters: DTensors on the partition mesh, or whole ones, of one dtype.
        block: index of the block in the order of execution, or None for what lies outside.
        hop_1: carries their gradients through the partition group; None where p is 1, or where they are on every rank.
        on_every_rank: whether they are whole beside sharded ones, and hop 1 is an all-reduce at the boundary.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    block: int | None
    hop_1: HopOne | None
    on_every_rank: bool = False

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Those that take a gradient now."""
        return [p for p in self.parameters if p.requires_grad]


class Window:
    """The micro-steps of one optimizer step, and the two hops of their gradients.

    Every rank of a replication group runs the same windows. Within one, ranks may differ: a rank on which a parameter
    got no gradient takes part in hop 2 with zeros, and a parameter that got none on any rank keeps `grad=None`.

    Args:
        buckets: in the order in which backward finishes them; the order of hop 2 on every rank. The last lies outside
            all blocks.
        groups: the partition group, where the ranks tell each other which parameters they used.
        hop_2: None where there is one replica, and no hop 2.
        order: tells how often a block was called, and hence when its gradient is complete.
        usage: tells which parameters got a gradient on this rank.
        residency: tells the engine what to free behind each forward and backward.
        held: gradients that the engine does not reduce in each micro-step; None where it has nowhere to reduce them.
        kept_whole: whether autograd itself accumulates into `.grad`, once a backward, and no engine does.
        on_host: whether `.grad` is in the host's memory, and hop 2 goes by way of the device.
        sum_dtype: the window's sums are kept in this dtype where the parameter's own is narrower.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        groups: Groups,
        hop_2: Traffic | None,
        order: BlockOrder,
        usage: Usage,
        residency: Residency,
        held: HeldGradients | None = None,
        kept_whole: bool = False,
        on_host: bool = False,
        sum_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.buckets = tuple(buckets)
        self.one_backward = False
        """Whether each micro-step is one forward and one backward over the whole module (automatic optimization).

        Then hop 2 covers every parameter, whether or not this rank has a gradient for it, and overlaps with the
        boundary's backward. Otherwise (manual optimization) it covers what has gathered gradients since the last hop
        2, after each backward that synchronises, as DDP does.
        """
        self.cleared_by_user = False
        """Whether gradients are cleared by who does not tell the window; it looks, then, before it goes on."""
        self._hops_1 = [bucket.hop_1 for bucket in self.buckets if bucket.hop_1 is not None]
        self._groups = groups
        self._hop_2 = hop_2
        self._order = order
        self._usage = usage
        self._kept_whole = kept_whole
        self._on_host = on_host
        self._alone = kept_whole and groups.topology.world_size == 1
        self.rung = Rung()
        """What stays whole until the boundary."""
        self.climb: Climb | None = None
        """Chooses another rung between windows, if anything does."""
        self.optimizer_shards: OptimizerShards | None = None
        """The pieces that the optimizer steps, where these are less than the shards."""
        self._residency = residency
        self._held = held
        self._sum_dtype = sum_dtype
        self._parameters = tuple(param for bucket in self.buckets for param in bucket.parameters)
        self._narrow = tuple(param for param in self._parameters if self._is_narrow(param))
        self._key: object = None
        self._micro_steps = 0
        self._near_budget: Tensor | float | None = None
        self._stale = False
        self._hop_1_only = False
        self._overlapping = False
        self._sums = True
        """Whether this window may have gradients to add up; a rank alone with one micro-step has none."""
        self._arrived = [0] * len(self.buckets)
        self._unsynced: set[int] = set()
        self._complete = False
        self._launched = 0
        self._in_flight: list[Transfer] = []
        self._marks: list[_Mark] = []
        self._means: list[Mean] = []
        for index, bucket in enumerate(self.buckets):
            for param in bucket.parameters:
                self._watch(param, index)

    # -- the schedule ------------------------------------------------------------------------------------------------

    def begin(self, key: object, *, fresh: bool = True) -> None:
        """Say which window the next micro-step belongs to.

        Args:
            key: anything that differs from window to window, and is the same for the micro-steps of one.
            fresh: what another window left behind will be dropped; otherwise it counts, until it is cleared.
        """
        if key == self._key:
            return
        self._key, self._stale = key, fresh
        self._next_rung()

    def _next_rung(self) -> None:
        if self.climb is not None:
            near = float(self._near_budget) if self._near_budget is not None else 0.0
            self.take(self.climb.window_begins(self.rung, self._micro_steps, near))
        self._micro_steps, self._near_budget = 0, None

    def take(self, rung: Rung) -> None:
        """Go on from another rung. Between windows only."""
        if rung != self.rung:
            self.rung = rung
            self._residency.take(rung)

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
        """Around one backward pass. Its hop 1, and at the boundary hop 2 of every parameter, are over when it exits.

        Raises:
            ValueError: if there are hooks of others on shards.
        """
        if not self._micro_steps:
            self._check_hooks()
        self._drop_stale()
        self._drop_cleared()
        self._micro_steps += 1
        boundary = not self._hop_1_only
        if self.optimizer_shards is not None:
            self.optimizer_shards.hold()
        self._residency.backward_begins(boundary)
        if self._held is not None:
            self._held.hold(self.rung.gradients == Gradients.WHOLE and not boundary and self.one_backward)
        self._complete = False
        self._launched = 0
        self._arrived = [0] * len(self.buckets)
        once = self._order.forwards == 1
        self._order.forwards = 0
        self._overlapping = boundary and once and self.one_backward and self._hop_2 is not None
        self._sums = not (self._alone and boundary and self.one_backward and self._micro_steps == 1)
        try:
            yield
        finally:
            self._overlapping = False
        if boundary:
            self._synchronize()
        self._finish_hop_1()
        if self._alone and self._sums:
            for param in self._narrow:
                self._widen(param)
        if self.one_backward:
            self._residency.show_shards()
        self._mark(boundary)

    def _check_hooks(self) -> None:
        for bucket in self.buckets if not self._kept_whole else ():
            if any(isinstance(param, DTensor) and hooks_on(param) > 1 for param in bucket.parameters):
                what = f"a parameter of {bucket.name}"
                raise ValueError(HOOKED.format(what, "would run before hop 1 is over, if at all"))

    def close(self) -> None:
        """Before the optimizer's step: hop 2 on all that lacks it, and gradients in their parameters' dtype.

        A boundary without a backward (a skipped batch) has its hop 2 here.
        """
        self._drop_stale()
        self._drop_cleared()
        if self.optimizer_shards is not None:
            self.optimizer_shards.close()
        if self._unsynced or (self.one_backward and not self._complete):
            self._launched = 0
            if self._held is not None:
                self._held.reduce()
            self._synchronize()
            self._finish_hop_1()
        for param in self._narrow if self._sums else ():
            if param.grad is not None and param.grad.dtype != param.dtype:
                param.grad = param.grad.to(param.dtype)

    def clears(self, params: Collection[Tensor]) -> None:
        """Before gradients of `params` are cleared by hand: held ones are where they can be told from others'.

        Collective on the partition group, if `params` are some of those that train and gradients are held.
        """
        if self._held is not None and not self._are_all(params):
            self._held.reduce()
            self._finish_hop_1()

    def cleared(self, params: Collection[Tensor]) -> None:
        """After that, as by an optimizer's `zero_grad`: where no gradient is left, another window begins."""
        gone = {id(param) for param in params}
        self._usage.forget(param for param in self._parameters if id(param) in gone)
        if self._are_all(params) or all(param.grad is None for param in self._parameters):
            self._forget_sums()
            if self._micro_steps:
                self._next_rung()

    def _are_all(self, params: Collection[Tensor]) -> bool:
        given = {id(param) for param in params}
        return all(id(param) in given for param in self._parameters if param.requires_grad)

    def drop(self) -> None:
        """Forget the window: no gradient, nothing under way. Updates of the last step are none of it."""
        self._forget_gradients(self._parameters)
        self._forget_sums()

    def _forget_sums(self) -> None:
        for transfer in self._in_flight:
            transfer.abandon()
        if self._held is not None:
            self._held.forget()
        for hop_1 in self._hops_1:
            hop_1.forget()
        self._in_flight.clear()
        self._means.clear()
        self._unsynced.clear()
        self._marks.clear()
        self._usage.forget()
        self._stale = self._complete = False

    def _drop_stale(self) -> None:
        if self._stale:
            self.drop()

    def _forget_gradients(self, params: Iterable[nn.Parameter]) -> None:
        for param in params:
            param.grad = None
            if self.optimizer_shards is not None:
                self.optimizer_shards.forget(param)

    # -- gradients that the user clears ------------------------------------------------------------------------------
    # The sums are in `.grad`, where they are cleared; not so gradients that are held whole, nor, inside a window, those
    # of pieces. There a mark is left for the user to clear, and looked for before the window goes on: zeros, or the
    # last window's gradient, if that was not cleared and counts on. It requires a gradient, as no gradient does: what
    # sets gradients to zeros instead of None takes that away.

    def _mark(self, boundary: bool) -> None:
        if boundary or not self.cleared_by_user:
            return
        elsewhere = self._held is not None and self._held.holds
        for param in (param for bucket in self.buckets for param in bucket.trainable):
            piece = self._stepped_for(param)
            for holder in {id(each): each for each in (param, piece)}.values():
                if elsewhere or (holder is not param and holder.grad is None):
                    self._marks.append(_Mark.on(param, holder))

    def _drop_cleared(self) -> None:
        if not self.cleared_by_user:
            return
        cleared = {id(mark.param): mark.param for mark in self._marks if mark.is_gone}
        for mark in self._marks:
            mark.remove()
        marked = {id(mark.param) for mark in self._marks if mark.holder is mark.param}
        for param in self._parameters:
            if id(param) not in marked and self._usage.saw(param) and self._has_no_gradient(param):
                cleared[id(param)] = param
        self._marks.clear()
        self._forget_gradients(cleared.values())
        self._usage.forget(cleared.values())
        if self._held is not None and cleared:
            self._held.forget(cleared.values())
        if not self._micro_steps:  # what was not cleared counts on
            self._usage.note(param for param in self._parameters if not self._has_no_gradient(param))

    def _has_no_gradient(self, param: nn.Parameter) -> bool:
        return param.grad is None and self._stepped_for(param).grad is None

    def _stepped_for(self, param: nn.Parameter) -> Tensor:
        """What an optimizer holds for a parameter."""
        return param if self.optimizer_shards is None else self.optimizer_shards.held(param)

    # -- hop 1 arrives -----------------------------------------------------------------------------------------------

    def _watch(self, param: nn.Parameter, index: int) -> None:
        if self._is_narrow(param):
            allow_wide_gradients(param)
        if self._alone:
            return  # nobody to tell
        trains = param.requires_grad
        param.requires_grad_(True)  # a frozen parameter may be unfrozen later, and takes no hook while it is frozen
        arrive = WeakMethod(self._arrive)  # a tensor's hooks are where the garbage collector does not look
        param.register_post_accumulate_grad_hook(lambda param: arrive()(index, param))  # type: ignore[misc]
        param.requires_grad_(trains)

    def _arrive(self, index: int, param: Tensor) -> None:
        """The engine has added a micro-step's gradient to `param.grad`."""
        if self._is_narrow(param):
            self._widen(param)
        if (hop_1 := self.buckets[index].hop_1) is not None:
            hop_1.arrived(param)  # type: ignore[arg-type]
        self._unsynced.add(index)
        if self._overlapping:
            self._arrived[index] += 1
            while self._is_whole(self._launched):
                self._launch(self._launched)

    def _widen(self, param: Tensor) -> None:
        if param.grad is not None and param.grad.dtype != self._sum_dtype:
            param.grad = param.grad.to(self._sum_dtype)

    def _finish_hop_1(self) -> None:
        for hop_1 in self._hops_1:
            hop_1.finish()

    def _is_whole(self, index: int) -> bool:
        """Whether no more gradient will come for a block in this backward.

        Kept whole, a block with an unused parameter is never known to be; its hop 2 begins when backward is over.
        """
        bucket = self.buckets[index]
        if bucket.block is None:
            return False
        calls = self._order.awaited[bucket.block]
        if self._kept_whole:
            calls = min(calls, 1)
        return self._arrived[index] >= calls * len(bucket.trainable) > 0

    # -- hop 2 -------------------------------------------------------------------------------------------------------

    def _synchronize(self) -> None:
        """Hop 2 of whatever has not begun it, and the end of all of it."""
        used = self._used_in_partition_group()
        while self._launched < len(self.buckets) - 1:
            self._launch(self._launched)
        if used is not None and self._hop_2 is not None:
            # In the same place of the order on every rank: before the last bucket, which has its hop 1 to wait for.
            self._carry(partial(self._all_reduce, used), "hop 2 of parameters' usage")
        self._launch(self._launched)
        for transfer in self._in_flight:
            transfer.wait()
        for mean in self._means:
            self.optimizer_shards.take_over(mean)  # type: ignore[union-attr]
        self._in_flight.clear()
        self._means.clear()
        if not self._alone:  # otherwise nothing was made up
            self._clear_unused(used)
        self._unsynced.clear()
        self._complete = True

    @torch.no_grad()
    def _launch(self, index: int) -> None:
        """Begin to average a bucket's gradients over the replication group."""
        self._launched = index + 1
        bucket = self.buckets[index]
        params = bucket.trainable
        if not self.one_backward:
            params = [p for p in params if p.grad is not None and index in self._unsynced]
        if bucket.on_every_rank and params:
            self._average_in_partition_group(params)
        if self._hop_2 is None:
            return
        hop_1 = bucket.hop_1.transfer if bucket.hop_1 is not None else None
        if self.optimizer_shards is not None and (held := [*filter(self.optimizer_shards.holds, params)]):
            mean = self.optimizer_shards.begin_reduce(bucket.name, held, [*map(self._local_gradient, held)], hop_1)
            self._means.append(mean)
            self._in_flight.append(mean.transfer)
            params = [p for p in params if not self.optimizer_shards.holds(p)]
        if params:
            shards = [
                ShardGradient(self._local_gradient(p), padded_numel(p, self._groups.topology.partition_size))
                for p in params
            ]
            self._carry(partial(self._average, shards, hop_1), f"hop 2 of {bucket.name}")

    def _average_in_partition_group(self, params: Sequence[nn.Parameter]) -> None:
        gradients = [self._local_gradient(p) for p in params]
        flat = torch.stack(gradients)
        dist.all_reduce(flat, group=self._groups.partition_group)
        for gradient, mean in zip(gradients, flat.div_(self._groups.topology.partition_size), strict=True):
            gradient.copy_(mean)

    def begin_updates(self) -> None:
        """After the optimizer's step: begin to gather what the replicas have updated, in the order of a forward."""
        assert self.optimizer_shards is not None
        for bucket in reversed(self.buckets):
            if params := [p for p in bucket.parameters if self.optimizer_shards.steps(p)]:
                self.optimizer_shards.begin_gather(bucket.block, bucket.name, params)

    def _carry(self, task: Task, what: str) -> None:
        assert self._hop_2 is not None
        self._in_flight.append(self._hop_2.channel.submit(task, what))

    def _all_reduce(self, buffer: Tensor) -> Iterator[None]:
        assert self._hop_2 is not None
        finish = self._hop_2.collectives.begin_all_reduce(buffer)
        yield
        finish()

    def _average(self, shards: Sequence[ShardGradient], hop_1: Transfer | None) -> Iterator[None]:
        if hop_1 is not None:
            hop_1.wait()
        flat = together(shards)
        gathered = torch.cat([shard.padded() for shard in shards]) if flat is None else flat
        sums = gathered.to(self._groups.device, copy=True) if self._on_host else gathered
        yield from self._all_reduce(sums)
        sums.div_(self._groups.topology.replicas)
        if flat is None:
            for shard, mean in zip(shards, sums.split([shard.room for shard in shards]), strict=True):
                shard.local.copy_(mean[: shard.local.numel()].view_as(shard.local))
        elif self._on_host:
            flat.copy_(sums)

    def _local_gradient(self, param: nn.Parameter) -> Tensor:
        """This rank's part of `param.grad`, made of zeros where there is none."""
        if param.grad is None:
            param.grad = torch.zeros_like(param, dtype=self._sum_dtype if self._is_narrow(param) else param.dtype)
        return param.grad.to_local() if isinstance(param.grad, DTensor) else param.grad

    # -- parameters without a gradient -------------------------------------------------------------------------------

    def _used_in_partition_group(self) -> Tensor | None:
        """On how many ranks of the partition group each parameter got a gradient in this window.

        And last, how many came near their memory budget. One all-reduce of four bytes a parameter in the partition
        group, and one over the replicas. None in manual optimization, where ranks are taken to run the same code, and
        where there is one rank.
        """
        if not self.one_backward:
            return None
        near_budget = self.climb.measured() if self.climb is not None else 0.0
        if self._groups.topology.world_size == 1:
            self._near_budget = near_budget
            return None
        device = self._groups.device
        # From pinned memory, so that the host goes on; otherwise it would wait for the whole backward here.
        used = torch.tensor(
            [*(float(self._usage.saw(p)) for p in self._parameters), near_budget],
            dtype=torch.float32,
            pin_memory=device.type != "cpu",
        ).to(device, non_blocking=True)
        if self._groups.topology.partition_size > 1:
            dist.all_reduce(used, group=self._groups.partition_group)
        return used

    def _clear_unused(self, used: Tensor | None) -> None:
        """A parameter without a gradient on any rank has none, rather than one of zeros: its optimizer skips it."""
        if used is not None:
            self._near_budget = used[-1]
        seen = [self._usage.saw(p) for p in self._parameters]
        if all(seen):
            return  # no need to wait for the device
        if used is not None:
            seen = [count > 0 for count in used[:-1].tolist()]
        self._forget_gradients(p for p, was_seen in zip(self._parameters, seen, strict=True) if not was_seen)

    # -- dtypes ------------------------------------------------------------------------------------------------------

    def _is_narrow(self, param: Tensor) -> bool:
        return param.dtype.is_floating_point and param.dtype.itemsize < self._sum_dtype.itemsize


@dataclass(frozen=True)
class _Mark:
    """What a user clears who clears gradients that are elsewhere.

    Attributes:
        param: whose these are.
        holder: in whose `.grad` the mark is.
        gradient: the mark.
        made: whether it is none but a mark.
    """

    param: nn.Parameter
    holder: Tensor
    gradient: Tensor
    made: bool

    @classmethod
    def on(cls, param: nn.Parameter, holder: Tensor) -> _Mark:
        made = holder.grad is None
        if holder.grad is None:
            holder.grad = _zeros_without_memory(holder)
        return cls(param, holder, holder.grad.requires_grad_(), made)

    @property
    def is_gone(self) -> bool:
        return self.holder.grad is not self.gradient or not self.gradient.requires_grad

    def remove(self) -> None:
        self.gradient.requires_grad_(False)
        if self.made and self.holder.grad is self.gradient:
            self.holder.grad = None


def _zeros_without_memory(like: Tensor) -> Tensor:
    """Zeros of the shape of `like`, sharded as it is, all of them one."""
    own = local_part(like)
    return sharded_as(own.new_zeros(()).expand(own.shape), like)
