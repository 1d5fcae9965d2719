"""Bytes of parameters, gradients, optimizer state and master weights; and whether they fit."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_hift.engine.probe import StateBytes
from lightning_hift.offload.sharded_tensors import local_numel
from lightning_hift.table import format_bytes

MASTER_BYTES = {"full": 4, "split": 2, "none": 0}
"""Bytes per parameter that outlive the step, by kind of master weights."""
CONTEXT_BYTES = round(0.6 * 2**30)
"""Assumed: what the driver, the CUDA context and cuBLAS hold on the device beside all tensors."""
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmgtp]?)(i?)b?\s*", re.IGNORECASE)


def parse_bytes(text: str | float, name: str = "size") -> int:
    """``"24GiB"``, ``"24GB"``, ``"512 MiB"`` or a plain number of bytes, as a whole number of bytes.

    Raises:
        ValueError: It is none of these, or not above 0; ``name`` says of what.
    """
    match = _SIZE.fullmatch(str(text))
    if match is None or float(match[1]) <= 0 or (match[3] and not match[2]):
        raise ValueError(
            f"Got {name}={text!r}; write a number above 0 with one of B, KB, MB, GB, TB (powers of 1000) or KiB, MiB,"
            " GiB, TiB (powers of 1024), such as 24GiB."
        )
    base, power = 1024 if match[3] else 1000, " kmgtp".index(match[2].lower() or " ")
    return round(float(match[1]) * float(base**power))


# --- what must fit ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupBytes:
    """Bytes of one layer group that do not depend on the batch.

    Args:
        name: Of the group.
        numel: Elements of its parameters.
        gradients: In the dtype of the weights.
        state: Optimizer state that moves to the device.
        masters: Master weights, or remainders, that are kept between the steps.
        sliced: The share of its state that is on the device at once, below 1 if the group is stepped in slices.
    """

    name: str
    numel: int
    gradients: int
    state: int
    masters: int
    sliced: float = 1.0

    @property
    def slot(self) -> int:
        """Bytes of state and masters that are on the device at once."""
        return round((self.state + self.masters) * self.sliced)


def group_bytes(
    name: str,
    parameters: Sequence[Tensor],
    states: Sequence[StateBytes],
    master_weights: Literal["full", "split", "none"] = "none",
    dtype: torch.dtype | None = None,
    max_group_numel: int | None = None,
) -> GroupBytes:
    """Adds up the bytes of a group.

    Args:
        name: Of the group.
        parameters: Of the group.
        states: Their optimizer state; see ``state_bytes``.
        master_weights: What is kept beside the weights.
        dtype: Dtype of the weights in the run; default: their own.
        max_group_numel: Elements above which the group is stepped in slices.
    """
    numel = sum(local_numel(p) for p in parameters)
    return GroupBytes(
        name,
        numel,
        sum(local_numel(p) * (dtype or p.dtype).itemsize for p in parameters),
        sum(state.device for state in states),
        MASTER_BYTES[master_weights] * numel,
        min(1.0, max_group_numel / numel) if max_group_numel and numel else 1.0,
    )


def check_memory(
    weight_bytes: int,
    groups: Sequence[GroupBytes],
    always_active: Sequence[GroupBytes] = (),
    *,
    device_memory: int | None = None,
    host_memory: int | None = None,
    offload: str = "host",
    overhead: int = CONTEXT_BYTES,
    resets: bool = False,
    processes: int = 1,
) -> None:
    """Refuse a run that cannot fit, whatever the batch: activations are not counted. Arithmetic only.

    Args:
        weight_bytes: All weights and buffers of the model on the device.
        groups: The layer groups.
        always_active: Units that train at every step; their state and masters never leave the device.
        device_memory: Bytes of the device; ``None``: unknown, not checked.
        host_memory: Bytes that are free on the host; ``None``: unknown, not checked. See ``available_host_memory``.
        offload: ``"host"``, ``"disk"`` or ``"none"``.
        overhead: Bytes on the device that are no tensors.
        resets: Whether the state of a group is dropped when it stops training.
        processes: That keep as much each in the memory of the host; a device is that of one.

    Raises:
        RuntimeError: It does not fit; with the sum, line by line, and what would help.
    """
    resident = sum(u.gradients + u.state + u.masters for u in always_active)
    deepest = max(groups, key=lambda g: g.gradients + (g.slot if offload != "none" else 0))
    if offload == "none":
        slot, label = sum(g.state + g.masters for g in groups), "optimizer state of all groups (offload='none')"
    else:
        slot, label = deepest.slot, f"optimizer state and masters of {deepest.name}"
    lines = {
        "weights": weight_bytes,
        f"gradients of {deepest.name}": deepest.gradients,
        label: slot,
        "always active: gradients, state, masters": resident,
        "driver and CUDA context (assumed)": overhead,
    }
    if device_memory is not None and sum(lines.values()) > device_memory:
        remedy = "Use a smaller group_size, max_group_numel, precision='bf16-true', offload='host', or a larger device."
        raise RuntimeError(_does_not_fit("the device", lines, device_memory, remedy))
    of_all = f", in {processes} processes" if processes > 1 else ""
    kept = max(g.state for g in groups) if resets else sum(g.state for g in groups)
    lines = {
        f"optimizer state of {'one group' if resets else 'all groups'}{of_all}": processes * kept,
        f"masters of all groups{of_all}": processes * sum(g.masters for g in groups),
    }
    if offload == "host" and host_memory is not None and sum(lines.values()) > host_memory:
        fewer = ", or fewer processes on this host" if processes > 1 else ""
        remedy = f"Use offload='disk', master_weights='split', an optimizer with 8-bit state, or frozen=[...]{fewer}."
        raise RuntimeError(_does_not_fit("the host", lines, host_memory, remedy))


def _does_not_fit(where: str, lines: Mapping[str, int], available: int, remedy: str) -> str:
    width = max(map(len, lines))
    table = "\n".join(f"  {what:<{width}}  {format_bytes(n):>10}" for what, n in lines.items() if n)
    return (
        f"This run needs at least {format_bytes(sum(lines.values()))} on {where}, which has {format_bytes(available)},"
        f" before activations:\n{table}\n{remedy}"
    )


def available_host_memory(root: str | os.PathLike[str] = "/") -> int | None:
    """Bytes that can still be had on this host: what Linux says is available, or less in a container with a limit.

    Args:
        root: Where ``proc`` and ``sys`` are mounted.

    Returns:
        ``None`` where it is not known.
    """
    found = []
    meminfo = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root, "proc/meminfo"), re.MULTILINE)
    if meminfo:
        found.append(int(meminfo[1]) * 1024)
    for folder, limit, used in (
        ("sys/fs/cgroup", "memory.max", "memory.current"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        numbers = [_read(root, f"{folder}/{name}").strip() for name in (limit, used)]
        if all(n.isdigit() for n in numbers):
            # What files have left in the cache is counted as used, but given back on demand.
            cached = re.findall(r"^(?:in)?active_file (\d+)$", _read(root, f"{folder}/memory.stat"), re.MULTILINE)
            found.append(max(0, int(numbers[0]) - int(numbers[1]) + sum(map(int, cached))))
    return min(found) if found else None


def process_memory(field: str, pid: int | str = "self") -> int | None:
    """Bytes of a process, without its children, as Linux counts them under the name of a field.

    Args:
        field: A line of ``/proc/PID/status``, such as ``"VmRSS"`` or ``"RssShmem"``.
        pid: The process; default: this one.

    Returns:
        ``None`` where it is not known: the process has ended, or this is no Linux.
    """
    found = re.search(rf"^{field}:\s+(\d+) kB", _read("/", f"proc/{pid}/status"), re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def _read(root: str | os.PathLike[str], path: str) -> str:
    try:
        return (Path(root) / path).read_text()
    except OSError:
        return ""
