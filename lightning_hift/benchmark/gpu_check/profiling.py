"""Where the time of a sweep goes, by torch's profiler: the package's own ranges, and the kernels that take longest."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from lightning_hift.benchmark.gpu_check.stage import Context

_RANGES = ("HiFT::", "Optimizer.step#")
_KERNELS = 20
_LONGEST = 100  # characters of a kernel's name


def profile(step: Callable[[], Any], steps: int, context: Context) -> Mapping[str, Any]:
    """Profile ``steps`` calls of ``step``; milliseconds are sums over all of them.

    Ranges have the time of the host, and of the kernels and copies that were started inside; kernels have their own
    time. On a device without a profiler of its own, operators of the host take the place of kernels.
    """
    on_gpu = context.device.type == "cuda"
    begin = time.perf_counter()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiler:
        for _ in range(steps):
            context.budget.check()
            step()
        context.meter.synchronize()
    wall_ms = 1000 * (time.perf_counter() - begin)
    averages: Any = profiler.key_averages()
    return {"wall_ms": wall_ms, "ranges": _ranges(averages), "kernels": _kernels(averages, on_gpu), "on_gpu": on_gpu}


def _is_range(event: Any) -> bool:
    return bool(event.key.startswith(_RANGES))


def _is_on_gpu(event: Any) -> bool:
    return bool(event.device_type.name == "CUDA")


def _ranges(averages: Any) -> list[dict[str, Any]]:
    found = [
        {"name": e.key, "calls": e.count, "host_ms": e.cpu_time_total / 1000, "device_ms": e.device_time_total / 1000}
        for e in averages
        if _is_range(e) and not _is_on_gpu(e)
    ]
    return sorted(found, key=lambda each: -each["host_ms"])


def _kernels(averages: Any, on_gpu: bool) -> list[dict[str, Any]]:
    events = [e for e in averages if _is_on_gpu(e) == on_gpu and not _is_range(e)]
    found = [
        {
            "name": e.key[:_LONGEST],
            "calls": e.count,
            "ms": (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1000,
        }
        for e in events
        if not getattr(e, "is_user_annotation", False)
    ]
    return sorted(found, key=lambda each: -each["ms"])[:_KERNELS]
