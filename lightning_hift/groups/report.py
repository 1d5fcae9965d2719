"""What a user is told about layer groups: a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_hift.groups.grouping import LayerGroup
from lightning_hift.table import format_bytes, format_table


def describe_groups(
    groups: Sequence[LayerGroup],
    always_active: Sequence[Any] = (),
    most_groups: int | None = 1,
    lr_scales: Sequence[float] = (),
) -> str:
    """A table of layer groups: index, units, parameters, bytes, share of the whole, and learning rate if not all alike.

    Args:
        groups: They take turns.
        always_active: Units that train at every step.
        most_groups: How many groups train at once, at most; ``None``: it depends.
        lr_scales: By what the learning rate of each group is multiplied.
    """
    total = sum(part.numel for part in (*groups, *always_active)) or 1

    def row(label: object, part: Any) -> list[object]:
        return [label, part.name, f"{part.numel:,}", format_bytes(part.nbytes), f"{100 * part.numel / total:.2f} %"]

    header = ["group", "units", "parameters", "bytes", "share"]
    rows = [row(group.index, group) for group in groups] + [row("all", unit) for unit in always_active]
    if set(lr_scales) - {1.0}:
        header.append("learning rate")
        scales = [*lr_scales, *(1.0 for _ in always_active)]
        rows = [[*cells, f"x {scale:.3g}"] for cells, scale in zip(rows, scales, strict=True)]
    table = format_table(header, rows)
    if most_groups is None:
        return table
    largest = sorted((group.numel for group in groups), reverse=True)[:most_groups]
    trained = sum(largest) + sum(unit.numel for unit in always_active)
    return (
        f"{table}\nAt most {trained:,} of {total:,} parameters train at once: {100 * (1 - trained / total):.2f} % less"
        " than in full fine-tuning."
    )
