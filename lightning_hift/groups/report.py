"""What a user is told about layer groups: a table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from lightning_hift.groups.grouping import LayerGroup, LayerUnit
from lightning_hift.table import format_bytes, format_table


def describe_groups(
    groups: Sequence[LayerGroup],
    always_active: Sequence[LayerUnit] = (),
    most_groups: int | None = 1,
    lr_scales: Sequence[float] = (),
) -> str:
    """A table of layer groups: index, units, parameters, bytes, share of the whole, and learning rate if not all alike.

    ``depth`` says through how many of all layer units the backward pass goes for each: down to the lowest that
    trains then.

    Args:
        groups: They take turns.
        always_active: Units that train at every step; what they cost in backward depth is said below the table.
        most_groups: How many groups train at once, at most; ``None``: it depends.
        lr_scales: By what the learning rate of each group is multiplied.
    """
    total = sum(unit.numel for unit in (*(unit for group in groups for unit in group.units), *always_active)) or 1
    own, together, count = _backward_depths(groups, always_active)

    def row(label: object, part: Any, depth: int) -> list[object]:
        share = f"{100 * part.numel / total:.2f} %"
        return [label, part.name, f"{part.numel:,}", format_bytes(part.nbytes), share, f"{depth}/{count}"]

    header = ["group", "units", "parameters", "bytes", "share", "depth"]
    rows = [row(group.index, group, depth) for group, depth in zip(groups, together, strict=True)]
    rows += [row("all", unit, count - unit.place) for unit in always_active]
    if set(lr_scales) - {1.0}:
        header.append("lr")
        scales = [*lr_scales, *(1.0 for _ in always_active)]
        rows = [[*cells, f"x {scale:.3g}"] for cells, scale in zip(rows, scales, strict=True)]
    table = format_table(header, rows)
    if min(own, default=0) < min(together, default=0):
        deepest = min(always_active, key=lambda unit: unit.place).name
        table += (
            f"\nBackward passes go through {mean(together):.1f} of {count} units on average, and through"
            f" {mean(own):.1f} without {deepest} always active."
        )
    if most_groups is None:
        return table
    largest = sorted((group.numel for group in groups), reverse=True)[:most_groups]
    trained = sum(largest) + sum(unit.numel for unit in always_active)
    return (
        f"{table}\nAt most {trained:,} of {total:,} parameters train at once: {100 * (1 - trained / total):.2f} % less"
        " than in full fine-tuning."
    )


def _backward_depths(
    groups: Sequence[LayerGroup], always_active: Sequence[LayerUnit]
) -> tuple[list[int], list[int], int]:
    """Units above the lowest that trains, itself included, for each group alone and with others; and those of all."""
    lowest = [min(unit.place for unit in group.units) for group in groups]
    others = [unit.place for unit in always_active]
    count = 1 + max([unit.place for group in groups for unit in group.units] + others, default=0)
    return [count - place for place in lowest], [count - min([place, *others]) for place in lowest], count
