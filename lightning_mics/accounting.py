"""Accounting: the bytes that a sharded model sends and holds, by formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mics.collectives import Collectives, Sent
from lightning_mics.comms import blocks_whole, padded_numel
from lightning_mics.groups import Groups
from lightning_mics.ladder import ModelBytes, Rung, Whole
from lightning_mics.optimizer_shards import OptimizerShards, room
from lightning_mics.precision import Precision
from lightning_mics.two_hop import Bucket
from lightning_mics.wire import Wire


@dataclass(frozen=True)
class WireBytes:
    """Bytes that one rank sends in one optimizer step.

    Attributes:
        gather: all-gathers in the partition group, of all micro-steps.
        hop_1: reduce-scatters in the partition group, of all micro-steps.
        hop_2: the all-reduce over the replication group, or its two halves before and after the optimizer's step.
        inter_node: the part of all three that leaves the node.
    """

    gather: int
    hop_1: int
    hop_2: int
    inter_node: int

    @property
    def in_partition_group(self) -> int:
        """Gathers and hop 1."""
        return self.gather + self.hop_1


@dataclass(frozen=True)
class Account:
    """What the buckets of a model cost.

    Attributes:
        buckets: in the order in which backward finishes them; the last lies outside all blocks.
        wire: how they travel.
        groups: among whom.
        precision: in what dtypes.
        kept_whole: whether parameters are what they were before, and nothing is gathered.
        optimizer_shards: the pieces that the optimizer steps, where these are less than the shards.
        on_host: whether shards are in another memory than what is gathered, and do not count.
    """

    buckets: Sequence[Bucket]
    wire: Wire
    groups: Groups
    precision: Precision
    kept_whole: bool = False
    optimizer_shards: OptimizerShards | None = None
    on_host: bool = False

    def sent(self, rung: Rung, window: int) -> WireBytes:
        """What one rank sends in an optimizer step of `window` micro-steps.

        Of a bucket's gathered bytes B, (p-1)/p for each gather and each reduce-scatter of the rung, and 2(r-1)/r of a
        shard for hop 2. Over both tiers, (p-k)/p of B leaves a node, for all of its k ranks together.
        """
        gather = hop_1 = hop_2 = Sent(0, 0)
        for bucket in self.buckets:
            if self.wire.gather is not None:
                blocks, index = len(self.buckets) - 1, bucket.block
                times = (
                    rung.gathers_outside(window)
                    if index is None
                    else rung.gathers(window, index, blocks, blocks_whole(self.groups))
                )
                gather += self.wire.gather.collectives.sent(*self._gathered(bucket), narrow=True) * times
            if self.wire.hop_1 is not None and bucket.trainable:
                hop_1 += self.wire.hop_1.collectives.sent(*self._summed(bucket)) * rung.reduce_scatters(window)
            if self.wire.hop_2 is not None and bucket.trainable:
                hop_2 += self._hop_2(bucket, self.wire.hop_2.collectives)
        inter_node = gather.inter_node + hop_1.inter_node + hop_2.inter_node
        return WireBytes(int(gather.total), int(hop_1.total), int(hop_2.total), int(inter_node))

    def _hop_2(self, bucket: Bucket, collectives: Collectives) -> Sent:
        """Of a bucket: the all-reduce of what is averaged whole, and both halves for pieces."""
        own, p = bucket.trainable[0].dtype, self.groups.topology.partition_size
        sums = sums_dtype(bucket.parameters, self.precision)
        whole, pieces = 0, 0
        for param in bucket.trainable:
            if self.optimizer_shards is not None and self.optimizer_shards.holds(param):
                pieces += room(param, self.groups.topology)
            else:
                whole += padded_numel(param, p)
        sent = collectives.sent(whole / self.groups.topology.replicas, sums, narrow=True) * 2
        exact = collectives.exact()
        return sent + exact.sent(pieces, sums) + exact.sent(pieces, own)

    def held(self) -> ModelBytes:
        """What a rank holds of the model, on whatever rung."""
        p = self.groups.topology.partition_size
        held = [bucket_bytes(bucket.parameters, p, self.precision, self.kept_whole) for bucket in self.buckets]
        *blocks, outside = held
        return model_bytes(blocks[::-1], outside, blocks_whole(self.groups), self.on_host)

    def _gathered(self, bucket: Bucket) -> tuple[int, torch.dtype]:
        return gathered(bucket.parameters, self.groups.topology.partition_size, self.precision)

    def _summed(self, bucket: Bucket) -> tuple[int, torch.dtype]:
        return summed(bucket.parameters, self.groups.topology.partition_size, self.precision)


@dataclass(frozen=True)
class BucketBytes:
    """What a rank holds of one bucket.

    Attributes:
        shards: of its parameters.
        sums: the window's gradients, in shards.
        whole: while it is whole.
    """

    shards: int
    sums: int
    whole: Whole


def bucket_bytes(
    parameters: Sequence[Tensor], partition_size: int, precision: Precision, kept_whole: bool = False
) -> BucketBytes:
    """What the rank with the most holds of a bucket; from shapes and dtypes alone, on the meta device as well.

    Args:
        parameters: the bucket's, of the shapes that they have whole.
        partition_size: over how many ranks they are sharded.
        precision: in what dtypes they travel and are summed.
        kept_whole: whether nothing is gathered; see `Account`.
    """
    slot, travels = gathered(parameters, partition_size, precision)
    summed_slot, sums = summed(parameters, partition_size, precision)
    trainable = (param for param in parameters if param.requires_grad)
    gradients = sum(param.numel() * precision.travels(param.dtype).itemsize for param in trainable)
    whole = Whole(partition_size * slot * travels.itemsize, gradients, partition_size * summed_slot * sums.itemsize)
    return BucketBytes(
        shards=sum(padded_numel(param, partition_size) * param.itemsize for param in parameters),
        sums=summed_slot * sums_dtype(parameters, precision).itemsize,
        whole=Whole(0, 0, 0) if kept_whole else whole,
    )


def model_bytes(blocks: Sequence[BucketBytes], outside: BucketBytes, whole: int, on_host: bool = False) -> ModelBytes:
    """All buckets together: `blocks` in order of execution, of which `whole` are so at a time.

    Shards that are on the host are not of the device's memory, which is meant.
    """
    shards = 0 if on_host else sum(bucket.shards + bucket.sums for bucket in (*blocks, outside))
    return ModelBytes(shards, tuple(block.whole for block in blocks), outside.whole, whole)


def gathered(parameters: Sequence[Tensor], partition_size: int, precision: Precision) -> tuple[int, torch.dtype]:
    """Elements of a rank's shard of a bucket, and the dtype in which they travel; several travel as bytes."""
    rooms = [padded_numel(param, partition_size) for param in parameters]
    dtypes = [precision.travels(param.dtype) for param in parameters]
    if len({*dtypes}) == 1:
        return sum(rooms), dtypes[0]
    return sum(numel * dtype.itemsize for numel, dtype in zip(rooms, dtypes, strict=True)), torch.uint8


def summed(parameters: Sequence[Tensor], partition_size: int, precision: Precision) -> tuple[int, torch.dtype]:
    """Elements of a rank's shard of a bucket that take gradients, and the dtype in which hop 1 adds them."""
    trainable = [param for param in parameters if param.requires_grad]
    own = trainable[0].dtype if trainable else torch.float32
    return sum(padded_numel(param, partition_size) for param in trainable), precision.sum_dtype(own)


def sums_dtype(parameters: Sequence[Tensor], precision: Precision) -> torch.dtype:
    """The dtype of a bucket's `.grad`, which hop 2 averages."""
    own = next((param.dtype for param in parameters if param.requires_grad), torch.float32)
    return torch.promote_types(precision.sum_dtype(own), own)
