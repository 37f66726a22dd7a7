"""Lightning Fabric: `Fabric(strategy="mics")`.

Thin by intent: it sets up the partition and replication groups, shards what is set up, has optimizers step the shards,
and tells the window where micro-steps, boundaries and optimizer steps are. `lightning.fabric` and `lightning_fabric`
are two trees of classes; each gets its own subclass of the same `MiCSFabricStrategyMixin`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning_fabric
import torch
from lightning.fabric.strategies import STRATEGY_REGISTRY, ParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from lightning_mics._compat import takes_scheduler
from lightning_mics.arguments import check_writers
from lightning_mics.blocks import BlockChoice
from lightning_mics.checkpoint import Verify, Writers
from lightning_mics.fabric_saving import FabricSavingMixin, root_of
from lightning_mics.groups import Groups
from lightning_mics.ladder import AUTO, Rung
from lightning_mics.network import Network
from lightning_mics.offload import Offload, check_scaler, step_on_host
from lightning_mics.optimizer_shards import OptimizerState, parameter_of
from lightning_mics.own_loop import Backward, OwnLoop
from lightning_mics.refusals import check_checkpoint_io, check_optimizers
from lightning_mics.running import RunningMixin, register_in
from lightning_mics.sharding import MiCSModule
from lightning_mics.shards import local_part
from lightning_mics.successors import Successors, check_state
from lightning_mics.topology import PartitionSize

if TYPE_CHECKING:
    from lightning.fabric.strategies import ParallelStrategy as _Base
else:
    _Base = object


class MiCSFabricStrategyMixin(FabricSavingMixin, RunningMixin, _Base):
    """MiCS for Fabric: model state sharded in partition groups, replicated across them, synchronised in two hops.

    A window is the micro-steps between two steps of an optimizer. Backward passes within `fabric.no_backward_sync`
    issue hop 1 alone; one outside is the boundary; a step before which there was none has hop 2 itself. Gradients are
    the user's to clear, at any time. A forward or a backward that raises ends the window, and its sums are gone.

    Args:
        partition_size: ranks that hold one replica: a number, `"node"` for one replica a node (the default), or None
            for one replica over all ranks (ZeRO-3).
        ranks_per_node: by default from torchrun, SLURM or Fabric's `devices`.
        blocks: the modules whose parameters travel together. By default the model's repeated layers; otherwise a
            class or its name, several, a predicate `(name, module) -> bool`, or a `ModuleWrapPolicy`.
        activation_checkpointing: recompute each block's forward in backward instead of keeping its activations.
        compile: True to compile each block's forward by `torch.compile`, or a mapping of its arguments. Instead of a
            compiled module given to `setup`.
        param_dtype: dtype in which parameters travel and compute. By default that of Fabric's precision: 16 bits under
            "16-mixed" and "bf16-mixed" (shards stay fp32), otherwise the parameters' own, and for p = 1.
        reduce_dtype: dtype of hop 1 and of the window's sums. By default fp32, or wider where the parameters are.
        between_nodes: parameters and hop 2 cross between nodes in this dtype, as `torch.bfloat16`, where theirs is
            wider. By default nothing is rounded.
        rung: what stays whole in memory instead of being moved again, "<parameters>/<gradients>": parameters for a
            `block`, a `micro_step` or the `window`; gradients `sharded`, or `whole` until the boundary. "auto" takes
            the fastest that fits `memory_budget`, from the second window on.
        micro_batch: None; batches are the loop's own.
        memory_budget: for "auto": bytes (an int), or a share of the device's memory (a float); on CPU, of an equal part
            of the node's.
        optimizer_state: "partition" shards the optimizer over the partition group, as parameters are. "world" shards it
            over all ranks, for one optimizer a module: the same bytes, an r-th of the optimizer's memory. Then mean
            gradients are with what `optimizer.param_groups` holds, and gone when the next window begins.
        offload: None leaves all on the device. "optimizer" keeps the optimizer's state on the host, and steps there: 8
            bytes a parameter less on the device with Adam, for a copy of gradients and parameters in each step.
            "parameters" keeps shards, the window's sums and the optimizer there, and gathers blocks on the device: what
            is left there is activations and what is whole, for a copy of each shard before each gather. Not with a
            gradient scaler ("16-mixed"), nor with `optimizer_state="world"`. Give the optimizer `fused=True`.
        network: what the cluster's two tiers can do, from `mics probe`: the path of its file, or a `Network`.
        writers: "all" ranks share the writing of a checkpoint, to a file system that all of them see; "group" leaves it
            to the first partition group, whose node then holds all of it.
        verify: how much of a checkpoint is compared with its checksums before it is loaded: "auto", all that will be
            read; "full", all; "off", nothing.
        process_group_backend: "nccl", "gloo", ...; by default that of the device.
        timeout: of the process groups. By default torch's.

    Raises:
        ValueError: for a `partition_size` that does not fit the cluster, when Fabric is made; for "auto" as a
            `partition_size` or a `micro_batch`, which a Trainer can plan; for what `offload` does not go with.
    """

    strategy_name = "mics"
    _tree = "lightning.fabric"

    def __init__(
        self,
        partition_size: PartitionSize = "node",
        *,
        ranks_per_node: int | None = None,
        blocks: BlockChoice = None,
        activation_checkpointing: bool = False,
        compile: bool | Mapping[str, Any] = False,
        param_dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype | None = None,
        between_nodes: torch.dtype | None = None,
        rung: Rung | str = "block/sharded",
        micro_batch: None = None,
        memory_budget: int | float = 0.9,
        optimizer_state: OptimizerState | str = OptimizerState.PARTITION,
        offload: Offload | str | None = None,
        network: Network | str | Path | None = None,
        writers: Writers | str = Writers.ALL,
        verify: Verify | str = Verify.AUTO,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_planned_elsewhere(partition_size, micro_batch)
        self._num_nodes = 1  # Fabric sets it
        self._set_running(
            partition_size,
            ranks_per_node=ranks_per_node,
            blocks=blocks,
            activation_checkpointing=activation_checkpointing,
            compile=compile,
            param_dtype=param_dtype,
            reduce_dtype=reduce_dtype,
            between_nodes=between_nodes,
            rung=rung,
            memory_budget=memory_budget,
            optimizer_state=optimizer_state,
            offload=offload,
            network=network,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._set_saving(writers, verify)
        check_writers(self._writers, self._optimizer_state)
        self._backward_sync_control: Any = NoBackwardSync()
        self._backward_pass = Backward()
        self._successors = Successors()
        self._root_of: Any = WeakIdKeyDictionary()  # by parameter

    # -- the cluster -------------------------------------------------------------------------------------------------

    @property
    def num_nodes(self) -> int:  # type: ignore[override]
        """As Fabric was told."""
        return self._num_nodes

    @override
    def setup_environment(self) -> None:
        check_checkpoint_io(self.checkpoint_io)
        super().setup_environment()
        self._set_world_ranks()
        check_scaler(self._offload, getattr(self.precision, "scaler", None))
        self._init_process_group()
        self._groups = Groups.create(self.topology, self.root_device.type, self._timeout)

    # -- what is set up ----------------------------------------------------------------------------------------------

    @override
    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """`fabric.init_module(empty_init=True)` builds on the meta device; values come block by block in setup."""
        stack = ExitStack()
        if empty_init:
            stack.enter_context(torch.device("meta"))
        stack.enter_context(self.precision.module_init_context())
        return stack

    @override
    def module_to_device(self, module: nn.Module) -> None:
        """Nothing to do: each block goes to the device when it is sharded."""

    @override
    def setup_module(self, module: nn.Module) -> MiCSModule:
        """Shard a module over its partition group. Collective on the default group.

        Args:
            module: on any device, the meta device included; its values are made equal to rank 0's.

        Returns:
            The sharded root, which Fabric wraps.
        """
        with self._successors.sharding(module):
            root = self._sharded(module, self.precision, one_backward=True)
        return self._known(root)

    @override
    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[Any, ...]:
        """The same, and the optimizers go on with the shards; they were made of the whole parameters.

        Raises:
            ValueError: before anything is sharded, for an optimizer with parameters of another module, with state that
                cannot be sharded, or that cannot step shards.
        """
        own = {id(param) for param in module.parameters()}
        for optimizer in optimizers:
            self._check(optimizer, own)
            check_state(optimizer)
        with self._successors.sharding(module, optimizers):
            root = self._sharded(module, self.precision, one_backward=True)
        known = self._known(root), [self.setup_optimizer(optimizer) for optimizer in optimizers]
        return (*known, scheduler) if takes_scheduler(ParallelStrategy.setup_module_and_optimizers) else known

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Have an optimizer step the shards of modules that were set up, whether it was made before or after that.

        Raises:
            ValueError: for an optimizer with other parameters, or that cannot step shards; under
                `optimizer_state="world"` for a module's second.
        """
        self._check(optimizer, set())
        self._successors.follow(optimizer)
        if self._offload == Offload.OPTIMIZER:
            step_on_host(optimizer)
        if self._optimizer_state == OptimizerState.WORLD:
            for root in self.roots_of(optimizer):
                _shard_over_all_ranks(root, optimizer)
        return optimizer

    def _known(self, root: MiCSModule) -> MiCSModule:
        OwnLoop(root, self._backward_pass)
        for param in root.parameters():
            self._root_of[param] = weakref.ref(root)
        return root

    def mics(self, module: nn.Module) -> MiCSModule:
        """The sharded root of a module that was set up, given as it was or as it came back.

        Raises:
            ValueError: if it was not.
        """
        root = root_of(module) or root_of(getattr(module, "module", None))
        if root is None:
            raise ValueError(f"{type(module).__name__} is not sharded; set it up first, by fabric.setup")
        return root

    def roots_of(self, optimizer: Optimizer) -> list[MiCSModule]:
        """The sharded modules whose parameters an optimizer steps."""
        params = (parameter_of(param) for group in optimizer.param_groups for param in group["params"])
        refs = {ref: None for param in params if (ref := self._root_of.get(param)) is not None}
        return [root for ref in refs if (root := ref()) is not None]

    def _check(self, optimizer: Optimizer, own: set[int]) -> None:
        if self.topology.partition_size > 1:
            check_optimizers([optimizer])
        for number, group in enumerate(optimizer.param_groups):
            for param in map(parameter_of, group["params"]):
                if id(param) not in own and param not in self._root_of and not self._successors.knows(param):
                    raise ValueError(
                        f"{type(optimizer).__name__} holds a parameter of shape {tuple(param.shape)}, in group "
                        f"{number}, that is of no module that was set up, and would be neither sharded nor averaged; "
                        "set the module up first (or with it), and make the optimizer of its parameters"
                    )

    # -- the schedule ------------------------------------------------------------------------------------------------

    @override
    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Backward, with hop 1, and at the boundary hop 2, of every module that it reaches complete on return."""
        with self._backward_pass.passing():
            super().backward(tensor, module, *args, **kwargs)

    @override
    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """The window closes: hop 2 is complete on every parameter and nothing partial is left; then the step."""
        loops = self._loops(optimizer)
        closure = kwargs.get("closure")
        if closure is None:
            _close(loops)
        else:
            kwargs["closure"] = lambda: _closing(closure, loops)
        output = super().optimizer_step(optimizer, **kwargs)
        for loop in loops:
            loop.stepped()
        return output

    def _loops(self, optimizer: Optimizer) -> list[OwnLoop]:
        return [loop for root in self.roots_of(optimizer) if (loop := OwnLoop.of(root)) is not None]

    @override
    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float | int,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """As of whole gradients. An all-reduce of one number on each group that they are sharded over.

        Returns:
            Their norm before, a plain tensor without dimensions.
        """
        params = self._about_to_clip(optimizer)
        gradients = [param.grad for param in params if param.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients, norm_type)
        total = total.full_tensor() if isinstance(total, DTensor) else total
        if error_if_nonfinite and not total.isfinite():
            raise RuntimeError(
                f"the gradients' norm of order {norm_type} is {total.item()}, so they cannot be clipped; to scale them "
                "by it nevertheless, set error_if_nonfinite=False"
            )
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, total)
        return total

    @override
    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float | int) -> None:
        """As of whole gradients. No communication."""
        for param in self._about_to_clip(optimizer):
            if (gradient := param.grad) is not None:
                local_part(gradient).clamp_(-clip_val, clip_val)

    def _about_to_clip(self, optimizer: Optimizer) -> list[Tensor]:
        _close(self._loops(optimizer))
        self.precision.unscale_gradients(optimizer)
        return [*self.precision.main_params(optimizer)]

    # -- collectives of Fabric's own ---------------------------------------------------------------------------------

    @override
    def all_reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduce a tensor over `group` (all ranks by default), in place; anything else comes back as it is.

        Args:
            tensor: of any shape; a mean of integers is cut to one.
            group: a process group.
            reduce_op: see `RunningMixin.reduce`.
        """
        reduced = self.reduce(tensor, group, reduce_op)
        if reduced is not tensor:
            with torch.no_grad():
                tensor.copy_(reduced)
        return tensor


