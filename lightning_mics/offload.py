"""Offload: what is in the host's memory instead of the device's, for time.

Of parameters: the engine keeps shards on the host, with the window's sums and the optimizer's state, and copies a shard
to the device before each gather. Hop 2 goes by the device, a bucket at a time: its network is the faster one, and what
is copied for that is little beside what is copied for gathers.

Of the optimizer: its state is on the host, and its step is taken there, with copies of parameters and gradients that
come when it begins. Between steps it holds the parameters themselves, so that clipping, clearing, scaling and logging
are what they were, and whatever changes a parameter meanwhile is seen by the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from lightning_mics.choice import Choice
from lightning_mics.groups import backends
from lightning_mics.optimizer_shards import STEPS_FOR, OptimizerState
from lightning_mics.shards import local_part, sharded_as

_HOST = torch.device("cpu")
_STEP = "_mics_host_step"


class Offload(Choice):
    """What is in the host's memory."""

    OPTIMIZER = "optimizer"
    """Optimizer state, and the step is taken there."""
    PARAMETERS = "parameters"
    """All that is sharded: parameters, the window's sums and optimizer state."""

    @classmethod
    def of(
        cls, word: Offload | str | None, optimizer_state: OptimizerState = OptimizerState.PARTITION
    ) -> Offload | None:
        """The one that a user gave, or None for nothing.

        Raises:
            ValueError: if there is none of that name, or it does not go with `optimizer_state`.
        """
        if word is None:
            return None
        chosen = cls.parse(word, "offload")
        if optimizer_state == OptimizerState.WORLD:
            raise ValueError(
                f'offload="{chosen}" with optimizer_state="world": pieces of shards are exchanged where the device has '
                'them; choose optimizer_state="partition", or leave offload out'
            )
        return chosen


def check_scaler(offload: Offload | None, scaler: object) -> None:
    """Raises:
    ValueError: if gradients are scaled by a scaler of torch's, which looks for them on the device.
    """
    if offload is not None and scaler is not None:
        raise ValueError(
            f'offload="{offload}" does not go with a gradient scaler, whose step is on the device; choose bf16 '
            '(precision="bf16-mixed", or mixed_precision="bf16"), which needs none, or leave offload out'
        )


def backend_with_host(device: torch.device) -> str:
    """The default group's backends for tensors on `device`, and for those of the host, which torch sums norms of."""
    own = dist.get_default_backend_for_device(device)
    return own if device.type == _HOST.type else f"cpu:gloo,{device.type}:{own}"


def check_backend(offload: Offload | None, device: torch.device, told: str | None = None) -> None:
    """Before groups are made.

    Args:
        offload: what is to be on the host.
        device: this rank's.
        told: the backend of a default group that is yet to be made; by default there is one.

    Raises:
        ValueError: if the default group does not carry the host's tensors.
    """
    if offload is not None and device.type != _HOST.type and _HOST.type not in backends(told):
        both = backend_with_host(device)
        raise ValueError(
            f'offload="{offload}" sums norms of what is on the host, which the backend {told or dist.get_backend()!r} '
            f'does not carry; let the process group have both: "{both}" (process_group_backend, or Accelerate\'s '
            "InitProcessGroupKwargs(backend=...)), or leave offload out"
        )


def policy(offload: Offload | None, device: torch.device) -> OffloadPolicy:
    """The engine's, of what it shards."""
    return CPUOffloadPolicy(pin_memory=_pins(device)) if offload == Offload.PARAMETERS else OffloadPolicy()


