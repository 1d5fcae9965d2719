"""What must agree between a checkpoint and the run that resumes from it.

Layer units agree if they hold the same parameters: of the same shape, and of the same name within the module that holds
all parameters of the model. So neither classes count, nor the attribute under which a network lies, nor wrappers that
torch puts around modules. Other names are refused, as are the same ones in another order or another unit: optimizer
state is saved by place, so it would be given to a parameter that it does not belong to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile, zip_longest
from typing import Any

import torch

from lightning_hift.groups.grouping import LayerGroup, LayerUnit
from lightning_hift.groups.selection import SelectionPolicy

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # of torch.compile and of activation checkpointing
_OF_UNITS = ("units", "always_active")


def make_fingerprint(
    policy: SelectionPolicy,
    groups: Sequence[LayerGroup],
    always_active: Sequence[LayerUnit],
    lr_scales: Sequence[float] = (),
    root: str = "",
) -> dict[str, Any]:
    """Everything that gives a position in the sweep its meaning, in plain values; ``root`` as from ``find_root``."""
    return {
        "group_size": _size_of(groups),
        **policy.fingerprint(),
        "units": _describe(unit for group in groups for unit in group.units),
        "always_active": _describe(always_active),
        **({"lr_scale": list(lr_scales)} if set(lr_scales) != {1.0} else {}),
        "root": root,
    }


def find_root(names: Iterable[str]) -> str:
    """The path of the innermost module that holds all parameters of these names, with a dot behind it."""
    levels = zip(*(_bare(name).split(".")[:-1] for name in names), strict=False)
    return "".join(f"{level[0]}." for level in takewhile(lambda level: len({*level}) == 1, levels))


def check_fingerprint(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Compare a saved fingerprint with that of this run.

    Raises:
        ValueError: They differ; the message says in what.
    """
    if differences := find_differences(saved, mine):
        raise ValueError(
            "The checkpoint was written with another grouping or policy, so its position in the sweep means something"
            f" else here. Checkpoint against this run: {'; '.join(differences)}. Use its settings to resume,"
            " or load only the weights to start a new run."
        )


def find_differences(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """In what two fingerprints differ."""
    saved = _completed(saved, mine)
    keys = [key for key in dict.fromkeys(("policy", "state_handling", "turns", "lr_scale", *mine)) if key != "root"]
    told = {
        key: _compare_units(saved, mine, key) if key in _OF_UNITS else _compare(saved.get(key), mine.get(key))
        for key in keys
    }
    return [f"{key}: {difference}" for key, difference in told.items() if difference]


def cast_state(state: Mapping[Any, Any], saved: str | None, dtype: torch.dtype) -> dict[Any, Any]:
    """State from a checkpoint whose weights may have had another precision.

    Args:
        state: The state of one parameter.
        saved: The dtype that the parameter had; ``None`` if the checkpoint does not say, as one of plain torch.
        dtype: The dtype that it has now. Float state of the saved dtype follows it; step counts stay as they are.
    """

    def cast(key: Any, value: Any) -> Any:
        follows = isinstance(value, torch.Tensor) and value.is_floating_point() and key != "step"
        return value.to(dtype) if follows and saved in (None, str(value.dtype)) else value

    return {key: cast(key, value) for key, value in state.items()}


def _size_of(groups: Sequence[LayerGroup]) -> int | str:
    """Units per group; of groups of different sizes, all of them. (The last one may be what was left.)"""
    first, *rest = [len(group.units) for group in groups]
    alike = all(size == first for size in rest[:-1]) and all(size <= first for size in rest)
    return first if alike else " + ".join(map(str, [first, *rest]))


def _describe(units: Iterable[LayerUnit]) -> list[tuple[str, dict[str, list[int]]]]:
    """Units with shapes of their parameters by name, the same for a wrapped module as for the module itself."""
    return [(_bare(unit.name), {_bare(name): list(p.shape) for name, p in unit.parameters.items()}) for unit in units]


def _bare(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _completed(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> Mapping[str, Any]:
    """A fingerprint of earlier versions, which has names alone, with the shapes of this run."""
    if "root" in saved:
        return saved
    shapes = {name: shape for key in _OF_UNITS for _, unit in mine[key] for name, shape in unit.items()}
    units = {
        key: [(unit, {name: shapes.get(name) for name in names}) for unit, names in saved[key]] for key in _OF_UNITS
    }
    return {**saved, **units, "root": mine["root"]}


def _compare(saved: Any, mine: Any) -> str:
    return "" if saved == mine else f"{saved!r} against {mine!r}"


def _compare_units(saved: Mapping[str, Any], mine: Mapping[str, Any], key: str) -> str:
    if len(saved[key]) != len(mine[key]):
        return f"{len(saved[key])} against {len(mine[key])}"
    for (name, there), (other, here) in zip(saved[key], mine[key], strict=True):
        pairs = zip_longest(_list(there, saved["root"]), _list(here, mine["root"]), fillvalue="nothing")
        differing = [f"{a} against {b}" for a, b in pairs if a != b]
        if differing:
            return f"{name!r} against {other!r} ({differing[0]})"
    return ""


def _list(shapes: Mapping[str, list[int]], root: str) -> list[str]:
    return [f"{name.removeprefix(root)} {shape}" for name, shape in shapes.items()]
