"""Hugging Face Accelerate: `MiCSAccelerator(partition_size=8, gradient_accumulation_steps=4)`.

An `accelerate.Accelerator` that shards the models it prepares, in place of wrapping them for DDP, and tells the window
where micro-steps, boundaries and optimizer steps are. All else is Accelerate's own. It needs the package `accelerate`:
`pip install "lightning-mics[accelerate]"`.
"""

from __future__ import annotations

import atexit
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DDPCommunicationHookType, TorchDynamoPlugin, is_compiled_module
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_mics._compat import mark_prepared, prepared
from lightning_mics.accelerate_arguments import check_no_other_sharding, of_dynamo, topology_of
from lightning_mics.accelerate_calls import Calls, abort
from lightning_mics.accelerate_optimizer import MiCSOptimizer
from lightning_mics.accelerate_planning import TrainingStep, question_of, what_to_plan
from lightning_mics.accelerate_saving import AcceleratorSavingMixin, alone_if_alone
from lightning_mics.arguments import check_writers, compile_arguments, root_of, sharded_before
from lightning_mics.blocks import BlockChoice, has_parameters
from lightning_mics.checkpoint import Verify, Writers, whole_state_dict
from lightning_mics.climb import Budget
from lightning_mics.groups import Groups
from lightning_mics.ladder import AUTO, Rung
from lightning_mics.network import Network
from lightning_mics.offload import Offload, check_backend, check_scaler, step_on_host
from lightning_mics.optimizer_shards import OptimizerState
from lightning_mics.planner.plan import Workload
from lightning_mics.planning import Asked, decide
from lightning_mics.precision import Precision
from lightning_mics.refusals import check_optimizers
from lightning_mics.sharding import MiCSModule
from lightning_mics.successors import Successors, check_state
from lightning_mics.topology import PartitionSize, Topology

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

log = get_logger(__name__)


