"""Bytes that a step of an optimizer needs for a moment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_hift.engine.probe import make_probe, probing_twin, step_probe
from lightning_hift.planner.allocations import AllocationTracker


def transient_bytes(optimizer: Optimizer, parameters: Sequence[nn.Parameter], dtype: torch.dtype | None = None) -> int:
    """Bytes that one step of ``parameters`` needs for a moment on a GPU, beside state and gradients.

    By default torch's optimizers take all parameters at once there (``foreach``), with temporary copies of all;
    ``fused=True`` needs none. Where the step cannot be made on tensors without memory, it is taken to need one copy of
    the largest parameter.
    """
    wanted = {id(p) for p in parameters}
    peak = 0
    for group in optimizer.param_groups:
        chosen = [p for p in group["params"] if id(p) in wanted]
        if not chosen or group.get("fused"):
            continue
        foreach = {"foreach": True} if "foreach" in group and group["foreach"] is None else {}
        tracker = AllocationTracker()
        try:
            probes = [make_probe(tuple(p.shape), dtype or p.dtype, "meta") for p in chosen]
            twin = probing_twin(optimizer, {**group, **foreach}, probes)
            with tracker:
                step_probe(twin)
                tracker.reset_peak()
                step_probe(twin)
            peak = max(peak, tracker.peak - tracker.current)
        except Exception:
            peak = max(peak, *(p.numel() * (dtype or p.dtype).itemsize for p in chosen))
    return peak
