"""Optimizer state as a flat list of tensors, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

State = dict[Any, Any]


class FlatState(NamedTuple):
    """The state of one parameter.

    Args:
        tensors: Plain tensors, those inside dicts, lists, tuples, tensor subclasses (quantized state) and attributes of
            other objects (projections) included.
        labels: For each tensor, the key of ``state`` under which it was found, and a number among those of that key.
        rebuild: Makes a state of the same structure from as many tensors, which may be elsewhere.
    """

    tensors: list[Tensor]
    labels: list[tuple[Any, int]]
    rebuild: Callable[[list[Tensor]], State]


def flatten_state(state: Mapping[Any, Any]) -> FlatState:
    """Take ``state`` apart; values that are no tensors stay in ``rebuild``."""
    tensors: list[Tensor] = []
    labels: list[tuple[Any, int]] = []
    builders = {}
    for key, value in state.items():
        builders[key] = _take_apart(value, tensors)
        labels += [(key, i) for i in range(len(tensors) - len(labels))]

    def rebuild(replacements: list[Tensor]) -> State:
        left = iter(replacements)
        return {key: build(left) for key, build in builders.items()}

    return FlatState(tensors, labels, rebuild)


def count_bytes(value: Any) -> int:
    """Bytes of all tensors in ``value``."""
    tensors: list[Tensor] = []
    _take_apart(value, tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _take_apart(value: Any, tensors: list[Tensor]) -> Callable[[Iterator[Tensor]], Any]:
    """Append the tensors of ``value`` to ``tensors``; the result builds it anew from those to come."""
    if isinstance(value, Tensor):
        if not is_traceable_wrapper_subclass(value):
            tensors.append(value.detach() if value.requires_grad else value)
            return next
        names, context = value.__tensor_flatten__()
        inner = {name: _take_apart(getattr(value, name), tensors) for name in names}
        kind, size, stride = type(value), value.shape, value.stride()
        return lambda left: kind.__tensor_unflatten__(
            {name: build(left) for name, build in inner.items()}, context, size, stride
        )
    if isinstance(value, dict):
        entries = {key: _take_apart(entry, tensors) for key, entry in value.items()}
        return lambda left: {key: build(left) for key, build in entries.items()}
    if isinstance(value, (list, tuple)):
        items = [_take_apart(item, tensors) for item in value]
        cls: Any = type(value)
        if hasattr(value, "_fields"):
            return lambda left: cls(*[build(left) for build in items])
        return lambda left: cls([build(left) for build in items])
    return _take_object_apart(value, tensors)


def _take_object_apart(value: Any, tensors: list[Tensor]) -> Callable[[Iterator[Tensor]], Any]:
    """As ``_take_apart``, for any object; the result builds a shallow copy of it, if it holds tensors at all."""
    before = len(tensors)
    found = {} if isinstance(value, type) else getattr(value, "__dict__", {})
    attributes = {
        name: _take_apart(attribute, tensors)
        for name, attribute in found.items()
        if isinstance(attribute, (Tensor, dict, list, tuple))
    }
    if len(tensors) == before:
        return lambda left: value

    def build_copy(left: Iterator[Tensor]) -> Any:
        twin = copy.copy(value)
        vars(twin).update({name: build(left) for name, build in attributes.items()})
        return twin

    return build_copy
