"""Quality of HiFT beside full fine-tuning: tasks, methods and seeds, each a run of its own, in one table.

``python -m lightning_hift.benchmark.quality --tasks trec mrpc --seeds 0 1 2 --model FOLDER`` runs, in the folder of the
project, ``lightning-hift fit -c configs/task/T.yaml -c configs/method/M.yaml`` for each. Runs that are in the file of
records are not repeated, so a table can be measured in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from lightning_hift.benchmark.passport import make_passport
from lightning_hift.table import format_table

_METRICS = {"cola": "val_matthews", "stsb": "val_pearson"}
_CONFIGS = Path("configs")
_BASELINE = "full"


class Run(NamedTuple):
    """One fit."""

    task: str
    method: str
    seed: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs that are missing, and write the table of all."""
    options = _parser().parse_args(arguments)
    records = options.output.with_suffix(".jsonl")
    done = {Run(*record["run"]): record for record in read_records(records)}
    wanted = [Run(*run) for run in product(options.tasks, options.methods, options.seeds)]
    # The methods of one task and seed follow each other, so that a machine that slows down slows them alike.
    wanted.sort(key=lambda run: (options.tasks.index(run.task), run.seed, options.methods.index(run.method)))
    missing = [run for run in wanted if run not in done]
    with ThreadPoolExecutor(options.jobs) as pool:
        for record in pool.map(lambda run: _fit(run, options), missing):
            run = Run(*record["run"])
            done[run] = record
            with records.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(*run, record["metrics"].get(_metric(run.task)), record["seconds"], flush=True)
    text = format_report([record for run, record in done.items() if run in wanted])
    options.output.write_text(text)
    print(text)


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a file of JSON lines, which may not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def format_report(records: Sequence[dict[str, Any]]) -> str:
    """Mean and spread over seeds by task and method, beside full fine-tuning, and what they were measured on."""
    by_kind: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        by_kind.setdefault((record["run"][0], record["run"][1]), []).append(record)
    rows = []
    for (task, method), found in by_kind.items():
        scores = [100 * record["metrics"][_metric(task)] for record in found]
        base = by_kind.get((task, _BASELINE), [])
        ratios = [
            record["seconds"]["cpu"] / other["seconds"]["cpu"]
            for record in found
            for other in base
            if other["run"][2] == record["run"][2]
        ]
        base_mean = mean(100 * other["metrics"][_metric(task)] for other in base) if base else None
        rows.append(
            [
                task,
                _metric(task).removeprefix("val_"),
                method,
                " ".join(f"{score:.1f}" for score in scores),
                f"{mean(scores):.2f}",
                f"{stdev(scores):.2f}" if len(scores) > 1 else "-",
                "-" if base_mean is None or method == _BASELINE else f"{mean(scores) - base_mean:+.2f}",
                f"{mean(ratios):.2f}" if ratios else "-",
                str(round(mean(record["epochs"] for record in found))),
                f"{found[0]['learning_rate']:g}",
            ]
        )
    header = ["task", "metric", "method", "by seed", "mean", "stdev", "against full", "time", "epochs", "lr"]
    passport = records[0]["passport"]
    about = ", ".join(f"{name} {value}" for name, value in passport["versions"].items())
    return (
        f"```text\n{format_table(header, rows)}\n```\n\nScores are percentages at the end of the run, on the validation"
        " split of the task. Time: seconds of the processor in training, validation left out, against full fine-tuning"
        f" with the same seed. Model: {records[0]['model']}; {records[0]['threads']} thread(s) per run,"
        f" {passport['device']}; {about}.\n"
    )


def _fit(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    parts = [_CONFIGS / "task" / f"{run.task}.yaml", _CONFIGS / "method" / f"{run.method}.yaml"]
    parts += [path for path in [_CONFIGS / "files" / f"{run.task}.yaml"] if path.exists() and not options.hub]
    parts += [path for path in [_CONFIGS / "tuned" / f"{run.task}_{run.method}.yaml"] if path.exists()]
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder, "report.json"), Path(folder, "log.txt")
        command = [sys.executable, "-m", "lightning_hift", "fit"]
        command += [word for part in parts for word in ("--config", str(part))]
        command += [f"--model.model={options.model}", f"--seed_everything={run.seed}", "--trainer.logger=false"]
        command += ["--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
        command += ["--trainer.callbacks+=lightning_hift.benchmark.FitReport", f"--trainer.callbacks.path={report}"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
        with log.open("w") as file:
            failed = subprocess.run(command + options.rest, stdout=file, stderr=file, env=environment).returncode
        if failed:
            raise RuntimeError(f"{' '.join(command)} ended with {failed}:\n{log.read_text()[-3000:]}")
        found = json.loads(report.read_text())
    return {"run": list(run), **found, "model": options.model, "threads": options.threads, "passport": make_passport()}


def _metric(task: str) -> str:
    return _METRICS.get(task, "val_accuracy")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    known = sorted(path.stem for path in (_CONFIGS / "files").glob("*.yaml"))
    parser.add_argument("--tasks", nargs="+", default=known, help=f"names of files in {_CONFIGS}/task")
    parser.add_argument("--methods", nargs="+", default=["full", "hift"], help=f"names of files in {_CONFIGS}/method")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--model", required=True, help="name on the hub or folder")
    parser.add_argument("--hub", action="store_true", help="take data from the hub, not from local files under data/")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch per run")
    parser.add_argument("--output", type=Path, default=Path("examples/results/quality.md"))
    parser.add_argument("rest", nargs="*", help="options for every fit, behind --")
    return parser


if __name__ == "__main__":
    main()
