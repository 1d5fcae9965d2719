"""Which layer groups train at which optimizer step: the interface of all policies, HiFT's sweep among them."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor

from lightning_hift.groups.grouping import LayerGroup, LayerUnit

_MANY_STEPS = 10_000  # with so many, every group has its turn
StateHandling = Literal["keep", "reset"]
_Policy = TypeVar("_Policy", bound="SelectionPolicy")


class SelectionPolicy(ABC):
    """Decides which layer groups train at which optimizer step. The engine takes care of everything else.

    A policy that is handed to a callback or an engine is a pattern: each optimizer trains by a copy of its own, made by
    ``bound_to``. In it ``groups`` are the layer groups that take turns, and ``seed`` is that of the run. What it draws
    should follow from the seed and the step alone; what it learns belongs into ``state_dict``.
    """

    state_handling: StateHandling = "keep"
    """``"keep"``: optimizer state waits for the group's next turn. ``"reset"``: it is dropped when the group stops
    training, as if each turn had a new optimizer. Master weights are kept in any case."""
    always_active: Sequence[str] = ()
    """Names of units that train at every step unless the user names others; those that a network lacks are ignored."""
    groups: Sequence[LayerGroup] = ()
    seed: int = 0

    @property
    @abstractmethod
    def steps_per_sweep(self) -> int:
        """Optimizer steps for which a held learning rate stays the same, at least 1."""

    @abstractmethod
    def groups_at(self, step: int) -> tuple[int, ...]:
        """Indices of the groups that train at optimizer step ``step``, counted from 0; one or several, ascending.

        It is asked for steps in their order, and again for the last one.
        """

    @property
    def name(self) -> str:
        """For reports."""
        return type(self).__name__

    @property
    def most_groups(self) -> int | None:
        """How many groups train at once, at most; ``None``: it depends."""
        return 1

    def share_of(self, index: int) -> float:
        """The share of the optimizer steps in which group ``index`` trains, on average: above 0, and at most 1."""
        return min(1.0, (self.most_groups or len(self.groups)) / len(self.groups))

    @property
    def learns(self) -> bool:
        """Whether it makes anything of the losses that it is shown."""
        return type(self).observe is not SelectionPolicy.observe

    def left_out(self, num_steps: float, num_groups: int) -> list[int]:
        """Groups that do not train in a run of so many optimizer steps, as far as that can be told beforehand."""
        if self.learns or not 0 < num_steps < _MANY_STEPS:
            return []
        missing = set(range(num_groups))
        for step in range(math.ceil(num_steps)):
            if not missing:
                break
            missing -= set(self.groups_at(step))
        return sorted(missing)

    def sweep_at(self, step: int) -> int:
        """Number of whole sweeps that were finished before ``step``."""
        return step // self.steps_per_sweep

    def starts_sweep(self, step: int) -> bool:
        """Whether ``step`` is the first one of a sweep."""
        return step % self.steps_per_sweep == 0

    def choose_always_active(self, units: Sequence[LayerUnit]) -> list[LayerUnit]:
        """Which of the units of an optimizer train at every step, unless the user names some; see ``always_active``."""
        return [unit for unit in units if unit.name in self.always_active]

    def split_unit(self, unit: LayerUnit) -> list[LayerUnit]:
        """Parts of a layer unit that train on their own: together they hold its parameters, each once."""
        return [unit]

    def bound_to(self: _Policy, groups: Sequence[LayerGroup], seed: int = 0) -> _Policy:
        """A new policy for the groups of one optimizer, which shares nothing with this one.

        Raises:
            ValueError: The policy cannot train such groups.
        """
        bound = copy.deepcopy(self)
        bound.groups, bound.seed = tuple(groups), seed
        return bound

    def observe(self, step: int, loss: Tensor) -> None:  # noqa: B027
        """Learn from a loss, shape (), of step ``step``, on its device: reading its value now would wait for that."""

    def state_dict(self) -> dict[str, Any]:
        """What the policy has learned, in plain values; saved with the optimizer."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take over a ``state_dict``."""

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same in a run that resumes; default: the class, the seed and all public plain attributes."""
        plain = {k: v for k, v in vars(self).items() if k[0] != "_" and isinstance(v, (bool, int, float, str))}
        return {"policy": type(self).__name__, "state_handling": self.state_handling, "seed": self.seed, **plain}

    def describe(self, num_groups: int) -> str:
        """One line for the summary of a run with so many groups."""
        shown = {k: v for k, v in self.fingerprint().items() if k not in ("policy", "seed")}
        details = ", ".join(f"{name}={value}" for name, value in shown.items())
        return f"{self.name} over {num_groups} layer groups: {details}"


def check_state_handling(state_handling: str) -> None:
    """Refuse what is neither kept nor reset.

    Raises:
        ValueError: ``state_handling`` is unknown.
    """
    if state_handling not in get_args(StateHandling):
        raise ValueError(
            f"Got state_handling={state_handling!r}; choose one of {', '.join(map(repr, get_args(StateHandling)))}."
        )


def check_count(name: str, value: int) -> None:
    """Refuse what is no number of steps or groups.

    Raises:
        ValueError: ``value`` is no whole number, or below 1.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"Got {name}={value!r}; it must be a whole number of at least 1.")
