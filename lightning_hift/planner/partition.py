"""Which process keeps what of the optimizer state where they divide it (``partition_state``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from lightning_hift.engine.row_slices import cut_into_turns
from lightning_hift.engine.state_partition import divide_turn
from lightning_hift.planner.memory import GroupBytes


@dataclass(frozen=True)
class Division:
    """How the elements of one layer group are divided.

    Args:
        numel: By process, in the order of their ranks.
        at_once: The most that each steps in one turn: all its own, unless the group is stepped in slices.
    """

    numel: tuple[int, ...]
    at_once: tuple[int, ...]

    def part_of(self, whole: GroupBytes, rank: int) -> GroupBytes:
        """What one process keeps of the state and the masters of a group. The gradients are there as a whole."""
        numel, total = self.numel[rank], sum(self.numel) or 1
        return replace(
            whole,
            numel=numel,
            state=-(-whole.state * numel // total),
            masters=-(-whole.masters * numel // total),
            sliced=self.at_once[rank] / numel if numel else 1.0,
        )


def divide(
    groups: Sequence[Sequence[nn.Parameter]], processes: int, max_group_numel: int | None = None
) -> list[Division]:
    """Tensors, or slices of them, go one by one to the process that has the least so far, the largest of a turn first.

    Args:
        groups: Parameters of each layer group, in the order of the groups.
        processes: Among how many.
        max_group_numel: Elements above which a group is stepped in slices.
    """
    so_far = [0] * processes
    found = []
    for parameters in groups:
        own, at_once = [0] * processes, [0] * processes
        for turn in cut_into_turns(parameters, max_group_numel):
            in_turn = [0] * processes
            sizes = [piece.rows_of(piece.parameter).numel() for piece in turn]
            for numel, rank in zip(sizes, divide_turn(sizes, so_far), strict=True):
                in_turn[rank] += numel
            own = [a + b for a, b in zip(own, in_turn, strict=True)]
            at_once = [max(a, b) for a, b in zip(at_once, in_turn, strict=True)]
        found.append(Division(tuple(own), tuple(at_once)))
    return found
