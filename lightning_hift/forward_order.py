"""In which order a module's forward pass uses its children, read from the code of ``forward``.

Registration order is a poor guide: OPT registers its final norm before its blocks, BART its embedding norm after them,
and a LightningModule may list its head first. The compiled code of ``forward`` names each child where it is first used,
for any architecture and without running anything.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

_ENTRY_POINTS = ("forward", "training_step")


def members_in_forward_order(module: nn.Module) -> list[tuple[str, nn.Module | nn.Parameter]]:
    """Children and own parameters of ``module`` as (name, member) pairs, in the order in which its code uses them.

    A member that the code never names keeps its place in front of the next registered one that is named. Containers
    such as ``nn.ModuleList`` keep their registration order.
    """
    members: dict[str, nn.Module | nn.Parameter] = {
        **{name: p for name, p in module.named_parameters(recurse=False, remove_duplicate=False)},
        **{name: child for name, child in module._modules.items() if child is not None},
    }
    rank: dict[str, int] = {}
    for name in _names_used(type(module)):
        if name in members:
            rank.setdefault(name, len(rank))

    place = float(len(rank))
    keyed: list[tuple[float, str]] = []
    for name in reversed(members):
        place = rank.get(name, place)
        keyed.append((place, name))
    keyed.reverse()
    return [(name, members[name]) for _, name in sorted(keyed, key=lambda pair: pair[0])]


def _names_used(cls: type) -> Iterator[str]:
    seen: set[int] = set()
    for entry in _ENTRY_POINTS:
        yield from _names_in_method(cls, entry, seen)


def _names_in_method(cls: type, name: str, seen: set[int]) -> Iterator[str]:
    """Attribute names in the order of their use, with the methods of ``cls`` unfolded where they are called."""
    for owner in cls.__mro__:
        function = inspect.unwrap(owner.__dict__[name]) if callable(owner.__dict__.get(name)) else None
        code = getattr(function, "__code__", None)
        if owner.__module__.startswith(("torch.nn.modules.module", "lightning.")) or code is None or id(code) in seen:
            continue
        seen.add(id(code))
        for used in _attributes(code):
            yield used
            # A second definition further down the MRO is reached through super().
            if used != name and inspect.isfunction(getattr(cls, used, None)):
                yield from _names_in_method(cls, used, seen)


def _attributes(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        argument: Any = instruction.argval
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            yield argument
        elif isinstance(argument, CodeType):  # a comprehension or an inner function
            yield from _attributes(argument)
