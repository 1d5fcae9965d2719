"""Bytes of one setup of a run, group by group: on the device at each of its two peaks, on the host and on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_hift.allocations import Needs
from lightning_hift.grouping import GroupSize, LayerGroup, LayerUnit, check_group_size
from lightning_hift.master_weights import MasterWeights, resolve_master_weights
from lightning_hift.memory import (
    CONTEXT_BYTES,
    GroupBytes,
    StateBytes,
    group_bytes,
)
from lightning_hift.planner.workload import Workload, parse_precision
from lightning_hift.table import format_bytes

_EIGHT_BIT = 2 * (1 + 4 / 256)  # two codes a parameter, and one float32 scale for each block of 256


@dataclass(frozen=True)
class Setup:
    """The choices of a run that decide what it needs; names and defaults as in the callback and the strategy.

    Args:
        precision: Lightning's name of the precision.
        group_size: Layer units per group, or ``"balanced"``. At the number of units or above, this is full fine-tuning.
        offload: Where the optimizer state of inactive groups is.
        prefetch: Whether the next group's state is on the device beside the activations.
        master_weights: What is kept beside 16-bit weights.
        max_group_numel: Elements above which a group is stepped in slices.
        activation_budget: Bytes that may be held for the backward pass.
        batch_size: Rows per micro-batch.
        sequence_length: Tokens per row.
        eight_bit: Take optimizer state to be two 8-bit moments in blocks of 256, whatever the optimizer.

    Raises:
        ValueError: One of them is out of range.
    """

    precision: str = "32-true"
    group_size: GroupSize = 1
    offload: Literal["host", "disk", "none"] = "host"
    prefetch: bool = True
    master_weights: MasterWeights = "auto"
    max_group_numel: int | None = None
    activation_budget: int | None = None
    batch_size: int = 1
    sequence_length: int = 512
    eight_bit: bool = False

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        for name in ("batch_size", "sequence_length", "max_group_numel", "activation_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Got {name}={value}; it must be at least 1.")
        if self.offload not in ("host", "disk", "none"):
            raise ValueError(f"Got offload={self.offload!r}; choose 'host', 'disk' or 'none'.")
        name, dtype, _ = parse_precision(self.precision)
        object.__setattr__(self, "precision", name)
        object.__setattr__(self, "master_weights", resolve_master_weights(self.master_weights, {dtype}))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights on the device."""
        return parse_precision(self.precision)[1]

    @property
    def stepped_dtype(self) -> torch.dtype:
        """Of what the optimizer steps: the masters, or the weights themselves."""
        return self.dtype if self.master_weights == "none" else torch.float32


@dataclass(frozen=True)
class GroupPlan:
    """Bytes on the device while one group trains.

    Args:
        name: Of the group.
        numel: Elements of its parameters, and of those that train with it.
        weights: Of the whole model, buffers included.
        gradients: Of all these and of what is always active.
        state: Optimizer state beside the activations.
        masters: Master weights or remainders beside the activations.
        activations: What forward and backward need on the peak beyond the gradients; ``None``: not known.
        step: Bytes at the optimizer step, when the activations are gone, without ``overhead``.
        overhead: What the driver holds; assumed.
        traffic: Bytes of state and masters that are fetched before the step, and as many released after it.
        flops_per_token: Multiplications and additions of its step.
    """

    name: str
    numel: int
    weights: int
    gradients: int
    state: int
    masters: int
    activations: int | None
    step: int
    overhead: int
    traffic: int
    flops_per_token: int

    @property
    def compute(self) -> int:
        """Bytes at the peak of forward and backward, without ``overhead``."""
        return self.weights + self.gradients + self.state + self.masters + (self.activations or 0)

    @property
    def peak(self) -> int:
        """The most bytes on the device at any time of its step."""
        return self.overhead + max(self.compute, self.step)


@dataclass(frozen=True)
class Forecast:
    """What one setup needs. Without activations where they are not known."""

    name: str
    setup: Setup
    groups: dict[int, GroupPlan]
    host_bytes: int
    disk_bytes: int

    @property
    def peak(self) -> int:
        """The most bytes on the device in a sweep."""
        return max(group.peak for group in self.groups.values())

    @property
    def is_complete(self) -> bool:
        """Whether activations are known, for every group that was planned."""
        return all(group.activations is not None for group in self.groups.values())

    def fits(self, device_memory: int | None, host_memory: int | None) -> bool:
        """Whether both places have room; ``None`` is room enough."""
        on_device = device_memory is None or self.peak <= device_memory
        return on_device and (host_memory is None or self.host_bytes <= host_memory)


def forecast(workload: Workload, setup: Setup, name: str = "", every_group: bool = False) -> Forecast:
    """What ``setup`` needs, for every group or for those among which the largest peak is.

    Raises:
        ValueError: The activation budget is too small for this batch.
    """
    groups = workload.groups(setup.group_size)
    joined = workload.trained_groups(setup.group_size)
    parts = [_bytes_of(workload, setup, group) for group in groups]
    fixed = [_bytes_of(workload, setup, unit) for unit in workload.always_active]
    needs = _needs_within_budget(workload, setup, every_group)
    chosen = range(len(groups)) if needs is None else needs
    planned = {
        i: _group_plan(
            workload,
            setup,
            [groups[i] for i in workload.trained_with(groups, i)],
            joined[i],
            parts,
            fixed,
            needs[i] if needs is not None else None,
        )
        for i in chosen
    }
    offloaded = _kept_state(workload, parts) + sum(part.masters for part in parts)
    counters = sum(state.host for state in workload.state(setup.stepped_dtype).values())
    host, disk = {"host": (offloaded, 0), "disk": (0, offloaded), "none": (0, 0)}[setup.offload]
    return Forecast(name, setup, planned, host + counters, disk)


