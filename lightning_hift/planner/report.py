"""A plan: what was found, and how it is told in plain text and Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_hift.planner.forecast import Forecast, GroupPlan
from lightning_hift.table import format_bytes, format_table

_KINDS = ("weights", "gradients", "state", "masters", "activations")
_EXCHANGE = "exchange"  # with several devices
# By whether weights are sharded.
_EXCHANGES = {
    False: "Exchange: copies of small gradients, which are averaged together. Sent: by each device, in a ring. A host"
    " keeps the state\nof all its processes.",
    True: "Exchange: whole weights of two blocks and of all that is in no block, and whole gradients before they are"
    " scattered. Sent:\nby each device, in a ring, for one micro-batch. A host keeps the shards of all its processes.",
}


@dataclass(frozen=True)
class Plan:
    """What ``make_plan`` found; printed, it is a report.

    Args:
        forecast: Of the setup that was asked for, every group.
        parameters: Of the model, frozen ones included.
        always_active: Names of the units that train at every step.
        comparison: Other ways to train the same model on the same batch.
        proposal: The nearest setup that fits, if the one that was asked for does not.
        changed: Names of the fields in which the proposal differs.
        smallest: The best that could be found, if nothing fits.
        device_memory: Bytes of each device, if a limit was given.
        host_memory: Bytes of each host, likewise.
        link: Bytes per second between host and device, each way.
        sustained_flops: Multiplications and additions per second.
        notes: What the plan leaves out or assumes.
    """

    forecast: Forecast
    parameters: int
    always_active: tuple[str, ...]
    comparison: tuple[Forecast, ...]
    proposal: Forecast | None
    changed: tuple[str, ...]
    smallest: Forecast | None
    device_memory: int | None
    host_memory: int | None
    link: float
    sustained_flops: float
    notes: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool:
        """Whether the setup that was asked for fits."""
        return self.forecast.fits(self.device_memory, self.host_memory)

    @property
    def mean_flops_per_token(self) -> float:
        """Over a sweep."""
        groups = self.forecast.groups.values()
        return sum(group.flops_per_token for group in groups) / len(groups)

    def seconds(self, group: GroupPlan) -> float:
        """Time of the transfer of a group's state, each way; both directions go at once."""
        return group.traffic / self.link

    def hiding_tokens(self, group: GroupPlan) -> float:
        """Tokens per step from which on the transfer of this group is hidden by a mean step's computing."""
        return self.seconds(group) * self.sustained_flops / self.mean_flops_per_token

    @property
    def mean_sent(self) -> float:
        """Bytes that each device sends to others in a step, over a sweep."""
        groups = self.forecast.groups.values()
        return sum(group.sent for group in groups) / len(groups)

    @property
    def mean_exchanged(self) -> float:
        """Bytes of the tensors that are exchanged in a step, over a sweep."""
        groups = self.forecast.groups.values()
        return sum(group.exchanged for group in groups) / len(groups)

    @property
    def written_per_1000_steps(self) -> float:
        """Bytes that 1000 steps write on each host, to the disk if the state is there: each releases one group's."""
        groups = self.forecast.groups.values()
        return 1000 * sum(group.host_traffic for group in groups) / len(groups)

    def __str__(self) -> str:
        return format_plan(self)


def format_plan(plan: Plan) -> str:
    """The whole plan in plain text: setup, groups, sums, comparison, verdict, notes."""
    parts = [
        _heading(plan),
        _groups(plan),
        _sums(plan),
        _comparison(plan),
        _verdict(plan),
        "\n".join(f"Note: {note}" for note in plan.notes),
    ]
    return "\n\n".join(part for part in parts if part)


def write_markdown(plan: Plan, path: str | Path) -> None:
    """Write the plan to a file, under the file's name as the title."""
    Path(path).write_text(f"# Plan for {Path(path).stem}\n\n```text\n{format_plan(plan)}\n```\n")


def _heading(plan: Plan) -> str:
    setup = plan.forecast.setup
    lines = [
        f"{plan.parameters:,} parameters, {len(plan.forecast.groups)} layer groups, precision {setup.precision},"
        f" masters: {setup.master_weights}, offload: {setup.offload},"
        f" prefetch: {'yes' if setup.prefetch else 'no'}",
        f"batch {setup.batch_size} x {setup.sequence_length} tokens,"
        f" activation budget: {format_bytes(setup.activation_budget) if setup.activation_budget else 'none'},"
        f" sliced above: {f'{setup.max_group_numel:,} elements' if setup.max_group_numel else 'never'}",
    ]
    if _is_shared(plan):
        partition = ", partition_state" if setup.partition_state else ""
        lines.append(
            f"{setup.strategy}{partition} on {setup.devices} devices, {setup.processes_per_host} on each of"
            f" {setup.hosts} host(s); the batch and the rows below are those of each device"
        )
    if plan.always_active:
        lines.append(f"always active, in every row: {', '.join(plan.always_active)}")
    return "\n".join(lines)


def _is_shared(plan: Plan) -> bool:
    return plan.forecast.setup.devices > 1


