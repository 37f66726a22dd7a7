"""Differences between versions of torch, Lightning and Accelerate, and every private name this package touches.

Nothing else in the package imports a private name or asks for a version. Each entry says why it is here and which
test would notice if it moved.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# A training step on shapes alone, and every operation of it seen: tensors without memory, the way out of them, and the
# mode that is told of operations. torch has all three under names with an underscore only.
# Test: tests/planner/test_activations.py.
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

# What `apply_activation_checkpointing` puts around layers. Test: tests/distributed/test_sharding.py.
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten  # nested inputs and outputs; torch has no public pytree
from typing_extensions import override

__all__ = [
    "HAS_RESET_ITER_STATE",
    "HAS_UNUSED_PARAMS",
    "RESET_METHODS",
    "CheckpointWrapper",
    "FakeTensor",
    "FakeTensorMode",
    "Prepared",
    "TorchDispatchMode",
    "all_gather_single",
    "allow_wide_gradients",
    "coalesced",
    "forget_held_gradients",
    "handlers_before_lightning",
    "hooks_on",
    "in_backward",
    "link_by",
    "loaders_are_the_modules",
    "log_as",
    "mark_prepared",
    "mark_saved",
    "named_files",
    "prepared",
    "quantized_state",
    "reduce_held_gradients",
    "reduce_scatter_single",
    "reduce_unused_params",
    "reset_iter_state",
    "sampler_within",
    "script_launcher",
    "set_received_sigterm",
    "steps_in_backward",
    "takes_scheduler",
    "train_loader",
    "tree_flatten",
    "tree_unflatten",
    "unset_fake_temporarily",
]


@dataclass(frozen=True)
class Prepared:
    """See `prepared`."""

    models: list[Any]
    optimizers: list[Any]
    schedulers: list[Any]
    loaders: list[Any]
    objects: list[Any]
    before_save: tuple[Callable[..., None], ...]
    before_load: tuple[Callable[..., None], ...]


# What torch 2.13 has and 2.11 has not.
HAS_UNUSED_PARAMS = hasattr(FSDPModule, "set_reduce_scatter_unused_params")
HAS_RESET_ITER_STATE = hasattr(FSDPModule, "reset_iter_state")
# From torch 2.15 on, autograd itself adds gradients up in another dtype, and a backward may be left to end by hand.
_SUMS_IN_GRAD = isinstance(getattr(FSDPParam, "unsharded_accumulated_grad", None), property)

# How a module sets its own values anew. torch's MultiheadAttention and Transformer have the method under a private
# name only. Test: tests/test_materialize.py.
RESET_METHODS = ("reset_parameters", "_reset_parameters")


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread.

    Activation checkpointing runs a block's forward again inside backward, which must not count as another call; torch
    has no public name for the question (FSDP2 asks the same way). Test: tests/distributed/test_blocks_in_step.py.
    """
    return torch._C._current_graph_task_id() != -1


def reduce_unused_params(root: Any, enable: bool) -> None:
    """Whether a parameter without a gradient takes part in hop 1 with zeros, so that no rank waits for another.

    torch 2.13 has a switch. Before, its parameter groups are told here to do what that one does.
    Test: tests/distributed/test_blocks_in_step.py.
    """
    if HAS_UNUSED_PARAMS:
        root.set_reduce_scatter_unused_params(enable)
        return
    for module in root.modules():
        if isinstance(module, FSDPModule):
            for group in _groups_of(module._get_fsdp_state()):
                group.__class__ = _ReducingUnused if enable else FSDPParamGroup


class _ReducingUnused(FSDPParamGroup):  # type: ignore[misc]
    """A parameter group before torch 2.13, whose unused parameters have gradients of zeros."""

    @override
    def post_backward(self, *unused: Any) -> None:
        for param in self.fsdp_params if self.reduce_grads else ():
            whole = getattr(param, "_unsharded_param", None)
            if whole is None or not whole.requires_grad:
                continue
            if whole.grad is None and param.unsharded_accumulated_grad is None:
                whole.grad = torch.zeros_like(whole)
        super().post_backward(*unused)


def reset_iter_state(root: FSDPModule) -> None:
    """Make FSDP2 forget a forward or backward that raised.

    torch 2.13 has a method. Before, what that one does is done here. Test: tests/distributed/test_windows.py.
    """
    if HAS_RESET_ITER_STATE:
        root.reset_iter_state()
        return
    state = root._get_fsdp_state()
    _forget_collectives(state)
    for group in _parameter_groups(root):
        group.finalize_backward()
        if (event := group._reshard_after_forward_event) is not None:
            group._wait_all_gather_streams_on_event(event)
        group._reshard_after_forward_event = group._partial_reduce_output = None
        group._training_state = type(group._training_state).IDLE
        group._to_sharded()
    for each in state._state_ctx.all_states:
        each._modules_to_run_forward.clear()
        each._training_state = type(each._training_state).IDLE
    state._state_ctx.iter_forward_root = None
    state._state_ctx.post_backward_final_callback_queued = False


