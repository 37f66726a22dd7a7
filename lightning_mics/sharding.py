"""Sharding: an unmodified module becomes a MiCS-sharded one.

`shard` reads as a checklist: blocks found, values made equal, checkpointing applied, blocks sharded over the partition
group, the rest sharded, the two-hop window installed. The engine underneath is PyTorch's FSDP2 on the one-dimensional
mesh of the partition group, by its public interface.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_mics._compat import hooks_on, in_backward, reduce_unused_params, reset_iter_state
from lightning_mics.accounting import Account, WireBytes
from lightning_mics.block_order import BlockOrder
from lightning_mics.blocks import (
    Block,
    BlockChoice,
    Slot,
    class_of,
    find_blocks,
    has_parameters,
    parameters_at,
    slots_by_owner,
    take_scalars,
    tied_across_blocks,
)
from lightning_mics.climb import Budget, Climb
from lightning_mics.comms import BlockGather, HopOne, blocks_whole
from lightning_mics.groups import Groups
from lightning_mics.held import HeldGradients
from lightning_mics.ladder import AUTO, ModelBytes, Rung
from lightning_mics.materialize import broadcast_from_rank_zero, common_seed, materialize
from lightning_mics.network import Network
from lightning_mics.offload import Offload, check_backend, empty_on_host, policy
from lightning_mics.optimizer_shards import OptimizerShards, check_optimizer
from lightning_mics.precision import Precision
from lightning_mics.recompute import already_recomputing, checkpoint_activations
from lightning_mics.repeats import check_repeat
from lightning_mics.residency import Residency
from lightning_mics.two_hop import HOOKED, Bucket, Window
from lightning_mics.usage import Usage
from lightning_mics.wire import Wire

_UNCHANGED = Precision()
_GENERATE = "generate"

OUTSIDE = "what lies outside the blocks"
ON_EVERY_RANK = "parameters without dimensions"


class MiCSModule(nn.Module):
    """The sharded root: a module together with its topology, its groups and its window. Made by `shard`.

    Calling it calls the module, gathering each block's parameters from the partition group on the way.
    """

    def __init__(self, module: nn.Module, groups: Groups, precision: Precision, offload: Offload | None = None) -> None:
        super().__init__()
        self.module = module
        self.tied_across_blocks = nn.ParameterList()
        self.groups = groups
        self.precision = precision
        self.offload = offload
        """What is in the host's memory. Of the optimizer, that is for who makes it to see to."""
        self.gathers: dict[nn.Module, BlockGather] = {}
        self.hops_1: dict[nn.Module, HopOne] = {}
        self.gathering: tuple[FSDPModule, ...] = ()
        """The modules that the engine gathers; none where parameters are kept whole."""
        self.wire: Wire
        self.blocks: tuple[Block, ...] = ()
        self.residency: Residency
        self.window: Window
        self.order: BlockOrder
        self._ahead: dict[int | None, Sequence[int]] = {}  # blocks whose gathers begin with a block's, or the root's
        self._has_run = False
        self._from_outside: Callable[..., Any] | None = None  # what a forward runs, if not the module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward; under inference mode without gradients instead. If it raises, the window is forgotten.

        What is gathered in inference mode could not be trained on afterwards, and the engine keeps the memory for it.
        """
        self._await_updates(None)
        try:
            if torch.is_inference_mode_enabled():
                with torch.inference_mode(mode=False), torch.no_grad():
                    return super().__call__(*args, **kwargs)
            return super().__call__(*args, **kwargs)
        except BaseException:
            self.abort()
            raise
        finally:
            self.residency.show_shards()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        self._has_run = True
        with self.order.forward() as finish:
            return finish((self._from_outside or self.module)(*args, **kwargs))

    def take_calls_from_outside(self) -> None:
        """Let a call of the module itself, outside this root's forward, be one of the root.

        As a callback makes it, or a summary of the module. Collective on the partition group, as every forward is.
        """
        plain: Callable[..., Any] = self.module.forward

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.order.inside or in_backward():
                return plain(*args, **kwargs)
            return self._called_from_outside(plain, *args, **kwargs)

        self.module.forward = forward  # type: ignore[method-assign]
        if callable(getattr(self.module, _GENERATE, None)):
            self._take_generation()

    def _take_generation(self) -> None:
        """Let `module.generate`, as Hugging Face's models have it, be a forward of this root: many of the blocks."""
        plain: Callable[..., Any] = getattr(self.module, _GENERATE)

        @functools.wraps(plain)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if self.order.inside:
                return plain(*args, **kwargs)
            passes, self.order.pass_skipped = self.order.pass_skipped, False
            try:
                with torch.no_grad():
                    return self._called_from_outside(plain, *args, **kwargs)
            finally:
                self.order.pass_skipped = passes

        setattr(self.module, _GENERATE, generate)

    def _called_from_outside(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A forward of this root that runs `plain`: the module's own hooks are around that call already."""
        self._from_outside = plain
        try:
            return self(*args, **kwargs)
        finally:
            self._from_outside = None
            if not torch.is_grad_enabled():
                self.release()

    @property
    def rung(self) -> Rung:
        """What stays whole in memory; "auto" changes it between windows."""
        return self.window.rung

    def set_rung(self, rung: Rung | str, memory_budget: int | float = 0.9, planned: Rung | None = None) -> None:
        """Go on from another rung, between windows; see `shard`. "auto" begins with `planned`, if that is given.

        Raises:
            ValueError: if there is no such rung, or no such budget.
        """
        budget, climbs = Budget(memory_budget), rung == AUTO
        if not climbs:
            self.window.climb = None
            self.window.take(Rung.parse(rung))
            return
        device, sizes = self.groups.device, self.bytes_held()
        room = budget.bytes(device, self.groups.topology.ranks_per_node)
        climb = Climb(room, device, sizes, lambda r, w: self.wire_bytes(w, r).in_partition_group, planned)
        self.window.climb = climb
        self.window.take(climb.first)

    @property
    def one_backward(self) -> bool:
        """Whether each micro-step is one forward and one backward over the whole module; see `Window`."""
        return self.window.one_backward

    @one_backward.setter
    def one_backward(self, value: bool) -> None:
        self.window.one_backward = self.residency.one_backward = value
        self.order.pass_skipped = value and self.groups.topology.partition_size > 1
        if self.gathering:
            reduce_unused_params(self, value)  # type: ignore[arg-type]
        self._prefetch(value)

    def _prefetch(self, enable: bool) -> None:
        """Whether blocks are gathered before the block ahead of them runs; see `blocks_whole`.

        Only where the next block is known to come. On an accelerator the engine runs ahead by itself.
        """
        if self.groups.device.type != "cpu" or self.groups.gather is None:
            return
        blocks = [block.module for block in self.blocks]
        ahead = blocks_whole(self.groups) - 1 if enable else 0
        for index, module in enumerate([self, *blocks]):
            following = self._ahead[index - 1 if index else None] = range(index, min(index + ahead, len(blocks)))
            module.set_modules_to_forward_prefetch([blocks[i] for i in following])  # type: ignore[operator]
            before = blocks[max(0, index - 1 - ahead) : max(0, index - 1)]
            module.set_modules_to_backward_prefetch(before[::-1])  # type: ignore[operator]

    # -- optimizer state over all ranks ------------------------------------------------------------------------------

    def shard_optimizer(self, optimizer: Optimizer) -> None:
        """Shard an optimizer's state over all ranks, and its step with it, instead of over the partition group.

        The parameters in its groups are replaced by this rank's pieces of them, in place; schedulers go on with the
        same groups. From then on hop 2 leaves mean gradients with the pieces, and the parameters' own `.grad` is None
        when the window closes. The optimizer's step begins to gather what the replicas have updated, on the channel of
        hop 2; a forward of this module awaits what it reads, block by block. Whoever reads or writes parameters
        otherwise calls `finish_updates` first; state dicts do so by themselves. With one replica nothing changes.

        No communication. To be called alike on all ranks, before the optimizer's first step; each call replaces the
        optimizer of the one before.

        Args:
            optimizer: of this module's parameters. One that treats elements alike (AdamW, SGD, ...) steps as it would
                on whole shards; others see DTensors of the parameters' shape.

        Raises:
            ValueError: for an optimizer that runs several forwards in a step, or was sharded before, and where
                micro-steps are not known to be one forward and one backward (`one_backward`).
        """
        check_optimizer(optimizer)
        if not self.one_backward:
            raise ValueError(
                "an optimizer that is sharded over all ranks cannot clear gradients in the midst of a window, which "
                "manual optimization may ask of it; set one_backward=True where each micro-step is one forward and one "
                "backward, or leave the optimizer as it is"
            )
        self.finish_updates()
        if self.wire.hop_2 is not None:
            self.window.optimizer_shards = OptimizerShards(
                self.groups, self.wire.hop_2, optimizer, self.parameters(), self.window.begin_updates
            )

    def forget_optimizer(self) -> None:
        """Go on with optimizers of whole shards."""
        self.finish_updates()
        self.window.optimizer_shards = None

    def finish_updates(self) -> None:
        """Return when the shards hold all that the optimizer's last step has changed on any replica.

        Raises:
            CollectiveError: if it cannot be had.
        """
        if self.window.optimizer_shards is not None:
            self.window.optimizer_shards.finish_all()

    def _await_updates(self, block: int | None) -> None:
        """Before the forward of a block, or of the root: what is read when it begins is there."""
        shards = self.window.optimizer_shards
        if shards is None:
            return
        if block is None:
            shards.forward_begins()
            if self.groups.device.type != "cpu":
                # Streams: the engine's gathers wait for the current stream in the root's forward only, and the current
                # stream waits for the updates, not the host.
                shards.finish_all()
        for each in (block, *self._ahead.get(block, ())):
            shards.finish(each)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, wherever the window has them."""
        super().zero_grad(set_to_none)
        parameters = [*self.parameters()]
        if (pieces := self.window.optimizer_shards) is not None:
            for param in parameters:
                pieces.forget(param)
        self.window.cleared(parameters)

    def as_output(self, loss: Callable[[], Tensor]) -> Tensor:
        """The loss to call backward on when that happens inside the module's own forward (manual optimization).

        The engine looks for a backward at the outputs of a forward. Passing through here makes the loss one, so that
        parameters outside the blocks are reduced as well; they are gathered again by the next forward that needs them.
        The loss comes as a function, because as an argument it would look like an input to that forward, too.
        """
        return loss().clone()

    def release(self) -> None:
        """Free what a forward without a backward left gathered, so that the next gather sees the optimizer's step."""
        for module in self.gathering:
            gather = self.gathers.get(module)  # type: ignore[call-overload]
            if gather is not None and gather.prefetched:
                module.unshard()  # nothing but the end of what was begun
            module.reshard()

    def abort(self) -> None:
        """After an exception in a forward or a backward: forget the window and whatever was under way."""
        self.window.drop()
        self.order.forwards = 0
        if self.window.optimizer_shards is not None:
            self.window.optimizer_shards.abort()
        for gather in self.gathers.values():
            gather.abandon()
        for param in self.parameters():
            if not isinstance(param, DTensor):  # still gathered: its backward did not finish
                param.grad = None
        if self._has_run and self.gathering:
            reset_iter_state(self)  # type: ignore[arg-type]

    def synchronize_buffers(self) -> None:
        """Give every rank rank 0's persistent buffers, as DDP does. Collective on the default group."""
        buffers = {name: buffer for name, buffer in self.module.named_buffers() if not isinstance(buffer, DTensor)}
        if not buffers or self.groups.topology.world_size == 1:
            return
        saved = self.module.state_dict().keys()
        if persistent := [buffer for name, buffer in buffers.items() if name in saved]:
            broadcast_from_rank_zero(persistent)

    def wire_bytes(self, window: int, rung: Rung | None = None) -> WireBytes:
        """What one rank sends in an optimizer step of `window` micro-steps, on `rung` or the current one."""
        return self._account().sent(rung or self.rung, window)

    def bytes_held(self) -> ModelBytes:
        """What one rank holds of the model, on whatever rung."""
        return self._account().held()

    def _account(self) -> Account:
        pieces = self.window.optimizer_shards
        buckets = [bucket for bucket in self.window.buckets if not bucket.on_every_rank]
        on_host = self.offload == Offload.PARAMETERS and self.groups.device.type != "cpu"
        return Account(buckets, self.wire, self.groups, self.precision, not self.gathering, pieces, on_host)

    def describe(self) -> str:
        """The choice of blocks, for people."""
        by_class: defaultdict[str, list[Block]] = defaultdict(list)
        for block in self.blocks:
            by_class[class_of(block.module).__name__].append(block)
        lines = []
        for name, blocks in by_class.items():
            numel = sum(p.numel() for p in blocks[0].module.parameters())
            ends = blocks[0].name if len(blocks) == 1 else f"{blocks[0].name} ... {blocks[-1].name}"
            lines.append(f"{len(blocks)} x {name} of {numel:,} parameters ({ends})")
        outside = sum(p.numel() for b in self.window.buckets if b.block is None for p in b.parameters)
        lines.append(f"{outside:,} parameters outside blocks")
        return "\n".join(lines)


def shard(
    module: nn.Module,
    groups: Groups,
    *,
    blocks: BlockChoice = None,
    activation_checkpointing: bool = False,
    compile: Mapping[str, Any] | None = None,
    precision: Precision = _UNCHANGED,
    rung: Rung | str = "block/sharded",
    memory_budget: int | float = 0.9,
    network: Network | None = None,
    offload: Offload | str | None = None,
) -> MiCSModule:
    """Shard `module` over its partition group, in place, with hop 2 over the replication group.

    Collective on the default group: values are made equal to rank 0's, wherever a rank's own came from. Where a rank's
    shard is the whole (p = 1) in the dtype that computes, parameters stay what they are, and no engine is between.

    Args:
        module: any module; on the meta device, in whole or in part, it is materialised block by block.
        groups: from `Groups.create`.
        blocks: which modules are gathered together; see `find_blocks`.
        activation_checkpointing: recompute each block's forward in backward instead of keeping its activations.
        compile: arguments of `torch.compile`, with which each block's forward is compiled; None leaves it as it is.
        precision: dtypes on the wire.
        rung: what stays whole in memory, as "block/sharded"; see `Rung`. "auto" takes the fastest that fits the
            budget, from the second window on; see `Climb`.
        memory_budget: for "auto": bytes (an int) or a share of the device's memory (a float).
        network: what the two tiers can do, the same on every rank; by default `Network.default`.
        offload: "parameters" keeps shards, and with them the window's sums and what an optimizer makes of them, in the
            host's memory; gathered blocks and hop 2 are on the device. Otherwise nothing changes here.

    Returns:
        The root to call; `module`'s parameters are now DTensors on the partition mesh, unless they are kept whole.
        Parameters without dimensions have no rows, and stay whole on every rank.

    Raises:
        ValueError: on every rank before any collective, for a block of mixed dtypes, hooks on parameters that are to be
            sharded, a module that is sharded over other ranks already, or one that is sharded at all and is to be
            offloaded, and where the process group does not carry what is offloaded.
    """
    offload = Offload.of(offload)
    check_backend(offload, groups.device)
    if rung != AUTO:
        rung = Rung.parse(rung)
    Budget(memory_budget)
    found = find_blocks(module, blocks) if has_parameters(module) else ()
    _check_sharded_by_user(module, groups, offload)
    root = MiCSModule(module, groups, precision, offload)
    slots = slots_by_owner(module, found)
    whole = is_kept_whole(module, groups.topology.partition_size, precision, offload)
    if not whole:
        _check_hooks(module)
    scalars = [] if whole else take_scalars(slots)
    root.tied_across_blocks.extend(p for p in tied_across_blocks(module, found) if p.ndim)
    _check_dtypes(slots)

    _equalize_user_shards(module, groups)
    recomputing = already_recomputing(found) if activation_checkpointing else ()
    seed = common_seed(groups.device)
    materialize(module, _modules_outside(module, found), groups.device, seed)
    for block in found:
        materialize(module, _modules_within(block), groups.device, seed)
        if activation_checkpointing and block not in recomputing:
            checkpoint_activations(block.module)
        if compile is not None:  # the forward alone: hooks, which gather, stay outside the graph
            block.module.forward = torch.compile(block.module.forward, **compile)  # type: ignore[method-assign]
        if not whole:
            _shard_block(block.module, slots[block.name], groups, precision, policy(offload, groups.device))
    if not whole:
        _shard_root(root, slots[""], ignored=parameters_at(scalars))
        root.take_calls_from_outside()

    root.blocks = found
    root.wire = Wire.create(groups, network, precision.between_nodes)
    _install_comms(root, slots)
    _install_window(root, slots, scalars)
    _finish_updates_before_state_dicts(root)
    root.set_rung(rung, memory_budget)
    return root


def _shard_block(
    module: nn.Module, slots: list[Slot], groups: Groups, precision: Precision, offloading: OffloadPolicy
) -> None:
    if isinstance(module, FSDPModule):
        return
    own = parameters_at(slots)
    ignored = {p for p in module.parameters() if not any(p is q for q in own)}
    fully_shard(
        module,
        mesh=groups.partition_mesh,
        mp_policy=_policy(precision, own),
        reshard_after_forward=True,
        offload_policy=offloading,
        ignored_params=ignored or None,
    )


def _shard_root(root: MiCSModule, slots: list[Slot], ignored: Sequence[nn.Parameter]) -> None:
    fully_shard(
        root,
        mesh=root.groups.partition_mesh,
        mp_policy=_policy(root.precision, parameters_at(slots)),
        offload_policy=policy(root.offload, root.groups.device),
        ignored_params={*ignored} or None,
    )
    register_fsdp_forward_method(root, "as_output")
    _gather_again_inside_forward(root, slots)
    root.gathering = tuple(module for module in root.modules() if isinstance(module, FSDPModule))


def is_kept_whole(module: nn.Module, partition_size: int, precision: Precision, offload: Offload | None = None) -> bool:
    """Whether each rank holds, computes with and updates whole parameters, so that an engine has nothing to do."""
    return (
        partition_size == 1
        and offload != Offload.PARAMETERS
        and not any(isinstance(p, DTensor) or precision.travels(p.dtype) != p.dtype for p in module.parameters())
    )


def _gather_again_inside_forward(root: MiCSModule, slots: list[Slot]) -> None:
    """A backward inside the root's forward leaves it sharded; a module outside the blocks that runs then gathers it."""

    def gather(module: nn.Module, args: Any) -> None:
        if root.order.inside and not root.one_backward and not in_backward():
            root.unshard()  # type: ignore[operator]

    for owner in {owner for owner, _ in slots}:
        owner.register_forward_pre_hook(gather, prepend=True)


def _policy(precision: Precision, params: Sequence[Tensor]) -> MixedPrecisionPolicy:
    own = next((p.dtype for p in params if p.requires_grad), torch.float32)
    return MixedPrecisionPolicy(
        param_dtype=precision.param_dtype, reduce_dtype=precision.sum_dtype(own), cast_forward_inputs=False
    )


def _install_comms(root: MiCSModule, slots: dict[str, list[Slot]]) -> None:
    """Gathers and hop 1 of our own."""
    gather, hop_1 = root.wire.gather, root.wire.hop_1
    if gather is None or hop_1 is None:
        return
    p, device = root.groups.topology.partition_size, root.groups.device
    on_host = partial(empty_on_host, device=device) if root.offload == Offload.PARAMETERS else None
    for name, module in _gathering(root).items():
        root.gathers[module] = BlockGather(name or OUTSIDE, gather)
        parameters = parameters_at(slots[name])
        root.hops_1[module] = HopOne(name or OUTSIDE, parameters, hop_1, p, blocks_whole(root.groups) - 1, on_host)
        module.set_custom_all_gather(root.gathers[module])
        module.set_custom_reduce_scatter(root.hops_1[module])
        module.set_gradient_divide_factor(1.0)  # hop 1 divides, once its sum has come
        module.set_force_sum_reduction_for_comms(True)


def _gathering(root: MiCSModule) -> dict[str, Any]:
    """The sharded modules by name: the blocks, in order, and the root as ""."""
    return {block.name: block.module for block in root.blocks} | {"": root}


def _install_window(root: MiCSModule, slots: dict[str, list[Slot]], scalars: list[Slot]) -> None:
    root.order = BlockOrder(root.blocks)
    root.order.before_call = root._await_updates
    if (hosts := root.groups.on_host) is not None:
        root.order.before_repeat = lambda index: check_repeat(hosts, root.blocks[index].name, index)
    gathering = _gathering(root)
    blocks = [(index, block.name) for index, block in enumerate(root.blocks)]
    whole, alone = not root.gathering, root.groups.topology.world_size == 1
    buckets = [
        Bucket(name or OUTSIDE, parameters_at(slots[name]), index, root.hops_1.get(gathering[name]))
        for index, name in [*reversed(blocks), (None, "")]
    ]
    if scalars:
        buckets.insert(-1, Bucket(ON_EVERY_RANK, parameters_at(scalars), None, None, on_every_rank=True))
    root.residency = Residency(
        [block.module for block in root.blocks if not whole],
        root,
        {module: parameters_at(slots[name]) for name, module in gathering.items() if not whole},
        stay=blocks_whole(root.groups) if root.groups.gather is not None else 0,
    )
    dtypes = {p.dtype for bucket in buckets for p in bucket.parameters if p.requires_grad} or {torch.float32}
    widest = functools.reduce(torch.promote_types, dtypes)
    used_by = {module: slots[name] + scalars * (not name) for name, module in gathering.items()}
    root.window = Window(
        buckets,
        root.groups,
        root.wire.hop_2,
        root.order,
        # Alone, a rank knows by `.grad` itself what it used.
        Usage(used_by if not (whole and alone) else {}),
        root.residency,
        HeldGradients(root) if root.hops_1 else None,
        kept_whole=whole,
        on_host=root.offload == Offload.PARAMETERS,
        sum_dtype=root.precision.sum_dtype(widest),
    )


def _finish_updates_before_state_dicts(root: MiCSModule) -> None:
    def finish(*_: Any) -> None:
        root.finish_updates()

    for module in root.module.modules():
        module.register_state_dict_pre_hook(finish)
        module.register_load_state_dict_pre_hook(finish)
    root.module.register_load_state_dict_pre_hook(lambda *_: root.release())


def _modules_within(block: Block) -> Iterator[tuple[str, nn.Module]]:
    return ((f"{block.name}.{name}".rstrip("."), module) for name, module in block.module.named_modules())


def _modules_outside(root: nn.Module, found: tuple[Block, ...]) -> Iterator[tuple[str, nn.Module]]:
    inside = {id(module) for block in found for module in block.module.modules()}
    return ((name, module) for name, module in root.named_modules() if id(module) not in inside)


# -- checks, before any collective -------------------------------------------------------------------------------------


def _check_sharded_by_user(module: nn.Module, groups: Groups, offload: Offload | None) -> None:
    ours = groups.partition_mesh
    for name, param in module.named_parameters():
        if isinstance(param, DTensor) and offload == Offload.PARAMETERS:
            raise ValueError(
                f'offload="parameters": {name} is sharded already, and would stay where it is; leave the sharding to '
                "lightning-mics"
            )
        if isinstance(param, DTensor) and (
            param.device_mesh.ndim > 1 or not torch.equal(param.device_mesh.mesh, ours.mesh)
        ):
            raise ValueError(
                f"{name} is sharded already, over ranks {param.device_mesh.mesh.flatten().tolist()}, not over this "
                f"rank's partition group {ours.mesh.flatten().tolist()}; leave the sharding to lightning-mics"
            )


def _check_hooks(module: nn.Module) -> None:
    for name, param in module.named_parameters():
        if param.ndim and not isinstance(param, DTensor) and hooks_on(param):
            raise ValueError(HOOKED.format(name, "its shard would not have"))


def _check_dtypes(slots: dict[str, list[Slot]]) -> None:
    for name, where in slots.items():
        dtypes = Counter(param.dtype for param in parameters_at(where) if param.requires_grad)
        if len(dtypes) > 1:
            raise ValueError(
                f"{name or 'the parameters outside blocks'}: trainable parameters of several dtypes ({dict(dtypes)}) "
                "cannot travel in one collective; convert the module to one dtype, and mix by param_dtype"
            )


def _equalize_user_shards(module: nn.Module, groups: Groups) -> None:
    """Shards that the user made take the first replica's values."""
    if groups.replication_group is None:
        return
    source = dist.get_process_group_ranks(groups.replication_group)[0]
    for param in module.parameters():
        if isinstance(param, DTensor):
            dist.broadcast(param.to_local().detach(), src=source, group=groups.replication_group)
