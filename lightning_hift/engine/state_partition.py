"""Optimizer state and masters divided among processes that otherwise do the same.

All of them have all weights and the same gradients. Each keeps the state of some pieces, steps these alone, and sends
the others what has become of them. So each needs its part of the host memory only, and of the time that a step takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from lightning_hift.engine.row_slices import Piece

_BUCKET_BYTES = 25 * 2**20  # small pieces are sent together, up to so many bytes


class UndividedState:
    """This process keeps and steps everything. The base of those that divide it in some way."""

    rank = 0
    world_size = 1

    def assign(self, turns: Iterable[Sequence[Piece]]) -> None:
        """Divide the pieces of ``turns``. To be called before all that follows."""

    def owner_of(self, piece: Piece) -> int:
        """The rank of the process that keeps the state of ``piece``, and steps it."""
        return 0

    def owns(self, piece: Piece) -> bool:
        """Whether this process does."""
        return self.owner_of(piece) == self.rank

    def share(self, pieces: Sequence[Piece]) -> None:
        """After a step of ``pieces``, by those who own them: begin to send their weights to the others."""

    def finish(self) -> None:
        """Wait for all weights that ``share`` has begun to send."""

    def sum(self, parts: Tensor) -> Tensor:
        """The sum over all processes of what each has found out about what it steps, on the host."""
        return parts


class ShardedState(UndividedState):
    """This process keeps and steps its part of every parameter, as all processes of the default group do.

    Args:
        device: Of the parameters.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def sum(self, parts: Tensor) -> Tensor:
        """The sum over all processes of what each has found out about its parts, on the host."""
        return _sum(parts, self._device)


class _Sent(NamedTuple):
    """Weights on their way from the process that has stepped them."""

    targets: list[Tensor]  # where to copy the parts of what was sent
    sent: Tensor
    work: Any


class StatePartition(UndividedState):
    """Divides pieces among all processes of the default group, in all of them alike.

    Whatever talks to the others (``share``, ``sum``) has to be called by all of them, in the same order.

    Args:
        bucket_bytes: Small pieces are sent together, up to about this size.
    """

    def __init__(self, bucket_bytes: int = _BUCKET_BYTES) -> None:
        self.sent_bytes = 0
        """Bytes of weights that this process has sent to the others; the caller sets it back."""
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._bucket_bytes = bucket_bytes
        self._owner: dict[nn.Parameter, int] = {}  # by handle
        self._parameters: list[nn.Parameter] = []
        self._numel = [0] * self.world_size  # of each process
        self._under_way: list[_Sent] = []

    def assign(self, turns: Iterable[Sequence[Piece]]) -> None:
        """Divide the pieces of ``turns``: turn by turn, from the largest down, to the process with the least so far."""
        for turn in turns:
            for piece, rank in zip(turn, divide_turn([_numel(piece) for piece in turn], self._numel), strict=True):
                self._owner[piece.handle] = rank
                self._parameters.append(piece.parameter)

    def owner_of(self, piece: Piece) -> int:
        """The rank of the process that keeps the state of ``piece``; of what never trains it is the first one."""
        return self._owner.get(piece.handle, 0)

    def share(self, pieces: Sequence[Piece]) -> None:
        """After a step of ``pieces``, by those who own them: begin to send their weights to the others."""
        for owner, weights in self._buckets(pieces):
            in_place = len(weights) == 1 and weights[0].is_contiguous()  # a large one, not copied
            sent = weights[0] if in_place else torch.cat([each.reshape(-1) for each in weights])
            mine = owner == self.rank
            self.sent_bytes += sent.nbytes if mine else 0
            work = dist.broadcast(sent, owner, async_op=True)
            self._under_way.append(_Sent([] if in_place or mine else weights, sent, work))

    def finish(self) -> None:
        """Wait for all weights that ``share`` has begun to send; on a GPU, let its stream wait."""
        with record_function("HiFT::wait_for_weights"):
            for targets, sent, work in self._under_way:
                work.wait()
                if targets:
                    parts = cast(Any, sent).split([target.numel() for target in targets])
                    for target, part in zip(targets, parts, strict=True):
                        target.copy_(part.view_as(target))
        self._under_way = []

    def sum(self, parts: Tensor) -> Tensor:
        """The sum over all processes of what each has found out about what it steps, on the host."""
        return _sum(parts, self._parameters[0].device)

    def _buckets(self, pieces: Sequence[Piece]) -> list[tuple[int, list[Tensor]]]:
        """Weights that are sent together, and the rank that sends them."""
        found: list[tuple[int, list[Tensor]]] = []
        last: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        for piece in pieces:
            owner, weights = self.owner_of(piece), piece.rows_of(piece.parameter.detach())
            bucket = last.get((owner, weights.dtype), [])
            if not bucket or sum(each.nbytes for each in bucket) + weights.nbytes > self._bucket_bytes:
                bucket = last[owner, weights.dtype] = []
                found.append((owner, bucket))
            bucket.append(weights)
        return found


def divide_turn(sizes: Sequence[int], so_far: list[int]) -> list[int]:
    """The rank of the process to which each of some pieces goes: from the largest down, that with the least so far.

    Args:
        sizes: Elements of each piece.
        so_far: Elements of each process, to which these are added.
    """
    found = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        found[index] = so_far.index(min(so_far))
        so_far[found[index]] += sizes[index]
    return found


def _sum(parts: Tensor, device: torch.device) -> Tensor:
    total = parts.to(device)  # some backends know no other memory
    dist.all_reduce(total)
    return total.cpu()


def _numel(piece: Piece) -> int:
    return piece.rows_of(piece.parameter).numel()
