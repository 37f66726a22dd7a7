"""Blocks: which modules are gathered together.

A block is the unit of communication: the parameters of one transformer layer travel in one collective. The repeated
layers of a model are found without being told; a class, a predicate or a wrap policy overrides the choice.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

BlockClass = type[nn.Module] | str
BlockPredicate = Callable[[str, nn.Module], bool]
BlockChoice = BlockClass | Collection[BlockClass] | BlockPredicate | ModuleWrapPolicy | None

_LISTS = (nn.ModuleList, nn.Sequential)
# Of a model with several stacks of layers (an encoder and a decoder), a stack counts if it is no less than this
# share of the largest; smaller ones are not worth a collective of their own.
_WORTH_A_STACK = 0.1


@dataclass(frozen=True)
class Block:
    """A module whose parameters are gathered together, and its name in the root."""

    name: str
    module: nn.Module


def find_blocks(root: nn.Module, choice: BlockChoice = None) -> tuple[Block, ...]:
    """The blocks of `root`, in the order of its modules (which is taken to be the order of execution).

    Args:
        root: any module; it is not changed.
        choice: None finds them: the repeated modules among Hugging Face's `_no_split_modules`, otherwise the largest
            `ModuleList` or `Sequential` whose children are all of one class, with others of the kind that hold no
            less than a tenth of its parameters. Otherwise a class (or its name), several, a predicate
            `(name, module) -> bool`, or a `torch.distributed.fsdp.wrap.ModuleWrapPolicy`.

    Raises:
        ValueError: if a choice matches nothing, a container without a forward, or a block inside another block.
        TypeError: if the choice is none of the above.
    """
    if choice is None:
        return _repeated_layers(root)
    matches = _predicate(choice)
    found = [
        Block(name, module)
        for name, module in root.named_modules()
        if name and matches(name, module) and has_parameters(module)
    ]
    _check_choice(choice, found)
    return tuple(found)


def _check_choice(choice: BlockChoice, found: list[Block]) -> None:
    if not found:
        raise ValueError(
            f"blocks={choice!r} matches no module with parameters; give the class of the model's repeated layer, "
            "or leave it out to have it found"
        )
    for block in found:
        if isinstance(block.module, nn.ModuleList | nn.ModuleDict):
            raise ValueError(
                f"blocks={choice!r} matches {block.name!r}, a {type(block.module).__name__} without a forward; "
                "choose the class of its children"
            )
    for outer, inner in pairwise(found):
        if inner.name.startswith(outer.name + "."):
            raise ValueError(
                f"blocks={choice!r} matches {inner.name!r} inside {outer.name!r}; blocks must not be nested, "
                "choose one of the two classes"
            )


def _predicate(choice: BlockChoice) -> BlockPredicate:
    if isinstance(choice, ModuleWrapPolicy):
        return lambda _, module: bool(choice(module, recurse=False))
    classes = [choice] if isinstance(choice, type | str) else choice
    if isinstance(classes, Collection) and all(isinstance(c, type | str) for c in classes):
        wanted = set(classes)
        return lambda _, module: any(c in wanted or c.__name__ in wanted for c in _user_classes(module))
    if callable(choice) and not isinstance(choice, type):
        return choice
    raise TypeError(
        f"blocks={choice!r} is not understood; give a module class or its name, several of them, a predicate "
        "(name, module) -> bool, or a ModuleWrapPolicy"
    )


def _user_classes(module: nn.Module) -> Iterator[type]:
    return (c for c in type(module).__mro__ if c not in (nn.Module, object))


def _repeated_layers(root: nn.Module) -> tuple[Block, ...]:
    return _declared_layers(root) or _largest_stacks(root)


def _declared_layers(root: nn.Module) -> tuple[Block, ...]:
    """Repeated modules whose class a Hugging Face model says must stay together."""
    declared: set[str] = set()
    for module in root.modules():
        names = getattr(module, "_no_split_modules", None)
        if isinstance(names, list | tuple | set | frozenset):
            declared.update(names)
    found = [
        Block(name, m) for name, m in root.named_modules() if class_of(m).__name__ in declared and has_parameters(m)
    ]
    count = Counter(class_of(block.module) for block in found)
    return _outermost(block for block in found if count[class_of(block.module)] > 1)


def _largest_stacks(root: nn.Module) -> tuple[Block, ...]:
    stacks: list[tuple[int, list[Block]]] = []
    for name, module in root.named_modules():
        children = [Block(f"{name}.{n}".lstrip("."), child) for n, child in module.named_children()]
        if (
            isinstance(module, _LISTS)
            and len(children) > 1
            and len({class_of(child.module) for child in children}) == 1
            and not isinstance(children[0].module, (*_LISTS[:1], nn.ModuleDict))
            and all(has_parameters(child.module) for child in children)
        ):
            stacks.append((sum(p.numel() for p in module.parameters()), children))
    largest = max((size for size, _ in stacks), default=0)
    worthy = [block for size, blocks in stacks if size >= _WORTH_A_STACK * largest for block in blocks]
    return _outermost(worthy)


def _outermost(blocks: Iterator[Block] | list[Block]) -> tuple[Block, ...]:
    kept: list[Block] = []
    for block in blocks:
        if not any(block.name.startswith(outer.name + ".") or block.module is outer.module for outer in kept):
            kept.append(block)
    return tuple(kept)


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class as its author wrote it; `fully_shard` puts another in front."""
    return next(c for c in type(module).__mro__ if issubclass(c, nn.Module) and not issubclass(c, FSDPModule))


