"""Records of many runs, put side by side: means over seeds, and ratios with the baseline of the same task and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from lightning_hift.benchmark.matrix import Benchmark, Cell
from lightning_hift.benchmark.records import Record
from lightning_hift.benchmark.runner import clock_of, has_score, is_loss, score_of

SEED = "seed"


@dataclass(frozen=True)
class Line:
    """Runs that differ in the seed only.

    Args:
        values: Name of the value on each axis but ``seed``.
        metric: The metric that counts.
        records: Those that were measured, by seed.
        baselines: Those that they are compared with, by seed; empty if this is what others are compared with.
        cells: How many runs there should be.
    """

    values: dict[str, Any]
    metric: str
    records: dict[Any, Record]
    baselines: dict[Any, Record]
    cells: int

    @property
    def scores(self) -> list[float]:
        """By seed: percentages, or a loss as it is."""
        return [_in_percent(score_of(record, self.metric), self.metric) for record in self.records.values()]

    @property
    def mean(self) -> float:
        """Of the scores."""
        return mean(self.scores)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds, if there are several."""
        return stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def gain(self) -> float | None:
        """Mean over seeds of the difference from the baseline; positive is better."""
        sign = -1 if is_loss(self.metric) else 1
        pairs = [
            sign
            * (
                _in_percent(score_of(own, self.metric), self.metric)
                - _in_percent(score_of(base, self.metric), self.metric)
            )
            for own, base in self._pairs()
        ]
        return mean(pairs) if pairs else None

    def ratio(self, measure: str) -> float | None:
        """Mean over seeds of a measure over the baseline's. Times go by the right clock."""
        found = []
        for own, base in self._pairs():
            above, below = (value_of(record, measure) for record in (own, base))
            if above is not None and below:
                found.append(above / below)
        return mean(found) if found else None

    def value(self, measure: str) -> float | None:
        """Mean over seeds of a measure."""
        found = [value for record in self.records.values() if (value := value_of(record, measure)) is not None]
        return mean(found) if found else None

    def _pairs(self) -> list[tuple[Record, Record]]:
        return [(record, self.baselines[seed]) for seed, record in self.records.items() if seed in self.baselines]


def value_of(record: Record, measure: str) -> float | None:
    """A measured value by name; one in a mapping by its dotted name."""
    clock = clock_of(record)
    by_clock = {"time": clock, "time_per_step": f"{clock}_per_step", "tokens_per_second": f"tokens_per_{clock[:-1]}"}
    name = by_clock.get(measure, measure)
    value: Any = record["measured"]
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return None if value is None else float(value)


def summarize(benchmark: Benchmark, cells: Sequence[Cell], records: Mapping[str, Record]) -> list[Line]:
    """One line for each cell but for its seed, in the order of the cells; those of which nothing was measured, too."""
    by_line: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.trial is None:
            by_line.setdefault(str(_without_seed(cell.values)), []).append(cell)
    lines = []
    for alike in by_line.values():
        measured, baselines = {}, {}
        for cell in alike:
            seed, record = cell.values.get(SEED), records.get(cell.key)
            metric = benchmark.metric_of(cell.values)
            if record is not None and has_score(record, metric):
                measured[seed] = record
            base = Cell(benchmark.baseline_of(cell.values))
            other = records.get(base.key)
            if benchmark.baseline and base.key != cell.key and other is not None and has_score(other, metric):
                baselines[seed] = other
        lines.append(Line(_without_seed(alike[0].values), metric, measured, baselines, len(alike)))
    return lines


def _without_seed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {axis: value for axis, value in values.items() if axis != SEED}


def _in_percent(score: float, metric: str) -> float:
    return score if is_loss(metric) else 100 * score
