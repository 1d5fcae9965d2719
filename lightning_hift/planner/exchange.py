"""What devices that share a run exchange in one step: bytes that lie ready for it, and bytes that are sent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_hift.engine.gradient_buckets import copied_bytes
from lightning_hift.groups.grouping import LayerGroup, LayerUnit
from lightning_hift.planner.setup import Setup
from lightning_hift.planner.workload import Workload


@dataclass(frozen=True)
class Exchange:
    """Bytes of one step on each device; nothing where one device is alone.

    Args:
        held: The most that is there for the exchange in forward and backward, beside what a device keeps anyway.
        at_step: Likewise at the optimizer step, at most: copies of small new weights.
        exchanged: Of the tensors that collective operations work on, each counted whole.
        sent: Over the links, by algorithms that go round in a ring: (N-1)/N of a tensor that is gathered, scattered or
            broadcast in parts, twice that of one that is averaged.
    """

    held: int = 0
    at_step: int = 0
    exchanged: int = 0
    sent: int = 0


def shard_of(tensor: Tensor, setup: Setup) -> Tensor:
    """What one device keeps of ``tensor``, without memory: all of it, or its share of the rows, rounded up."""
    rows = [_shard_rows(tensor, setup)] if tensor.ndim else []
    dtype = setup.dtype if tensor.is_floating_point() else tensor.dtype
    return torch.empty((*rows, *tensor.shape[1:]), dtype=dtype, device="meta")


def weight_bytes(workload: Workload, setup: Setup) -> int:
    """Weights and buffers on each device; buffers are never sharded."""
    if not setup.is_sharded:
        return workload.tensor_bytes(setup.dtype)
    tensors = list(workload.model.parameters())
    buffers = workload.tensor_bytes(setup.dtype) - setup.dtype.itemsize * sum(t.numel() for t in tensors)
    return _shard_bytes(tensors, setup) + buffers


def exchange_of(workload: Workload, setup: Setup, group: LayerGroup) -> Exchange:
    """The exchange of a step in which ``group`` trains, with one micro-batch.

    Args:
        workload: The model.
        setup: With its strategy and devices.
        group: All that trains at once, but for what is always active.
    """
    if setup.devices == 1:
        return Exchange()
    trained = [*group.units, *workload.always_active]
    return _sharded(workload, setup, trained, group) if setup.is_sharded else _replicated(setup, trained)


def _replicated(setup: Setup, trained: Sequence[LayerUnit]) -> Exchange:
    """Gradients are averaged, in flat copies where they are small; new weights come from whom they were stepped by."""
    gradients = [shard_of(p, setup) for p in _parameters(trained)]
    averaged = sum(t.nbytes for t in gradients)
    copied = copied_bytes(gradients)
    if not setup.partition_state:
        return Exchange(copied, 0, averaged, _ring(setup, 2 * averaged))
    return Exchange(copied, copied, 2 * averaged, _ring(setup, 3 * averaged))


def _sharded(workload: Workload, setup: Setup, trained: Sequence[LayerUnit], group: LayerGroup) -> Exchange:
    """Weights are gathered unit by unit, and gradients of a unit are summed up and scattered.

    Blocks are units of FSDP2. All else is its root, which stays whole from the forward to the end of the backward pass;
    a block does not, and is gathered again where the backward pass comes to it. While one block computes, the next one
    is gathered.
    """
    blocks = workload.block_parameters
    inside = {id(p) for parameters in blocks.values() for p in parameters}
    whole = {unit: _gathered_bytes(parameters, setup) for unit, parameters in blocks.items()}
    root = _gathered_bytes((p for p in workload.model.parameters() if id(p) not in inside), setup)
    gradients = {unit: _gathered_bytes(unit.parameters.values(), setup) for unit in trained}
    being_reduced = sum(n for unit, n in gradients.items() if unit not in blocks)
    being_reduced += max((n for unit, n in gradients.items() if unit in blocks), default=0)
    gathered = root + sum(whole.values()) + sum(whole.get(unit, 0) for unit in workload.crossed(group))
    exchanged = gathered + sum(gradients.values())
    two_blocks = sum(sorted(whole.values(), reverse=True)[:2])
    return Exchange(root + two_blocks + being_reduced, 0, exchanged, _ring(setup, exchanged))


def _ring(setup: Setup, nbytes: int) -> int:
    return round(nbytes * (setup.devices - 1) / setup.devices)


def _gathered_bytes(parameters: Iterable[Tensor], setup: Setup) -> int:
    """Of whole tensors as they are gathered or scattered: with rows rounded up to a multiple of the devices."""
    return _shard_bytes(parameters, setup) * setup.devices


def _shard_bytes(parameters: Iterable[Tensor], setup: Setup) -> int:
    rows = ((p, _shard_rows(p, setup)) for p in parameters)
    return setup.dtype.itemsize * sum(n * (p.numel() // len(p)) if p.ndim and len(p) else p.numel() for p, n in rows)


def _shard_rows(tensor: Tensor, setup: Setup) -> int:
    rows = len(tensor) if tensor.ndim else 1
    return -(-rows // setup.devices) if setup.is_sharded else rows


def _parameters(units: Iterable[LayerUnit]) -> list[nn.Parameter]:
    return [p for unit in units for p in unit.parameters.values()]
