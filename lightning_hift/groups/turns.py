"""How long turns are and how large groups are, where the user leaves that to the length of the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lightning_hift.groups.grouping import BALANCED, GroupSize, LayerUnit, group_units

_STEPS_PER_GROUP = 4
_VISITS = 8  # of each layer in a run, for turns of several steps
_FEW_VISITS = 3  # for turns that count the units of a group
_UPDATES = 30  # of each layer, for groups that are no larger than the largest layer


class Turns(NamedTuple):
    """How layer units take turns.

    Args:
        group_size: See ``group_units``.
        steps_per_group: Optimizer steps of a turn.
        per_unit: Whether they count for each layer unit of a group.
    """

    group_size: GroupSize = BALANCED
    steps_per_group: int = _STEPS_PER_GROUP
    per_unit: bool = True


def choose_turns(
    units: Sequence[LayerUnit],
    total_steps: float,
    group_size: GroupSize | None = None,
    steps_per_group: int | None = None,
    most_numel: float = math.inf,
) -> Turns:
    """Turns with which each layer trains several times in a run, as far as its length allows.

    Long runs have four steps for each layer unit in a turn, which moves its state least often; shorter runs have fewer,
    down to one for each group. Where that would leave each layer less than 30 updates, groups are larger than the
    largest layer: a layer that trains in few steps needs large ones, whose noise does not average out. Found with
    SmolLM2-135M on ViGGO: after 67 steps, halves of the model were where sixths were after 100, or better.

    Args:
        units: Those that take turns.
        total_steps: Optimizer steps of the run; infinity if that is not known.
        group_size: As the user wants it; ``None``: to be chosen.
        steps_per_group: Likewise.
        most_numel: Parameters that a group may have if it is made larger than the largest layer.
    """
    size: GroupSize = BALANCED if group_size is None else group_size
    if group_size is None:
        size = _enlarged(units, total_steps / (steps_per_group or 1), most_numel) or BALANCED
    turns = len(units) if size == BALANCED else len(group_units(units, size))
    if steps_per_group is not None:
        return Turns(size, steps_per_group, per_unit=size == BALANCED)
    steps = int(max(1, min(_STEPS_PER_GROUP, total_steps / (_VISITS * turns))))
    return Turns(size, steps, per_unit=size == BALANCED and total_steps >= _FEW_VISITS * turns)


def _enlarged(units: Sequence[LayerUnit], turns: float, most_numel: float) -> int | None:
    """Units per group, in two groups at least, with which each gets enough of so many turns.

    ``None`` if balanced groups get them, too, or are as large as may be.
    """
    balanced = len(group_units(units, BALANCED))
    if turns >= _UPDATES * balanced:
        return None
    largest = None
    for size in range(2, math.ceil(len(units) / 2) + 1):
        groups = group_units(units, size)
        if len(groups) < balanced:
            if max(group.numel for group in groups) > most_numel:
                break
            largest = size
            if turns >= _UPDATES * len(groups):
                break
    return largest
