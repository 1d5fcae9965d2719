"""Layer units -> layer groups: a checked partition of the trainable parameters.

A *layer unit* is never split: the embedding, one block, the head. ``unit_search`` finds them in the module tree. A unit
that would hold nothing but norms joins its neighbour: training one norm for a whole step is a wasted batch. Parameters
count by identity, so a tied weight belongs to the first unit that uses it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, cast

from torch import nn

from lightning_hift.groups.unit_search import has_parameters, join_path, search_units

BALANCED: Literal["balanced"] = "balanced"
GroupSize = int | Literal["balanced"]


@dataclass(frozen=True, eq=False)
class LayerUnit:
    """The smallest thing that HiFT trains at once.

    Args:
        name: ``"embedding"``, ``"head"`` or the path of the unit's first module.
        modules: Paths of the modules and bare parameters that make up the unit, in forward order.
        parameters: Trainable parameters by their full name.
        place: How many units are below it, nearer to the input.
    """

    name: str
    modules: tuple[str, ...]
    parameters: dict[str, nn.Parameter]
    place: int = 0

    @property
    def numel(self) -> int:
        """Number of trainable elements."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the trainable parameters."""
        return sum(p.numel() * p.element_size() for p in self.parameters.values())

    @property
    def may_reach_down(self) -> bool:
        """Whether it has norms of a list, which a loop that is not to be seen may use between the blocks."""
        listed = [path + "." for path in self.modules if path.rpartition(".")[2].isdigit()]
        parts = [[p for name, p in self.parameters.items() if name.startswith(path)] for path in listed]
        return sum(bool(part) and all(p.ndim < 2 for p in part) for part in parts) > 1


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """Units that train together. ``index`` counts from the input of the model upwards."""

    index: int
    units: tuple[LayerUnit, ...]

    @property
    def name(self) -> str:
        """Names of the first and the last unit."""
        first, last = self.units[0].name, self.units[-1].name
        return first if first == last else f"{first} ... {last}"

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters of all units by their full name."""
        return {name: p for unit in self.units for name, p in unit.parameters.items()}

    @property
    def numel(self) -> int:
        """Number of trainable elements."""
        return sum(unit.numel for unit in self.units)

    @property
    def nbytes(self) -> int:
        """Bytes of the trainable parameters."""
        return sum(unit.nbytes for unit in self.units)


def find_layer_units(
    model: nn.Module,
    units: Sequence[str | Sequence[str]] | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> list[LayerUnit]:
    """Layer units of ``model`` in forward order, covering every trainable parameter exactly once.

    Args:
        model: Any module tree. Frozen parameters (``requires_grad=False``) belong to no unit.
        units: Overrides the search. Each entry is a pattern of module paths, or a list of patterns that form one unit
            together. ``*`` matches within one part of a path: ``"model.layers.*"``.
        parameters: Restricts the search to these parameters (an optimizer's, say). Default: all of ``model``.

    Raises:
        ValueError: Nothing is trainable; a pattern matches nothing, or something that another one already matched; or
            the patterns leave trainable parameters out.
    """
    wanted = {id(p) for p in (model.parameters() if parameters is None else parameters) if p.requires_grad}
    if not any(id(p) in wanted for p in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter. Set requires_grad=True on what should train."
        )
    found = _units_from_patterns(model, units, wanted) if units is not None else _units_from_tree(model, wanted)
    _check_partition(model, found, wanted)
    return [replace(unit, place=i) for i, unit in enumerate(found)]


def group_units(units: Sequence[LayerUnit], group_size: GroupSize = 1) -> list[LayerGroup]:
    """Join neighbouring units into fixed groups.

    Args:
        units: From the input to the output.
        group_size: Units per group (m in the paper), for ceil(n / m) groups; or ``"balanced"``, as many as together
            have no more parameters than the largest unit, which needs no more memory than groups of 1.

    Raises:
        ValueError: ``group_size`` is something else.
    """
    check_group_size(group_size)
    limit = max((unit.numel for unit in units), default=0)
    parts: list[list[LayerUnit]] = []
    for unit in units:
        if group_size == BALANCED:
            is_full = not parts or sum(u.numel for u in parts[-1]) + unit.numel > limit
        else:
            is_full = not parts or len(parts[-1]) == group_size
        if is_full:
            parts.append([])
        parts[-1].append(unit)
    return [LayerGroup(i, tuple(part)) for i, part in enumerate(parts)]


def check_group_size(group_size: object) -> None:
    """Refuse what ``group_units`` cannot make groups of.

    Raises:
        ValueError: ``group_size`` is neither a whole number of at least 1 nor ``"balanced"``.
    """
    is_number = isinstance(group_size, int) and not isinstance(group_size, bool)
    if group_size != BALANCED and not (is_number and cast(int, group_size) >= 1):
        raise ValueError(f"Got group_size={group_size!r}; it must be a whole number of at least 1, or {BALANCED!r}.")


def select_units(units: Sequence[LayerUnit], patterns: Sequence[str]) -> list[LayerUnit]:
    """Units whose name, or one of whose modules, matches a pattern.

    Raises:
        ValueError: A pattern matches no unit, or a unit that another pattern already matched.
    """
    chosen: dict[int, str] = {}
    for pattern in patterns:
        hits = [i for i, u in enumerate(units) if any(_matches(path, pattern) for path in (u.name, *u.modules))]
        if not hits:
            raise ValueError(
                f"Pattern {pattern!r} matches no layer unit; the units are {', '.join(u.name for u in units)}."
            )
        for hit in hits:
            if hit in chosen:
                raise ValueError(
                    f"Layer unit {units[hit].name!r} is matched twice, by {chosen[hit]!r} and {pattern!r}; drop one."
                )
            chosen[hit] = pattern
    return [units[i] for i in sorted(chosen)]


def select_parameters(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """Trainable parameters of the modules, or with the names, that match a pattern.

    Raises:
        ValueError: A pattern matches no trainable parameter, or one that another pattern already matched.
    """
    chosen: dict[str, nn.Parameter] = {}
    by_pattern: dict[str, str] = {}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for pattern in patterns:
        depth = pattern.count(".") + 1
        hits = [n for n in trainable if _matches(".".join(n.split(".")[:depth]), pattern)]
        if not hits:
            raise ValueError(f"Pattern {pattern!r} matches no trainable parameter. {_some_paths(model)}")
        for name in hits:
            if name in chosen:
                raise ValueError(
                    f"Parameter {name!r} is matched twice, by {by_pattern[name]!r} and {pattern!r}; drop one."
                )
            chosen[name], by_pattern[name] = trainable[name], pattern
    return chosen


# --- the search -------------------------------------------------------------------------------------------------------


def _units_from_tree(model: nn.Module, wanted: set[int]) -> list[LayerUnit]:
    taken: set[int] = set()
    found = [_unit(name, parts, wanted, taken) for name, parts in search_units(model, wanted)]
    return _join_bare_norms([unit for unit in found if unit.parameters], model)


def _join_bare_norms(units: list[LayerUnit], model: nn.Module) -> list[LayerUnit]:
    """Join units of mere norms and scales to the last unit if they stand right before it, else to the one before.

    What counts is the whole module, tied and frozen weights included: a head whose weight is tied to the embedding
    stays a unit, though only its norm is left, and so does a block of which only the norms or the biases train.
    """
    matrices = {
        join_path(path, name)
        for path, module in model.named_modules(remove_duplicate=False)
        if any(p.ndim > 1 for p in module.parameters(recurse=False))
        for name, _ in module.named_parameters(recurse=False, remove_duplicate=False)
    }

    def is_solid(unit: LayerUnit) -> bool:
        return any(m == path or m.startswith(path + ".") for m in matrices for path in unit.modules)

    solid = [i for i, unit in enumerate(units) if is_solid(unit)]
    if not solid:
        return units
    members: dict[int, list[LayerUnit]] = {i: [] for i in solid}
    for i, unit in enumerate(units):
        before, after = [s for s in solid if s < i], [s for s in solid if s >= i]
        home = after[0] if after and (after[0] == i or len(after) == 1 or not before) else before[-1]
        members[home].append(unit)
    return [_merge(units[i], joined) for i, joined in members.items()]


def _merge(leader: LayerUnit, members: list[LayerUnit]) -> LayerUnit:
    return LayerUnit(
        leader.name,
        tuple(path for unit in members for path in unit.modules),
        {name: p for unit in members for name, p in unit.parameters.items()},
    )


# --- the override -----------------------------------------------------------------------------------------------------


def _units_from_patterns(model: nn.Module, units: Sequence[str | Sequence[str]], wanted: set[int]) -> list[LayerUnit]:
    members: dict[str, nn.Module | nn.Parameter] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **{path: m for path, m in model.named_modules(remove_duplicate=False) if path and has_parameters(m)},
    }
    found: list[LayerUnit] = []
    taken: set[int] = set()
    owner: dict[str, str] = {}
    for entry in units:
        joined: list[tuple[str, nn.Module | nn.Parameter]] = []
        for pattern in [entry] if isinstance(entry, str) else entry:
            hits = [(path, m) for path, m in members.items() if _matches(path, pattern)]
            if not hits:
                raise ValueError(
                    f"Pattern {pattern!r} in units matches no module with parameters. {_some_paths(model)}"
                )
            for path, _ in hits:
                twice = [o for o in owner if o == path or o.startswith(path + ".") or path.startswith(o + ".")]
                if twice:
                    raise ValueError(
                        f"{path!r} is matched twice in units, by {owner[twice[0]]!r} and {pattern!r}; a layer unit is"
                        " never split, and every parameter belongs to one unit."
                    )
                owner[path] = pattern
            joined += hits
        parts = [[hit] for hit in joined] if isinstance(entry, str) else [joined]
        found += [_unit(part[0][0], part, wanted, taken) for part in parts]
    return [unit for unit in found if unit.parameters]


# --- shared by both ---------------------------------------------------------------------------------------------------


def _unit(name: str, parts: list[tuple[str, nn.Module | nn.Parameter]], wanted: set[int], taken: set[int]) -> LayerUnit:
    parameters: dict[str, nn.Parameter] = {}
    for path, member in parts:
        named = [("", member)] if isinstance(member, nn.Parameter) else list(member.named_parameters())
        for inner, p in named:
            if id(p) in wanted and id(p) not in taken:
                parameters[join_path(path, inner)] = p
            taken.add(id(p))
    return LayerUnit(name, tuple(path for path, _ in parts), parameters)


def _check_partition(model: nn.Module, units: Sequence[LayerUnit], wanted: set[int]) -> None:
    counts = Counter(id(p) for unit in units for p in unit.parameters.values())
    missing = [name for name, p in model.named_parameters() if id(p) in wanted and counts[id(p)] != 1]
    if missing:
        raise ValueError(
            f"The layer units do not hold each trainable parameter exactly once: {list_names(missing)}. Add a pattern"
            " for them to units, or freeze them."
        )


def _matches(path: str, pattern: str) -> bool:
    parts, patterns = path.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(fnmatchcase(a, b) for a, b in zip(parts, patterns, strict=True))


def _some_paths(model: nn.Module) -> str:
    paths = [path for path, _ in model.named_modules() if path]
    return f"Module paths of this model start like this: {list_names(paths, 12)}."


def list_names(names: Sequence[str], limit: int = 8) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
