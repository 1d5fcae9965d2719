"""Bytes of one setup of a run, group by group: on a device at each of its two peaks, on a host and on its disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_hift.engine.probe import StateBytes
from lightning_hift.groups.grouping import LayerGroup, LayerUnit
from lightning_hift.planner.allocations import Needs
from lightning_hift.planner.exchange import Exchange, exchange_of, shard_of, weight_bytes
from lightning_hift.planner.memory import (
    CONTEXT_BYTES,
    GroupBytes,
    group_bytes,
)
from lightning_hift.planner.partition import Division, divide
from lightning_hift.planner.setup import Setup
from lightning_hift.planner.workload import Workload
from lightning_hift.precision.master_weights import resolve_master_weights
from lightning_hift.table import format_bytes

_EIGHT_BIT = 2 * (1 + 4 / 256)  # two codes a parameter, and one float32 scale for each block of 256


@dataclass(frozen=True)
class GroupPlan:
    """Bytes on each device while one group trains.

    Args:
        name: Of the group.
        numel: Elements of its parameters, and of those that train with it.
        weights: Of the whole model, or of the device's shards of it, buffers included.
        gradients: Of all these and of what is always active, or of the device's shards.
        state: Optimizer state beside the activations.
        masters: Master weights or remainders beside the activations.
        activations: What forward and backward need on the peak beyond the gradients; ``None``: not known. Where weights
            are sharded, the one gradient that has just been computed is among them.
        exchange: What is there for the exchange with other devices in forward and backward; see ``Exchange.held``.
        step: Bytes at the optimizer step, when the activations are gone, without ``overhead``.
        overhead: What the driver holds; assumed.
        traffic: Bytes of state and masters that are fetched before the step, and as many released after it.
        flops_per_token: Multiplications and additions of its step.
        host_traffic: As ``traffic``, of all processes of a host.
        exchanged: See ``Exchange``.
        sent: See ``Exchange``.
    """

    name: str
    numel: int
    weights: int
    gradients: int
    state: int
    masters: int
    activations: int | None
    exchange: int
    step: int
    overhead: int
    traffic: int
    flops_per_token: int
    host_traffic: int
    exchanged: int
    sent: int

    @property
    def compute(self) -> int:
        """Bytes at the peak of forward and backward, without ``overhead``."""
        kept = self.weights + self.gradients + self.state + self.masters
        return kept + (self.activations or 0) + self.exchange

    @property
    def peak(self) -> int:
        """The most bytes on the device at any time of its step."""
        return self.overhead + max(self.compute, self.step)


@dataclass(frozen=True)
class Forecast:
    """What one setup needs on each device and each host. Without activations where they are not known."""

    name: str
    setup: Setup
    groups: dict[int, GroupPlan]
    host_bytes: int
    disk_bytes: int

    @property
    def peak(self) -> int:
        """The most bytes on a device in a sweep."""
        return max(group.peak for group in self.groups.values())

    @property
    def most_sent(self) -> int:
        """The most bytes that a device sends to others in a step."""
        return max(group.sent for group in self.groups.values())

    @property
    def is_complete(self) -> bool:
        """Whether activations are known, for every group that was planned."""
        return all(group.activations is not None for group in self.groups.values())

    def fits(self, device_memory: int | None, host_memory: int | None) -> bool:
        """Whether a device and a host have room; ``None`` is room enough."""
        on_device = device_memory is None or self.peak <= device_memory
        return on_device and (host_memory is None or self.host_bytes <= host_memory)


def forecast(workload: Workload, setup: Setup, name: str = "", every_group: bool = False) -> Forecast:
    """What ``setup`` needs, for every group or for those among which the largest peak is.

    Raises:
        ValueError: The activation budget is too small for this batch.
    """
    groups = workload.groups(setup.group_size)
    joined = workload.trained_groups(setup.group_size)
    processes = _bytes_by_process(workload, setup, groups)
    needs = _needs_within_budget(workload, setup, every_group)
    chosen = range(len(groups)) if needs is None else needs
    planned = {
        i: _group_plan(
            workload,
            setup,
            [groups[i] for i in workload.trained_with(groups, i)],
            joined[i],
            processes,
            needs[i] if needs is not None else None,
        )
        for i in chosen
    }
    offloaded = _most_on_a_host(setup, [_kept_state(workload, p.groups) + p.masters for p in processes])
    counters = setup.processes_per_host * sum(state.host for state in workload.state(setup.stepped_dtype).values())
    host, disk = {"host": (offloaded, 0), "disk": (0, offloaded), "none": (0, 0)}[setup.offload]
    return Forecast(name, setup, planned, host + counters, disk)


@dataclass(frozen=True)
class _Process:
    """What one process keeps of each layer group, and of what is always active."""

    groups: Sequence[GroupBytes]
    fixed: Sequence[GroupBytes]

    @property
    def masters(self) -> int:
        """Of all groups."""
        return sum(part.masters for part in self.groups)


def _bytes_by_process(workload: Workload, setup: Setup, groups: Sequence[LayerGroup]) -> list[_Process]:
    """In the order of the ranks; a single one where all keep as much."""
    whole = [_bytes_of(workload, setup, group) for group in groups]
    fixed = [_bytes_of(workload, setup, unit) for unit in workload.always_active]
    if setup.devices == 1 or not setup.partition_state:
        return [_Process(whole, fixed)]
    divided = divide(
        [[p for unit in group.units for p in unit.parameters.values()] for group in groups],
        setup.devices,
        setup.max_group_numel,
    )
    # The engine divides what is always active after all groups. Here each process has as much of it.
    even = [Division(*[(-(-part.numel // setup.devices),) * setup.devices] * 2) for part in fixed]
    return [
        _Process(
            [division.part_of(part, rank) for division, part in zip(divided, whole, strict=True)],
            [division.part_of(part, rank) for division, part in zip(even, fixed, strict=True)],
        )
        for rank in range(setup.devices)
    ]


def _most_on_a_host(setup: Setup, by_process: Sequence[int]) -> int:
    """The largest sum of the processes of one host; of one number, all processes have as much."""
    every = list(by_process) * (setup.devices // len(by_process))
    count = setup.processes_per_host
    return max(sum(every[first : first + count]) for first in range(0, setup.devices, count))


def _kept_state(workload: Workload, parts: Sequence[GroupBytes]) -> int:
    """Optimizer state of all groups, or of those that train at once if that of the others is dropped."""
    kept = sorted((part.state for part in parts), reverse=True)
    return sum(kept[: workload.policy.most_groups] if workload.policy.state_handling == "reset" else kept)


def _bytes_of(workload: Workload, setup: Setup, part: LayerGroup | LayerUnit) -> GroupBytes:
    """Of what each process keeps, or all of them divide; ``numel`` counts the elements of its shards."""
    states = workload.state(setup.stepped_dtype)
    parameters = list(part.parameters.values())
    found = [states.get(p, StateBytes()) for p in parameters]
    if setup.eight_bit:
        found = [StateBytes(round(_EIGHT_BIT * p.numel())) for p in parameters]
    masters = resolve_master_weights(setup.master_weights, {setup.dtype})
    shards = [shard_of(p, setup) for p in parameters]
    found = [
        replace(state, device=-(-state.device * shard.numel() // max(1, p.numel())))
        for state, shard, p in zip(found, shards, parameters, strict=True)
    ]
    return group_bytes(part.name, shards, found, masters, setup.dtype, setup.max_group_numel)


def _group_plan(
    workload: Workload,
    setup: Setup,
    trained: Sequence[LayerGroup],
    joined: LayerGroup,
    processes: Sequence[_Process],
    needs: Needs | None,
) -> GroupPlan:
    """The plan for the first of the ``trained`` groups, on the device that needs most; ``joined`` holds all of them."""
    exchange = exchange_of(workload, setup, joined)
    found = [_device_plan(workload, setup, trained, joined, each, exchange, needs) for each in processes]
    traffic = [plan.traffic for plan in found]
    return replace(
        max(found, key=lambda plan: plan.peak), traffic=max(traffic), host_traffic=_most_on_a_host(setup, traffic)
    )


def _device_plan(
    workload: Workload,
    setup: Setup,
    trained: Sequence[LayerGroup],
    joined: LayerGroup,
    process: _Process,
    exchange: Exchange,
    needs: Needs | None,
) -> GroupPlan:
    parts, fixed = process.groups, process.fixed
    own = [parts[group.index] for group in trained]
    weights = weight_bytes(workload, setup)
    gradients = sum(part.gradients for part in (*own, *fixed))
    state, masters = sum(part.state for part in fixed), sum(part.masters for part in fixed)
    if setup.offload == "none":
        state += _kept_state(workload, parts)
        masters += process.masters
        at_step = 0
    else:
        slot = max(parts, key=lambda part: part.slot)
        slot_bytes = (round(slot.state * slot.sliced), round(slot.masters * slot.sliced))
        at_step = 0 if setup.prefetch else max(part.slot for part in own)
        if setup.prefetch:
            state, masters = state + slot_bytes[0], masters + slot_bytes[1]
    return GroupPlan(
        own[0].name,
        sum(group.numel for group in trained),
        weights,
        gradients,
        state,
        masters,
        None if needs is None else max(0, needs.peak - (0 if setup.is_sharded else gradients)),
        exchange.held,
        weights
        + gradients
        + state
        + masters
        + at_step
        + exchange.at_step
        + max(_at_step(workload, setup, group, parts[group.index], fixed) for group in trained),
        CONTEXT_BYTES,
        0 if setup.offload == "none" else sum(part.state + part.masters for part in own),
        workload.flops_per_token(joined, setup.activation_budget is not None),
        0,
        exchange.exchanged,
        exchange.sent,
    )


def _at_step(workload: Workload, setup: Setup, group: LayerGroup, own: GroupBytes, fixed: Sequence[GroupBytes]) -> int:
    """Bytes that exist during the optimizer step only: temporaries, and one group's values in 32 bits."""
    parameters = [p for unit in (*group.units, *workload.always_active) for p in unit.parameters.values()]
    stepped = own.numel / group.numel if group.numel else 1.0
    temporary = workload.transient(parameters, setup.stepped_dtype) * stepped * own.sliced
    largest = max(part.numel * part.sliced for part in (own, *fixed))
    is_cut = setup.max_group_numel is not None and group.numel > setup.max_group_numel
    # Whole gradients are clipped in all processes, whoever steps them.
    clipped = max(largest, group.numel) if setup.partition_state and not is_cut else largest
    # The gradients of one group at a time and, unless it is kept as a whole, its master.
    casts = {"none": 0, "full": 4 * clipped, "split": 4 * (clipped + largest)}[setup.master_weights]
    return round(temporary + casts)