class NoBackwardSync:
    """What `fabric.no_backward_sync` asks."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """Backward passes in here are not the boundary of `module`'s window; unless `enabled`, nothing changes.

        Raises:
            TypeError: for a module that was not set up by this strategy.
        """
        if not isinstance(module, MiCSModule):
            raise TypeError(
                f"no_backward_sync needs a module that was set up with strategy='mics', and {type(module).__name__} "
                "was not; pass what fabric.setup returned"
            )
        return module.window.hop_1_only() if enabled else nullcontext()


def _close(loops: list[OwnLoop]) -> None:
    for loop in loops:
        loop.close()


def _closing(closure: Any, loops: list[OwnLoop]) -> Any:
    result = closure()
    _close(loops)
    return result


def _shard_over_all_ranks(root: MiCSModule, optimizer: Optimizer) -> None:
    before = root.window.optimizer_shards
    if before is not None:
        raise ValueError(
            'optimizer_state="world" shards one optimizer a module over all ranks, and this is its second; give one '
            'optimizer all parameters, in groups, or choose optimizer_state="partition"'
        )
    root.shard_optimizer(optimizer)


def _check_planned_elsewhere(partition_size: object, micro_batch: object) -> None:
    if partition_size == AUTO:
        raise ValueError(
            'partition_size="auto" is planned when a Trainer begins a fit, of which Fabric knows nothing; ask '
            '`mics plan`, and give the number that it says, or "node", or None for all ranks'
        )
    if micro_batch is not None:
        raise ValueError(
            f"micro_batch={micro_batch!r}: under Fabric batches are the loop's own; leave it out, and give the data "
            "loader the batch size that `mics plan` says"
        )


class MiCSFabricStrategy(MiCSFabricStrategyMixin, ParallelStrategy):
    __doc__ = MiCSFabricStrategyMixin.__doc__


class LightningFabricMiCSStrategy(MiCSFabricStrategyMixin, lightning_fabric.strategies.ParallelStrategy):
    """The same, for a `lightning_fabric.Fabric`."""

    _tree = "lightning_fabric"


def register() -> None:
    """Make the name "mics" known to both trees of Fabric. Calling it again changes nothing."""
    register_in(
        (STRATEGY_REGISTRY, MiCSFabricStrategy),
        (lightning_fabric.strategies.STRATEGY_REGISTRY, LightningFabricMiCSStrategy),
    )
