"""``lightning-hift``, or ``python -m lightning_hift``: the command line of Lightning with HiFT, and benchmarks."""

import sys


def main() -> None:
    """Entry point of ``lightning-hift``."""
    if sys.argv[1:2] == ["bench"]:
        from lightning_hift.benchmark.command import main as run_benchmark

        run_benchmark(sys.argv[2:])
    else:
        from lightning_hift.cli import main as run_cli

        run_cli()


if __name__ == "__main__":
    main()
