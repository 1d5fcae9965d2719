"""From a model and its optimizers to one engine for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_hift.engine.engine import ORPHAN_REMEDY, HiFTEngine
from lightning_hift.engine.lr_scale import LRScale
from lightning_hift.engine.optimizer_state import parameters_of
from lightning_hift.engine.state_partition import UndividedState
from lightning_hift.groups.grouping import (
    BALANCED,
    GroupSize,
    LayerGroup,
    LayerUnit,
    find_layer_units,
    group_units,
    select_parameters,
    select_units,
)
from lightning_hift.groups.policies import POLICIES
from lightning_hift.groups.schedule import Order, SweepSchedule
from lightning_hift.groups.selection import SelectionPolicy
from lightning_hift.offload.offloader import StateOffloader
from lightning_hift.precision.master_weights import MasterWeights


def attach_engines(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    policy: SelectionPolicy | str | None = None,
    group_size: GroupSize = 1,
    order: Order = "bottom2up",
    reshuffle: bool = False,
    steps_per_group: int = 1,
    units: Sequence[str | Sequence[str]] | None = None,
    frozen: Sequence[str] | None = None,
    always_active: Sequence[str] | None = None,
    seed: int = 0,
    make_offloader: Callable[[], StateOffloader] | None = None,
    advance_on_step: bool = True,
    master_weights: MasterWeights = "auto",
    weights_dtype: torch.dtype | None = None,
    max_group_numel: int | None = None,
    lr_scale: LRScale = 1.0,
    partition: UndividedState | None = None,
) -> list[HiFTEngine]:
    """Find the layer groups of ``model`` among the parameters of each optimizer and attach an engine to each.

    Args:
        model: The module that owns the parameters.
        optimizers: Together they hold every trainable parameter once. Each rotates through its own groups.
        policy: Which groups train at which step, in the place of ``order``, ``reshuffle`` and ``steps_per_group``; each
            optimizer gets a copy of its own. Or the name of one, such as ``"LISA"``. Default: HiFT's ``SweepSchedule``
            with those three.
        group_size: Layer units per group (m in the paper). Larger groups mean more updates per parameter, and more
            gradients and state on the device. ``"balanced"``: see ``group_units``.
        order: ``"bottom2up"``, ``"top2down"`` or ``"random"``.
        reshuffle: Draw a new random order for each sweep.
        steps_per_group: Optimizer steps before the next group takes over. Divides the traffic of state.
        units: Module-path patterns instead of the automatic search; see ``find_layer_units``.
        frozen: Module-path patterns of parameters that must not train until ``close``.
        always_active: Patterns of units that train at every step; default: those of the policy, with HiFT none. Their
            gradients and state never leave the device, and a low one makes every backward pass a deep one.
        seed: Seed of the random order, and of what other policies draw.
        make_offloader: Builds the keeper of one optimizer's state; default: host memory.
        advance_on_step: See ``HiFTEngine``.
        master_weights: See ``HiFTEngine``.
        weights_dtype: See ``HiFTEngine``.
        max_group_numel: See ``HiFTEngine``.
        lr_scale: See ``HiFTEngine``.
        partition: See ``HiFTEngine``; one for all optimizers.

    Raises:
        ValueError: An argument is out of range, or does not go with the policy; a pattern matches nothing, or something
            twice; a trainable parameter is in no optimizer, or in two.
        TypeError: An optimizer cannot step one group at a time, or ``policy`` is none.
        RuntimeError: An optimizer is already under another engine.
    """
    schedule = SweepSchedule(1, order, reshuffle, steps_per_group, per_unit=group_size == BALANCED)
    policy = choose_policy(policy, schedule, SweepSchedule())
    found = find_groups(
        model,
        optimizers,
        policy=policy,
        group_size=group_size,
        units=units,
        frozen=frozen,
        always_active=always_active,
    )
    held_back = _select_frozen(model, frozen)
    engines: list[HiFTEngine] = []
    for p in held_back:
        p.requires_grad_(False)
    try:
        for optimizer, (groups, fixed) in zip(optimizers, found, strict=True):
            engine = HiFTEngine(
                optimizer,
                groups,
                policy.bound_to(groups, seed),
                fixed,
                make_offloader() if make_offloader else None,
                advance_on_step,
                held_back,
                master_weights,
                weights_dtype,
                max_group_numel,
                lr_scale,
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


def choose_policy(
    policy: SelectionPolicy | str | None, schedule: SweepSchedule, usual: SweepSchedule
) -> SelectionPolicy:
    """``policy``, or HiFT's own.

    Args:
        policy: Or the name of one, or ``None`` for HiFT's.
        schedule: HiFT's own, as it was asked for.
        usual: What it is where nothing was asked for.

    Raises:
        ValueError: Something was asked for beside a policy, or there is no policy of that name.
        TypeError: ``policy`` is none.
    """
    if policy is None:
        return schedule
    if isinstance(policy, str):
        if policy not in POLICIES:
            names = ", ".join(map(repr, POLICIES))
            raise ValueError(
                f"Got policy={policy!r}; choose one of {names}, pass a SelectionPolicy, or leave it out for HiFT."
            )
        policy = POLICIES[policy]()
    if not isinstance(policy, SelectionPolicy):
        raise TypeError(
            f"Got policy={policy!r}; it must be a SelectionPolicy, such as lightning_hift.LISA(), the name of one"
            f" ({', '.join(POLICIES)}), or None for HiFT."
        )
    asked = [
        f"{name}={value!r}"
        for name in ("order", "reshuffle", "steps_per_group")
        if (value := getattr(schedule, name)) != getattr(usual, name)
    ]
    if asked:
        raise ValueError(
            f"Got {' and '.join(asked)} beside the policy {type(policy).__name__}, which decides by itself when a group"
            " trains. Leave that out, and give what it takes to the policy."
        )
    return policy


class OptimizerGroups(NamedTuple):
    """What one optimizer trains.

    Args:
        groups: Its layer groups, which take turns.
        always_active: Units that train at every step.
    """

    groups: list[LayerGroup]
    always_active: list[LayerUnit]


def find_groups(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    policy: SelectionPolicy | None = None,
    group_size: GroupSize = 1,
    units: Sequence[str | Sequence[str]] | None = None,
    frozen: Sequence[str] | None = None,
    always_active: Sequence[str] | None = None,
) -> list[OptimizerGroups]:
    """The layer groups of each optimizer, as ``attach_engines`` would form them. Nothing is changed; see there."""
    units = [units] if isinstance(units, str) else units
    always_active = [always_active] if isinstance(always_active, str) else always_active
    policy = policy or SweepSchedule()
    held_back = _select_frozen(model, frozen)
    for p in held_back:
        p.requires_grad_(False)
    try:
        check_coverage(model, optimizers)
        found = [find_layer_units(model, units, parameters=parameters_of(optimizer)) for optimizer in optimizers]
        everything = [unit for part in found for unit in part]
        if always_active is None:
            always = [unit for part in found for unit in policy.choose_always_active(part)]
        else:
            always = select_units(everything, always_active) if always_active else []
        return [_divide(part, [unit for unit in part if unit in always], group_size, policy) for part in found]
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


def _select_frozen(model: nn.Module, frozen: Sequence[str] | None) -> list[nn.Parameter]:
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
