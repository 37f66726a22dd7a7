"""The Lightning strategy: `Trainer(strategy="mics", accumulate_grad_batches=4)`.

Thin by intent: it sets up the partition and replication groups, shards the LightningModule into a `MiCSModule`, and
tells the window where micro-steps, boundaries and optimizer steps are. All of Lightning's hooks mean what they mean
under DDP. `lightning.pytorch` and `pytorch_lightning` are two trees of classes; each gets its own subclass of the same
`MiCSStrategyMixin`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytorch_lightning
import torch
from lightning.pytorch.strategies import ParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mics.arguments import check_writers, sharded_before
from lightning_mics.blocks import BlockChoice
from lightning_mics.checkpoint import TrainingRng, Verify, Writers
from lightning_mics.fit_planning import apply_batch, question_of
from lightning_mics.groups import Groups
from lightning_mics.ladder import AUTO, Rung
from lightning_mics.network import Network
from lightning_mics.offload import Offload, check_scaler, step_on_host
from lightning_mics.optimizer_shards import OptimizerState
from lightning_mics.planner.plan import Workload
from lightning_mics.planning import Asked, decide
from lightning_mics.preemption import Preemption
from lightning_mics.refusals import check_callbacks, check_checkpoint_io, check_not_in_backward, check_optimizers
from lightning_mics.running import RunningMixin, register_in
from lightning_mics.saving import SavingMixin
from lightning_mics.sharding import MiCSModule
from lightning_mics.topology import PartitionSize
from lightning_mics.trials import Trials

# Where a module or a callback may read parameters after an optimizer step and before the next forward.
_BETWEEN_STEP_AND_FORWARD = (
    "optimizer_step",
    "lr_scheduler_step",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_validation_model_zero_grad",
    "on_validation_model_eval",
    "on_validation_start",
    "on_train_epoch_start",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "on_train_batch_start",
)
# Where they may look at gradients that hop 2 has left with the optimizer.
_BETWEEN_BACKWARD_AND_STEP = ("on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")


class MiCSStrategyMixin(SavingMixin, RunningMixin):
    """MiCS for Lightning: model state sharded in partition groups, replicated across them, synchronised in two hops.

    Args:
        partition_size: ranks that hold one replica: a number, `"node"` for one replica a node (the default), None for
            one replica over all ranks (ZeRO-3), or "auto" for the fastest that fits `memory_budget`, as planned when a
            fit begins from the module, an example of a batch, the devices and `network`; the plan is logged. It is
            then kept, and outside a fit it is "node".
        ranks_per_node: by default from torchrun, SLURM or the Trainer's `devices`.
        blocks: the modules whose parameters travel together. By default the model's repeated layers; otherwise a
            class or its name, several, a predicate `(name, module) -> bool`, or a `ModuleWrapPolicy`.
        activation_checkpointing: recompute each block's forward in backward instead of keeping its activations.
        compile: True to compile each block's forward by `torch.compile`, or a mapping of its arguments
            (`{"mode": "max-autotune-no-cudagraphs"}`). Instead of a compiled LightningModule, which Lightning refuses.
        param_dtype: dtype in which parameters travel and compute. By default that of the Trainer's precision: 16 bits
            under "16-mixed" and "bf16-mixed" (shards stay fp32), otherwise the parameters' own, and for p = 1.
        reduce_dtype: dtype of hop 1 and of the window's sums. By default fp32, or wider where the parameters are.
        between_nodes: parameters and hop 2 cross between nodes in this dtype, as `torch.bfloat16`, where theirs is
            wider; inside a node they stay as they are. By default nothing is rounded. Hop 2 is never rounded where
            `optimizer_state` is "world".
        rung: what stays whole in memory instead of being moved again, "<parameters>/<gradients>": parameters for a
            `block`, a `micro_step` or the `window`; gradients `sharded`, or `whole` until the boundary. "auto" takes
            the fastest that fits `memory_budget`, from the second window on; or, beside another "auto", the planned one
            from the first, as long as it fits.
        micro_batch: None leaves the data's batches as they are; "auto" plans them with the partition size: sets
            `batch_size` of the LightningDataModule or the LightningModule, and the Trainer's `accumulate_grad_batches`,
            such that an optimizer step has as many samples as before.
        memory_budget: for "auto": bytes (an int), or a share of the device's memory (a float); on CPU, of an equal part
            of the node's.
        optimizer_state: "partition" shards the optimizer over the partition group, as parameters are. "world" shards it
            over all ranks: hop 2 becomes a reduce-scatter, each rank steps 1/n of the parameters, and gathers the rest
            of its shard behind the next forward; as many bytes, an r-th of the optimizer's memory, and the same
            checkpoints. Automatic optimization only. Inside a window gradients are with the module's parameters; after
            the backward that ends it, with those in `optimizer.param_groups`, and the module's own are None. A hook
            that drops gradients calls `trainer.strategy.mics.window.drop()`, which knows where they are. Hooks of yours
            that run between a step and the next forward find parameters complete, at the price of waiting for them; a
            `training_step` that reads a block's parameters outside that block's forward calls
            `trainer.strategy.mics.finish_updates()` first.
        offload: None leaves all on the device. "optimizer" keeps the optimizer's state on the host, and steps there: 8
            bytes a parameter less on the device with Adam, for a copy of gradients and parameters in each step.
            "parameters" keeps shards, the window's sums and the optimizer there, and gathers blocks on the device: what
            is left there is activations and what is whole, for a copy of each shard before each gather. Not with a
            gradient scaler ("16-mixed"), nor with `optimizer_state="world"`. Give the optimizer `fused=True`.
        network: what the cluster's two tiers can do, from `mics probe`: the path of its file, or a `Network`.
        async_save: let training go on while a checkpoint is written from a copy in host memory, of as many bytes as
            this rank writes. One at a time: the next save waits for it, and so does the end of training. If it fails,
            the next step raises. Otherwise a save returns when it is on the disk.
        writers: "all" ranks share the writing of a checkpoint, to a file system that all of them see; "group" leaves it
            to the first partition group, whose node then holds all of it, on a disk of its own if need be.
        verify: how much of a checkpoint is compared with its checksums before it is loaded: "auto", all that will be
            read; "full", all; "off", nothing.
        process_group_backend: "nccl", "gloo", ...; by default that of the device.
        timeout: of the process groups. By default torch's.

    Raises:
        ValueError: for a `partition_size` that does not fit the cluster, on every rank before any collective; for
            `optimizer_state="world"` with manual optimization or LBFGS, when the Trainer starts; for what `offload`
            does not go with.
        TypeError: for a `compile` that is none of the above.
    """

    strategy_name = "mics"
    _tree = "lightning.pytorch"

    def __init__(
        self,
        partition_size: PartitionSize | Literal["auto"] = "node",
        *,
        ranks_per_node: int | None = None,
        blocks: BlockChoice = None,
        activation_checkpointing: bool = False,
        compile: bool | Mapping[str, Any] = False,
        param_dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype | None = None,
        between_nodes: torch.dtype | None = None,
        rung: Rung | str = "block/sharded",
        micro_batch: Literal["auto"] | None = None,
        memory_budget: int | float = 0.9,
        optimizer_state: OptimizerState | str = OptimizerState.PARTITION,
        offload: Offload | str | None = None,
        network: Network | str | Path | None = None,
        async_save: bool = False,
        writers: Writers | str = Writers.ALL,
        verify: Verify | str = Verify.AUTO,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_nodes = 1
        if micro_batch not in (None, AUTO):
            raise ValueError(
                f'micro_batch={micro_batch!r} must be None or "auto"; a number is for the data loader to set, as its '
                "batch_size"
            )
        asked = {"partition_size": partition_size, "micro_batch": micro_batch}
        self._planned = {name for name, value in asked.items() if value == AUTO}
        self._set_running(
            "node" if partition_size == "auto" else partition_size,
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
        self._hooks_may_read = False
        self._set_saving(writers, verify, async_save=async_save)
        self._set_training_state()
        check_writers(self._writers, self._optimizer_state)
        self._preemption: Preemption | None = None
        self._trials: Trials | None = None

    # -- the cluster -------------------------------------------------------------------------------------------------

    @property
    def mics(self) -> MiCSModule:
        """The sharded root, once the Trainer has set up the model."""
        if not isinstance(self.model, MiCSModule):
            raise RuntimeError("the model is not sharded yet; MiCSStrategy shards it when the Trainer starts to run it")
        return self.model

    @property
    def is_distributed(self) -> bool:
        """Tells Lightning to give each rank its own part of the data."""
        return True

    @override
    def setup_environment(self) -> None:
        check_checkpoint_io(self.checkpoint_io)
        if self.lightning_module is not None:
            check_callbacks(self.lightning_module.trainer.callbacks)  # type: ignore[attr-defined]
        super().setup_environment()
        self._set_world_ranks()
        self._init_process_group()
        if not self._planned:
            self._groups = Groups.create(self.topology, self.root_device.type, self._timeout)

    # -- the model ---------------------------------------------------------------------------------------------------

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """`trainer.init_module(empty_init=True)` builds on the meta device; values come block by block in setup."""
        context: AbstractContextManager[Any] = torch.device("meta") if empty_init else nullcontext()
        with context, self.precision_plugin.tensor_init_context():
            yield

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.lightning_module is not None
        check_not_in_backward(self.lightning_module)
        check_scaler(self._offload, getattr(self.precision_plugin, "scaler", None))
        fits, manual = trainer.state.fn == "fit", not self.lightning_module.automatic_optimization
        if fits and manual and self._optimizer_state == OptimizerState.WORLD:
            raise ValueError(
                'optimizer_state="world" needs automatic optimization: under manual optimization nobody tells when a '
                'window begins, and gradients in the midst of one could not be cleared; choose "partition"'
            )
        self._take_over_links(trainer.callbacks)  # type: ignore[attr-defined]
        if fits and self._planned and sharded_before(self.lightning_module) is None:
            self._plan(trainer)
        if self._groups is None:
            self._groups = Groups.create(self.topology, self.root_device.type, self._timeout)
        super().setup(trainer)
        if fits:
            self.saver.prepare()  # now: later a rank that has died would be waited for
            self._preemption = Preemption.attach(trainer, self._timeout)

    def _plan(self, trainer: pl.Trainer) -> None:
        """Choose what is "auto", once."""
        assert self.lightning_module is not None
        precision = self.precision_plugin
        workload = Workload(
            self.lightning_module,
            batch=lambda size: None,
            blocks=self._blocks,
            precision=self._precision_for(precision, whole=False),
            optimizer_state=self._optimizer_state,
            activation_checkpointing=self._activation_checkpointing,
            offload=self._offload,
        )
        asked = Asked(
            partition_size=None if "partition_size" in self._planned else self.topology.partition_size,
            rung=self._rung if isinstance(self._rung, Rung) else None,
            window=trainer.accumulate_grad_batches,
            changes_batch="micro_batch" in self._planned,
            memory_budget=self._memory_budget,
        )
        question = question_of(trainer, workload, asked, precision.train_step_context)
        nodes, k = self.topology.nodes, self.topology.ranks_per_node
        decision = decide(question, self.root_device, nodes, k, self._network)
        rank_zero_info("planned: " + "\n         ".join(decision.lines))
        self._partition_size, self._planned_rung = decision.partition_size, decision.rung
        if asked.changes_batch:
            apply_batch(trainer, decision)
        self._planned.clear()

    @override
    def model_to_device(self) -> None:
        """Nothing to do: each block goes to the device when it is sharded."""

    @override
    def _setup_model(self, model: nn.Module) -> MiCSModule:
        if sharded_before(model) is None:
            model = self._synchronized(model)
        return self._sharded(
            model, self.precision_plugin, one_backward=bool(getattr(model, "automatic_optimization", True))
        )

    def _synchronized(self, model: nn.Module) -> nn.Module:
        """With batch norms over all ranks, if the Trainer is asked for them."""
        assert self.lightning_module is not None
        if not self._layer_sync or self.lightning_module.trainer.state.fn != "fit":
            return model
        if self.root_device.type == "cpu":
            raise ValueError(
                "sync_batchnorm=True: torch synchronises batch norms on accelerators alone; leave it out on a CPU"
            )
        synchronized: nn.Module = self._layer_sync.apply(model)
        return synchronized

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        self._rng = TrainingRng()
        super().setup_optimizers(trainer)
        if self._optimizer_state == OptimizerState.WORLD:
            for optimizer in self.optimizers:  # one, as optimization is automatic
                self.mics.shard_optimizer(optimizer)
            self._hooks_may_read = bool(_users_hooks(trainer, _BETWEEN_STEP_AND_FORWARD))
            if watching := _users_hooks(trainer, _BETWEEN_BACKWARD_AND_STEP):
                rank_zero_warn(
                    f'optimizer_state="world": when a window ends, {", ".join(watching)} will find gradients in '
                    "pieces, with what optimizer.param_groups holds; the module's own parameters have none then"
                )
        if self.mics.gathering or self._optimizer_state == OptimizerState.WORLD:
            check_optimizers(self.optimizers)
        if self._offload == Offload.OPTIMIZER:
            for optimizer in self.optimizers:
                step_on_host(optimizer)

    # -- the schedule ------------------------------------------------------------------------------------------------

    @property
    def climbs(self) -> bool:
        """Whether rungs are chosen between windows."""
        return self._rung == AUTO

    @contextmanager
    def trying(self, trials: Trials) -> Generator[None, None, None]:
        """Batches in here are of one size after another, and `trials` says which are too large."""
        self._trials = trials
        try:
            yield
        finally:
            self._trials = None

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.saver.look()
        if self._trials is not None:
            self._trials.batch_begins()
        self._rng.step_begins(new_epoch=batch_idx == 0)
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if self.lightning_module.automatic_optimization:
            self.mics.window.begin((trainer.current_epoch, batch_idx // trainer.accumulate_grad_batches))

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().training_step(*args, **kwargs)
        self._rng.step_ended()
        return output

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Gradient accumulation: hop 1 only."""
        with self.mics.window.hop_1_only():
            yield

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Backward, with both hops complete before `on_after_backward` looks at the gradients."""
        assert self.lightning_module is not None
        module, precision = self.lightning_module, self.precision_plugin
        self.pre_backward(closure_loss)
        closure_loss = precision.pre_backward(closure_loss, module)
        if not module.automatic_optimization:
            loss = closure_loss
            closure_loss = self.mics.as_output(lambda: loss)
        with self.mics.window.backward():
            precision.backward(closure_loss, module, optimizer, *args, **kwargs)
        closure_loss = precision.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """The window closes: hop 2 is complete on every parameter and nothing partial is left; then the step."""

        def closing() -> Any:
            result = closure()
            self.mics.window.close()
            return result

        output = super().optimizer_step(optimizer, closing, model, **kwargs)
        if self._hooks_may_read:
            self.mics.finish_updates()
        self.mics.release()
        return output

    @override
    def on_exception(self, exception: BaseException) -> None:
        if isinstance(self.model, MiCSModule):
            self.model.abort()
        self._end_saving(exception)

    @override
    def on_train_end(self) -> None:
        self.mics.finish_updates()
        self.saver.wait()

    @override
    def on_validation_start(self) -> None:
        self.mics.finish_updates()
        self.mics.synchronize_buffers()

    @override
    def on_validation_end(self) -> None:
        self.mics.release()
        self._rng.go_on()

    @override
    def on_test_start(self) -> None:
        self.mics.synchronize_buffers()

    @override
    def on_test_end(self) -> None:
        self.mics.release()

    @override
    def on_predict_start(self) -> None:
        self.mics.synchronize_buffers()

    @override
    def on_predict_end(self) -> None:
        self.mics.release()

    @override
    def barrier(self, name: str | None = None) -> None:
        if name == "run-stage" and self._preemption is not None:  # Lightning has just put its signal handlers
            self._preemption.listen(self.lightning_module.trainer)  # type: ignore[union-attr]
        super().barrier(name)

    @override
    def teardown(self) -> None:
        """Shards stay on their device: the module may be run again, and is whole nowhere."""
        assert self.cluster_environment is not None and self.accelerator is not None
        if isinstance(self.model, MiCSModule):
            self.model.release()
        self._end_saving()
        if self._preemption is not None:
            self._preemption.detach(self.lightning_module.trainer)  # type: ignore[union-attr]
            self._preemption = None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()


def _users_hooks(trainer: pl.Trainer, names: Iterable[str]) -> list[str]:
    """Which of these hooks are the user's own, on the module or on a callback; not Lightning's, nor this package's."""
    packages = ("lightning", "pytorch_lightning", __name__.split(".")[0])
    owners = [trainer.lightning_module, *trainer.callbacks]  # type: ignore[attr-defined]
    hooks = [(owner, name, getattr(owner, name, None)) for name in names for owner in owners]
    return [
        f"{type(owner).__name__}.{name}"
        for owner, name, hook in hooks
        if hook is not None and str(getattr(hook, "__module__", "")).split(".")[0] not in packages
    ]


class MiCSStrategy(MiCSStrategyMixin, ParallelStrategy):
    __doc__ = MiCSStrategyMixin.__doc__


class PytorchLightningMiCSStrategy(MiCSStrategyMixin, pytorch_lightning.strategies.ParallelStrategy):
    """The same, for a `pytorch_lightning.Trainer`."""

    _tree = "pytorch_lightning"


def register() -> None:
    """Make the name "mics" known to both Lightning trees. Calling it again changes nothing."""
    register_in(
        (StrategyRegistry, MiCSStrategy),
        (pytorch_lightning.strategies.StrategyRegistry, PytorchLightningMiCSStrategy),
    )
