"""Benchmarks and comparisons of whole runs. Only the command line imports this."""

from lightning_hift.benchmark.comparison import FullFineTuningComparison
from lightning_hift.benchmark.run_measures import RunMeasures

__all__ = ["FullFineTuningComparison", "RunMeasures"]
