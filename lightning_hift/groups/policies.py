"""Relatives of HiFT as selection policies: BAdam and HFT here, and the names of all."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lightning_hift.groups.drawn_blocks import IST, LISA
from lightning_hift.groups.grouping import LayerGroup, LayerUnit
from lightning_hift.groups.schedule import Order, SweepSchedule, check_order
from lightning_hift.groups.selection import SelectionPolicy, StateHandling, check_count, check_state_handling


class BAdam(SelectionPolicy):
    """Block coordinate descent with any optimizer (BAdam, arXiv 2404.02827): many steps per block, each from new state.

    A sweep is one pass over all blocks. The paper does not hold the learning rate for one: pass ``hold_lr="off"``.

    Args:
        steps_per_block: Optimizer steps that a block trains before the next one takes over; K in the paper.
        order: ``"random"`` shuffles anew for each sweep; see ``SweepSchedule`` for the others.
        state_handling: ``"reset"`` starts each turn of a block with new optimizer state, as in the paper.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self, steps_per_block: int = 50, order: Order = "random", state_handling: StateHandling = "reset"
    ) -> None:
        check_count("steps_per_block", steps_per_block)
        check_order(order)
        check_state_handling(state_handling)
        self.steps_per_block = steps_per_block
        self.order: Order = order
        self.state_handling = state_handling

    @property
    def steps_per_sweep(self) -> int:
        """Optimizer steps in one pass over all blocks."""
        return self._schedule.steps_per_sweep

    def groups_at(self, step: int) -> tuple[int, ...]:
        """The only block that trains."""
        return self._schedule.groups_at(step)

    @property
    def _schedule(self) -> SweepSchedule:
        return SweepSchedule(
            max(1, len(self.groups)), self.order, self.order == "random", self.steps_per_block, self.seed
        )


class HFT(SelectionPolicy):
    """Half of the matrices of each layer unit, then the other half, then new halves (HFT, arXiv 2404.18466).

    A matrix counts with its bias; modules that hold vectors only, such as norms, are halved likewise, and where a
    number is odd the larger half comes first in every other unit. The paper draws once for a whole stage of training,
    within attention, MLP and norms separately, and leaves the other half as it was; here a sweep trains everything.
    Layer groups are single matrices, so it takes ``group_size=1``.

    Args:
        steps_per_half: Optimizer steps that one half trains; a sweep is both.
        state_handling: ``"keep"`` the optimizer state of the half that waits, or ``"reset"`` it.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, steps_per_half: int = 50, state_handling: StateHandling = "keep") -> None:
        check_count("steps_per_half", steps_per_half)
        check_state_handling(state_handling)
        self.steps_per_half = steps_per_half
        self.state_handling = state_handling

    @property
    def steps_per_sweep(self) -> int:
        """Optimizer steps of two halves."""
        return 2 * self.steps_per_half

    @property
    def most_groups(self) -> None:
        """About half of the groups."""
        return None

    def share_of(self, index: int) -> float:
        """See ``SelectionPolicy``."""
        return 0.5

    def split_unit(self, unit: LayerUnit) -> list[LayerUnit]:
        """One part for each module that holds parameters of its own."""
        parts: dict[str, LayerUnit] = {}
        for name, p in unit.parameters.items():
            owner = name.rpartition(".")[0] or name
            parts.setdefault(owner, LayerUnit(owner, unit.modules, {})).parameters[name] = p
        return list(parts.values())

    def bound_to(self, groups: Sequence[LayerGroup], seed: int = 0) -> HFT:
        """See ``SelectionPolicy``.

        Raises:
            ValueError: A group holds more than one matrix, or there is only one.
        """
        joined = next((group for group in groups if len(group.units) > 1), None)
        if joined is not None:
            raise ValueError(
                f"HFT trains halves of layer units, matrix by matrix, but group {joined.name} joins several. Use"
                " group_size=1."
            )
        if len(groups) < 2:
            raise ValueError(
                f"HFT needs at least 2 matrices to take turns, and got {len(groups)}. Name fewer units in"
                " always_active=[...]."
            )
        return super().bound_to(groups, seed)

    def groups_at(self, step: int) -> tuple[int, ...]:
        """The matrices of this half."""
        sweep, place = divmod(step, self.steps_per_sweep)
        return self._halves(sweep)[place // self.steps_per_half]

    def _halves(self, sweep: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        kinds: dict[tuple[tuple[str, ...], bool], list[int]] = {}
        for group in self.groups:
            is_matrix = any(p.ndim > 1 for p in group.parameters.values())
            kinds.setdefault((group.units[0].modules, is_matrix), []).append(group.index)
        draw = random.Random(f"{self.seed}/{sweep}")
        halves: tuple[list[int], list[int]] = ([], [])
        larger = draw.randrange(2)
        for members in draw.sample(list(kinds.values()), len(kinds)):
            draw.shuffle(members)
            cut = (len(members) + larger) // 2
            larger = (larger + len(members)) % 2
            halves[0].extend(members[:cut])
            halves[1].extend(members[cut:])
        return tuple(sorted(halves[0])), tuple(sorted(halves[1]))


POLICIES: dict[str, type[SelectionPolicy]] = {kind.__name__: kind for kind in (BAdam, LISA, HFT, IST)}
"""By the name that stands for them with their default arguments."""
