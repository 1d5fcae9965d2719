"""In which order a module's forward pass uses its children, read from the source of ``forward``.

Registration order is a poor guide: OPT registers its final norm before its blocks, BART its embedding norm after them,
and a LightningModule may list its head first. The source of ``forward`` shows where each child is first used, for any
architecture and without running anything. Code without source (typed at a prompt, compiled) keeps registration order.
"""

from __future__ import annotations

import re
import warnings
from fnmatch import fnmatchcase
from functools import cache

from torch import nn

from lightning_hift.groups.source_uses import Use, read_uses

Member = nn.Module | nn.Parameter


def members_in_forward_order(module: nn.Module) -> list[tuple[str, Member]]:
    """Children and own parameters of ``module`` as (name, member) pairs, in the order in which its code uses them.

    A member that the code never names keeps its place in front of the next registered one that is named. Containers
    such as ``nn.ModuleList`` keep their registration order, and so does a module whose code cannot be read, with a
    warning where the order matters.
    """
    members = own_members(module)
    uses = uses_of(module)
    rank: dict[str, tuple[int, int]] = {}
    for passing in (False, True):
        for i, use in enumerate(uses):
            if use.passing == passing:
                for number, name in enumerate(matching(use.path[0], members)):
                    rank.setdefault(name, (i, number))

    place = (len(uses), 0)
    keyed: list[tuple[tuple[int, int], str]] = []
    for name in reversed(members):
        place = rank.get(name, place)
        keyed.append((place, name))
    keyed.reverse()
    return [(name, members[name]) for _, name in sorted(keyed, key=lambda pair: pair[0])]


def own_members(module: Member) -> dict[str, Member]:
    """Parameters of its own and children by name, as registered; nothing of a parameter."""
    if isinstance(module, nn.Parameter):
        return {}
    return {
        **dict(module.named_parameters(recurse=False, remove_duplicate=False)),
        **{name: child for name, child in module._modules.items() if child is not None},
    }


def matching(pattern: str, members: dict[str, Member]) -> list[str]:
    """Names that a use may mean: ``"layer*"`` for ``getattr(self, f"layer{i}")``, sorted by their numbers."""
    if "*" not in pattern:
        return [pattern] if pattern in members else []
    return sorted((name for name in members if fnmatchcase(name, pattern)), key=_numbers)


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def uses_of(module: nn.Module) -> tuple[Use, ...]:
    """What the code of ``module`` uses, in order; nothing, with a warning if that may matter, if it cannot be read."""
    cls: type = type(module)
    uses, problem = _read(cls)
    members = [child for child in module.children() if any(True for _ in child.parameters())]
    if problem and len(members) > 1:
        warnings.warn(
            f"The source of {cls.__name__}.{problem}. The order of its layers is taken to be that in which"
            f" they were registered ({', '.join(list(module._modules)[:4])}, ...); if that is not the order in which"
            " they are used, name them in units=[...].",
            stacklevel=1,  # the same place for all callers: Python shows it once
        )
    return uses


@cache
def _read(cls: type) -> tuple[tuple[Use, ...], str]:
    try:
        return read_uses(cls)
    except Exception as error:  # code in a form that nobody has thought of is no reason not to train
        return (), f"forward cannot be understood ({type(error).__name__}: {error})"
