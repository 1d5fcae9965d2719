"""Comparisons of whole runs. Nothing else in the package imports this."""

from lightning_hift.benchmark.comparison import FullFineTuningComparison
from lightning_hift.benchmark.fit_report import FitReport

__all__ = ["FitReport", "FullFineTuningComparison"]
