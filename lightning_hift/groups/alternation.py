"""Lists of layers that a forward pass uses in turns: ``for layer, norm in zip(self.layers, self.norms)``.

The i-th members of such lists belong together. What a loop uses again in each pass has its place in the first one: with
what is first in the lists, or behind it where it is a layer of its own.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations, groupby
from typing import NamedTuple

from torch import nn

from lightning_hift.groups.forward_order import Member, matching, members_in_forward_order, own_members, uses_of
from lightning_hift.groups.source_uses import Use

_INDEXED = (nn.ModuleList, nn.Sequential, nn.ParameterList)
_LISTS = (*_INDEXED, nn.ModuleDict, nn.ParameterDict)
_Holders = tuple[str, ...]  # the path of a list, or those of attributes with numbers
_Named = list[tuple[str, Member]]


class Step(NamedTuple):
    """Members by their paths, and whether they are what one turn of a loop uses of the lists that it goes through."""

    members: list[tuple[str, Member]]
    is_turn: bool


def steps_in_forward_order(module: nn.Module) -> list[Step]:
    """Members of ``module`` as ``members_in_forward_order`` has them, each alone, or with those used in the same turn.

    Members of lists that alternate are there by themselves, by their paths from ``module``: ``layers.0`` with
    ``norms.0``. Lists may be ``nn.ModuleList``, ``nn.Sequential``, ``nn.ParameterList``, dictionaries, and attributes
    with numbers in their names. Of lists of different lengths, the shorter one is spread evenly over the longest.
    """
    members = dict(members_in_forward_order(module))
    turns: dict[str, list[Step]] = {}
    for together in _alternating(module):
        holders = [holder for series in together for holder in series]
        while (outer := next((p for p in members if any(h.startswith(f"{p}.") for h in holders)), None)) is not None:
            inside = {f"{outer}.{name}": member for name, member in own_members(members[outer]).items()}
            before, after = _split(members, outer)
            members = {**before, **inside, **after}
        if not all(holder in members for holder in holders):
            continue  # a list in a list of an earlier loop
        turns.update({holder: [] for holder in holders})
        lists = [series for series in together.values() if not _is_layer(series)]
        first, *rest = [Step(turn, True) for turn in _turns(lists)]
        layers = [Step(series, False) for series in together.values() if _is_layer(series)]
        turns[next(path for path in members if path in holders)] = [first, *layers, *rest]
    return [step for path, member in members.items() for step in turns.get(path, [Step([(path, member)], False)])]


def _is_layer(series: _Named) -> bool:
    """Whether it is a single layer with a matrix, which is large enough to be a unit."""
    ((_, member), *others) = series
    return not others and any(
        p.ndim > 1 for p in ([member] if isinstance(member, nn.Parameter) else member.parameters())
    )


def _turns(lists: Collection[_Named]) -> list[_Named]:
    """The i-th members of all lists, a shorter one spread evenly over the longest."""
    longest = max(map(len, lists))
    turns: list[_Named] = [[] for _ in range(longest)]
    for series in lists:
        for i, named in enumerate(series):
            turns[i * longest // len(series)].append(named)
    return turns


def _split(members: dict[str, Member], path: str) -> tuple[dict[str, Member], dict[str, Member]]:
    """Members before and after one of them."""
    place = list(members).index(path)
    pairs = list(members.items())
    return dict(pairs[:place]), dict(pairs[place + 1 :])


def _alternating(module: nn.Module) -> list[dict[_Holders, _Named]]:
    """Series that the code of ``module`` uses in turns: those that belong together, in order of use."""
    known: dict[_Holders, _Named] = {}
    carried: set[_Holders] = set()
    used: list[_Holders] = []
    for use in uses_of(module):
        if use.repeated or not use.passing:
            holders, series = _series(module, use)
            if any(isinstance(m, nn.Parameter) or any(True for _ in m.parameters()) for _, m in series):
                known[holders] = series
                used.append(holders)
                carried |= {holders} if use.carried else set()
    clusters: list[set[_Holders]] = []
    for a, b in combinations(known, 2):
        turns = [holders for holders, _ in groupby(holders for holders in used if holders in (a, b))]
        shorter, longer = sorted((a, b), key=lambda holders: len(known[holders]))
        is_even = len(known[longer]) - len(known[shorter]) <= 1 or shorter in carried
        if len(turns) > 3 and is_even and len(known[longer]) > 1 and not _nested(a, b):
            joined = [cluster for cluster in clusters if a in cluster or b in cluster]
            clusters = [cluster for cluster in clusters if cluster not in joined]
            clusters.append({a, b}.union(*joined))
    return [{holders: series for holders, series in known.items() if holders in cluster} for cluster in clusters]


def _nested(a: _Holders, b: _Holders) -> bool:
    return any(f"{x}.".startswith(f"{y}.") or f"{y}.".startswith(f"{x}.") for x in a for y in b)


def _series(module: nn.Module, use: Use) -> tuple[_Holders, _Named]:
    """What a use goes through, one after the other; one that is no list counts where the next pass begins with it."""
    if "*" in use.path[0]:
        members = own_members(module)
        names = matching(use.path[0], members)
        return tuple(names), [(name, members[name]) for name in names]
    chain: list[Member] = [module]
    for name in use.path:
        inner = own_members(chain[-1])
        if name not in inner:
            break
        chain.append(inner[name])
    path = use.path[: len(chain) - 1]
    if not path:
        return (), []
    depth = next((i for i in range(len(path) - 1, 0, -1) if isinstance(chain[i], _INDEXED)), 0)  # layers of layers[0]
    is_list = isinstance(chain[-1], _LISTS) and not use.called
    if is_list and not (depth and isinstance(chain[-1], nn.Sequential)):
        depth = len(path)
    holder = ".".join(path[: depth or len(path)])
    if depth:
        return (holder,), [(f"{holder}.{name}", member) for name, member in own_members(chain[depth]).items()]
    return (holder,), [(holder, chain[-1])] if use.carried else []
