"""Time and memory of a device: CUDA, one of torch's other accelerators, or the CPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


class DeviceMeter:
    """Marks points in time on the compute stream, and reads the allocator's peaks.

    Args:
        device: Which one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device)
        self._on_host = device.type == "cpu"

    @property
    def name(self) -> str | None:
        """What the driver calls the device; ``None`` for a CPU."""
        return None if self._on_host else str(self._module.get_device_properties(self.device).name)

    def synchronize(self) -> None:
        """Wait for all that was started."""
        if not self._on_host:
            self._module.synchronize(self.device)

    def mark(self) -> Any:
        """The point in time when all that was started on the compute stream until now is over."""
        if self._on_host:
            return time.perf_counter()
        event = self._module.Event(enable_timing=True)
        event.record(self._module.current_stream(self.device))
        return event

    def wait_for(self, mark: Any) -> None:
        """Let the host wait until ``mark``; copies on other streams go on."""
        if not self._on_host:
            mark.synchronize()

    def ms_between(self, first: Any, second: Any) -> float:
        """Milliseconds between two marks that were waited for."""
        return 1000 * (second - first) if self._on_host else float(first.elapsed_time(second))

    def free(self) -> None:
        """Give back what nothing refers to any more, and what torch has cached."""
        gc.collect()
        if not self._on_host:
            self._module.empty_cache()

    def reset_peaks(self) -> None:
        """Give cached memory back, and let peaks count from now on."""
        if not self._on_host:
            self._module.empty_cache()
            self._module.reset_peak_memory_stats(self.device)

    def peaks(self) -> dict[str, int | None]:
        """Bytes allocated by tensors and reserved by torch, at the most since ``reset_peaks``; ``None`` on a CPU."""
        if self._on_host:
            return {"peak_allocated": None, "peak_reserved": None}
        return {
            "peak_allocated": self._module.max_memory_allocated(self.device),
            "peak_reserved": self._module.max_memory_reserved(self.device),
        }


@dataclass
class PageLocking:
    """What page-locking took: calls, bytes, seconds."""

    calls: int = 0
    nbytes: int = 0
    seconds: float = 0.0


@contextmanager
def page_locking(device: torch.device) -> Iterator[PageLocking]:
    """Time each ``cudaHostRegister`` inside, whoever calls it. Where nothing is page-locked there are none."""
    found = PageLocking()
    module: Any = torch.get_device_module(device)
    if not hasattr(module, "cudart"):
        yield found
        return
    runtime = module.cudart()
    register = runtime.cudaHostRegister

    def timed(address: int, nbytes: int, flags: int) -> Any:
        begin = time.perf_counter()
        result = register(address, nbytes, flags)
        found.seconds += time.perf_counter() - begin
        found.calls += 1
        found.nbytes += nbytes
        return result

    runtime.cudaHostRegister = timed
    try:
        yield found
    finally:
        runtime.cudaHostRegister = register
