"""The setup nearest to one that does not fit, that does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import median_low

from lightning_hift.planner.forecast import Forecast, forecast, needs_of, smallest_budget
from lightning_hift.planner.setup import Setup
from lightning_hift.planner.workload import Workload

_GRAIN = 2**28  # activation budgets are proposed in steps of 256 MiB


def propose(
    workload: Workload, asked: Forecast, device_memory: int | None, host_memory: int | None
) -> tuple[Forecast | None, Forecast | None]:
    """Change what costs least until it fits, then take back what turns out to be needless.

    Args:
        workload: The model.
        asked: The forecast of the setup that does not fit.
        device_memory: Bytes of the device; ``None``: no limit.
        host_memory: Bytes of the host; ``None``: no limit.

    Returns:
        The proposal, and ``None``; or ``None``, and the forecast of the last and smallest setup.
    """
    limits = (device_memory, host_memory)
    found = asked
    for setup in _smaller_and_smaller(workload, asked):
        tried = forecast(workload, setup, "proposal")
        if asked.is_complete and not tried.is_complete:
            continue
        found = tried
        if found.fits(*limits):
            return _take_back(workload, asked.setup, found, limits), None
    return None, found


def _smaller_and_smaller(workload: Workload, asked: Forecast) -> Iterator[Setup]:
    """Setups that need less and less of the device or the host, in the order of what each change costs.

    Several devices first share the state, then all, before anything else is changed.
    """
    setup = asked.setup
    if setup.devices > 1 and setup.strategy == "hift_ddp":
        yield replace(setup, partition_state=True)
        setup = replace(setup, strategy="hift_fsdp", partition_state=False)
        yield setup
    if setup.offload == "none":
        setup = replace(setup, offload="host")
        yield setup
    if setup.master_weights == "full" and setup.precision == "bf16-true":
        setup = replace(setup, master_weights="split")
        yield setup
    setup = replace(setup, group_size=1)
    yield setup
    block = median_low(group.numel for group in workload.groups(1))
    setup = replace(setup, max_group_numel=min(block, setup.max_group_numel or block))
    yield setup
    for offload in (setup.offload, "disk"):  # the disk helps the host only, and costs wear
        for batch_size in (setup.batch_size, 1):
            yield _with_smallest_budget(workload, replace(setup, offload=offload, batch_size=batch_size))
    setup = _with_smallest_budget(workload, replace(setup, batch_size=1, prefetch=False))
    yield setup
    yield replace(setup, offload="disk")
    if setup.precision not in ("bf16-true", "16-true"):
        setup = replace(setup, precision="bf16-true", master_weights="split")
        yield _with_smallest_budget(workload, setup)
        yield _with_smallest_budget(workload, replace(setup, offload="disk"))


def _with_smallest_budget(workload: Workload, setup: Setup) -> Setup:
    return replace(setup, activation_budget=smallest_budget(workload, setup))


def _take_back(workload: Workload, asked: Setup, found: Forecast, limits: tuple[int | None, int | None]) -> Forecast:
    def fits(setup: Setup) -> bool:
        tried = forecast(workload, setup)
        return tried.fits(*limits) and (tried.is_complete or not found.is_complete)

    setup = found.setup
    setup = _largest_batch(workload, asked.batch_size, setup, limits)
    names = ("prefetch", "offload", "group_size", "max_group_numel", "master_weights", "activation_budget")
    for name in names:
        if name == "master_weights" and setup.precision != asked.precision:
            continue
        before = replace(setup, **{name: getattr(asked, name)})
        if before.activation_budget is not None and name != "activation_budget":
            before = _with_smallest_budget(workload, before)
        if before != setup and fits(before):
            setup = before
    if setup.strategy != asked.strategy:
        for partition_state in dict.fromkeys((True, asked.partition_state)):
            before = replace(setup, strategy=asked.strategy, partition_state=partition_state)
            setup = before if fits(before) else setup
    if setup.activation_budget not in (None, asked.activation_budget):
        setup = _largest_budget(workload, setup, limits)
    return forecast(workload, setup, "proposal")


def _largest_batch(workload: Workload, wanted: int, setup: Setup, limits: tuple[int | None, int | None]) -> Setup:
    fitting, failing = setup, wanted + 1
    while failing - fitting.batch_size > 1:
        # The batch that was asked for first: mostly it is only the budget that had to be small.
        middle = wanted if failing > wanted else (fitting.batch_size + failing) // 2
        tried = replace(setup, batch_size=middle)
        tried = _with_smallest_budget(workload, tried) if setup.activation_budget is not None else tried
        if forecast(workload, tried).fits(*limits):
            fitting = tried
        else:
            failing = middle
    return fitting


def _largest_budget(workload: Workload, setup: Setup, limits: tuple[int | None, int | None]) -> Setup:
    smallest = setup.activation_budget or 1
    whole = needs_of(workload, setup, ends_only=True)
    low, high = -(-smallest // _GRAIN), max(needs.saved for needs in (whole or {}).values()) // _GRAIN
    best = setup
    while low <= high:
        middle = (low + high) // 2
        tried = replace(setup, activation_budget=middle * _GRAIN)
        if forecast(workload, tried).fits(*limits):
            best, low = tried, middle + 1
        else:
            high = middle - 1
    return best
