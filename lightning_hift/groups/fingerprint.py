"""What must agree between a checkpoint and the run that resumes from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from lightning_hift.groups.grouping import LayerGroup, LayerUnit
from lightning_hift.groups.selection import SelectionPolicy

_COMPILED = "_orig_mod."


def make_fingerprint(
    policy: SelectionPolicy,
    groups: Sequence[LayerGroup],
    always_active: Sequence[LayerUnit],
    lr_scales: Sequence[float] = (),
) -> dict[str, Any]:
    """Everything that gives a position in the sweep its meaning, in plain values."""
    return {
        "group_size": _size_of(groups),
        **policy.fingerprint(),
        "units": _names_of(unit for group in groups for unit in group.units),
        "always_active": _names_of(always_active),
        **({"lr_scale": list(lr_scales)} if set(lr_scales) != {1.0} else {}),
    }


def check_fingerprint(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Compare a saved fingerprint with that of this run.

    Raises:
        ValueError: They differ; the message says in what.
    """
    differences = [
        f"{key}: {_first_difference(saved.get(key), mine.get(key))}"
        for key in dict.fromkeys(("policy", "state_handling", "turns", "lr_scale", *mine))
        if saved.get(key) != mine.get(key)
    ]
    if differences:
        raise ValueError(
            "The checkpoint was written with another grouping or policy, so its position in the sweep means something"
            f" else here. Checkpoint against this run: {'; '.join(differences)}. Use its settings to resume,"
            " or load only the weights to start a new run."
        )


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


def _names_of(units: Iterable[LayerUnit]) -> list[tuple[str, list[str]]]:
    """Units with their parameters by name, the same for a compiled module as for the module itself."""
    return [(unit.name.replace(_COMPILED, ""), [n.replace(_COMPILED, "") for n in unit.parameters]) for unit in units]


def _first_difference(saved: Any, mine: Any) -> str:
    if not (isinstance(saved, list) and isinstance(mine, list)):
        return f"{saved!r} against {mine!r}"
    if len(saved) != len(mine):
        return f"{len(saved)} against {len(mine)}"
    theirs, ours = next((a, b) for a, b in zip(saved, mine, strict=True) if a != b)
    if not isinstance(theirs, (list, tuple)):
        return f"{saved!r} against {mine!r}"
    (name, there), (other, here) = theirs, ours
    if name != other:
        return f"{name!r} against {other!r}"
    return f"{name!r} holds other parameters ({sorted({*there} ^ {*here})[:4] or 'in another order'})"
