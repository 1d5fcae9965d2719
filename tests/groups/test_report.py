"""The table of layer groups."""

from __future__ import annotations

import pytest

from lightning_hift.groups.grouping import find_layer_units, group_units
from lightning_hift.groups.policies import HFT
from lightning_hift.groups.report import describe_groups
from tests.architectures import NanoGPT


def backward(table: str) -> list[str]:
    """The column that says how deep the backward pass goes."""
    header, _, *rows = table.splitlines()
    end = header.index("depth") + len("depth")
    return [row[:end].split()[-1] for row in rows if "/" in row[:end]]


@pytest.mark.parametrize(
    ("always", "size", "depths", "cost"),
    [
        ([], 1, "5/5 4/5 3/5 2/5 1/5", None),
        ([4], 1, "5/5 4/5 3/5 2/5 1/5", None),
        ([], 2, "5/5 3/5 1/5", None),
        (
            [0, 4],
            1,
            "5/5 5/5 5/5 5/5 1/5",
            "5.0 of 5 units on average, and through 3.0 without embedding always",
        ),
        ([2], 1, "5/5 4/5 3/5 3/5 3/5", "3.8 of 5 units on average, and through 3.0 without transformer.h.1 always"),
    ],
)
def test_depth_of_the_backward_pass(always: list[int], size: int, depths: str, cost: str | None) -> None:
    units = find_layer_units(NanoGPT())
    fixed = [units[i] for i in always]
    table = describe_groups(group_units([unit for unit in units if unit not in fixed], size), fixed)
    assert backward(table) == depths.split()
    assert (cost in table) if cost else "on average" not in table


def test_parts_of_a_unit_are_as_deep_as_it() -> None:
    from lightning_hift.engine.optimizer_groups import _split

    unit = find_layer_units(NanoGPT())[1]
    assert {part.place for part in _split(unit, HFT())} == {unit.place} == {1}
