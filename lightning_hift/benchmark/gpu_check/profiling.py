"""Where the time of a sweep goes, by torch's profiler: the package's own ranges, and the kernels that take longest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from lightning_hift.benchmark.gpu_check.stage import Context

_RANGES = ("HiFT::", "Optimizer.step#")
_STEPS = 4  # a step of a 7B model has some 30,000 events, each of which takes the profiler up to 0.1 ms afterwards
_KERNELS = 20
_LONGEST = 100  # characters of a kernel's name


def profile(step: Callable[[], Any], steps: int, context: Context) -> Mapping[str, Any]:
    """Call ``step`` as often as a sweep has ``steps``, and profile a few calls that lie evenly spread.

    Ranges have the time of the host, and of the kernels and copies that were started inside; kernels have their own
    time. On a device without a profiler of its own, operators of the host take the place of kernels.

    Returns:
        ``steps`` that were profiled, and sums over them in milliseconds: ``wall_ms``, ``ranges``, ``kernels``.
    """
    on_gpu = context.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    every, wall_ms, events = -(-steps // _STEPS), 0.0, []
    for index in range(steps):
        context.budget.check()
        if index % every != every // 2:
            step()
            continue
        context.meter.synchronize()
        with torch.profiler.profile(activities=activities) as profiler:
            begin = time.perf_counter()
            step()
            context.meter.synchronize()
            wall_ms += 1000 * (time.perf_counter() - begin)
        events.append(profiler.key_averages())
    every_event = [event for averages in events for event in averages]
    tables = {"ranges": _ranges(every_event), "kernels": _kernels(every_event, on_gpu)}
    return {"steps": len(events), "wall_ms": wall_ms, **tables, "on_gpu": on_gpu}


def _is_range(event: Any) -> bool:
    return bool(event.key.startswith(_RANGES))


def _is_on_gpu(event: Any) -> bool:
    return bool(event.device_type.name == "CUDA")


def _ranges(events: Iterable[Any]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for event in events:
        if _is_range(event) and not _is_on_gpu(event):
            _add(found, event.key, event.count, host_ms=event.cpu_time_total, device_ms=event.device_time_total)
    return sorted(found.values(), key=lambda each: -each["host_ms"])


def _kernels(events: Iterable[Any], on_gpu: bool) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for event in events:
        if _is_on_gpu(event) == on_gpu and not _is_range(event) and not getattr(event, "is_user_annotation", False):
            us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            _add(found, event.key[:_LONGEST], event.count, ms=us)
    return sorted(found.values(), key=lambda each: -each["ms"])[:_KERNELS]


def _add(found: dict[str, dict[str, Any]], name: str, calls: int, **microseconds: float) -> None:
    """Add an event to those of its name, in milliseconds."""
    entry = found.setdefault(name, {"name": name, "calls": 0, **dict.fromkeys(microseconds, 0.0)})
    entry["calls"] += calls
    for key, value in microseconds.items():
        entry[key] += value / 1000
