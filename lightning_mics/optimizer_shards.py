"""Optimizer state off the diagonal: each rank steps its piece of a shard, and replicas exchange what they stepped.

Replicas hold the same shard, and in the plain form each of them keeps optimizer state for all of it and takes the same
step. Here a shard's rows are split once more over its r replicas. Hop 2 becomes the reduce half of an all-reduce, the
step runs on 1/n of each parameter, and the gather half carries the updated rows behind whatever comes next, until a
forward needs them (AMSP, arXiv 2311.00257: parameters, gradients and optimizer state each sharded as wide as pays).

A piece is a DTensor on the mesh ("shard", "replica") whose memory is the shard's own, so that a step writes into the
shard, and a checkpoint sees the parameter's shape, sharded otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from lightning_mics.channels import Transfer
from lightning_mics.choice import Choice
from lightning_mics.comms import padded_numel
from lightning_mics.groups import Groups
from lightning_mics.shards import local_part
from lightning_mics.topology import Topology
from lightning_mics.wire import Traffic

STEPS_FOR = "_mics_parameter"
"""The attribute by which what an optimizer steps for a parameter tells which."""


class OptimizerState(Choice):
    """Over which ranks optimizer state is sharded."""

    PARTITION = "partition"
    """Over the p ranks of the partition group, as parameters are."""
    WORLD = "world"
    """Over all n ranks."""


class OptimizerShards:
    """The pieces of one optimizer on this rank, their gradients, and the updates that are under way.

    Args:
        groups: with more than one replica.
        hop_2: carries both halves, exactly: an update that is rounded on its way would make replicas differ.
        optimizer: of whose groups "params" are replaced by pieces, in place.
        parameters: the sharded module's; any others that the optimizer holds stay as they are.
        on_step: called after each step, when the pieces have their new values.
    """

    def __init__(
        self,
        groups: Groups,
        hop_2: Traffic,
        optimizer: Optimizer,
        parameters: Iterable[nn.Parameter],
        on_step: Callable[[], None],
    ) -> None:
        self._groups = groups
        self._replicas = groups.topology.replicas
        self._collectives = hop_2.collectives.exact()
        self._channel = hop_2.channel
        self._replica = groups.world_mesh.get_local_rank("replica")
        self._pieces: dict[int, nn.Parameter] = {}
        self._under_way: dict[int | None, Transfer] = {}
        self.optimizer = optimizer
        self._parameters = {id(param) for param in parameters}
        self._on_step = on_step
        self._stepping = self._closed = False
        self.hold()
        optimizer.register_step_pre_hook(self._step_begins)
        optimizer.register_step_post_hook(self._step_ended)

    def hold(self) -> None:
        """Replace parameters in the optimizer's groups by pieces, those of groups that were added since as well."""
        state = self.optimizer.state
        for group in self.optimizer.param_groups:
            for number, param in enumerate(group["params"]):
                if id(param) in self._parameters and param.ndim:  # otherwise there are no rows
                    piece = self._pieces[id(param)] = self._piece_of(param)
                    group["params"][number] = piece
                    if param in state:
                        state[piece] = {k: self._state_of(param, value) for k, value in state.pop(param).items()}

    @torch.no_grad()
    def _piece_of(self, param: nn.Parameter) -> nn.Parameter:
        piece = nn.Parameter(self._as_piece(_rows(local_part(param), self._replicas, self._replica), param))
        setattr(piece, STEPS_FOR, param)
        return piece

    @torch.no_grad()
    def _state_of(self, param: nn.Parameter, value: Any) -> Any:
        """State that an optimizer has made already, as some do when they are made."""
        if not isinstance(value, Tensor) or value.shape != param.shape:
            return value
        return self._as_piece(_rows(local_part(value), self._replicas, self._replica).clone(), param)

    def _as_piece(self, rows: Tensor, param: nn.Parameter) -> DTensor:
        mesh = self._groups.world_mesh
        return DTensor.from_local(
            rows, mesh, (Shard(0), Shard(0)), run_check=False, shape=param.shape, stride=param.stride()
        )

    def holds(self, param: nn.Parameter) -> bool:
        """Whether there is a piece of `param`."""
        return id(param) in self._pieces

    def held(self, param: Tensor) -> Tensor:
        """What the optimizer steps for `param`: its piece, or itself."""
        return self._pieces.get(id(param), param)

    def steps(self, param: nn.Parameter) -> bool:
        """Whether the optimizer may have changed the piece of `param` in its last step."""
        return self.holds(param) and (param.requires_grad or self._pieces[id(param)].grad is not None)

    # -- gradients ---------------------------------------------------------------------------------------------------

    def begin_reduce(
        self, name: str, params: Sequence[nn.Parameter], gradients: Sequence[Tensor], hop_1: Transfer | None
    ) -> Mean:
        """Hop 2 as a reduce-scatter over the replication group, behind whatever runs.

        Args:
            name: of the bucket, for people.
            params: those with pieces, of one dtype.
            gradients: this rank's part of each one's gradient, of one dtype; not to be touched until it is over.
            hop_1: what still adds to them.
        """
        rooms = [room(param, self._groups.topology) for param in params]
        out = gradients[0].new_empty(sum(rooms))
        task = partial(self._reduce, gradients, rooms, out, hop_1)
        return Mean(self._channel.submit(task, f"hop 2 of {name}"), params, rooms, out)

    def _reduce(
        self, gradients: Sequence[Tensor], rooms: Sequence[int], out: Tensor, hop_1: Transfer | None
    ) -> Iterator[None]:
        if hop_1 is not None:
            hop_1.wait()
        slots = out.new_empty(self._replicas, out.numel())
        for gradient, offset in zip(gradients, _offsets(rooms), strict=True):
            _spread(gradient, slots, offset)
        finish = self._collectives.begin_reduce_scatter(slots.view(-1))
        yield
        torch.div(finish(), self._replicas, out=out)

    @torch.no_grad()
    def take_over(self, mean: Mean) -> None:
        """Add what has come to the pieces' `.grad`, in their dtype; the parameters' own are gone."""
        for param, offset in zip(mean.params, _offsets(mean.rooms), strict=True):
            piece = self._pieces[id(param)]
            rows = local_part(piece)
            part = mean.out[offset : offset + rows.numel()].view_as(rows).to(piece.dtype)
            gradient = self._as_piece(part, param)
            piece.grad = gradient if piece.grad is None else piece.grad + gradient
            param.grad = None

    def forget(self, param: nn.Parameter) -> None:
        """The piece of `param`, if there is one, has no gradient."""
        if (piece := self._pieces.get(id(param))) is not None:
            piece.grad = None

    # -- updates -----------------------------------------------------------------------------------------------------

    def begin_gather(self, bucket: int | None, name: str, params: Sequence[nn.Parameter]) -> None:
        """Begin to send a bucket's updated rows to the other replicas, and to receive theirs into the shards.

        Raises:
            RuntimeError: if a shard has got other memory since its piece was made.
        """
        pairs = [(local_part(param), local_part(self._pieces[id(param)])) for param in params]
        for param, (shard, rows) in zip(params, pairs, strict=True):
            if rows.untyped_storage().data_ptr() != shard.untyped_storage().data_ptr():
                raise RuntimeError(
                    f"a parameter of {name} of shape {tuple(param.shape)} has got other memory since its optimizer was "
                    "sharded, as by module.to() or load_state_dict(assign=True); make the optimizer after that"
                )
        task = partial(self._gather, pairs, [room(param, self._groups.topology) for param in params])
        self._under_way[bucket] = self._channel.submit(task, f"updates of {name}")

    def _gather(self, pairs: Sequence[tuple[Tensor, Tensor]], rooms: Sequence[int]) -> Iterator[None]:
        slots = pairs[0][0].new_empty(self._replicas, sum(rooms))
        for (_, rows), offset in zip(pairs, _offsets(rooms), strict=True):
            slots[self._replica, offset : offset + rows.numel()] = rows.reshape(-1)
        finish = self._collectives.begin_all_gather(slots.view(-1))
        yield
        finish()
        for (shard, _), offset in zip(pairs, _offsets(rooms), strict=True):
            _collect(slots, offset, shard)

    def finish(self, bucket: int | None) -> None:
        """Return when a bucket's shards hold all replicas' updates.

        Raises:
            CollectiveError: if they cannot be had.
        """
        if (transfer := self._under_way.pop(bucket, None)) is not None:
            transfer.wait()

    def finish_all(self) -> None:
        """Return when all shards hold all replicas' updates."""
        for bucket in [*self._under_way]:
            self.finish(bucket)

    # -- the step ----------------------------------------------------------------------------------------------------

    def _step_begins(self, *_: Any) -> None:
        self._stepping, self._closed = True, False

    def _step_ended(self, *_: Any) -> None:
        self._stepping = False
        self._on_step()

    def close(self) -> None:
        """The window closes: the step that follows may write into the shards."""
        self.finish_all()
        self._closed = True

    def forward_begins(self) -> None:
        """Before a forward of the whole module.

        Raises:
            RuntimeError: if the optimizer runs its closure once more in a step: the rows that it has changed since are
                its own, and the other replicas' are not.
        """
        if self._stepping and self._closed:
            raise RuntimeError(_SEVERAL_FORWARDS.format(type(self.optimizer).__name__))

    def abort(self) -> None:
        """A step that was begun may not have ended, and will not."""
        self._stepping = False


