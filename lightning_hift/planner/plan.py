"""What a run will need, before it runs: bytes by place and kind, traffic, wear, and what would fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_hift.groups.selection import SelectionPolicy
from lightning_hift.planner.forecast import Forecast, forecast
from lightning_hift.planner.made_up_batch import ComputeLoss
from lightning_hift.planner.proposal import propose
from lightning_hift.planner.report import Plan
from lightning_hift.planner.setup import Setup
from lightning_hift.planner.workload import Workload

SUSTAINED_FLOPS = 125e12
"""Assumed: 40 % of the dense bf16 peak of an A100."""


def make_plan(
    model: nn.Module,
    setup: Setup | None = None,
    *,
    optimizer: Callable[[Any], Optimizer] | None = None,
    compute_loss: ComputeLoss | None = None,
    policy: SelectionPolicy | None = None,
    units: Sequence[str | Sequence[str]] | None = None,
    frozen: Sequence[str] | None = None,
    always_active: Sequence[str] | None = None,
    device_memory: int | None = None,
    host_memory: int | None = None,
    link: float = 25e9,
    sustained_flops: float = SUSTAINED_FLOPS,
    compare: bool = True,
) -> Plan:
    """Find out what a run would need, without a GPU, and without memory for weights or activations.

    Args:
        model: On any device, "meta" included; it is not touched.
        setup: The choices of the run; default: those of ``Setup``.
        optimizer: Builds the optimizer from parameters; default: what ``configure_optimizers`` returns, or AdamW.
        compute_loss: Maps a copy of the model without memory, the batch size and the sequence length to a loss, on
            tensors on the device "cpu"; default: found for models that take ``input_ids``, or that have an
            ``example_input_array``.
        policy: See ``attach_engines``. One that trains several groups at once is planned with the most demanding ones.
        units: See ``attach_engines``.
        frozen: See ``attach_engines``.
        always_active: See ``attach_engines``.
        device_memory: Bytes of each device; with it, a setup that does not fit is answered by one that does.
        host_memory: Bytes of each host, likewise.
        link: Bytes per second between host and device, each way.
        sustained_flops: Multiplications and additions per second of the device on this model.
        compare: Also plan full fine-tuning and the other kinds of masters, which takes several times as long.

    Raises:
        ValueError: The grouping does not fit the model; an argument is out of range; the policy does not say how many
            groups train at once.
    """
    for name, value in (("link", link), ("sustained_flops", sustained_flops)):
        if not value > 0:
            raise ValueError(f"Got {name}={value}; it must be above 0.")
    setup = setup or Setup()
    workload = Workload(
        model, optimizer, compute_loss, policy=policy, units=units, frozen=frozen, always_active=always_active
    )
    asked = forecast(workload, setup, "as asked", every_group=True)
    proposal, smallest = None, None
    if not asked.fits(device_memory, host_memory):
        proposal, smallest = propose(workload, asked, device_memory, host_memory)
    changed = [name for name in vars(setup) if proposal and getattr(setup, name) != getattr(proposal.setup, name)]
    return Plan(
        asked,
        sum(p.numel() for p in workload.model.parameters()),
        tuple(unit.name for unit in workload.always_active),
        tuple(_comparison(workload, setup)) if compare else (),
        proposal,
        tuple(changed),
        smallest,
        device_memory,
        host_memory,
        link,
        sustained_flops,
        tuple(workload.notes),
    )


def _comparison(workload: Workload, setup: Setup) -> list[Forecast]:
    plain = replace(setup, activation_budget=None, max_group_numel=None, offload="host", prefetch=True, eight_bit=False)
    everything, method = len(workload.units), workload.policy.name
    true32 = replace(plain, precision="32-true", master_weights="none")
    half = replace(plain, precision="bf16-true")
    rows = {
        "full fine-tuning, fp32": replace(true32, group_size=everything, offload="none"),
        "full fine-tuning, bf16-mixed": replace(
            plain, precision="bf16-mixed", group_size=everything, offload="none", master_weights="none"
        ),
        f"{method}, fp32": true32,
        f"{method}, Mixed^Hi, full masters": replace(half, master_weights="full"),
        f"{method}, Mixed^Hi, split masters": replace(half, master_weights="split"),
        f"{method}, Mixed^Hi, split, 8-bit state": replace(half, master_weights="split", eight_bit=True),
    }
    if setup.devices > 1:
        ddp = replace(setup, strategy="hift_ddp", partition_state=False)
        sharings = {
            f"{method}, hift_ddp": ddp,
            f"{method}, hift_ddp, partition_state": replace(ddp, partition_state=True),
            f"{method}, hift_fsdp": replace(ddp, strategy="hift_fsdp"),
        }
        rows |= {name: other for name, other in sharings.items() if other != setup}
    return [forecast(workload, other, name) for name, other in rows.items()]
