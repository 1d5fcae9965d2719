"""Before a run: will weights, gradients, optimizer state and masters fit where they are to be kept?

Activations depend on the batch and are not counted; ``lightning-hift plan`` counts them, too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_hift.engine.optimizer_groups import OptimizerGroups
from lightning_hift.engine.probe import StateBytes, live_state_bytes
from lightning_hift.groups.grouping import LayerGroup, LayerUnit
from lightning_hift.groups.schedule import SweepSchedule
from lightning_hift.groups.selection import SelectionPolicy
from lightning_hift.offload.host_memory import check_directory
from lightning_hift.offload.offloader import Offload
from lightning_hift.offload.sharded_tensors import local_numel
from lightning_hift.planner.memory import GroupBytes, available_host_memory, check_memory, group_bytes
from lightning_hift.precision.master_weights import HALF_DTYPES, MasterWeights, resolve_master_weights
from lightning_hift.table import format_bytes


def check_before_run(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    found: Sequence[OptimizerGroups],
    device: torch.device,
    *,
    offload: Offload = "host",
    directory: str | os.PathLike[str] | None = None,
    master_weights: MasterWeights = "auto",
    weights_dtype: torch.dtype | None = None,
    max_group_numel: int | None = None,
    policy: SelectionPolicy | None = None,
    processes: int = 1,
    processes_per_host: int = 1,
) -> str | None:
    """Refuse a run that cannot fit on its device, host or disk.

    Args:
        model: On the host still, with weights as they were made.
        optimizers: Its optimizers, which are not changed.
        found: The groups of each.
        device: Where the run will be.
        offload: See ``StateOffloader``.
        directory: See ``StateOffloader``.
        master_weights: See ``HiFTEngine``.
        weights_dtype: See ``HiFTEngine``.
        max_group_numel: See ``HiFTEngine``.
        policy: Which groups train when; default: HiFT's.
        processes: Among how many the state is divided.
        processes_per_host: That keep as much as this one, each, in the same host memory and on the same disk.

    Returns:
        For ``"disk"``, what the run will do to it. ``None`` otherwise, or where the state cannot be foretold.

    Raises:
        RuntimeError: It does not fit; with the sum, line by line.
        ValueError: The masters are impossible; see ``resolve_master_weights``.
    """
    try:
        everything = _bytes_of(optimizers, found, master_weights, weights_dtype, max_group_numel)
    except RuntimeError:  # a foreign optimizer may refuse to be tried out; it will be measured by running it
        return None
    rotating, fixed = ([_part_of(group, processes) for group in groups] for groups in everything)
    on_host = sum(local_numel(p) * p.element_size() for p in model.parameters() if p.device.type == "cpu")
    weights = sum(local_numel(t) * _dtype(t, weights_dtype).itemsize for t in (*model.parameters(), *model.buffers()))
    leaving = on_host if device.type != "cpu" else max(0, on_host - weights)
    free = available_host_memory()
    check_memory(
        weights,
        rotating,
        fixed,
        device_memory=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
        host_memory=None if free is None else free + processes_per_host * leaving,
        processes=processes_per_host,
        offload=offload,
        overhead=0,
        resets=policy is not None and policy.state_handling == "reset",
    )
    if directory is None:
        return None
    moves = [_moved_per_step(policy or SweepSchedule(), groups) for groups, _ in found]
    return _check_disk(directory, [*rotating, *fixed], sum(moves) / len(moves), processes_per_host)


def _moved_per_step(policy: SelectionPolicy, groups: Sequence[LayerGroup]) -> float:
    """The share of all state that leaves the device in a step, on average."""
    if policy.most_groups is None:
        return 0.5
    bound = policy.bound_to(groups)
    return policy.most_groups / len(groups) if policy.most_groups > 1 else 1 / bound.steps_per_sweep


def _bytes_of(
    optimizers: Sequence[Optimizer],
    found: Sequence[OptimizerGroups],
    master_weights: MasterWeights,
    weights_dtype: torch.dtype | None,
    max_group_numel: int | None,
) -> tuple[list[GroupBytes], list[GroupBytes]]:
    rotating: list[GroupBytes] = []
    fixed: list[GroupBytes] = []
    for optimizer, (groups, always) in zip(optimizers, found, strict=True):
        units = [*(unit for group in groups for unit in group.units), *always]
        dtypes = {_dtype(p, weights_dtype) for unit in units for p in unit.parameters.values()}
        masters = resolve_master_weights(master_weights, dtypes)
        states = live_state_bytes(optimizer, torch.float32 if masters != "none" and dtypes <= {*HALF_DTYPES} else None)

        for parts, into in ((groups, rotating), (always, fixed)):
            for part in cast(Sequence[LayerGroup | LayerUnit], parts):
                parameters = list(part.parameters.values())
                of_each = [states.get(p, StateBytes()) for p in parameters]
                into.append(group_bytes(part.name, parameters, of_each, masters, weights_dtype, max_group_numel))
    return rotating, fixed


def _part_of(group: GroupBytes, processes: int) -> GroupBytes:
    """What one of several processes keeps, on average."""
    return replace(group, state=-(-group.state // processes), masters=-(-group.masters // processes))


def _check_disk(
    directory: str | os.PathLike[str], groups: Sequence[GroupBytes], moved_per_step: float, processes: int
) -> str:
    check_directory(directory)
    total, free = processes * sum(g.state + g.masters for g in groups), shutil.disk_usage(directory).free
    of_all = f" of {processes} processes" if processes > 1 else ""
    if total > free:
        raise RuntimeError(
            f"The optimizer state{of_all} needs {format_bytes(total)} in {directory}, where {format_bytes(free)} are"
            " free. Free some space, name another offload_directory, or use an optimizer with 8-bit state."
        )
    return (
        f"HiFT: optimizer state{of_all} takes {format_bytes(total)} in {directory} ({format_bytes(free)} are free);"
        f" 1,000 steps write about {format_bytes(1000 * total * moved_per_step)} to it."
    )


def _dtype(tensor: torch.Tensor, weights_dtype: torch.dtype | None) -> torch.dtype:
    return weights_dtype if weights_dtype is not None and tensor.is_floating_point() else tensor.dtype
