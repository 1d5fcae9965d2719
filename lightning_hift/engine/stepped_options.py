"""Counters that an optimizer keeps in its ``param_groups``: each layer group gets its own.

Some optimizers count steps, or sum up what they have seen, for a whole entry of ``param_groups`` instead of for each
parameter. Under HiFT each layer group must find such a value as its own last step has left it, as if it had an
optimizer to itself. Which values those are shows when ``step`` changes them.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

_Place = tuple[int, str]  # which of param_groups, and which key of it
_MISSING = object()


class _NotedTensor(NamedTuple):
    tensor: Tensor
    version: int
    copied: Tensor


class SteppedOptions:
    """Swaps what ``step`` changes in ``optimizer.param_groups`` together with the group that is stepped.

    A value that something else changes between two steps (a scheduler that sets a learning rate which the optimizer
    adapts, too) counts for all groups from then on.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._first: dict[_Place, Any] = {}  # before the first step of any group
        self._left: dict[_Place, Any] = {}  # as the last step has left it
        self._own: dict[Hashable, dict[_Place, Any]] = {}
        self._before: dict[_Place, Any] = {}

    def enter(self, owner: Hashable) -> None:
        """Before a step of ``owner``: give it its own values."""
        for place in self._first:
            now = self._read(place)
            if not _same(now, self._left[place]):
                self._first[place] = _copied(now)
                for values in self._own.values():
                    values.pop(place, None)
            self._write(place, _copied(self._own.get(owner, {}).get(place, self._first[place])))
        self._before = {place: _noted(self._read(place)) for place in self._places()}

    def leave(self, owner: Hashable, keep: bool = True) -> None:
        """After a step of ``owner``: note what has changed. Without ``keep``, its next step finds the same as this."""
        for place in self._places() | self._before.keys():
            before, now = self._before.get(place, _MISSING), self._read(place)
            if place not in self._first and not _unchanged(before, now):
                self._first[place] = before.copied if isinstance(before, _NotedTensor) else before
        for place in self._first:
            self._left[place] = self._read(place)
            if keep:
                self._own.setdefault(owner, {})[place] = self._left[place]

    def forget(self, owner: Hashable) -> None:
        """The next step of ``owner`` finds what the first step of any group has found."""
        self._own.pop(owner, None)

    def state_dict(self) -> list[Any]:
        """Entries (index in ``param_groups``, key, [first value], {owner: [value]}, [value of the last step]).

        No value is an empty list.
        """
        owned = {place: {o: _listed(v[place]) for o, v in self._own.items() if place in v} for place in self._first}
        return [[*place, _listed(f), owned[place], _listed(self._left[place])] for place, f in self._first.items()]

    def load_state_dict(self, state: list[Any]) -> None:
        """Take over a ``state_dict``, once ``param_groups`` are loaded; what was changed in these counts for all."""
        self._first, self._own, self._left = {}, {}, {}
        for index, key, first, own, *left in state:
            place = (index, key)
            self._first[place] = first[0] if first else _MISSING
            now = self._read(place)
            was = now if not left else left[0][0] if left[0] else _MISSING
            if isinstance(now, Tensor) and isinstance(was, Tensor) and torch.equal(now.cpu(), was.cpu()):
                was = now
            self._left[place] = was
            for owner, value in own.items():
                self._own.setdefault(owner, {})[place] = value[0] if value else _MISSING

    def _places(self) -> set[_Place]:
        groups = self._optimizer.param_groups
        return {(index, key) for index, group in enumerate(groups) for key in group if key != "params"}

    def _read(self, place: _Place) -> Any:
        index, key = place
        return self._optimizer.param_groups[index].get(key, _MISSING)

    def _write(self, place: _Place, value: Any) -> None:
        index, key = place
        if value is _MISSING:
            self._optimizer.param_groups[index].pop(key, None)
        else:
            self._optimizer.param_groups[index][key] = value


def _noted(value: Any) -> Any:
    """What is needed to tell later whether ``value`` was changed, without waiting for a device."""
    return _NotedTensor(value, value._version, value.clone()) if isinstance(value, Tensor) else _copied(value)


def _unchanged(noted: Any, now: Any) -> bool:
    if isinstance(noted, _NotedTensor):
        return noted.tensor is now and noted.version == now._version
    return _same(noted, now)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    try:
        return bool(a == b)
    except Exception:  # whatever a foreign value makes of a comparison
        return False


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return copy.deepcopy(value) if isinstance(value, (list, dict, set)) else value


def _listed(value: Any) -> list[Any]:
    return [] if value is _MISSING else [value]
