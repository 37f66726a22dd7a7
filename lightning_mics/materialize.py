"""Materialize: real, equal values on every rank, block by block.

Before a block is sharded its values must exist and must be the same on every rank, whatever seed a rank started from.
A module on the meta device is given memory and initialised with rank 0's seed; a module that has values takes rank
0's. Either way a rank holds one whole block at a time, as it does in training, and never the whole model.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mics._compat import RESET_METHODS


def common_seed(device: torch.device) -> int:
    """Rank 0's current seed, on every rank. Issues a broadcast on the default group."""
    seed = torch.tensor([torch.initial_seed() % 2**63], device=device)
    dist.broadcast(seed, src=0)
    return int(seed.item()) if dist.get_backend() != "fake" else torch.initial_seed() % 2**63


def materialize(root: nn.Module, modules: Iterable[tuple[str, nn.Module]], device: torch.device, seed: int) -> None:
    """Give `modules` (names and modules of `root`, each with its own parameters and buffers only) real, equal values.

    Args:
        root: the model they belong to; decides who initialises (Hugging Face's `_init_weights` of the closest model
            above, otherwise the module's `reset_parameters`), children before parents.
        modules: what to materialise; children are not descended into.
        device: where the values go.
        seed: from `common_seed`, mixed with the names so that no two blocks draw the same numbers.

    Raises:
        ValueError: if a tensor on the meta device is left without a value by its initialisation.
    """
    modules = list(modules)
    with torch.no_grad():
        fresh = _allocate(root, modules, device)
        if fresh:
            _initialise(root, modules, fresh, device, seed)
        _take_from_rank_zero(modules, fresh, device)


def _initialise(
    root: nn.Module, modules: list[tuple[str, nn.Module]], fresh: set[int], device: torch.device, seed: int
) -> None:
    own = [(f"{name}.{n}".lstrip("."), tensor) for name, module in modules for n, tensor in _own_tensors(module)]
    kept = [(t, t.clone()) for _, t in own if id(t) not in fresh and not isinstance(t, DTensor)]
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed ^ zlib.crc32(modules[0][0].encode()))
        for name, module in reversed(modules):  # children before parents, as nn.Module.apply
            _initialiser(root, name, module, fresh, within={id(tensor) for _, tensor in own})()
    for tensor, value in kept:
        tensor.copy_(value)
    unset = [name for name, tensor in own if id(tensor) in fresh and _is_unset(tensor)]
    if unset:
        raise ValueError(
            f"{', '.join(unset[:5])}{' ...' * (len(unset) > 5)}: on the meta device, and left without a value; give "
            "the module a reset_parameters() that sets them, or build it outside init_module(empty_init=True)"
        )


def _allocate(root: nn.Module, modules: list[tuple[str, nn.Module]], device: torch.device) -> set[int]:
    """Replace meta tensors by unset ones, everywhere in `root` where they are tied. Returns the ids of the new."""
    replaced: dict[int, Tensor] = {}
    for _, module in modules:
        for _, tensor in _own_tensors(module):
            if tensor.is_meta and id(tensor) not in replaced:
                fresh = _unset_like(tensor, device)
                is_param = isinstance(tensor, nn.Parameter)
                replaced[id(tensor)] = nn.Parameter(fresh, tensor.requires_grad) if is_param else fresh
    for module in root.modules() if replaced else ():
        for name, tensor in list(_own_tensors(module)):
            if id(tensor) in replaced:
                setattr(module, name, replaced[id(tensor)])
    return {id(tensor) for tensor in replaced.values()}


def _initialiser(
    root: nn.Module, name: str, module: nn.Module, fresh: set[int], *, within: set[int]
) -> Callable[[], object]:
    """What sets the values of `module`.

    A module without new tensors of its own counts too, since it may set its children's (GPT-2 scales its residual
    projections that way), unless it could reach values that are not `within` the tensors at hand.
    """
    if not any(id(tensor) in fresh for _, tensor in _own_tensors(module)):
        held = {id(p) for p in module.parameters() if not p.is_meta}
        if not held & fresh or held - within:
            return lambda: None
    by_model = _hugging_face_initialiser(root, name)
    if by_model:
        return partial(by_model, module)
    resets = (getattr(module, method, None) for method in RESET_METHODS)
    return next((r for r in resets if callable(r)), lambda: None)


def _hugging_face_initialiser(root: nn.Module, name: str) -> Callable[[nn.Module], object] | None:
    parts = name.split(".") if name else []
    for depth in range(len(parts), -1, -1):
        above = root.get_submodule(".".join(parts[:depth]))
        initialise = getattr(above, "_init_weights", None)
        if callable(initialise) and hasattr(above, "config"):
            return cast(Callable[[nn.Module], object], initialise)
    return None


def _take_from_rank_zero(modules: list[tuple[str, nn.Module]], fresh: set[int], device: torch.device) -> None:
    tensors: dict[int, Tensor] = {}
    for _, module in modules:
        for name, tensor in list(_own_tensors(module)):
            if id(tensor) in fresh or isinstance(tensor, DTensor):  # a rank's own shard is not rank 0's
                continue
            if isinstance(tensor, nn.Parameter):
                tensor.data = tensor.data.to(device)
            else:
                tensor = tensor.to(device)
                setattr(module, name, tensor)
            tensors[id(tensor)] = tensor
    broadcast_from_rank_zero(tensors.values())


def broadcast_from_rank_zero(tensors: Iterable[Tensor]) -> None:
    """Overwrite `tensors` (any shapes and dtypes, the same on every rank) with rank 0's, in place.

    Issues one broadcast per dtype on the default group.
    """
    by_dtype: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_dtype[tensor.dtype].append(tensor.detach())
    for same in by_dtype.values():
        flat = torch.cat([t.reshape(-1) for t in same])
        dist.broadcast(flat, src=0)
        for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _unset_like(tensor: Tensor, device: torch.device) -> Tensor:
    fresh = torch.empty_like(tensor, device=device)
    return fresh.fill_(_unset_value(tensor.dtype))


def _unset_value(dtype: torch.dtype) -> float | int:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 0 if dtype == torch.bool else torch.iinfo(dtype).min


def _is_unset(tensor: Tensor) -> bool:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return bool(tensor.isnan().any())
    # An unsigned dtype has no value to spare.
    return tensor.dtype.is_signed and bool((tensor == _unset_value(tensor.dtype)).any())
