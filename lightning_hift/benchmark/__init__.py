"""Benchmarks and measures of whole runs. Of the package, only the command line imports this."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_hift.benchmark.run_measures import RunMeasures

__all__ = ["RunMeasures"]


def __getattr__(name: str) -> Any:
    # Imported on first use: ``bench`` starts a process for each run, and what some of them do needs no Lightning.
    if name != "RunMeasures":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_hift.benchmark.run_measures import RunMeasures

    return RunMeasures
