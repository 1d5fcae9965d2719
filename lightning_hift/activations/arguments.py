"""Arguments of a call that is made twice: a checkpoint keeps their tensors, and hands them over as other objects.

Then what was one tensor has to be one again, as modules ask for it: attention takes another path where query, key and
value are the same. And arguments in keywords and containers have to be kept like those that stand alone, so that a
change in place is noticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lightning_hift.activations.saved_bytes import tensors_in


class _Place(NamedTuple):
    """Where a tensor was, by its number among all."""

    number: int


class Arguments:
    """Positional and keyword arguments, without their tensors.

    Args:
        args: In nested tuples, lists and dicts. What other containers hold stays where it is.
        kwargs: Likewise.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tensors: list[Tensor] = []
        self._places: dict[int, _Place] = {}
        self._containers: dict[int, Any] = {}
        self._fixed: set[int] = set()  # tensors that other containers hold, by their identity
        self._note_fixed((args, kwargs))
        self._template = self._emptied((args, kwargs))
        self._original: tuple[tuple[Any, ...], dict[str, Any]] | None = (args, kwargs)
        del self._places, self._containers, self._fixed

    def take_tensors(self) -> list[Tensor]:
        """Each of them once. They are not held here any longer."""
        tensors, self._tensors = self._tensors, []
        return tensors

    def filled(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments: the first time as they were given, later with these tensors in the place of theirs."""
        original, self._original = self._original, None
        if original is not None:
            return original
        args, kwargs = _filled(self._template, tensors, {})
        return args, kwargs

    def _note_fixed(self, value: Any) -> None:
        if _can_be_rebuilt(value):
            for item in _items(value):
                self._note_fixed(item)
        elif not isinstance(value, Tensor):
            self._fixed |= {id(tensor) for tensor in tensors_in(value)}

    def _emptied(self, value: Any) -> Any:
        if isinstance(value, Tensor) and id(value) not in self._fixed:
            if id(value) not in self._places:
                self._places[id(value)] = _Place(len(self._tensors))
                self._tensors.append(value)
            return self._places[id(value)]
        if not _can_be_rebuilt(value):
            return value
        if id(value) not in self._containers:
            self._containers[id(value)] = _rebuilt(value, [self._emptied(item) for item in _items(value)])
        return self._containers[id(value)]


def _filled(value: Any, tensors: Sequence[Tensor], containers: dict[int, Any]) -> Any:
    if isinstance(value, _Place):
        return tensors[value.number]
    if not _can_be_rebuilt(value):
        return value
    if id(value) not in containers:
        containers[id(value)] = _rebuilt(value, [_filled(item, tensors, containers) for item in _items(value)])
    return containers[id(value)]


def _can_be_rebuilt(value: Any) -> bool:
    return type(value) in (tuple, list, dict) or (isinstance(value, tuple) and hasattr(value, "_fields"))


def _items(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else list(value)


def _rebuilt(value: Any, items: list[Any]) -> Any:
    if isinstance(value, dict):
        return dict(zip(value, items, strict=True))
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