def _forget_collectives(state: Any) -> None:
    """Those under way between parameter groups; torch 2.11 keeps one reduce-scatter, 2.12 a list."""
    comms = state._comm_ctx
    several = hasattr(comms, "reduce_scatter_states")
    pending = [comms.all_gather_state, *(comms.reduce_scatter_states if several else [comms.reduce_scatter_state])]
    for each in pending:
        if each is not None and each.event is not None:
            state._device_handle.current_stream().wait_event(each.event)
    comms.all_gather_state = None
    if several:
        comms.reduce_scatter_states.clear()
    else:
        comms.reduce_scatter_state = None
    comms.post_forward_order.clear()


def reduce_held_gradients(root: FSDPModule) -> None:
    """Reduce, outside a backward, the gradients of earlier backwards that did not.

    FSDP2 does it at the end of every backward for modules that took no part in it, and has no public name for that.
    Test: tests/distributed/test_sums.py.
    """
    state: Any = root._get_fsdp_state()
    if _SUMS_IN_GRAD:
        state._state_ctx.manual_backward_finalization_active = False  # as a backward says when it begins
    for group in reversed(_parameter_groups(root)):
        group.post_backward()
    state._root_post_backward_final_callback()


def forget_held_gradients(root: FSDPModule, params: Iterable[nn.Parameter] | None = None) -> None:
    """Drop the gradients of earlier backwards that were not reduced: all, or those of the sharded `params`.

    They are on parameters that FSDP2 registers only while they are gathered, or, summed in another dtype, beside them
    before torch 2.15. Test: tests/distributed/test_sums.py.
    """
    chosen = None if params is None else {id(param) for param in params}
    for group in _parameter_groups(root):
        for param in group.fsdp_params:
            if chosen is not None and id(param.sharded_param) not in chosen:
                continue
            if not _SUMS_IN_GRAD:
                param.unsharded_accumulated_grad = None
            if hasattr(param, "_unsharded_param"):
                param._unsharded_param.grad = None


def _parameter_groups(root: FSDPModule) -> list[Any]:
    """FSDP2's, in the order of execution."""
    return [group for state in root._get_fsdp_state()._state_ctx.all_states for group in _groups_of(state)]


def _groups_of(state: Any) -> list[Any]:
    """Those of a module; torch 2.11 has one a module."""
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def all_gather_single(output: Tensor, shard: Tensor, group: dist.ProcessGroup) -> None:
    """torch 2.13 calls `all_gather_into_tensor` so, and deprecates the older name.

    Test: tests/distributed/test_collectives.py.
    """
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    gather(output, shard, group=group)


def reduce_scatter_single(output: Tensor, whole: Tensor, group: dist.ProcessGroup) -> None:
    """torch 2.13 calls `reduce_scatter_tensor` so, and deprecates the older name.

    Test: tests/distributed/test_collectives.py.
    """
    reduce = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
    reduce(output, whole, group=group)


def coalesced(group: dist.ProcessGroup, backend: str) -> AbstractContextManager[Any]:
    """Issue the collectives in here as one, where the backend can: NCCL launches them together.

    torch has no public name for it. It takes a device, too, for backends that cannot gather or reduce-scatter several
    tensors in one call; NCCL can, and given one would open a second group around that call. Elsewhere they are issued
    one by one. No test without several GPUs.
    """
    return dist.distributed_c10d._coalescing_manager(group) if backend == "nccl" else nullcontext()


def allow_wide_gradients(param: nn.Parameter) -> None:
    """Let `param.grad` have another dtype than `param`, so that 16-bit parameters can sum gradients in fp32.

    `Tensor.grad_dtype` is public from torch 2.10. Test: tests/distributed/test_precision.py.
    """
    param.grad_dtype = None


def hooks_on(param: nn.Parameter) -> int:
    """How many hooks of either kind `param` has that autograd calls with its gradient.

    They can be registered and removed by public names, and not counted.
    Test: tests/distributed/test_lightning_features.py.
    """
    each = param._backward_hooks, getattr(param, "_post_accumulate_grad_hooks", None)
    return sum(len(hooks) for hooks in each if hooks)


def steps_in_backward(param: nn.Parameter) -> bool:
    """Whether an optimizer has been applied to `param` by `_apply_optimizer_in_backward`.

    torch has neither that function nor the mark that it leaves under a public name.
    Test: tests/distributed/test_lightning_features.py.
    """
    return hasattr(param, "_in_backward_optimizers")


def script_launcher(tree: str) -> Any:
    """The launcher behind `Trainer(devices=n)`: it runs the user's script once per further process.

    Lightning names it with an underscore, and a strategy has no public way to ask for it. `tree` is
    "lightning.pytorch" or "pytorch_lightning". Test: tests/test_readme.py.
    """
    return importlib.import_module(f"{tree}.strategies.launchers.subprocess_script")._SubprocessScriptLauncher