def empty_on_host(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of the host, as `device` copies fastest to and from."""
    return torch.empty(numel, dtype=dtype, pin_memory=_pins(device))


def _pins(device: torch.device) -> bool:
    return device.type != _HOST.type


# -- an optimizer ------------------------------------------------------------------------------------------------------


def step_on_host(optimizer: Optimizer) -> None:
    """Have an optimizer keep its state on the host, and step there, from now on. Calling it again changes nothing.

    No communication. Numbers are those of a step on the device, but for what its operators round otherwise.

    Args:
        optimizer: of sharded parameters or whole ones. It holds them as before, but within its step.

    Raises:
        ValueError: for one that runs several forwards in a step.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(_SEVERAL_FORWARDS.format("LBFGS"))
    if _STEP not in optimizer.__dict__:
        optimizer.__dict__[_STEP] = HostStep(optimizer)


def stepped_for(optimizer: Optimizer, param: Tensor) -> Tensor:
    """What an optimizer has state for: its parameter, or where its step is on the host, the copy there."""
    step: HostStep | None = optimizer.__dict__.get(_STEP)
    return param if step is None else step.copy_of(param)


_SEVERAL_FORWARDS = (
    'offload="optimizer" copies parameters to the host once in a step, and {} runs several forwards in one; leave '
    "offload out, or choose another optimizer"
)


class HostStep:
    """One optimizer's step on the host; see `step_on_host`."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._copies: Any = WeakIdKeyDictionary()  # by parameter
        self._held: list[_Place] = []  # while the copies are in the groups: what was
        optimizer.register_step_pre_hook(self._begins)
        optimizer.register_step_post_hook(self._ended)
        optimizer.register_load_state_dict_pre_hook(self._loads)
        optimizer.register_load_state_dict_post_hook(self._loaded)

    def copy_of(self, param: Tensor) -> Tensor:
        """The copy that is stepped for `param`; a copy itself is its own."""
        if hasattr(param, STEPS_FOR):
            return param
        if param not in self._copies:
            copy = nn.Parameter(_like(param, param), requires_grad=param.requires_grad)
            setattr(copy, STEPS_FOR, param)
            self._copies[param] = copy
        made: Tensor = self._copies[param]
        return made

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """A closure computes the gradients with the parameters in their places; the step goes on from what it left.

        The step of a class that calls that of its base comes here twice.
        """
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if isinstance(closure, _Fetching) or (closure is None and self._has_fetched()):
            return None
        self._give_back(optimizer)
        if closure is None:
            self.fetch(optimizer)
            return None
        return (args[0],), {**kwargs, "closure": _Fetching(self, optimizer, closure)}

    @property
    def fetched(self) -> bool:
        """Whether the copies are in the groups."""
        return bool(self._held)

    def _has_fetched(self) -> bool:
        """These very gradients."""
        return self.fetched and all(param.grad is gradient for _, _, param, gradient in self._held)

    @torch.no_grad()
    def _ended(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for _, _, param, _ in self._held:
            copy = self.copy_of(param)
            local_part(param).copy_(local_part(copy), non_blocking=True)  # on the stream that computes next
            copy.grad = None
        self._give_back(optimizer)

    def _loads(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """torch puts state where the parameters are that it finds in the groups."""
        self._give_back(optimizer)
        groups = optimizer.param_groups, state["param_groups"]
        ours, saved = ([len(group["params"]) for group in each] for each in groups)
        if ours == saved:  # otherwise it raises
            self._take(optimizer)

    def _loaded(self, optimizer: Optimizer) -> None:
        self._give_back(optimizer)

    # -- what the groups hold ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def fetch(self, optimizer: Optimizer) -> None:
        """Copy values and gradients, and put the copies into the groups."""
        self._take(optimizer)
        for _, _, param, gradient in self._held:
            copy = self.copy_of(param)
            copy.requires_grad_(param.requires_grad)
            local_part(copy).copy_(local_part(param), non_blocking=True)
            if gradient is not None:
                copy.grad = _like(gradient, copy)
                local_part(copy.grad).copy_(local_part(gradient), non_blocking=True)
        for device in {param.device for _, _, param, _ in self._held if param.device.type != _HOST.type}:
            torch.accelerator.current_stream(device).synchronize()

    def _take(self, optimizer: Optimizer) -> None:
        for held in [*_places(optimizer)]:
            params, number, param, _ = held
            copy = params[number] = self.copy_of(param)
            self._held.append(held)
            if param in optimizer.state:
                state = optimizer.state.pop(param)
                optimizer.state[copy] = {name: _on_host(value) for name, value in state.items()}

    def _give_back(self, optimizer: Optimizer) -> None:
        """Also what a step that raised has left."""
        for params, number, param, _ in self._held:
            copy, params[number] = params[number], param
            if copy in optimizer.state:
                optimizer.state[param] = optimizer.state.pop(copy)
        self._held.clear()


class _Fetching:
    """A step's closure, behind which the copies are stepped."""

    def __init__(self, step: HostStep, optimizer: Optimizer, closure: Callable[[], Any]) -> None:
        self._step, self._optimizer, self._closure = step, optimizer, closure

    def __call__(self) -> Any:
        if self._step.fetched:
            raise RuntimeError(_SEVERAL_FORWARDS.format(type(self._optimizer).__name__))
        result = self._closure()
        self._step.fetch(self._optimizer)
        return result


_Place = tuple[list[Tensor], int, Tensor, Tensor | None]
"""A list, the place in it, the parameter that is there, and its gradient."""


def _places(optimizer: Optimizer) -> Iterator[_Place]:
    for group in optimizer.param_groups:
        for number, param in enumerate(group["params"]):
            yield group["params"], number, param, param.grad


def _on_host(value: Any) -> Any:
    """State that was made on the device, by a checkpoint or before this optimizer was told."""
    if not isinstance(value, Tensor) or local_part(value).device == _HOST:
        return value
    return _sharded_on_host(local_part(value).to(_HOST), value)


def _like(tensor: Tensor, sharded: Tensor) -> Tensor:
    """Memory on the host for a copy of `tensor`, sharded as another is."""
    own = local_part(tensor)
    memory = torch.empty_like(own, device=_HOST, pin_memory=_pins(own.device))
    return _sharded_on_host(memory, sharded)


def _sharded_on_host(local: Tensor, like: Tensor) -> Tensor:
    return sharded_as(local, like, _mesh_on_host(like.device_mesh) if isinstance(like, DTensor) else None)


def _mesh_on_host(mesh: DeviceMesh) -> DeviceMesh:
    """The same ranks and groups, for the host's tensors: a mesh takes those of its device alone."""
    if mesh.device_type == _HOST.type:
        return mesh
    return DeviceMesh.from_group(mesh.get_group(), _HOST.type, mesh_dim_names=mesh.mesh_dim_names)
