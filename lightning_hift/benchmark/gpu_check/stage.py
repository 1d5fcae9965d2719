"""Stages, their cells, and the file that each stage keeps."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from lightning_hift.benchmark.cell_process import MEASURED, outcome_of
from lightning_hift.benchmark.gpu_check.measuring import DeviceMeter
from lightning_hift.benchmark.gpu_check.sizes import Sizes
from lightning_hift.benchmark.kinds import Skipped
from lightning_hift.benchmark.records import Record

NOT_MEASURED, NO_TIME = "not measured", "no time left"

Measure = Callable[[], Mapping[str, Any]]
"""Measures one cell; returns values by name."""


class Budget:
    """Seconds for the whole check.

    Args:
        seconds: From now on.
        clock: Tells the time in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left; below 0: it is over."""
        return self._end - self._clock()

    def check(self) -> None:
        """Stop what takes too long.

        Raises:
            Skipped: No time is left.
        """
        if self.left <= 0:
            raise Skipped(NO_TIME)


@dataclass(frozen=True)
class Context:
    """What all stages share.

    Args:
        device: Where to train.
        sizes: What to measure.
        budget: Seconds; long cells check it.
        folder: For results.
        seed: Of weights and batches.
    """

    device: torch.device
    sizes: Sizes
    budget: Budget
    folder: Path
    seed: int = 0
    meter: DeviceMeter = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "meter", DeviceMeter(self.device))


class Stage(Protocol):
    """Some cells, which are measured in their order, and what they share."""

    @property
    def config(self) -> Mapping[str, Any]:
        """What was told to it, for the passport."""

    def cells(self) -> Mapping[str, Measure]:
        """By name; nothing is measured or built yet."""

    def close(self) -> None:
        """Free what the cells share. Also called if some were not measured."""


class StageFile:
    """The JSON file of a stage: passport, and the outcome of each cell. It is whole at any time.

    Args:
        folder: Where it is, as ``NAME.json``.
        name: Of the stage.
        cells: Names of all its cells.
        passport: What it is measured on, and what was told to it.
    """

    def __init__(self, folder: Path, name: str, cells: Iterable[str], passport: Mapping[str, Any]) -> None:
        self.path = folder / f"{name}.json"
        self.cells: dict[str, Record] = {cell: {"status": NOT_MEASURED} for cell in cells}
        self._content = {"stage": name, "passport": passport, "cells": self.cells}
        self.write()

    def write(self) -> None:
        """Replace the file as a whole."""
        part = self.path.with_suffix(".part")
        with part.open("w") as file:
            json.dump(self._content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path)


def measure_cells(stage: Stage, file: StageFile, context: Context, say: Callable[[str], None]) -> None:
    """Measure one cell after the other; whatever goes wrong is its outcome.

    Args:
        stage: Its cells.
        file: Where each outcome is written at once.
        context: With the time that is left.
        say: Shows a line.
    """
    for name, measure in stage.cells().items():
        started, begin = now(), time.perf_counter()
        outcome = outcome_of(partial(_in_time, measure, context.budget))
        seconds = round(time.perf_counter() - begin, 3)
        file.cells[name] = {**outcome, "started": started, "seconds": seconds}
        file.write()
        if outcome.get("reason") != NO_TIME:
            context.meter.free()  # an error had kept its tensors alive until here
        why = f", {outcome['reason']}" if "reason" in outcome else ""
        say(f"{file.path.stem} | {name}: {outcome['status']}{why} ({seconds:.1f} s, {context.budget.left:.0f} s left)")
    stage.close()


def _in_time(measure: Measure, budget: Budget) -> Mapping[str, Any]:
    budget.check()
    return measure()


def is_right(cells: Sequence[Record]) -> bool:
    """Whether all of these were measured, and none of them found a difference."""
    return all(cell["status"] == MEASURED and cell["measured"].get("equal", True) for cell in cells)


def now() -> str:
    """The time of day, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
