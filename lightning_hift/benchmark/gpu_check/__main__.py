"""Command line: ``run`` measures and writes JSON, ``report`` makes tables and pictures of it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_hift.benchmark.gpu_check.copies import Copies
from lightning_hift.benchmark.gpu_check.correctness import Correctness
from lightning_hift.benchmark.gpu_check.sizes import LARGE, SMALL
from lightning_hift.benchmark.gpu_check.stage import Budget, Context, Stage, StageFile, is_right, measure_cells, now
from lightning_hift.benchmark.gpu_check.training import LargeModel
from lightning_hift.benchmark.passport import make_passport

STAGES = ("correctness", "copies", *LARGE.models)
_SECONDS = 540
_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it, cuBLAS is not deterministic
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns 0 if every run of the stage ``correctness`` came out right and no cell failed, 1 if not.

    What does not fit the device, or had no time outside of that stage, is no failure.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    os.environ |= {name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()}
    try:
        if options.command == "report":
            from lightning_hift.benchmark.gpu_check.report import write_report

            print("\n".join(f"Written: {path}" for path in write_report(options.folder)))
            return 0
        device = find_device(options.device, options.small)
        options.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sizes = SMALL if options.small else LARGE
    budget = Budget(options.budget)
    return 0 if run_check(Context(device, sizes, budget, options.output), options.stages) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lightning_hift.benchmark.gpu_check", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, the most important first, and write JSON")
    run.add_argument("--device", help="as torch names it, such as cuda or cpu; default: cuda")
    run.add_argument("--small", action="store_true", help="tiny models, on any device: proves the program, no number")
    run.add_argument("--output", type=Path, default=Path("gpu_check"), help="folder of results, which are replaced")
    run.add_argument("--budget", type=float, default=_SECONDS, help="seconds; what has no time left is skipped")
    run.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all")
    report = commands.add_parser("report", help="write report.md and pictures beside the JSON of a run")
    report.add_argument("folder", type=Path)
    return parser


def find_device(name: str | None, small: bool) -> torch.device:
    """The device of this name; without one, CUDA's.

    Raises:
        ValueError: torch has no such device here, or it is a CPU, which takes ``small``.
    """
    remedy = "Run this on a machine with a CUDA GPU, or try the program alone with --device cpu --small."
    if name is None and not torch.cuda.is_available():
        raise ValueError(f"torch found no CUDA device. {remedy}")
    try:
        device = torch.zeros(1, device=name or "cuda").device  # with its index
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"Got --device {name}, which torch cannot use here ({error}). {remedy}") from error
    if device.type == "cpu" and not small:
        raise ValueError(f"Got --device cpu, which has no time for models of 7B and 8B parameters. {remedy}")
    return device


def run_check(context: Context, stages: Sequence[str] = STAGES, say: Callable[[str], None] | None = None) -> bool:
    """Measure ``stages`` in the order of ``STAGES``, and write ``STAGE.json`` of each.

    Args:
        context: Where, what, and how long.
        stages: Names.
        say: Shows a line of progress; default: prints it.

    Returns:
        Whether all was right: see ``main``.
    """
    say = say or partial(print, flush=True)
    made: dict[str, Callable[[], Stage]] = {
        "correctness": lambda: Correctness(context),
        "copies": lambda: Copies(context),
        **{name: partial(LargeModel, context, size) for name, size in context.sizes.models.items()},
    }
    passport = _passport(context)
    chosen = {name: make() for name, make in made.items() if name in stages}
    files = {
        name: StageFile(context.folder, name, stage.cells(), {**passport, "config": stage.config})
        for name, stage in chosen.items()
    }
    for name, stage in chosen.items():
        measure_cells(stage, files[name], context, say)
    cells = {name: list(file.cells.values()) for name, file in files.items()}
    return is_right(cells.get("correctness", [])) and not any(
        cell["status"] == "failed" for found in cells.values() for cell in found
    )


def _passport(context: Context) -> Mapping[str, Any]:
    passport = make_passport()
    return {
        **passport,
        "device": context.meter.name or passport["device"],
        "kind": str(context.device),
        "small": context.sizes is not LARGE,
        "seed": context.seed,
        "budget_seconds": context.budget.seconds,
        "environment": {name: os.environ.get(name) for name in _ENVIRONMENT},
        "started": now(),
    }


if __name__ == "__main__":
    sys.exit(main())