def _kept_state(workload: Workload, parts: Sequence[GroupBytes]) -> int:
    """Optimizer state of all groups, or of those that train at once if that of the others is dropped."""
    kept = sorted((part.state for part in parts), reverse=True)
    return sum(kept[: workload.policy.most_groups] if workload.policy.state_handling == "reset" else kept)


def _bytes_of(workload: Workload, setup: Setup, part: LayerGroup | LayerUnit) -> GroupBytes:
    states = workload.state(setup.stepped_dtype)
    parameters = list(part.parameters.values())
    found = [states.get(p, StateBytes()) for p in parameters]
    if setup.eight_bit:
        found = [StateBytes(round(_EIGHT_BIT * p.numel())) for p in parameters]
    masters = resolve_master_weights(setup.master_weights, {setup.dtype})
    return group_bytes(part.name, parameters, found, masters, setup.dtype, setup.max_group_numel)


def _group_plan(
    workload: Workload,
    setup: Setup,
    trained: Sequence[LayerGroup],
    joined: LayerGroup,
    parts: Sequence[GroupBytes],
    fixed: Sequence[GroupBytes],
    needs: Needs | None,
) -> GroupPlan:
    """The plan for the first of the ``trained`` groups; ``joined`` holds all of them."""
    own = [parts[group.index] for group in trained]
    weights = workload.tensor_bytes(setup.dtype)
    gradients = sum(part.gradients for part in (*own, *fixed))
    state, masters = sum(part.state for part in fixed), sum(part.masters for part in fixed)
    if setup.offload == "none":
        state += _kept_state(workload, parts)
        masters += sum(part.masters for part in parts)
        at_step = 0
    else:
        slot = max(parts, key=lambda part: part.slot)
        slot_bytes = (round(slot.state * slot.sliced), round(slot.masters * slot.sliced))
        at_step = 0 if setup.prefetch else max(part.slot for part in own)
        if setup.prefetch:
            state, masters = state + slot_bytes[0], masters + slot_bytes[1]
    return GroupPlan(
        own[0].name,
        sum(part.numel for part in own),
        weights,
        gradients,
        state,
        masters,
        None if needs is None else max(0, needs.peak - gradients),
        weights
        + gradients
        + state
        + masters
        + at_step
        + max(_at_step(workload, setup, group, parts[group.index], fixed) for group in trained),
        CONTEXT_BYTES,
        0 if setup.offload == "none" else sum(part.state + part.masters for part in own),
        workload.flops_per_token(joined, setup.activation_budget is not None),
    )


def _at_step(workload: Workload, setup: Setup, group: LayerGroup, own: GroupBytes, fixed: Sequence[GroupBytes]) -> int:
    """Bytes that exist during the optimizer step only: temporaries, and one group's values in 32 bits."""
    parameters = [p for unit in (*group.units, *workload.always_active) for p in unit.parameters.values()]
    temporary = workload.transient(parameters, setup.stepped_dtype) * own.sliced
    largest = max(part.numel * part.sliced for part in (own, *fixed))
    # The gradients of one group at a time and, unless it is kept as a whole, its master.
    casts = {"none": 0, "full": 4, "split": 8}[setup.master_weights] * largest
    return round(temporary + casts)


def _needs_within_budget(workload: Workload, setup: Setup, every_group: bool) -> dict[int, Needs] | None:
    batch = (setup.precision, setup.group_size, setup.batch_size, setup.sequence_length)
    whole = workload.needs(*batch, ends_only=not every_group)
    budget = setup.activation_budget
    if whole is None or budget is None:
        return whole
    small = workload.needs(*batch, checkpointed=True, ends_only=not every_group)
    if small is None:
        return None
    smallest = smallest_budget(workload, setup)
    if smallest is not None and budget < smallest:
        raise ValueError(
            f"Got activation_budget={format_bytes(budget)}, but with every block recomputed this batch still holds"
            f" {format_bytes(smallest)}. Use at least that, or a smaller batch."
        )
    found = {}
    for i, needs in whole.items():
        if needs.saved <= budget:
            found[i] = needs
            continue
        at_loss = needs.peak - needs.saved  # what the peak has beyond what is saved: the loss, one block's backward
        found[i] = Needs(budget, max(small[i].peak, min(needs.peak, budget + at_loss)))
    return found


def smallest_budget(workload: Workload, setup: Setup) -> int | None:
    """The least bytes that can be held for the backward pass: all inputs of blocks, and the inside of one block.

    Returns:
        ``None`` if activations are not known, or if there are no blocks that could be recomputed.
    """
    batch = (setup.precision, setup.group_size, setup.batch_size, setup.sequence_length)
    whole = workload.needs(*batch, ends_only=True)
    small = workload.needs(*batch, checkpointed=True, ends_only=True) if workload.blocks else None
    if whole is None or small is None:
        return None
    deepest = max(whole, key=lambda i: whole[i].saved)
    inside = (whole[deepest].saved - small[deepest].saved) / len(workload.blocks)
    return round(max(min(whole[i].saved, small[i].saved + inside) for i in whole))