def _groups(plan: Plan) -> str:
    kinds, sent = ((*_KINDS, _EXCHANGE), ["sent"]) if _is_shared(plan) else (_KINDS, [])
    header = ["group", "units", "parameters", *kinds, "at step", "peak", *sent, "transfer", "time", "hidden from"]
    rows = [
        [
            index,
            group.name,
            f"{group.numel:,}",
            *("unknown" if getattr(group, k) is None else format_bytes(getattr(group, k)) for k in kinds),
            format_bytes(group.step),
            format_bytes(group.peak),
            *(format_bytes(getattr(group, k)) for k in sent),
            format_bytes(group.traffic),
            f"{1000 * plan.seconds(group):.1f} ms",
            f"{plan.hiding_tokens(group):.0f} tokens",
        ]
        for index, group in plan.forecast.groups.items()
    ]
    return format_table(header, rows)


def _sums(plan: Plan) -> str:
    overhead = next(iter(plan.forecast.groups.values())).overhead
    where = " on each host" if _is_shared(plan) else ""
    where += "" if plan.forecast.setup.offload == "disk" else " if it were on disk"
    written = f"{plan.written_per_1000_steps / 1e12:.2f} TB"
    each = "each " if _is_shared(plan) else ""
    rows = [
        [
            f"{each}device, largest peak" + ("" if plan.forecast.is_complete else " without activations"),
            format_bytes(plan.forecast.peak),
        ],
        ["  of it driver and CUDA context (assumed)", format_bytes(overhead)],
        [f"{each}host", format_bytes(plan.forecast.host_bytes)],
        [f"{each}disk", format_bytes(plan.forecast.disk_bytes)],
        [f"written per 1000 steps{where}", written],
    ]
    if _is_shared(plan):
        rows.append(["tensors exchanged per step (mean of a sweep)", format_bytes(plan.mean_exchanged)])
        rows.append(["  sent for it by each device", format_bytes(plan.mean_sent)])
    kinds = "six" if _is_shared(plan) else "five"
    rule = (
        f"Transfers go both ways at once, each at {plan.link / 1e9:g} GB/s. They are hidden behind a step of as many"
        f" tokens as the last column says, at\n{plan.sustained_flops / 1e12:g} TFLOP/s and"
        f" {plan.mean_flops_per_token / 1e9:.3g} GFLOP per token (mean of a sweep). The peak is what the driver holds"
        f" plus the larger of two sums:\nthe {kinds} kinds (activations: what they need beyond the gradients), or all"
        " that is there at the optimizer step."
    )
    if _is_shared(plan):
        rule += "\n" + _EXCHANGES[plan.forecast.setup.is_sharded]
    return format_table(["place", "bytes"], rows) + "\n" + rule


def _comparison(plan: Plan) -> str:
    if not plan.comparison:
        return ""
    sent = ["sent at most"] if _is_shared(plan) else []
    header = ["same batch, other ways", "device", "host", *sent, *_fit_header(plan)]
    return format_table(header, [_row(plan, forecast) for forecast in (plan.forecast, *plan.comparison)])


def _fit_header(plan: Plan) -> list[str]:
    return ["fits"] if plan.device_memory or plan.host_memory else []


def _row(plan: Plan, forecast: Forecast) -> list[str]:
    fits = "no" if not forecast.fits(plan.device_memory, plan.host_memory) else "yes"
    device = format_bytes(forecast.peak)
    if not forecast.is_complete:
        fits, device = fits.replace("yes", "unknown"), f"{device} and activations"
    sent = [format_bytes(forecast.most_sent)] if _is_shared(plan) else []
    return [forecast.name, device, format_bytes(forecast.host_bytes), *sent, *([fits] if _fit_header(plan) else [])]


def _verdict(plan: Plan) -> str:
    the = "each" if _is_shared(plan) else "the"
    limits = {"device": plan.device_memory, "host": plan.host_memory}
    room = " and ".join(f"{format_bytes(n)} on {the} {where}" for where, n in limits.items() if n is not None)
    if not room:
        return ""
    if plan.fits:
        return f"Fits {room}." if plan.forecast.is_complete else f"Fits {room} without its activations, not known here."
    asked, found = plan.forecast, plan.proposal
    needs = f"{format_bytes(asked.peak)} on {the} device and {format_bytes(asked.host_bytes)} on {the} host"
    verdict = f"Does not fit {room}: it needs {needs}."
    if found is not None:
        changes = ", ".join(f"{name}={_value(name, getattr(found.setup, name))}" for name in plan.changed)
        sent = f", sending at most {format_bytes(found.most_sent)} per step" if _is_shared(plan) else ""
        return (
            f"{verdict}\nThis fits, with {format_bytes(found.peak)} on {the} device, {format_bytes(found.host_bytes)}"
            f" on {the} host and {format_bytes(found.disk_bytes)} on {the} disk{sent}: {changes}."
        )
    assert plan.smallest is not None
    return (
        f"{verdict}\nNothing that was tried fits. The smallest that works needs {format_bytes(plan.smallest.peak)} on"
        f" {the} device and {format_bytes(plan.smallest.host_bytes)} on {the} host, with batch_size=1, every block"
        " recomputed, and 16-bit weights."
    )


def _value(name: str, value: Any) -> str:
    return f"{value / 2**30:g}GiB" if name == "activation_budget" and value else str(value)
