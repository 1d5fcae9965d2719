"""Which layer groups each optimizer of a model has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_hift.engine.optimizer_state import parameters_of
from lightning_hift.engine.options import HiFTOptions
from lightning_hift.engine.parameter_checks import ORPHAN_REMEDY
from lightning_hift.groups.grouping import (
    GroupSize,
    LayerGroup,
    LayerUnit,
    find_layer_units,
    group_units,
    select_parameters,
    select_units,
)
from lightning_hift.groups.selection import SelectionPolicy
from lightning_hift.groups.turns import Turns, choose_turns

_DEVICE_SHARE = 4 * 16  # a group that is made larger takes a quarter of the device, by 16 bytes a parameter


class OptimizerGroups(NamedTuple):
    """What one optimizer trains.

    Args:
        groups: Its layer groups, which take turns.
        always_active: Units that train at every step.
    """

    groups: list[LayerGroup]
    always_active: list[LayerUnit]


def find_groups(
    model: nn.Module, optimizers: Sequence[Optimizer], options: HiFTOptions, policy: SelectionPolicy | None = None
) -> list[OptimizerGroups]:
    """The layer groups of each optimizer, as ``attach_engines`` would form them. Nothing is changed.

    Args:
        model: See ``attach_engines``.
        optimizers: Likewise.
        options: Likewise.
        policy: In the place of that of ``options``.

    Raises:
        ValueError: See ``attach_engines``.
    """
    policy = policy or options.make_policy()
    units, always_active = (
        [patterns] if isinstance(patterns, str) else patterns for patterns in (options.units, options.always_active)
    )
    held_back = select_frozen(model, options.frozen)
    for p in held_back:
        p.requires_grad_(False)
    try:
        check_coverage(model, optimizers)
        found = [find_layer_units(model, units, parameters=parameters_of(optimizer)) for optimizer in optimizers]
        everything = [unit for part in found for unit in part]
        if always_active is None:
            always = [unit for part in found for unit in policy.choose_always_active(part)]
        else:
            always = select_units(everything, cast(Sequence[str], always_active)) if always_active else []
        size = options.turns.group_size
        return [_divide(part, [unit for unit in part if unit in always], size, policy) for part in found]
    finally:
        for p in held_back:
            p.requires_grad_(True)


def turns_of_run(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    options: HiFTOptions,
    total_steps: Callable[[], float],
    device: torch.device,
) -> Turns:
    """How layer groups take turns in a run of this many optimizer steps, as far as ``options`` leave that open.

    Args:
        model: See ``attach_engines``.
        optimizers: Likewise.
        options: Likewise.
        total_steps: Infinity if they are not known. Not asked for where all units are one group.
        device: Where the model trains.
    """
    size, steps = options.group_size, options.steps_per_group
    if options.policy is not None or None not in (size, steps):
        return options.turns
    found = find_groups(model, optimizers, replace(options, group_size=1))
    units = max(([unit for group in each.groups for unit in group.units] for each in found), key=len)
    if isinstance(size, int) and size >= len(units):
        return Turns(size, 1)
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
    return choose_turns(units, total_steps(), size, steps, memory / _DEVICE_SHARE)


def _divide(
    units: list[LayerUnit], fixed: list[LayerUnit], group_size: GroupSize, policy: SelectionPolicy
) -> OptimizerGroups:
    rotating = [unit for unit in units if unit not in fixed]
    if not rotating:
        raise ValueError(
            f"always_active ({', '.join(unit.name for unit in fixed)}) matches every layer unit, which leaves nothing"
            f" to rotate. That is full fine-tuning: use group_size={len(units)} for it, or always_active=[]."
        )
    groups = group_units([part for unit in rotating for part in _split(unit, policy)], group_size)
    policy.bound_to(groups)  # which may refuse them
    return OptimizerGroups(groups, fixed)


def _split(unit: LayerUnit, policy: SelectionPolicy) -> list[LayerUnit]:
    parts = policy.split_unit(unit)
    names = [name for part in parts for name in part.parameters]
    if sorted(names) != sorted(unit.parameters):
        raise ValueError(
            f"{type(policy).__name__}.split_unit divides the layer unit {unit.name} into parts with the parameters"
            f" {names[:8]}; they must be those of the unit, each once."
        )
    return [replace(part, place=unit.place) for part in parts]


def select_frozen(model: nn.Module, frozen: Sequence[str] | str | None) -> list[nn.Parameter]:
    """Parameters that match the patterns of what must not train."""
    frozen = [frozen] if isinstance(frozen, str) else frozen
    return list(select_parameters(model, frozen).values()) if frozen else []


def check_coverage(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Refuse trainable parameters that no optimizer, or more than one, holds.

    Raises:
        ValueError: There are such parameters.
    """
    owners: dict[int, int] = {}
    for optimizer in optimizers:
        for i in {id(p) for p in parameters_of(optimizer)}:
            owners[i] = owners.get(i, 0) + 1
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    orphans = [name for name, p in trainable if id(p) not in owners]
    if orphans:
        raise ValueError(f"No optimizer holds the trainable parameters {orphans[:8]}. {ORPHAN_REMEDY}")
    shared = [name for name, p in trainable if owners[id(p)] > 1]
    if shared:
        raise ValueError(
            f"More than one optimizer holds the parameters {shared[:8]}, so no single schedule can decide when they"
            " train. Give each parameter to one optimizer."
        )