class MiCSAccelerator(AcceleratorSavingMixin, Accelerator):  # type: ignore[misc]
    """MiCS for Accelerate: model state sharded in partition groups, replicated across them, synchronised in two hops.

    Args:
        partition_size: ranks that hold one replica: a number, `"node"` for one replica a node (the default), None for
            one replica over all ranks (ZeRO-3), or "auto" for the fastest that fits `memory_budget`, as planned when a
            model and its data loader are prepared in one call; the plan is logged.
        ranks_per_node: by default from the launcher, or from the ranks' host names.
        blocks: the modules whose parameters travel together. By default the model's repeated layers; otherwise a
            class or its name, several, a predicate `(name, module) -> bool`, or a `ModuleWrapPolicy`.
        activation_checkpointing: recompute each block's forward in backward instead of keeping its activations.
        compile: True to compile each block's forward by `torch.compile`, or a mapping of its arguments. By default as
            Accelerate's dynamo plugin says, which compiles blocks here as well.
        param_dtype: dtype in which parameters travel and compute. By default 16 bits under "fp16" and "bf16" (shards
            stay fp32), otherwise the parameters' own, and for p = 1.
        reduce_dtype: dtype of hop 1 and of the window's sums. By default fp32, or wider where the parameters are.
        between_nodes: parameters and hop 2 cross between nodes in this dtype, as `torch.bfloat16`, where theirs is
            wider. By default nothing is rounded.
        rung: what stays whole in memory instead of being moved again, "<parameters>/<gradients>", or "auto" for the
            fastest that fits `memory_budget`, from the second window on; or, beside partition_size="auto", the planned
            one to begin with.
        memory_budget: for "auto": bytes (an int), or a share of the device's memory (a float).
        optimizer_state: "partition" shards the optimizer over the partition group, as parameters are; "world" over all
            ranks, for one optimizer of a model each of whose micro-steps is one forward and one backward. Gradients are
            then with `optimizer.param_groups` at a boundary, where `clip_grad_norm_` and `clip_grad_value_` find them.
        offload: None leaves all on the device. "optimizer" keeps the optimizer's state on the host, and steps there: 8
            bytes a parameter less on the device with Adam, for a copy of gradients and parameters in each step.
            "parameters" keeps shards, the window's sums and the optimizer there, and gathers blocks on the device: what
            is left there is activations and what is whole, for a copy of each shard before each gather. Not with a
            gradient scaler ("16-mixed"), nor with `optimizer_state="world"`. Give the optimizer `fused=True`.
        network: what the cluster's two tiers can do, from `mics probe`: the path of its file, or a `Network`.
        async_save: let training go on while `save_state` writes. One at a time; `end_training`, the next save and a
            load wait for it, and so does the end of the process.
        writers: "all" ranks share the writing of a checkpoint, to a file system that all of them see; "group" leaves it
            to the first partition group.
        verify: how much of a checkpoint is compared with its checksums before it is loaded: "auto", all that will be
            read; "full", all; "off", nothing.
        training_step: from the model and a batch to the loss, for "auto". By default a mapping's items are the model's
            arguments, and a tuple's first item; the loss is `output.loss`, or stands for all that is returned.
        timeout: of the partition and replication groups. By default that of `InitProcessGroupKwargs`, or torch's.
        kwargs: Accelerate's own arguments.

    Raises:
        ValueError: for a `partition_size` that does not fit the cluster, and where Accelerate is asked, by an argument
            or by its launcher's configuration, to shard or to compute in a way that excludes this one.
    """

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
        memory_budget: int | float = 0.9,
        optimizer_state: OptimizerState | str = OptimizerState.PARTITION,
        offload: Offload | str | None = None,
        network: Network | str | Path | None = None,
        async_save: bool = False,
        writers: Writers | str = Writers.ALL,
        verify: Verify | str = Verify.AUTO,
        training_step: TrainingStep | None = None,
        timeout: timedelta | None = None,
        **kwargs: Any,
    ) -> None:
        check_no_other_sharding(kwargs)
        self._blocks = blocks
        self._activation_checkpointing = activation_checkpointing
        self._precision = Precision(param_dtype, reduce_dtype, between_nodes)
        self._rung = rung if rung == AUTO else Rung.parse(rung)
        self._planned_rung: Rung | None = None
        self._to_be_planned = partition_size == AUTO
        self._training_step = training_step
        self._memory_budget = Budget(memory_budget).amount
        self._optimizer_state = OptimizerState.parse(optimizer_state, "optimizer_state")
        self._offload = Offload.of(offload, self._optimizer_state)
        self._network = Network.load(network) if isinstance(network, str | Path) else network
        self._successors = Successors()
        self._set_saving(writers, verify, async_save=async_save)
        check_writers(self._writers, self._optimizer_state)
        compiling = compile_arguments(compile)
        super().__init__(**kwargs)
        self._timeout = timeout or getattr(self.init_handler, "timeout", None)
        if self.fp8_enabled:
            raise ValueError('mixed_precision="fp8" is not supported here; choose "no", "fp16" or "bf16"')
        check_scaler(self._offload, self.scaler)
        if self.num_processes > 1:
            check_backend(self._offload, self.device)
        self._compile = of_dynamo(self.state.dynamo_plugin) if compiling is None else compiling
        until_planned: PartitionSize = "node" if self._to_be_planned else partition_size
        self._topology = topology_of(until_planned, ranks_per_node, self.num_processes)
        if self.mixed_precision == "fp16" and not self.native_amp:
            log.warning('mixed_precision="fp16" computes in fp32 on CPU, as in Accelerate; choose "bf16"')
        if self.ddp_handler is not None and self.ddp_handler.comm_hook != DDPCommunicationHookType.NO:
            log.warning(
                f"comm_hook={self.ddp_handler.comm_hook} is DDP's, and does nothing here; "
                "between_nodes=torch.bfloat16 sends 16 bits between nodes"
            )
        if async_save:
            atexit.register(self.saver.wait)

    @property
    @override
    def topology(self) -> Topology:
        """Who shards with whom. To be planned, it is one replica a node until then."""
        return self._topology

    # -- the model ---------------------------------------------------------------------------------------------------

    def roots(self) -> Iterator[MiCSModule]:
        """The models that were prepared, as they were sharded."""
        for model in prepared(self).models:
            if (root := sharded_before(model)) is not None:
                yield root

    @override
    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """Shard the models and have optimizers step the shards; all else as Accelerate does.

        An optimizer may be made before or after its model is prepared, and prepared with it or without.

        Raises:
            ValueError: for an optimizer that cannot step shards, or whose state cannot be sharded, before any
                collective; and on every rank where partition_size="auto" finds nothing to plan from, or nothing that
                fits.
        """
        if self._to_be_planned and any(isinstance(obj, nn.Module) for obj in args):
            self._plan(*what_to_plan(args))
        for obj in args:
            self._check_optimizer(obj)
        sharded = [self.prepare_model(obj) if isinstance(obj, nn.Module) else obj for obj in args]
        return super().prepare(*sharded, device_placement=device_placement)

    @override
    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Shard a model over its partition group. Collective on the default group.

        Args:
            model: on any device, the meta device included; its values are made equal to rank 0's.
            device_placement: of a model that is not sharded; shards are on the accelerator's device.
            evaluation_mode: leave it whole, and prepare it for no more than inference.

        Returns:
            The sharded root, to be called instead of `model`.
        """
        if isinstance(model, MiCSModule):
            model = model.module
        known = sharded_before(model)
        if known is not None and any(each is model for each in prepared(self).models):
            return known
        if known is None and (evaluation_mode or not has_parameters(model)):
            return super().prepare_model(model, device_placement, evaluation_mode=True)  # type: ignore[no-any-return]
        if self.verify_device_map(model):
            raise ValueError("the model was loaded with a device map, and cannot be sharded; load it without")
        if is_compiled_module(model):
            raise ValueError("the model is compiled already; leave that to compile=True, which compiles block by block")
        if self._to_be_planned:
            what_to_plan([model])
        with self._successors.sharding(model):
            root = self._root_of(model)
        with self._without_dynamo():
            super().prepare_model(model, device_placement=False, evaluation_mode=True)
        mark_prepared(root)
        for optimizer in prepared(self).optimizers:
            self._follow(optimizer)
        return root

    def _root_of(self, model: nn.Module) -> MiCSModule:
        root = root_of(
            model,
            self.topology,
            self._precision_of_shards(whole=self.topology.partition_size == 1),
            self._make_groups,
            blocks=self._blocks,
            activation_checkpointing=self._activation_checkpointing,
            compile=self._compile,
            network=self._network,
            offload=self._offload,
        )
        Calls.of(root).for_training = 0
        root.set_rung(self._rung, self._memory_budget, self._planned_rung)
        root.one_backward = True
        return root

    def _plan(self, model: nn.Module, loader: DataLoader[Any]) -> None:
        """Choose what is "auto", once. Collective on the default group."""
        alone_if_alone(self.device)
        workload = Workload(
            model,
            batch=lambda size: None,
            blocks=self._blocks,
            precision=self._precision_of_shards(whole=False),
            optimizer_state=self._optimizer_state,
            offload=self._offload,
            activation_checkpointing=self._activation_checkpointing,
        )
        asked = Asked(
            partition_size=None,
            rung=self._rung if isinstance(self._rung, Rung) else None,
            window=self.gradient_accumulation_steps,
            changes_batch=False,
            memory_budget=self._memory_budget,
        )
        shares = self.num_processes if self.split_batches else 1
        question = question_of(model, loader, workload, asked, self._training_step, self.autocast, shares)
        nodes, k = self.topology.nodes, self.topology.ranks_per_node
        decision = decide(question, self.device, nodes, k, self._network)
        log.info("planned: " + "\n         ".join(decision.lines), main_process_only=True)
        self._topology = Topology.resolve(decision.partition_size, world_size=self.num_processes, ranks_per_node=k)
        self._planned_rung, self._to_be_planned = decision.rung, False

    def _make_groups(self) -> Groups:
        alone_if_alone(self.device)
        return Groups.create(self.topology, self.device.type, self._timeout)

    def _precision_of_shards(self, whole: bool) -> Precision:
        if self._precision.param_dtype is not None or whole or not self.native_amp:
            return self._precision
        return replace(self._precision, param_dtype=_DTYPES.get(self.mixed_precision))

    @contextmanager
    def _without_dynamo(self) -> Generator[None, None, None]:
        """Blocks are compiled already, and a compiled root would take the hooks that gather into its graph."""
        plugin, self.state.dynamo_plugin = self.state.dynamo_plugin, TorchDynamoPlugin(backend="no")
        try:
            yield
        finally:
            self.state.dynamo_plugin = plugin

    @override
    def unwrap_model(self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True) -> Any:
        """The user's own module. Where p > 1 its parameters are shards, and it is called through what was prepared."""
        if isinstance(model, MiCSModule):
            model.finish_updates()
            model = model.module
        return super().unwrap_model(model, keep_fp32_wrapper, keep_torch_compile)

    @override
    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """The state dict with whole tensors on the CPU, on the first process of each node; an empty one elsewhere.

        Collective on the partition group. One tensor at a time is whole on the other ranks.
        """
        root = model if isinstance(model, MiCSModule) else sharded_before(model)
        if root is None:
            return super().get_state_dict(model, unwrap)  # type: ignore[no-any-return]
        root.release()
        root.synchronize_buffers()
        return whole_state_dict(root.module, keep=self.is_local_main_process)

    # -- optimizers --------------------------------------------------------------------------------------------------

    @override
    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> Any:
        """Have an optimizer step the shards of the models that are prepared, or will be."""
        if not isinstance(optimizer, MiCSOptimizer):
            self._check_optimizer(optimizer)
            optimizer = MiCSOptimizer(optimizer, self.roots, self.scaler)
            mark_prepared(optimizer)
        self._follow(optimizer)
        return super().prepare_optimizer(optimizer)

    def _check_optimizer(self, obj: object) -> None:
        if isinstance(obj, Optimizer) and not isinstance(obj, MiCSOptimizer) and self.topology.partition_size > 1:
            check_optimizers([obj])
            check_state(obj)

    def _follow(self, optimizer: MiCSOptimizer) -> None:
        self._successors.follow(optimizer.optimizer)
        if self._offload == Offload.OPTIMIZER:
            step_on_host(optimizer.optimizer)
        if self._optimizer_state == OptimizerState.WORLD:
            for root in optimizer.roots():
                if root.window.optimizer_shards is None:
                    root.shard_optimizer(optimizer.optimizer)
                elif root.window.optimizer_shards.optimizer is not optimizer.optimizer:
                    raise ValueError(
                        'optimizer_state="world" shards one optimizer of a model, and this is its second; give one '
                        'optimizer all parameters, in groups, or choose optimizer_state="partition"'
                    )

    def _held(self, parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
        """Where the gradients of `parameters` are. At a boundary hop 2 is over on them when this returns."""
        params = [parameters] if isinstance(parameters, Tensor) else [*parameters]
        given = {id(param) for param in params}
        for root in self.roots():
            if any(id(param) in given for param in root.parameters()):
                if self.sync_gradients:
                    root.window.close()
                if (pieces := root.window.optimizer_shards) is not None:
                    params = [pieces.held(param) for param in params]
        return params

    @override
    def clip_grad_norm_(
        self, parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2
    ) -> Tensor | None:
        """As `torch.nn.utils.clip_grad_norm_` of whole gradients.

        Collectives: of one number, on the groups that the gradients are sharded over.
        """
        norm = super().clip_grad_norm_(self._held(parameters), max_norm, norm_type)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @override
    def clip_grad_value_(self, parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
        super().clip_grad_value_(self._held(parameters), clip_value)

    # -- the schedule ------------------------------------------------------------------------------------------------

    @contextmanager
    @override
    def no_sync(self, model: nn.Module) -> Generator[None, None, None]:
        """Backward passes in here are not the boundary: of the gradients of `model`, they issue hop 1 only."""
        root = model if isinstance(model, MiCSModule) else sharded_before(model)
        if root is None:
            with super().no_sync(model):
                yield
            return
        with root.window.hop_1_only():
            yield

    @contextmanager
    @override
    def accumulate(self, *models: nn.Module) -> Generator[None, None, None]:
        """A micro-step. After an exception in it, what the window had of these models is gone on every rank."""
        try:
            with super().accumulate(*models):
                yield
        except Exception:
            abort(root for root in models if isinstance(root, MiCSModule))
            raise

    @override
    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Backward, with hop 1, and at the boundary hop 2, complete when it returns.

        Its gradients go to the models that have been called with gradients since their last backward, or, if none has,
        to all.
        """
        self.saver.look()
        roots = [*self.roots()]
        called = [root for root in roots if Calls.of(root).for_training] or roots
        try:
            with ExitStack() as stack:
                for root in called:
                    Calls.of(root).for_training = 0
                    stack.enter_context(root.window.backward())
                super().backward(loss, **kwargs)
        except BaseException:
            abort(called)
            raise

    @contextmanager
    @override
    def join_uneven_inputs(self, joinables: list[Any], even_batches: bool | None = None) -> Generator[None, None, None]:
        """Nothing to do where each rank has as many batches.

        Raises:
            ValueError: where they may differ: a rank that has no more batches would leave its partition group waiting.
        """
        even = self.even_batches if even_batches is None else even_batches
        if self.num_processes > 1 and not even:
            raise ValueError(
                "even_batches=False leaves ranks with different numbers of batches, and a rank without one would keep "
                "its partition group waiting; leave it True, or drop the last batches"
            )
        yield

    # -- the end -----------------------------------------------------------------------------------------------------

    @override
    def free_memory(self, *objects: Any) -> Any:
        self.wait_for_save()
        for root in self.roots():
            root.finish_updates()
            root.release()
        return super().free_memory(*objects)

    @override
    def end_training(self) -> None:
        self.wait_for_save()
        for root in self.roots():
            root.finish_updates()
        super().end_training()
