"""Copies between a device and memory that is not page-locked, by way of two small buffers that are.

One buffer is filled or emptied by the host while the device copies the other. Without them the driver would do so with
buffers of its own, in smaller steps.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hift.offload.host_memory import can_page_lock, page_lock

_NBYTES = 2**24  # of each buffer


class Staging:
    """Copies flat tensors piece by piece. The caller waits, so it had better be a thread of its own.

    Args:
        buffers: Two page-locked tensors of bytes, of one size.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._buffers = [*buffers]
        self._in_use: list[Any] = [None for _ in buffers]  # until this event

    def copy(self, source: Tensor, target: Tensor, stream: Any) -> None:
        """Copy ``source`` to ``target``, of shape (n,) and one dtype, on ``stream``, which is the current one.

        On the host all has arrived when this returns; on the device, when what the stream has been told is done.
        """
        to_host = target.device.type == "cpu"
        size = len(self._buffers[0]) // source.element_size()
        arriving: tuple[Any, Tensor, Tensor] | None = None
        for i, (part, goal) in enumerate(zip(torch.split(source, size), torch.split(target, size), strict=True)):
            which = i % len(self._buffers)
            if self._in_use[which] is not None:
                self._in_use[which].synchronize()
            staged = self._buffers[which][: part.nbytes].view(part.dtype)
            if to_host:
                staged.copy_(part, non_blocking=True)
            else:
                staged.copy_(part)
                goal.copy_(staged, non_blocking=True)
            self._in_use[which] = stream.record_event()
            if to_host:
                _unload(arriving)
                arriving = (self._in_use[which], staged, goal)
        _unload(arriving)


def make_staging(device: torch.device) -> Staging | None:
    """Two buffers for ``device``; ``None`` where there is no page-locked memory to be had."""
    if not can_page_lock(device):
        return None
    mapped = [mmap.mmap(-1, _NBYTES) for _ in range(2)]
    try:
        for each in mapped:
            page_lock(each, device)
    except RuntimeError:
        return None
    return Staging([torch.frombuffer(each, dtype=torch.uint8) for each in mapped])


def _unload(arriving: tuple[Any, Tensor, Tensor] | None) -> None:
    if arriving is not None:
        event, staged, goal = arriving
        event.synchronize()
        goal.copy_(staged)
