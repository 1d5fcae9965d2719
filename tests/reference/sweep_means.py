"""The learning rate of each step under HiFT in the plainest form: the mean of a sweep."""

from __future__ import annotations

import math
from collections.abc import Callable


def sweep_means(lr_at: Callable[[int], float], per_sweep: int, end: float = math.inf) -> Callable[[int], float]:
    """From the learning rate of plain training at each step to that of HiFT.

    ``end`` is the length of the run, for schedules that end with it; others are read to the end of the sweep.
    """

    def held(step: int) -> float:
        start = step - step % per_sweep
        values = [lr_at(t) for t in range(start, start + per_sweep) if t < end]
        return values[0] if len(set(values)) == 1 else math.fsum(values) / len(values)

    return held
