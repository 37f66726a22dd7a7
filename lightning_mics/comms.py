"""Comms: a block's gathers and its hop 1, as the engine calls them.

FSDP2 lets each sharded module bring its own all-gather and reduce-scatter: any object with these two methods. On CPU
the engine has no streams, and would stand still in each of them; these hand the work to a channel and return, so that
it happens behind the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics.channels import Transfer, naming
from lightning_mics.groups import Groups
from lightning_mics.wire import Traffic


def blocks_whole(groups: Groups) -> int:
    """How many blocks are whole at a time, on the lowest rung: the one that runs, and those on their way.

    One block's parameters are on their way, and one block's gradients; on CPU two blocks' where they cross between
    nodes, so that the link does not idle while what has crossed is passed on in the node and taken into use. (On an
    accelerator the engine runs ahead by itself.)
    """
    across = groups.gather is not None and groups.gather.nodes > 1
    return 3 if across and groups.device.type == "cpu" else 2


class BlockGather:
    """All-gathers of one block's parameters in the partition group.

    Args:
        name: the block's, for people.
        traffic: the gathers of all blocks.
    """

    def __init__(self, name: str, traffic: Traffic) -> None:
        self._name = name
        self._collectives = traffic.collectives
        self._channel = traffic.channel
        self._under_way: Transfer | None = None

    @property
    def prefetched(self) -> bool:
        """Whether a gather was begun that nothing has used yet."""
        return self._under_way is not None and not self._under_way.waited

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is gathered."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Begin a gather; the engine has put this rank's shard in its place in `output_tensor`."""
        with naming(f"all-gather of {self._name}") as what:
            finish = self._collectives.begin_all_gather(output_tensor)
        transfer = self._channel.submit(finish, what)
        if not self._channel.asynchronous:
            return None
        self._under_way = transfer
        return transfer

    def abandon(self) -> None:
        """After an exception: nobody waits for a gather whose other ranks may never come."""
        if self._under_way is not None:
            self._under_way.abandon()
            self._under_way = None


class HopOne:
    """Hop 1 of one block: reduce-scatters of its gradients in the partition group, added to the shards' `.grad`.

    The engine adds what it finds in the output to `.grad` at once. Here it finds zeros, and the mean over the partition
    group is added when it has come. While `holds`, the gradients of all ranks stay whole and are summed here instead;
    the next hop 1 takes them along.

    Args:
        name: the block's, for people.
        traffic: hop 1 of all blocks.
        partition_size: p, by which sums are divided.
        most_under_way: blocks whose gradients may be on their way at a time.
    """

    def __init__(self, name: str, traffic: Traffic, partition_size: int, most_under_way: int) -> None:
        self.holds = False
        self.transfer: Transfer | None = None
        """The last hop 1, under way or over."""
        self._name = name
        self._collectives = traffic.collectives
        self._channel = traffic.channel
        self._partition_size = partition_size
        self._most_under_way = most_under_way
        self._held: Tensor | None = None
        self._buffer: Tensor | None = None
        self._parameters: list[nn.Parameter] = []
        self._awaited = 0

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for gradients, once there is room for one more block's; see `blocks_whole`."""
        self._channel.drain(leave=self._most_under_way - 1)
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        """Take a micro-step's gradients, laid out by the engine as one slot a rank. `arrived` tells whose they are."""
        output_tensor.zero_()
        if input_tensor.device.type != "cpu":  # it was made on another stream, and is needed beyond this call
            input_tensor.record_stream(torch.accelerator.current_stream(input_tensor.device))
        self._parameters, self._awaited = [], output_tensor.numel()
        if self._held is not None:
            input_tensor.add_(self._held)
        self._buffer, self._held = input_tensor, None
        return None

    def arrived(self, param: nn.Parameter) -> None:
        """The engine has added its zeros to `param.grad`; called for each parameter, in the order of the layout."""
        if self._buffer is None:
            return
        self._parameters.append(param)
        self._awaited -= padded_numel(param, self._partition_size)
        if self._awaited:
            return
        if self.holds:
            self._held, self._buffer = self._buffer, None
        else:
            self._begin()

    def flush(self) -> None:
        """Begin hop 1 of what was held, if anything was."""
        if self._held is not None:
            self._buffer, self._held = self._held, None
            self._begin()

    def forget(self) -> None:
        """Drop what is held or under way."""
        self._held = self._buffer = None
        if self.transfer is not None:
            self.transfer.abandon()
            self.transfer = None

    def _begin(self) -> None:
        assert self._buffer is not None
        targets = [param.grad.to_local() for param in self._parameters]  # type: ignore[union-attr,attr-defined]
        sizes = [padded_numel(param, self._partition_size) for param in self._parameters]
        small_range = self._buffer.dtype == torch.float16
        if small_range:
            self._buffer.div_(self._partition_size)
        with naming(f"reduce-scatter of {self._name}") as what:
            finish = self._collectives.begin_reduce_scatter(self._buffer)
        task = partial(self._add, finish, 1 if small_range else self._partition_size, targets, sizes)
        self._buffer = None
        self.transfer = self._channel.submit(task, what)

    def _add(self, finish: Callable[[], Tensor], divisor: int, targets: list[Tensor], sizes: list[int]) -> None:
        total = finish().div_(divisor)
        for target, piece in zip(targets, total.split(sizes), strict=True):
            target.add_(piece[: target.numel()].view_as(target))


def padded_numel(param: nn.Parameter, partition_size: int) -> int:
    """Elements that each of `partition_size` ranks has room for when `param` is sharded in dim 0."""
    rows = param.shape[0]
    return -(-rows // partition_size) * (param.numel() // rows) if rows else 0