@dataclass(frozen=True)
class Mean:
    """A bucket's mean gradients on their way to this rank's pieces.

    Attributes:
        transfer: what brings them.
        params: whose they are.
        rooms: elements that there are in `out` for each.
        out: one-dimensional.
    """

    transfer: Transfer
    params: Sequence[nn.Parameter]
    rooms: Sequence[int]
    out: Tensor


def check_optimizer(optimizer: Optimizer) -> None:
    """Before an optimizer's state is sharded over all ranks.

    Raises:
        ValueError: for one that needs several forwards in a step, or holds pieces already.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(_SEVERAL_FORWARDS.format("LBFGS"))
    if any(parameter_of(param) is not param for group in optimizer.param_groups for param in group["params"]):
        raise ValueError("this optimizer's state is sharded over all ranks already; make a new optimizer")


_SEVERAL_FORWARDS = (
    'optimizer_state="world" lets each rank step a part of its shard, and {} runs several forwards in a step, between '
    'which every rank would need all parts; choose optimizer_state="partition"'
)


def parameter_of(held: Tensor) -> Tensor:
    """The parameter that an optimizer means by what it holds: a piece's, or itself."""
    whole: Tensor = getattr(held, STEPS_FOR, held)
    return whole


def room(param: Tensor, topology: Topology) -> int:
    """Elements that each rank has room for when the padded shard of `param` is split over the replicas in dim 0."""
    shard = padded_numel(param, topology.partition_size)
    row = param.numel() // param.shape[0] if shard and param.ndim else 1
    return -(-shard // row // topology.replicas) * row


# -- rows --------------------------------------------------------------------------------------------------------------
# A shard of m rows is split over r replicas as torch.chunk does it, by ceil(m/r) rows: what DTensor means by two shards
# of one dim.


def _rows(shard: Tensor, replicas: int, replica: int) -> Tensor:
    """The rows of one replica, a view."""
    each = -(-len(shard) // replicas)
    return shard[min(replica * each, len(shard)) : min((replica + 1) * each, len(shard))]


def _width(shard: Tensor, replicas: int) -> int:
    """Elements of the first replica's rows, which has the most."""
    return _rows(shard, replicas, 0).numel()


def _spread(shard: Tensor, slots: Tensor, offset: int) -> None:
    """Lay every replica's rows into its slot."""
    width = _width(shard, len(slots))
    flat = shard.reshape(-1)
    if missing := width * len(slots) - flat.numel():
        flat = nn.functional.pad(flat, (0, missing))
    slots[:, offset : offset + width] = flat.view(len(slots), width)


def _collect(slots: Tensor, offset: int, shard: Tensor) -> None:
    """The reverse."""
    width = _width(shard, len(slots))
    shard.copy_(slots[:, offset : offset + width].reshape(-1)[: shard.numel()].view_as(shard))


def _offsets(rooms: Sequence[int]) -> list[int]:
    return [*accumulate(rooms, initial=0)][:-1]
