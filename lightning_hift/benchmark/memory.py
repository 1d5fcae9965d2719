"""The kind ``"memory"``: memory and speed on one GPU, beside what is planned, targets, and published numbers.

A cell has the options ``row`` (see ``memory_rows.ROWS``), and, as one likes, ``tiny`` (a tiny model, on any device: it
proves the program, not the targets) and ``max_steps`` (of warm-up, and of measurement). Each row has a process of its
own, so that a peak is its own; a batch that turns out to be too large is tried again, smaller, in another one.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightning_hift.benchmark.cell_process import MEASURED, OUT_OF_MEMORY, SKIPPED, write_request
from lightning_hift.benchmark.kinds import Skipped, check_options
from lightning_hift.benchmark.memory_plan import PlannedRow, plan_row
from lightning_hift.benchmark.memory_rows import find_row
from lightning_hift.benchmark.passport import device_bytes
from lightning_hift.benchmark.records import Record

_OPTIONS = ("row", "tiny", "max_steps", "batch_size")  # the last one is for the processes that are started here


def run(configs: Sequence[str], options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What ``memory_run.run_row`` measures; with the row's ``config``, and what was ``planned``, in bytes.

    Raises:
        Skipped: There is no CUDA device, or a package is missing.
        ValueError: An option is unknown.
    """
    check_options(options, _OPTIONS)
    find_row(options.get("row", ""))
    if not options.get("tiny") and not torch.cuda.is_available():
        raise Skipped("there is no CUDA device")
    planned = _planned(options)
    if planned.row.largest_batch:
        return _largest_batch(options, planned.row.setup.batch_size)
    from lightning_hift.benchmark.memory_run import run_row

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {**run_row(planned, device, options.get("max_steps")), "config": planned.config, "planned": planned.bytes}


def plan(configs: Sequence[str], options: Mapping[str, Any], folder: Path) -> dict[str, int | None]:
    """Bytes on the device and on the host.

    Raises:
        ValueError: An option is unknown.
    """
    check_options(options, _OPTIONS)
    planned = _planned(options)
    return {"device": planned.device, "host": planned.host}


def _planned(options: Mapping[str, Any]) -> PlannedRow:
    row = find_row(options.get("row", ""), bool(options.get("tiny")))
    if "batch_size" in options:
        setup = replace(row.setup, batch_size=options["batch_size"])
        row = replace(row, setup=setup, largest_batch=False)
    return plan_row(row, device_bytes())


def _largest_batch(options: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """Measured with the largest batch that fits, from ``batch_size`` downwards, each in a fresh process."""
    for size in range(batch_size, 0, -1):
        outcome = _start({**options, "batch_size": size})
        if outcome["status"] == MEASURED:
            return dict(outcome["measured"])
        if outcome["status"] == SKIPPED:
            raise Skipped(outcome["reason"])
        if outcome["status"] != OUT_OF_MEMORY:
            raise RuntimeError(f"with a batch of {size}: {outcome['reason']}")
    raise torch.OutOfMemoryError(f"with a batch of 1: {outcome['reason']}")


def _start(options: Mapping[str, Any]) -> Record:
    """What came of a run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out, command = write_request(Path(folder), "memory", [], options)
        code = subprocess.run(command).returncode
        if code:
            raise RuntimeError(f"with a batch of {options['batch_size']}: the process ended with code {code}")
        found: Record = json.loads(out.read_text())
        return found
