"""Comparisons of whole runs. Nothing else in the package imports this."""

from lightning_hift.benchmark.comparison import FullFineTuningComparison

__all__ = ["FullFineTuningComparison"]
