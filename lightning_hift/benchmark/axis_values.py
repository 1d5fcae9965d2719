"""The values of an axis of a benchmark, and the templates in which they are filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

_ENTRY_KEYS = ("name", "as", "configs", "options", "trials")
_OPTIONAL = "?"


@dataclass(frozen=True)
class Entry:
    """One value of an axis.

    Args:
        name: By which it is known.
        stands_for: What is filled into templates.
        configs: Files that only runs with this value read.
        options: Settings of these runs, by dotted key.
        trials: Values to be tried out for these runs, by dotted key.
    """

    name: Any
    stands_for: Any
    configs: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    trials: dict[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, axis: str, value: Any) -> Entry:
        """A plain value, or a mapping of the keys that it may have.

        Raises:
            ValueError: A key is missing or unknown.
        """
        if not isinstance(value, dict):
            return cls(value, value)
        unknown = [key for key in value if key not in _ENTRY_KEYS]
        if unknown or "name" not in value:
            raise ValueError(
                f"Got axes.{axis} with {value!r}; it needs a name and may have {', '.join(_ENTRY_KEYS[1:])}."
            )
        trials = value.get("trials") or {}
        if any(not isinstance(choices, list) or not choices for choices in trials.values()):
            raise ValueError(f"Got trials={trials!r} for {value['name']!r}; each key needs a list of values to try.")
        return cls(
            value["name"],
            value.get("as", value["name"]),
            tuple(value.get("configs") or ()),
            dict(value.get("options") or {}),
            dict(trials),
        )


def matches(entries: Mapping[str, Entry], pattern: Mapping[str, Any]) -> bool:
    """Whether the entries, by axis, have the names of ``pattern``, or one of several."""
    return all(
        entries[axis].name in (wanted if isinstance(wanted, list) else [wanted]) for axis, wanted in pattern.items()
    )


def choices_of(trials: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Each combination of the values to be tried out, by dotted key."""
    return [dict(zip(trials, values, strict=True)) for values in product(*trials.values())] if trials else []


def existing_path(template: str, names: Mapping[str, Any]) -> str | None:
    """The path that a template stands for; ``None`` if it ends in ``?`` and there is no such file.

    Raises:
        ValueError: There is no such file; with those that there are.
    """
    optional = template.endswith(_OPTIONAL)
    path = Path(_format(template.removesuffix(_OPTIONAL), names))
    if path.is_file():
        return str(path)
    if optional:
        return None
    others = sorted(p.stem for p in path.parent.glob(f"*{path.suffix}"))
    raise ValueError(
        f"Got {path.stem!r}, but there is no {path}; {path.parent} has {', '.join(others) or 'no such file'}."
    )


def fill_in(value: Any, names: Mapping[str, Any]) -> Any:
    """``value`` with names in the place of ``{axis}``; one that is nothing but ``{axis}`` keeps its type."""
    if isinstance(value, str):
        axis = value[1:-1]
        return names[axis] if value == f"{{{axis}}}" and axis in names else _format(value, names)
    if isinstance(value, dict):
        return {key: fill_in(each, names) for key, each in value.items()}
    return [fill_in(each, names) for each in value] if isinstance(value, list) else value


def _format(template: str, names: Mapping[str, Any]) -> str:
    try:
        return template.format_map(dict(names))
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"Got {template!r}; in braces there can be {', '.join(names)}.") from error
