"""What a run of a benchmark can do: each kind has functions that make one run, plan it, and write the report of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from lightning_hift.benchmark.matrix import Benchmark, Cell
from lightning_hift.benchmark.records import Record

Run = Callable[[Sequence[str], Mapping[str, Any], Path], Mapping[str, Any]]
"""Takes files of configuration, options by dotted key, and an empty folder; returns what was measured by name."""
Report = Callable[[Benchmark, Sequence[Cell], Mapping[str, Mapping[str, Record]]], list[Path]]
"""Takes the cells, and the records that there are by device and by ``Cell.key``; writes all files of the report."""
Planned = Mapping[str, int | None]
"""Bytes on the device, ``"device"``, and on the host, ``"host"``."""
Plan = Callable[[Sequence[str], Mapping[str, Any], Path], Planned]
"""Takes what ``Run`` takes."""


class Kind(NamedTuple):
    """Where the functions of a kind are, as ``module:function`` below this package.

    Args:
        run: Makes one run, in a process of its own; raises ``Skipped`` where something that it needs is missing.
        report: Writes all files of the report, and returns their paths.
        plan: Says what a run needs.
    """

    run: str
    report: str = "report:write_report"
    plan: str | None = None


class Skipped(Exception):
    """A run cannot be made here; the message says why."""


KINDS = {
    "fit": Kind("fit_cell:run", plan="fit_cell:plan"),
}


def check_kind(kind: str) -> None:
    """Refuse a kind that does not exist.

    Raises:
        ValueError: It does not.
    """
    if kind not in KINDS:
        raise ValueError(f"Got kind={kind!r}; choose one of {', '.join(map(repr, KINDS))}.")


def run_function(kind: str) -> Run:
    """The function that makes one run."""
    check_kind(kind)
    found: Run = _load(KINDS[kind].run)
    return found


def report_function(kind: str) -> Report:
    """The function that writes the report, and returns the paths of its files."""
    check_kind(kind)
    found: Report = _load(KINDS[kind].report)
    return found


def plan_function(kind: str) -> Plan | None:
    """The function that plans a run, if there is one."""
    check_kind(kind)
    place = KINDS[kind].plan
    return None if place is None else _load(place)


def _load(place: str) -> Any:
    module, name = place.split(":")
    return getattr(import_module(f"lightning_hift.benchmark.{module}"), name)
