"""Comms: a block's gathers and its hop 1, as the engine calls them.

FSDP2 lets each sharded module bring its own all-gather and reduce-scatter: any object with these two methods. On CPU
the engine has no streams, and would stand still in each of them; these hand the work to a channel and return, so that
it happens behind the computation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mics.channels import Transfer, naming
from lightning_mics.flat import ShardGradient, together
from lightning_mics.groups import Groups
from lightning_mics.topology import Topology
from lightning_mics.wire import Traffic


def blocks_whole(groups: Groups) -> int:
    """How many blocks are whole at a time, on the lowest rung: the one that runs, and those on their way.

    One block's parameters are on their way, and one block's gradients; on CPU two blocks' where they cross between
    nodes, so that the link does not idle while what has crossed is passed on in the node and taken into use. (On an
    accelerator the engine runs ahead by itself.)
    """
    return whole_at_a_time(groups.topology, groups.device.type)


def whole_at_a_time(topology: Topology, device_type: str) -> int:
    """The same, for groups that have not been made."""
    return 3 if topology.spans_nodes and device_type == "cpu" else 2


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

    The engine makes the output `.grad`, or adds it to that, at once. Here it finds zeros in it, or is given the very
    memory of `.grad`, with the window's sums; the mean over the partition group is added when it has come.

    Args:
        name: the block's, for people.
        parameters: the block's.
        traffic: hop 1 of all blocks.
        partition_size: p, by which sums are divided.
        most_under_way: blocks whose gradients may be on their way at a time.
        host_memory: makes memory for so many sums, where these are on the host and gradients on the device; by default
            both are where the engine asks for them.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[nn.Parameter],
        traffic: Traffic,
        partition_size: int,
        most_under_way: int,
        host_memory: Callable[[int, torch.dtype], Tensor] | None = None,
    ) -> None:
        self.transfer: Transfer | None = None
        """The last hop 1, under way or over."""
        self._name = name
        self._collectives = traffic.collectives
        self._channel = traffic.channel
        self._partition_size = partition_size
        self._most_under_way = most_under_way
        self._buffer: Tensor | None = None
        self._rooms = {param: padded_numel(param, partition_size) for param in parameters}
        self._parameters: list[nn.Parameter] = []
        self._slot_numel = self._awaited = 0
        self._sums: Tensor | None = None
        self._host_memory = host_memory
        self._gradients_numel = 0  # of the memory that was asked for, until the output's is

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory: for gradients, once there is room for one more block's, see `blocks_whole`; then for the output."""
        self._channel.drain(leave=self._most_under_way - 1)
        numel = math.prod(map(int, size))
        of_sums = self._gradients_numel == self._partition_size * numel > 0
        self._gradients_numel = 0 if of_sums else numel
        on_host = of_sums and self._host_memory is not None
        self._sums = self._sums_so_far(numel, dtype, torch.device("cpu") if on_host else device)
        if self._sums is not None:
            return self._sums
        if self._host_memory is not None and on_host:
            return self._host_memory(numel, dtype)
        return torch.empty(*size, dtype=dtype, device=device)

    def _sums_so_far(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """The memory of `.grad`, which has none from here on, where it is what the engine asks for as output."""
        params = self._parameters
        if not params or numel != self._slot_numel or not all(param.requires_grad for param in params):
            return None  # it asks for the input, or not for all of these
        if len(params) < sum(param.requires_grad for param in self._rooms) or params[0].dtype != dtype:
            return None  # nor for these alone; or it would round the sums
        flat = together(gradients) if (gradients := self._gradients()) else None
        if flat is None or flat.dtype != dtype or flat.device != device:
            return None
        for param in params:
            param.grad = None
        return flat

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        """Take a micro-step's gradients, laid out by the engine as one slot a rank. `arrived` tells whose they are."""
        if self._sums is None:
            output_tensor.zero_()
        self._parameters, self._slot_numel = [], output_tensor.numel()
        self._awaited = self._slot_numel
        self._buffer = input_tensor
        return None

    def arrived(self, param: nn.Parameter) -> None:
        """The engine has added its zeros to `param.grad`; called for each parameter, in the order of the layout."""
        if self._buffer is None:
            return
        self._parameters.append(param)
        self._awaited -= self._rooms[param]
        if not self._awaited:
            self._begin()

    def finish(self) -> None:
        """Wait for hop 1, if there was any."""
        if self.transfer is not None:
            self.transfer.wait()
            self._channel.drain()

    def forget(self) -> None:
        """Drop what is under way."""
        self._buffer = None
        self._gradients_numel = 0
        if self.transfer is not None:
            self.transfer.abandon()
            self.transfer = None

    def _begin(self) -> None:
        gradients = self._gradients() if self._sums is None else [ShardGradient(self._sums, self._sums.numel())]
        assert self._buffer is not None and gradients is not None
        buffer, self._buffer, self._sums = self._buffer, None, None
        small_range = buffer.dtype == torch.float16
        if small_range:
            buffer.div_(self._partition_size)
        with naming(f"reduce-scatter of {self._name}") as what:
            finish = self._collectives.begin_reduce_scatter(buffer)
        task = partial(self._add, finish, 1 if small_range else self._partition_size, gradients)
        self.transfer = self._channel.submit(task, what)
        if buffer.device.type != "cpu":
            # The block behind waits for it in `allocate`, on the stream whose memory it is. Left to the allocator
            # (`record_stream`), memory would come back when the device is through, and the host is far ahead of that.
            self._channel.keep(buffer, torch.accelerator.current_stream(buffer.device).record_event())

    def _gradients(self) -> list[ShardGradient] | None:
        """Those of the last micro-step's parameters, in the order of the layout; None unless all have one."""
        gradients = []
        for param in self._parameters:
            if not isinstance(param.grad, DTensor):
                return None
            gradients.append(ShardGradient(param.grad.to_local(), self._rooms[param]))
        return gradients

    @staticmethod
    def _add(finish: Callable[[], Tensor], divisor: int, gradients: Sequence[ShardGradient]) -> None:
        mean = finish().div_(divisor).to(gradients[0].local.device)
        for gradient, piece in zip(gradients, mean.split([gradient.room for gradient in gradients]), strict=True):
            gradient.local.add_(piece[: gradient.local.numel()].view_as(gradient.local))


def padded_numel(param: Tensor, partition_size: int) -> int:
    """Elements that each of `partition_size` ranks has room for when `param` is sharded in dim 0, if it has one."""
    if not param.ndim:
        return 1
    rows = param.shape[0]
    return -(-rows // partition_size) * (param.numel() // rows) if rows else 0
