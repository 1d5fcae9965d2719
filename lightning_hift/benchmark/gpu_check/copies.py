"""Bandwidth between page-locked host memory and the device, one way at a time and both ways at once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from lightning_hift.benchmark.gpu_check.stage import Context, Measure
from lightning_hift.benchmark.kinds import Skipped

_WAYS = {"host to device": (True, False), "device to host": (False, True), "both at once": (True, True)}


class Copies:
    """Copies of one size, each direction on a stream of its own."""

    def __init__(self, context: Context) -> None:
        self._context = context

    @property
    def config(self) -> Mapping[str, Any]:
        sizes = self._context.sizes
        return {"bytes": sizes.copy_bytes, "repeats": sizes.copy_repeats, "warm_up_copies": 1}

    def cells(self) -> Mapping[str, Measure]:
        return {name: partial(self._measure, *ways) for name, ways in _WAYS.items()}

    def close(self) -> None: ...

    def _measure(self, to_device: bool, to_host: bool) -> Mapping[str, Any]:
        device, sizes, meter = self._context.device, self._context.sizes, self._context.meter
        if device.type == "cpu":
            raise Skipped("on a CPU, host and device are the same memory")
        streams: Any = torch.get_device_module(device)
        jobs = []
        for to_host_now in [False] * to_device + [True] * to_host:
            host = torch.zeros(sizes.copy_bytes, dtype=torch.uint8).pin_memory()
            there = torch.zeros(sizes.copy_bytes, dtype=torch.uint8, device=device)
            jobs.append((streams.Stream(device=device), *((host, there) if to_host_now else (there, host))))
        meter.synchronize()

        def copy(times: int) -> None:
            for _ in range(times):
                for stream, target, source in jobs:
                    with streams.stream(stream):
                        target.copy_(source, non_blocking=True)
            meter.synchronize()

        copy(1)
        begin = time.perf_counter()
        copy(sizes.copy_repeats)
        seconds = time.perf_counter() - begin
        moved = len(jobs) * sizes.copy_repeats * sizes.copy_bytes
        return {"bytes": moved, "copy_seconds": seconds, "bytes_per_second": moved / seconds}