def _needs_within_budget(workload: Workload, setup: Setup, every_group: bool) -> dict[int, Needs] | None:
    whole = needs_of(workload, setup, ends_only=not every_group)
    budget = setup.activation_budget
    if whole is None or budget is None:
        return whole
    small = needs_of(workload, setup, checkpointed=True, ends_only=not every_group)
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


def needs_of(
    workload: Workload, setup: Setup, checkpointed: bool = False, ends_only: bool = False
) -> dict[int, Needs] | None:
    """What forward and backward need, with gradients that leave the device by and by if they are sharded."""
    return workload.needs(
        setup.precision,
        setup.group_size,
        setup.batch_size,
        setup.sequence_length,
        checkpointed,
        ends_only,
        not setup.is_sharded,
    )


def smallest_budget(workload: Workload, setup: Setup) -> int | None:
    """The least bytes that can be held for the backward pass: all inputs of blocks, and the inside of one block.

    Returns:
        ``None`` if activations are not known, or if there are no blocks that could be recomputed.
    """
    whole = needs_of(workload, setup, ends_only=True)
    small = needs_of(workload, setup, checkpointed=True, ends_only=True) if workload.blocks else None
    if whole is None or small is None:
        return None
    deepest = max(whole, key=lambda i: whole[i].saved)
    inside = (whole[deepest].saved - small[deepest].saved) / len(workload.blocks)
    return round(max(min(whole[i].saved, small[i].saved + inside) for i in whole))