def has_parameters(module: nn.Module) -> bool:
    """Whether there is anything to shard."""
    return next(module.parameters(), None) is not None


# -- who owns which parameter ------------------------------------------------------------------------------------------

Slot = tuple[nn.Module, str]
"""Where a parameter is registered: with which module, under which name."""


def slots_by_owner(module: nn.Module, found: Sequence[Block]) -> dict[str, list[Slot]]:
    """For each block's name, and "" for the root: where the parameters that travel with it are registered, each once.

    A parameter that two blocks share, or a block and the rest, belongs to the root, which stays gathered from forward
    to backward.
    """
    holders, where = _holders(module, found)
    slots: dict[str, list[Slot]] = {name: [] for name in (*(block.name for block in found), "")}
    for key, slot in where.items():
        owners = holders[key]
        slots[next(iter(owners)) if len(owners) == 1 else ""].append(slot)
    return slots


def tied_across_blocks(module: nn.Module, found: Sequence[Block]) -> list[nn.Parameter]:
    """The root's parameters that only blocks hold. The engine looks for them with the root."""
    holders, where = _holders(module, found)
    return [getattr(*slot) for key, slot in where.items() if len(holders[key]) > 1 and "" not in holders[key]]


def take_scalars(slots: Mapping[str, list[Slot]]) -> list[Slot]:
    """Remove from `slots` those of parameters without dimensions, which have no rows to shard."""
    scalars = [slot for where in slots.values() for slot in where if not getattr(*slot).ndim]
    for where in slots.values():
        where[:] = [slot for slot in where if getattr(*slot).ndim]
    return scalars


def parameters_at(slots: Sequence[Slot]) -> tuple[nn.Parameter, ...]:
    """What is registered there."""
    return tuple(getattr(owner, name) for owner, name in slots)


def _holders(module: nn.Module, found: Sequence[Block]) -> tuple[dict[int, set[str]], dict[int, Slot]]:
    """By a parameter's id: the blocks that hold it, and where it is registered; in the root, if it is there too."""
    holders: defaultdict[int, set[str]] = defaultdict(set)
    where: dict[int, Slot] = {}
    by_module = {id(block.module): block.name for block in found}
    everywhere = [*module.named_modules(remove_duplicate=False)]
    blocks = {name: by_module[id(holder)] for name, holder in everywhere if id(holder) in by_module}
    for module_name, holder in everywhere:
        owner = _block_of(module_name, blocks)
        for name, param in holder.named_parameters(recurse=False):
            holders[id(param)].add(owner)
            if owner == "" or id(param) not in where:
                where[id(param)] = (holder, name)
    return holders, where


def _block_of(name: str, blocks: Mapping[str, str]) -> str:
    """The block in which a module is; `blocks` are names by each place where one is registered."""
    parts = name.split(".")
    above = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
    return next((blocks[place] for place in above if place in blocks), "")
