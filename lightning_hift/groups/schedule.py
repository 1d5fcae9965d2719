"""HiFT's own policy: one layer group at a time, in sweeps over all of them. Integers only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

from lightning_hift.groups.grouping import LayerGroup, LayerUnit
from lightning_hift.groups.selection import SelectionPolicy, StateHandling, check_state_handling
from lightning_hift.groups.unit_search import HEAD

Order = Literal["bottom2up", "top2down", "random"]

ORDERS: tuple[str, ...] = get_args(Order)
_AUTHORS_NAMES = {"down2up": "bottom2up", "up2down": "top2down"}


@dataclass(frozen=True)
class SweepSchedule(SelectionPolicy):
    """A pure function from the optimizer step to the active layer group (HiFT, arXiv 2401.15207, algorithm 1).

    One sweep visits every group once. Nothing is stored between steps, so a resumed run needs only its step number.

    Args:
        num_groups: Number of layer groups, k in the paper; ``bound_to`` sets it. Group 0 is the one nearest the input.
        order: ``"bottom2up"`` trains group 0 first, ``"top2down"`` group k-1 first, ``"random"`` a seeded shuffle.
        reshuffle: With ``order="random"``, draw a new shuffle for each sweep. The paper draws one and repeats it.
        steps_per_group: Optimizer steps that a group stays active before the next one takes over.
        seed: Seed of the shuffle; ``bound_to`` sets it. Ignored by the other orders.
        state_handling: ``"keep"`` the optimizer state of a group for its next turn, or ``"reset"`` it after each turn.
        per_unit: Let ``steps_per_group`` count for each layer unit of a group: groups of many units have longer turns.
        small_head: Let the head train at every step, unless the user names others, if it has at most an eighth of the
            parameters of the largest unit, as that of a classifier has, and nothing of it is used below the top.
        turns: Length of each group's turn, as a multiple of ``steps_per_group``; default: 1 each. ``bound_to`` sets it.

    Raises:
        ValueError: An argument is out of range, or ``reshuffle`` is asked for without ``order="random"``.
    """

    num_groups: int = 1
    order: Order = "bottom2up"
    reshuffle: bool = False
    steps_per_group: int = 1
    seed: int = 0
    state_handling: StateHandling = "keep"
    per_unit: bool = False
    small_head: bool = False
    turns: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_state_handling(self.state_handling)
        check_order(self.order, self.reshuffle)
        if self.num_groups < 1:
            raise ValueError(f"Got num_groups={self.num_groups}; a schedule needs at least 1 group.")
        if self.steps_per_group < 1:
            raise ValueError(
                f"Got steps_per_group={self.steps_per_group}; a group must stay active for at least 1 step."
            )
        if self.turns and (len(self.turns) != self.num_groups or min(self.turns) < 1):
            raise ValueError(f"Got turns={self.turns}; there must be {self.num_groups} of them, each at least 1.")

    @property
    def name(self) -> str:
        """The method's."""
        return "HiFT"

    @property
    def steps_per_sweep(self) -> int:
        """Optimizer steps in one sweep."""
        return (sum(self.turns) or self.num_groups) * self.steps_per_group

    def group_at(self, step: int) -> int:
        """Index of the group that trains at optimizer step ``step``, counted from 0.

        Raises:
            ValueError: ``step`` is negative.
        """
        if step < 0:
            raise ValueError(f"Got step={step}; optimizer steps are counted from 0.")
        place = step % self.steps_per_sweep // self.steps_per_group
        shuffle = self.sweep_at(step) if self.reshuffle else 0
        return _in_order(self.num_groups, self.turns, self.order, self.seed, shuffle)[place]

    def groups_at(self, step: int) -> tuple[int, ...]:
        """``group_at``, as all policies have it."""
        return (self.group_at(step),)

    def choose_always_active(self, units: Sequence[LayerUnit]) -> list[LayerUnit]:
        """See ``SelectionPolicy``."""
        most = max((unit.numel for unit in units), default=0) / 8 if self.small_head else 0
        top = [unit for unit in units[-1:] if unit.name == HEAD and not unit.may_reach_down]
        return [unit for unit in top if unit.numel <= most]

    def share_of(self, index: int) -> float:
        """See ``SelectionPolicy``."""
        return (self.turns[index] if self.turns else 1) * self.steps_per_group / self.steps_per_sweep

    def bound_to(self, groups: Sequence[LayerGroup], seed: int = 0) -> SweepSchedule:
        """The same schedule over ``groups``."""
        turns = tuple(len(group.units) for group in groups) if self.per_unit else self.turns
        return replace(self, num_groups=len(groups), seed=seed, turns=turns)

    def fingerprint(self) -> dict[str, Any]:
        """All arguments that matter."""
        return {
            "order": self.order,
            "reshuffle": self.reshuffle,
            "steps_per_group": self.steps_per_group,
            "seed": self.seed if self.order == "random" else None,
            **({} if self.state_handling == "keep" else {"state_handling": self.state_handling}),
            **({"turns": list(self.turns)} if len(set(self.turns)) > 1 else {}),
        }

    def describe(self, num_groups: int) -> str:
        """Order and steps."""
        ends = "" if self.state_handling == "keep" else ", state reset after each turn"
        steps = f"{self.steps_per_group} step{'s' if self.steps_per_group > 1 else ''}"
        each = "for each unit" if self.per_unit else "each"
        return f"{self.name}: {self.order} over {num_groups} layer groups, {steps} {each}{ends}"


def check_order(order: str, reshuffle: bool = False) -> None:
    """Refuse an order that does not exist, before anything has been built.

    Raises:
        ValueError: ``order`` is unknown, or ``reshuffle`` is combined with a fixed order.
    """
    if order in _AUTHORS_NAMES:
        raise ValueError(
            f"Got order={order!r}, the name in the HiFT authors' code. The paper's name, used here, is"
            f" {_AUTHORS_NAMES[order]!r}; choose one of {', '.join(map(repr, ORDERS))}."
        )
    if order not in ORDERS:
        raise ValueError(f"Got order={order!r}; choose one of {', '.join(map(repr, ORDERS))}.")
    if reshuffle and order != "random":
        raise ValueError(f"Got reshuffle=True with order={order!r}; only order='random' can be shuffled again.")


@lru_cache(maxsize=8)
def _in_order(num_groups: int, turns: tuple[int, ...], order: Order, seed: int, shuffle: int) -> tuple[int, ...]:
    """The groups of a sweep, each as often as its turn is long."""
    groups = list(range(num_groups))
    if order == "top2down":
        groups.reverse()
    elif order == "random":
        # A string seed is hashed with SHA-512, so neighbouring sweeps get unrelated shuffles on every platform.
        random.Random(f"{seed}/{shuffle}").shuffle(groups)
    return tuple(group for group in groups for _ in range(turns[group] if turns else 1))
