"""From a model and its optimizers to one engine for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_hift.engine.engine import HiFTEngine
from lightning_hift.engine.optimizer_state import parameters_of
from lightning_hift.engine.options import HiFTOptions
from lightning_hift.engine.parameter_checks import ORPHAN_REMEDY
from lightning_hift.engine.state_partition import UndividedState
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
from lightning_hift.offload.offloader import StateOffloader


def attach_engines(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    options: HiFTOptions | None = None,
    *,
    make_offloader: Callable[[], StateOffloader] | None = None,
    advance_on_step: bool = True,
    weights_dtype: torch.dtype | None = None,
    partition: UndividedState | None = None,
    **more: Any,
) -> list[HiFTEngine]:
    """Find the layer groups of ``model`` among the parameters of each optimizer and attach an engine to each.

    Args:
        model: The module that owns the parameters.
        optimizers: Together they hold every trainable parameter once. Each rotates through its own groups.
        options: What trains when, and where its state lives.
        make_offloader: Builds the keeper of one optimizer's state; default: as ``options`` say.
        advance_on_step: See ``HiFTEngine``.
        weights_dtype: See ``HiFTEngine``.
        partition: See ``HiFTEngine``; one for all optimizers.
        more: Fields of ``HiFTOptions`` that are to be others.

    Raises:
        ValueError: An option is out of range; a pattern matches nothing, or something twice; a trainable parameter is
            in no optimizer, or in two.
        TypeError: An optimizer cannot step one group at a time, or an option does not exist.
        RuntimeError: An optimizer is already under another engine.
    """
    options = replace(options or HiFTOptions(), **more)
    policy = options.make_policy()
    found = find_groups(model, optimizers, options, policy)
    held_back = _select_frozen(model, options.frozen)
    engines: list[HiFTEngine] = []
    for p in held_back:
        p.requires_grad_(False)
    try:
        for optimizer, (groups, fixed) in zip(optimizers, found, strict=True):
            engine = HiFTEngine(
                optimizer,
                groups,
                policy.bound_to(groups, options.seed),
                fixed,
                make_offloader() if make_offloader else options.make_offloader(_device_of(groups)),
                advance_on_step,
                held_back,
                options.master_weights,
                weights_dtype,
                options.max_group_numel,
                options.scale,
                partition,
            )
            engines.append(engine)
    except BaseException:
        for engine in engines:
            engine.close()
        for p in held_back:
            p.requires_grad_(True)
        raise
    return engines


def _device_of(groups: Sequence[LayerGroup]) -> torch.device:
    return next(p.device for group in groups for p in group.parameters.values())


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
    held_back = _select_frozen(model, options.frozen)
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
    return parts


def _select_frozen(model: nn.Module, frozen: Sequence[str] | str | None) -> list[nn.Parameter]:
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
