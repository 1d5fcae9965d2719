"""Benchmarks and comparisons of whole runs. Only the command line imports this."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_hift.benchmark.comparison import FullFineTuningComparison
    from lightning_hift.benchmark.run_measures import RunMeasures

__all__ = ["FullFineTuningComparison", "RunMeasures"]

# Imported on first use: ``bench`` starts a process for each run, and what some of them do needs no Lightning.
_NEEDS_LIGHTNING = {"FullFineTuningComparison": "comparison", "RunMeasures": "run_measures"}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_LIGHTNING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NEEDS_LIGHTNING[name]}"), name)
