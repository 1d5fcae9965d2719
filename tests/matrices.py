"""Combinations of what the tests vary: a part of them in the ordinary suite, the rest slow."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def crossed(*axes: Iterable[Any]) -> list[Any]:
    """All combinations of one value from each axis, for ``pytest.mark.parametrize``.

    Ordinary are a part of them, in which the value from the last axis goes round with the others: of two axes, each
    value is there; of three, each pair of values, if the last axis is the shortest. The others are marked as slow.
    """
    values = [list(axis) for axis in axes]
    return [
        pytest.param(*(axis[i] for axis, i in zip(values, place, strict=True)), marks=marks)
        for place in product(*(range(len(axis)) for axis in values))
        for marks in [[] if sum(place[:-1]) % len(values[-1]) == place[-1] else [pytest.mark.slow]]
    ]
