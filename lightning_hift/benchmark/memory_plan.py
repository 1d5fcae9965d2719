"""What the planner says of each row, and what it is asked to choose: layers, batch size, activation budget."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch

from lightning_hift.benchmark.memory_rows import MODELS, Row
from lightning_hift.planner.forecast import forecast, smallest_budget
from lightning_hift.planner.memory import CONTEXT_BYTES
from lightning_hift.planner.setup import Setup
from lightning_hift.planner.workload import Workload
from lightning_hift.tasks import CausalLM

_GRAIN = 2**26  # activation budgets are chosen in steps of 64 MiB
_SPARE = 1.05  # above the planner's smallest budget: a run that is given too little is refused


@dataclass(frozen=True)
class PlannedRow:
    """A row with nothing left open.

    Args:
        row: With its batch size and activation budget.
        layers: Blocks of the model.
        device: Bytes on the device at the peak, driver included; ``None``: not planned.
        host: Bytes in host memory.
    """

    row: Row
    layers: int
    device: int | None = None
    host: int | None = None

    @property
    def allocated(self) -> int | None:
        """Bytes of tensors at the peak."""
        return None if self.device is None else self.device - CONTEXT_BYTES

    @property
    def bytes(self) -> dict[str, int | None]:
        """All that is planned, for the record."""
        return {"allocated": self.allocated, "device": self.device, "host": self.host}

    @property
    def config(self) -> dict[str, Any]:
        """For the record."""
        found = asdict(self.row)
        kept = ("what", "kind", "model", "setup", "chunk_tokens", "cap")
        return {**{key: found[key] for key in kept}, "layers": self.layers}


def plan_row(row: Row, device_bytes: int | None) -> PlannedRow:
    """Fill in what ``row`` leaves open.

    Args:
        row: The row.
        device_bytes: Of the device; ``None``: unknown, and large enough for everything.
    """
    if row.kind == "check":
        return PlannedRow(row, 0)
    layers = MODELS[row.model]["num_hidden_layers"]
    if row.like_full and device_bytes is not None:
        full = replace(row.setup, master_weights="none", offload="none", group_size=10**6)
        while layers > 1 and forecast(_workload(row.model, layers, None), full).peak > 0.95 * device_bytes:
            layers -= 1
    workload, setup = _workload(row.model, layers, row.chunk_tokens), row.setup
    if row.largest_batch and row.cap is not None:
        while setup.batch_size > 1 and forecast(workload, setup).peak > row.cap:
            setup = replace(setup, batch_size=setup.batch_size - 1)
    if row.budget_for is not None:
        setup = _largest_budget(workload, setup, row.budget_for)
    row = replace(row, setup=setup)
    if row.kind == "cpu_offload":  # gradients leave while the backward pass is on: nothing that is planned here
        return PlannedRow(row, layers)
    found = forecast(workload, setup)
    return PlannedRow(row, layers, found.peak, found.host_bytes)


@cache
def _workload(model: str, layers: int, chunk_tokens: int | None) -> Workload:
    module = CausalLM(
        model_type="llama",
        model_config={**MODELS[model], "num_hidden_layers": layers},
        optimizer=lambda parameters: torch.optim.AdamW(parameters, fused=True),
        loss_chunk_tokens=chunk_tokens,
    )
    with torch.device("meta"):
        module.configure_model()
    return Workload(module)


def _largest_budget(workload: Workload, setup: Setup, device_bytes: int) -> Setup:
    """The largest activation budget that fits, or the smallest that works."""
    smallest = smallest_budget(workload, setup)
    assert smallest is not None, "models of this benchmark have blocks and activations"
    best = replace(setup, activation_budget=round(_SPARE * smallest))
    batch = (setup.precision, setup.group_size, setup.batch_size, setup.sequence_length)
    enough = max(needs.saved for needs in (workload.needs(*batch, ends_only=True) or {}).values())
    for budget in range(round(_SPARE * smallest) + _GRAIN, enough, _GRAIN):
        larger = replace(setup, activation_budget=budget)
        if forecast(workload, larger).peak > device_bytes:
            break
        best = larger
    return best