def log_as(package: str) -> None:
    """Have Lightning's messages come from the logger that they come from where this package of theirs is used alone.

    There is one for all packages, a module's attribute, and whichever is imported last takes it. This one imports all
    of them, so that what a user sets for the one in use would change nothing. Test: tests/test_logging.py.
    """
    rank_zero: Any = importlib.import_module("lightning_utilities.core.rank_zero")
    tree = "lightning.pytorch" if package == "lightning" else package
    rank_zero.log = logging.getLogger(f"{tree}.utilities.rank_zero")


def sampler_within(sampler: Any) -> Any:
    """The sampler that Lightning has made a distributed one of, or `sampler` if it is not such.

    It keeps it in a private class, under a private name. Test: tests/test_loaders.py.
    """
    return getattr(getattr(sampler, "dataset", None), "_sampler", sampler)


def named_files(plan: SavePlan, prefix: str) -> SavePlan:
    """`plan`, to be written by the library's file writer into files whose names begin with `prefix`.

    The writer would name them after the rank alone; that model and optimizer lie in files of their own, so that one can
    be checked and read without the other, takes its private record. Test: tests/checkpoint/test_directory.py.
    """
    return replace(plan, storage_data=filesystem._StoragePrefix(prefix))


def link_by(callback: Any, link: Callable[[Any, str, str], None]) -> None:
    """Have a callback's links made by `link(trainer, path, link)`.

    ModelCheckpoint makes them in a method with an underscore: as soon as the strategy has been told to save, and by
    deleting the old link first, so that a process killed then leaves none. Test: tests/distributed/test_chaos.py.
    """
    if hasattr(callback, "_link_checkpoint"):
        callback._link_checkpoint = link


def mark_saved(callback: Any, step: int) -> None:
    """Let a callback know that it need not save at `step`, from which the run goes on.

    ModelCheckpoint knows by an attribute with an underscore, which it does not restore: resumed at a step at which it
    saves, it would save anew after the next micro-step, within a window, where gradients are not in the checkpoint.
    Test: tests/distributed/test_chaos.py.
    """
    if hasattr(callback, "_last_global_step_saved"):
        callback._last_global_step_saved = step


def handlers_before_lightning(trainer: Any) -> Mapping[int, Any]:
    """The signal handlers that stood when Lightning put its own in their place, by signal.

    Lightning's compose what they found with their own, and do not tell the one from the other.
    Test: tests/distributed/test_preemption.py.
    """
    handlers: Mapping[int, Any] = trainer._signal_connector._original_handlers
    return handlers


def set_received_sigterm(trainer: Any, received: bool) -> None:
    """Whether Lightning is to raise SIGTERMException at the next batch's end, be it of training or of validation.

    `Trainer.received_sigterm` is public, and can only be read. Test: tests/distributed/test_preemption.py.
    """
    trainer._signal_connector.received_sigterm = received


def train_loader(trainer: Any) -> Any:
    """The training loader that a fit has been given, or asks its module or data module for.

    The loop makes it behind the strategy's setup, and knows under a private name where it will come from.
    Test: tests/distributed/test_planning.py.
    """
    return trainer.fit_loop._data_source.dataloader()


def loaders_are_the_modules(trainer: Any) -> bool:
    """Whether the training loader of a fit is made by its module or data module, and was not given.

    Known under a private name, as above. Test: tests/distributed/test_batch_size_finder.py.
    """
    return bool(trainer.fit_loop._data_source.is_module())


def quantized_state(optimizer: Any, param: Tensor, field: str) -> Tensor | None:
    """Zeros as torchao's optimizers keep `field` of `param` (in 8 bits, as it says for their size); None for others.

    They make state by a private method, and tell by its argument alone that only the first moment has a sign.
    Test: tests/distributed/test_quantized_state.py.
    """
    if type(optimizer).__module__.split(".")[0] != "torchao" or not hasattr(optimizer, "_new_buffer"):
        return None
    made: Tensor = optimizer._new_buffer(param, field == "exp_avg")
    return made


def takes_scheduler(setup: Callable[..., Any]) -> bool:
    """Whether Fabric hands a strategy's `setup_module_and_optimizers` a scheduler, and takes it back: from 2.6.

    Test: tests/distributed/test_fabric.py.
    """
    return "scheduler" in inspect.signature(setup).parameters


def prepared(accelerator: Any) -> Prepared:
    """What an `accelerate.Accelerator` has prepared and registered, which it keeps under private names.

    The lists are its own. Test: tests/distributed/test_accelerate.py.
    """
    return Prepared(
        models=accelerator._models,
        optimizers=accelerator._optimizers,
        schedulers=accelerator._schedulers,
        loaders=accelerator._dataloaders,
        objects=accelerator._custom_objects,
        before_save=tuple(accelerator._save_model_state_pre_hook.values()),
        before_load=tuple(accelerator._load_model_state_pre_hook.values()),
    )


def mark_prepared(prepared: Any) -> None:
    """Have `Accelerator.prepare` take an object as it is, and no other wrapper around it.

    Accelerate marks what it returns by an attribute with an underscore. Test: tests/distributed/test_accelerate.py.
    """
    prepared._is_accelerate_prepared = True
