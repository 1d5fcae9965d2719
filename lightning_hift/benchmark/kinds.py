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


_HERE = "lightning_hift.benchmark"


class Kind(NamedTuple):
    """Where the functions of a kind are, as ``module:function``.

    Args:
        run: Makes one run, in a process of its own; raises ``Skipped`` where something that it needs is missing.
        report: Writes all files of the report, and returns their paths.
        plan: Says what a run needs.
        apart: Whether each run has a process of its own; arithmetic does not need one.
    """

    run: str
    report: str = f"{_HERE}.report:write_report"
    plan: str | None = None
    apart: bool = True


class Skipped(Exception):
    """A run cannot be made here; the message says why."""


KINDS = {
    "fit": Kind(f"{_HERE}.fit_cell:run", plan=f"{_HERE}.fit_cell:plan"),
    "speed": Kind(f"{_HERE}.speed:run", f"{_HERE}.speed:write_report"),
    "data_parallel": Kind(f"{_HERE}.data_parallel:run", f"{_HERE}.data_parallel:write_report"),
    "memory": Kind(f"{_HERE}.memory:run", f"{_HERE}.memory_report:write_report", plan=f"{_HERE}.memory:plan"),
    "paper_memory": Kind(f"{_HERE}.paper_memory:run", f"{_HERE}.paper_memory:write_report", apart=False),
}


def kind_of(name: str) -> Kind:
    """A kind by its name; or one of your own by the place of its ``Run``, such as ``"my_module:run"``.

    Raises:
        ValueError: There is none of this name.
    """
    if name in KINDS:
        return KINDS[name]
    if ":" in name:
        return Kind(name)
    raise ValueError(
        f"Got kind={name!r}; choose one of {', '.join(map(repr, KINDS))}, or name a function of your own, as"
        " module:function."
    )


def run_function(kind: str) -> Run:
    """The function that makes one run."""
    found: Run = _load(kind_of(kind).run)
    return found


def report_function(kind: str) -> Report:
    """The function that writes the report, and returns the paths of its files."""
    found: Report = _load(kind_of(kind).report)
    return found


def plan_function(kind: str) -> Plan | None:
    """The function that plans a run, if there is one."""
    place = kind_of(kind).plan
    return None if place is None else _load(place)


def check_options(options: Mapping[str, Any], known: Sequence[str]) -> None:
    """For a ``Run`` that does not read its options with a command line's parser.

    Raises:
        ValueError: An option is unknown.
    """
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"Got options {', '.join(unknown)}; there are {', '.join(known)}.")


def _load(place: str) -> Any:
    module, name = place.split(":")
    return getattr(import_module(module), name)
