"""Memory and speed on one GPU, beside targets and published numbers: ``make bench-gpu``.

``python -m lightning_hift.benchmark.memory`` measures each row in a fresh process, so that a peak is its own and a
crash is a row, not the end. Records are appended to a file of JSON lines, and the table is written from all of them, so
rows can be measured in pieces: on a fast card each takes one to three minutes (``--rows split,split-budget``).
``--dry-run`` shows what is planned; ``--tiny`` proves the program with a tiny model on any device. Without a CUDA
device the rows say "not measured".
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightning_hift.benchmark.memory_plan import PlannedRow, plan_row
from lightning_hift.benchmark.memory_report import NOT_MEASURED, format_report, latest_records
from lightning_hift.benchmark.memory_rows import ROWS, Row, tiny
from lightning_hift.benchmark.passport import make_passport
from lightning_hift.benchmark.records import Record, append_record

_OUT_OF_MEMORY = "out of memory"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the chosen rows and write the table."""
    options = _parser().parse_args(arguments)
    if options.child is not None:
        _run_in_child(options.child)
        return
    rows = [tiny(row) for row in ROWS] if options.tiny else list(ROWS)
    chosen = _choose(rows, options.rows)
    passport = make_passport()
    planned = {row.name: plan_row(row, passport["device_bytes"]) for row in rows}  # type: ignore[arg-type]
    if options.dry_run:
        print(format_report([planned[row.name] for row in chosen], {}, "Planned"))
        return
    name = "memory_tiny" if options.tiny else "memory_gpu"
    records = options.output / f"{name}.jsonl"
    can_measure = options.tiny or torch.cuda.is_available()
    if not can_measure:
        print("There is no CUDA device here: all rows are written as not measured.")
    for row in chosen:
        if can_measure:
            planned[row.name], record = _measure(planned[row.name], options)
        else:
            record = {"status": NOT_MEASURED, "reason": "no CUDA device was at hand"}
        _print_progress(row, record)
        append_record(records, _complete(planned[row.name], record, passport))
    found = latest_records(records)
    shown = [_as_recorded(planned[row.name], found.get(row.name)) for row in rows]
    heading = "Memory and speed, tiny model: a test of the program" if options.tiny else "Memory and speed on one GPU"
    table = options.output / f"{name}.md"
    table.write_text(format_report(shown, found, heading))
    print(f"Records: {records}\nTable: {table}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", help=f"names, separated by commas; default: all ({', '.join(r.name for r in ROWS)})")
    parser.add_argument("--max-steps", type=int, help="at most so many steps of warm-up, and of measurement, per row")
    parser.add_argument("--timeout", type=float, default=500, help="seconds for one row")
    parser.add_argument("--output", type=Path, default=Path("examples/results"), help="an existing folder")
    parser.add_argument("--dry-run", action="store_true", help="only show the rows and what is planned for them")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on any device")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser


def _choose(rows: Sequence[Row], names: str | None) -> list[Row]:
    by_name = {row.name: row for row in rows}
    wanted = list(by_name) if names is None else names.split(",")
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        raise SystemExit(f"Got --rows with {', '.join(unknown)}; there are {', '.join(by_name)}.")
    return [by_name[name] for name in wanted]


# --- one row ----------------------------------------------------------------------------------------------------------


def _measure(planned: PlannedRow, options: argparse.Namespace) -> tuple[PlannedRow, Record]:
    """The record of a row, measured in a process of its own; with the next smaller batch where that is asked for."""
    while True:
        record = _start_child(planned, options.max_steps, options.timeout)
        batch_size = planned.row.setup.batch_size
        too_large = planned.row.largest_batch and _OUT_OF_MEMORY in record.get("reason", "") and batch_size > 1
        if not too_large:
            return planned, record
        setup = replace(planned.row.setup, batch_size=batch_size - 1)
        row = replace(planned.row, setup=setup, largest_batch=False)
        planned = replace(plan_row(row, None), row=replace(row, largest_batch=True))


def _start_child(planned: PlannedRow, max_steps: int | None, timeout: float) -> Record:
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request", Path(folder) / "request.json"
        request.write_bytes(pickle.dumps((planned, max_steps)))
        command = [sys.executable, "-m", "lightning_hift.benchmark.memory", "--child", str(request)]
        # Without it, blocks of many sizes leave gaps that count as reserved.
        environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
        since = time.perf_counter()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
        except subprocess.TimeoutExpired:
            return {"status": "failed", "reason": f"took more than {timeout:g} seconds"}
        if not answer.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {"status": "failed", "reason": f"the process ended with code {done.returncode}: {last}"}
        record: Record = json.loads(answer.read_text())
        return {**record, "wall_seconds": round(time.perf_counter() - since, 1)}


def _run_in_child(request: Path) -> None:
    from lightning_hift.benchmark.memory_run import Skipped, run_row

    planned, max_steps = pickle.loads(request.read_bytes())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record: Record
    try:
        record = {"status": "measured", "measured": run_row(planned, device, max_steps)}
    except Skipped as reason:
        record = {"status": "skipped", "reason": str(reason)}
    except torch.OutOfMemoryError as error:
        record = {"status": "failed", "reason": f"{_OUT_OF_MEMORY}: {str(error).splitlines()[0]}"}
    except Exception as error:  # a row, not the end
        record = {"status": "failed", "reason": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    request.with_suffix(".json").write_text(json.dumps(record))


# --- records ----------------------------------------------------------------------------------------------------------


def _complete(planned: PlannedRow, record: Record, passport: dict[str, Any]) -> Record:
    plan = {"allocated": planned.allocated, "device": planned.device, "host": planned.host}
    config = planned.config()
    return {"row": planned.row.name, "config": config, "planned": plan, **record, "passport": passport}


def _as_recorded(planned: PlannedRow, record: Record | None) -> PlannedRow:
    """The row as it was when it was measured: another device may have had room for other layers or batches."""
    if record is None:
        return planned
    setup = replace(planned.row.setup, **record["config"]["setup"])
    row = replace(planned.row, setup=setup)
    return PlannedRow(row, record["config"]["layers"], record["planned"]["device"], record["planned"]["host"])


def _print_progress(row: Row, record: Record) -> None:
    what = record.get("reason") or ", ".join(f"{k} {v:.4g}" for k, v in record["measured"].items())
    print(f"{row.name}: {record['status']}, {what}", flush=True)


if __name__ == "__main__":
    main()
