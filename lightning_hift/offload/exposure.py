"""How long the compute stream has waited for copies, found out without waiting for it."""

from __future__ import annotations

from collections import deque
from typing import Any


class Exposure:
    """Milliseconds that the compute stream of a device has waited, by step and sweep.

    Events tell when they have happened, so the numbers are those of the last step and sweep for which all is known.
    """

    def __init__(self) -> None:
        self.step_ms = 0.0
        """In the last known step."""
        self.sweep_ms = 0.0
        """In the last known sweep, in all."""
        self.sweep_max_ms = 0.0
        """In its longest step."""
        self._waits: deque[tuple[Any, Any]] = deque(maxlen=256)  # of this step
        self._steps: deque[tuple[list[tuple[Any, Any]], bool]] = deque(maxlen=256)
        self._sweep: list[float] = []

    def add(self, begin: Any, end: Any) -> None:
        """The stream has waited between two events that measure time."""
        self._waits.append((begin, end))

    def end_step(self, ends_sweep: bool = False) -> None:
        """The waits from now on belong to the next step."""
        self._steps.append(([*self._waits], ends_sweep))
        self._waits.clear()
        self.update()

    def update(self) -> Exposure:
        """Look at what has become known."""
        while self._steps and all(end.query() for _, end in self._steps[0][0]):
            waits, ends_sweep = self._steps.popleft()
            self.step_ms = sum(begin.elapsed_time(end) for begin, end in waits)
            self._sweep.append(self.step_ms)
            if ends_sweep:
                self.sweep_ms, self.sweep_max_ms = sum(self._sweep), max(self._sweep)
                self._sweep = []
        return self
