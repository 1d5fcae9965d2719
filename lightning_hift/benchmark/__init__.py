"""Benchmarks and measures of whole runs. Of the package, only the command line imports this."""

from lightning_hift.benchmark.run_measures import RunMeasures

__all__ = ["RunMeasures"]
