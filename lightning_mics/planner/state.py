"""State: what a rank holds of a model whatever it computes, exactly, from shapes and dtypes.

The same computation that the engine's account is made by, before there are process groups: shards of the parameters,
the window's gradients, the optimizer's state, and what is whole of the blocks on each rung of the memory ladder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mics.accounting import BucketBytes, bucket_bytes, model_bytes, sums_dtype
from lightning_mics.blocks import BlockChoice, find_blocks, has_parameters, parameters_at, slots_by_owner
from lightning_mics.comms import padded_numel, whole_at_a_time
from lightning_mics.exchange import reduction_bytes
from lightning_mics.ladder import ModelBytes, Phase
from lightning_mics.offload import Offload
from lightning_mics.optimizer_shards import OptimizerState, room
from lightning_mics.planner.meter import Meter
from lightning_mics.precision import Precision
from lightning_mics.sharding import is_kept_whole
from lightning_mics.topology import Topology

_UNCHANGED = Precision()
_MEASURED_NUMEL, _MEASURED_PARAMETERS = 4096, 4


@dataclass(frozen=True)
class OptimizerBytes:
    """What an optimizer keeps, and makes on the way of a step; in bytes.

    Attributes:
        per_value: of its state, for each value that it steps.
        per_parameter: of its state, for each parameter.
        step_per_value: made in a step and alive at once, for each value of all parameters (as foreach forms do).
        step_per_value_of_largest: the same for each value of the largest parameter (as loops do).
    """

    per_value: float
    per_parameter: float = 0
    step_per_value: float = 0
    step_per_value_of_largest: float = 0

    @classmethod
    def measure(
        cls,
        make: Callable[[list[nn.Parameter]], Optimizer],
        dtype: torch.dtype = torch.float32,
        device_type: str = "cpu",
    ) -> OptimizerBytes:
        """By steps of small instances on CPU.

        State that does not grow with the values (Adafactor's rows and columns) is taken as that of a row of 4096.

        Args:
            make: from parameters to an optimizer, as `torch.optim.AdamW`.
            dtype: of the parameters.
            device_type: whose default is meant where the optimizer chooses its form by itself: on an accelerator, the
                foreach form.
        """
        numel, count = _MEASURED_NUMEL, _MEASURED_PARAMETERS
        few, state = _stepped(make, count, dtype, device_type)
        many, _ = _stepped(make, 2 * count, dtype, device_type)
        per_value = sum(tensor.nbytes for tensor in state if tensor.numel() == numel) / numel
        per_parameter = sum(tensor.nbytes for tensor in state if tensor.numel() != numel)
        of_all = (many - few) / (count * numel)
        return cls(per_value, per_parameter, of_all, few / numel - count * of_all)

    def state(self, sizes: list[int]) -> int:
        """Bytes of state for parameters of so many values each."""
        return int(self.per_value * sum(sizes) + self.per_parameter * len(sizes))

    def step(self, sizes: list[int]) -> int:
        """Bytes that a step makes on its way."""
        return int(self.step_per_value * sum(sizes) + self.step_per_value_of_largest * max(sizes, default=0))


def _stepped(
    make: Callable[[list[nn.Parameter]], Optimizer], count: int, dtype: torch.dtype, device_type: str
) -> tuple[int, list[Tensor]]:
    """The most that a second step of `count` parameters has alive at once, and the first parameter's state."""
    params = [nn.Parameter(torch.ones(_MEASURED_NUMEL, dtype=dtype)) for _ in range(count)]
    optimizer = make(params)
    for group in optimizer.param_groups:
        if device_type != "cpu" and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    meter = Meter()
    meter.begin(Phase.HEAD, None, [])
    with meter:
        optimizer.step()
    made = meter.finish()[0].peak.total
    state = [value for value in optimizer.state[params[0]].values() if isinstance(value, Tensor)]
    return made, state


@dataclass(frozen=True)
class ModelState:
    """What a rank holds of a model; that of rank 0, which has the most. All figures in bytes.

    Attributes:
        blocks: in order of execution.
        outside: what lies outside the blocks.
        model: the same as the memory ladder wants it.
        kept_whole: whether parameters are whole, and nothing is gathered.
        adds_in_place: whether autograd adds a backward's gradients to those that are whole already, one by one.
        optimizer: its state.
        step: what the optimizer makes on the way of a step.
        stepped: the gradients that it steps with.
        pieces: of each block, and last of what lies outside: where the optimizer's state is sharded over all ranks, the
            mean gradients of its pieces, as hop 2 brings them; else 0.
        hop_1: what hop 1 needs beside the gradients that it sends.
        hop_2: the same of hop 2, for the largest bucket. One is under way at a time; where the links are slower than a
            backward, there may be three.
        host: what is in the host's memory, where that is not the device's.
        work: what the optimizer's step reads and writes, wherever.
        copied: between host and device in the optimizer's step.
        shards_on_host: whether each gather begins with a copy from the host, each hop 1 ends with one to it, and hop 2
            goes by way of the device. Then the figures of shards and sums are 0 but for those of `blocks` and
            `outside`.
    """

    blocks: tuple[BucketBytes, ...]
    outside: BucketBytes
    model: ModelBytes
    kept_whole: bool
    adds_in_place: bool
    optimizer: int
    step: int
    stepped: int
    pieces: tuple[int, ...]
    hop_1: int
    hop_2: int
    host: int = 0
    work: int = 0
    copied: int = 0
    shards_on_host: bool = False

    @property
    def parameters(self) -> int:
        """Their shards."""
        return 0 if self.shards_on_host else sum(bucket.shards for bucket in (*self.blocks, self.outside))

    @property
    def sums(self) -> tuple[int, ...]:
        """The window's gradients in shards, of each block, and last of what lies outside."""
        return tuple(0 if self.shards_on_host else bucket.sums for bucket in (*self.blocks, self.outside))


def model_state(
    module: nn.Module,
    topology: Topology,
    *,
    optimizer: OptimizerBytes,
    optimizer_state: OptimizerState | str = OptimizerState.PARTITION,
    precision: Precision = _UNCHANGED,
    blocks: BlockChoice = None,
    device_type: str = "cpu",
    offload: Offload | str | None = None,
) -> ModelState:
    """What a rank holds of `module`, on the meta device or any other.

    No communication, and no memory.

    Args:
        module: as it will be given to `shard`.
        topology: of the cluster.
        optimizer: from `OptimizerBytes.measure`, or declared.
        optimizer_state: over which ranks it is sharded.
        precision: dtypes on the wire.
        blocks: see `find_blocks`.
        device_type: where the tensors will be.
        offload: what of them will be in the host's memory; where that is the device's as well, what offloading adds.

    Raises:
        ValueError: for what `find_blocks` refuses of `blocks`, an `optimizer_state` or `offload` that there is not, or
            both where they exclude one another.
    """
    p = topology.partition_size
    optimizer_state = OptimizerState.parse(optimizer_state, "optimizer_state")
    offload = Offload.of(offload, optimizer_state)
    wide = optimizer_state == OptimizerState.WORLD and topology.replicas > 1
    found = find_blocks(module, blocks) if has_parameters(module) else ()
    slots = slots_by_owner(module, found)
    buckets = [parameters_at(slots[name]) for name in (*(block.name for block in found), "")]
    whole = is_kept_whole(module, p, precision, offload)
    *held, outside = [bucket_bytes(parameters, p, precision, whole) for parameters in buckets]
    trainable = [param for parameters in buckets for param in parameters if param.requires_grad]
    sizes = [room(param, topology) if wide else padded_numel(param, p) for param in trainable]
    pieces = [_piece_bytes(parameters, topology, precision) if wide else 0 for parameters in buckets]
    stepped = sum(size * param.itemsize for size, param in zip(sizes, trainable, strict=True))
    made, on_way = optimizer.state(sizes), optimizer.step(sizes)
    if offload == Offload.OPTIMIZER:  # parameters, and in the step gradients, are there twice
        made, on_way = made + stepped, on_way + stepped
    apart = device_type != "cpu" and offload is not None
    shards_on_host = apart and offload == Offload.PARAMETERS
    shards = sum(bucket.shards + bucket.sums for bucket in (*held, outside)) if shards_on_host else 0
    hop_2 = _hop_2_bytes([*held, outside], pieces, topology, whole or offload == Offload.PARAMETERS)
    return ModelState(
        blocks=tuple(held),
        outside=outside,
        model=model_bytes(held, outside, whole_at_a_time(topology, device_type), shards_on_host),
        kept_whole=whole,
        adds_in_place=all(precision.travels(q.dtype) == precision.sum_dtype(q.dtype) for q in trainable),
        optimizer=0 if apart else made,
        step=0 if apart else on_way,
        stepped=0 if shards_on_host else stepped,
        pieces=tuple(pieces),
        hop_1=_hop_1_bytes([*held, outside], topology, device_type),
        hop_2=hop_2,
        host=made + on_way + shards if apart else 0,
        work=3 * stepped + 2 * optimizer.state(sizes) + 2 * optimizer.step(sizes),
        copied=3 * stepped if offload == Offload.OPTIMIZER else 0,
        shards_on_host=shards_on_host,
    )


def _piece_bytes(parameters: tuple[nn.Parameter, ...], topology: Topology, precision: Precision) -> int:
    """A bucket's mean gradients of one rank's pieces."""
    trainable = [param for param in parameters if param.requires_grad]
    return sum(room(param, topology) * sums_dtype([param], precision).itemsize for param in trainable)


def _hop_1_bytes(buckets: list[BucketBytes], topology: Topology, device_type: str) -> int:
    p, k = topology.partition_size, topology.ranks_per_node
    slot = max(bucket.whole.sums for bucket in buckets) // p
    nodes, per_node = max(1, p // k), min(p, k)
    if device_type == "cpu":
        return reduction_bytes(slot, nodes, per_node)
    return slot * (2 * nodes - 1)  # the sums of all nodes' slots, and what comes for this one's


def _hop_2_bytes(buckets: list[BucketBytes], pieces: list[int], topology: Topology, copies: bool) -> int:
    """Pieces are laid out for all replicas; gradients are brought together that autograd made one by one, or are on the
    host.
    """
    if topology.replicas == 1:
        return 0
    if any(pieces):
        return max(pieces) * topology.replicas
    return max(bucket.sums for bucket in buckets) if copies else 0
