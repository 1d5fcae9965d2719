"""Quality of HiFT beside full fine-tuning: tasks, methods and seeds, each a run of its own, in one table.

``python -m lightning_hift.benchmark.quality --tasks trec mrpc --seeds 0 1 2 --model FOLDER`` runs, in the folder of the
project, ``lightning-hift fit -c configs/task/T.yaml -c configs/method/M.yaml`` for each, with what ``configs/files``
and ``configs/tuned`` have for them. Runs that are in the file of records are not repeated, so a table can be measured
in pieces.
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
from typing import NamedTuple

from lightning_hift.benchmark.passport import make_passport
from lightning_hift.benchmark.records import Record, append_record, read_records
from lightning_hift.table import format_table

_METRICS = {"cola": ["val_matthews"], "stsb": ["val_pearson"], "viggo": ["val_loss", "val_bleu", "val_rougeL"]}
_DEFAULT_METRICS = ["val_accuracy"]
_CONFIGS = Path("configs")
_BASELINE = "full"
_LOSS = "val_loss"


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
            append_record(records, record)
            scores = [round(_score(record, metric), 3) for metric in _metrics(run.task)]
            print(*run, *scores, record["seconds"], flush=True)
    text = format_report([record for run, record in done.items() if run in wanted])
    options.output.write_text(text)
    print(text)


def format_report(records: Sequence[Record]) -> str:
    """Mean and spread over seeds by task and method, beside full fine-tuning, and what they were measured on."""
    by_kind: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        by_kind.setdefault((record["run"][0], record["run"][1]), []).append(record)
    rows = []
    for task in dict.fromkeys(task for task, _ in by_kind):
        base = by_kind.get((task, _BASELINE), [])
        for metric, method in product(_metrics(task), [method for name, method in by_kind if name == task]):
            found = by_kind[task, method]
            scores = [_score(record, metric) for record in found]
            base_scores = [_score(record, metric) for record in base] if method != _BASELINE else []
            rows.append(
                [
                    task,
                    metric.removeprefix("val_"),
                    method,
                    " ".join(f"{score:.1f}" if metric != _LOSS else f"{score:.3f}" for score in scores),
                    f"{mean(scores):.2f}",
                    f"{stdev(scores):.2f}" if len(scores) > 1 else "-",
                    f"{mean(scores) - mean(base_scores):+.2f}" if base_scores else "-",
                    _time_ratio(found, base, "wall"),
                    _time_ratio(found, base, "cpu"),
                    str(round(mean(record["epochs"] for record in found))),
                    f"{found[0]['learning_rate']:g}",
                ]
            )
    header = [
        "task",
        "metric",
        "method",
        "by seed",
        "mean",
        "stdev",
        "against full",
        "time",
        "processor",
        "epochs",
        "lr",
    ]
    passport = records[0]["passport"]
    about = ", ".join(f"{name} {value}" for name, value in passport["versions"].items())
    commits = ", ".join(dict.fromkeys(str(record["passport"]["commit"]) for record in records))
    return (
        f"```text\n{format_table(header, rows)}\n```\n\nAt the end of the run, on the validation split of the task;"
        " scores are percentages, losses nats per token. Time: seconds of training by the clock, validation left out,"
        " against full fine-tuning with the same seed; processor: the same of the processor's seconds."
        f" Model: {records[0]['model']}; {records[0]['threads']} thread(s) per run, {passport['device']},"
        f" commit {commits}; {about}.\n"
    )


def _score(record: Record, metric: str) -> float:
    value: float = record["metrics"][metric]
    return value if metric == _LOSS else 100 * value


def _time_ratio(records: Sequence[Record], base: Sequence[Record], clock: str) -> str:
    by_seed = {record["run"][2]: record["seconds"][clock] for record in base}
    ratios = [r["seconds"][clock] / by_seed[r["run"][2]] for r in records if r["run"][2] in by_seed]
    return f"{mean(ratios):.2f}" if ratios else "-"


def _fit(run: Run, options: argparse.Namespace) -> Record:
    parts = [_CONFIGS / "task" / f"{run.task}.yaml", _CONFIGS / "method" / f"{run.method}.yaml"]
    parts += [path for path in [_CONFIGS / "files" / f"{run.task}.yaml"] if path.exists() and not options.hub]
    parts += [path for path in [_CONFIGS / "tuned" / f"{run.task}_{run.method}.yaml"] if path.exists()]
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder, "report.json"), Path(folder, "log.txt")
        command = [sys.executable, "-m", "lightning_hift", "fit"]
        command += [word for part in parts for word in ("--config", str(part))]
        command += ["--config" if options.model.endswith(".yaml") else "--model.model", options.model]
        command += [f"--seed_everything={run.seed}", "--trainer.logger=false"]
        command += ["--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
        command += ["--trainer.callbacks+=lightning_hift.benchmark.FitReport", f"--trainer.callbacks.path={report}"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
        with log.open("w") as file:
            failed = subprocess.run(command + options.rest, stdout=file, stderr=file, env=environment).returncode
        if failed:
            raise RuntimeError(f"{' '.join(command)} ended with {failed}:\n{log.read_text()[-3000:]}")
        found = json.loads(report.read_text())
    return {"run": list(run), **found, "model": options.model, "threads": options.threads, "passport": make_passport()}


def _metrics(task: str) -> list[str]:
    return _METRICS.get(task, _DEFAULT_METRICS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    known = sorted(path.stem for path in (_CONFIGS / "files").glob("*.yaml"))
    parser.add_argument("--tasks", nargs="+", default=known, help=f"names of files in {_CONFIGS}/task")
    parser.add_argument("--methods", nargs="+", default=["full", "hift"], help=f"names of files in {_CONFIGS}/method")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--model", required=True, help="name on the hub, folder, or YAML of a model")
    parser.add_argument("--hub", action="store_true", help="take data from the hub, not from local files under data/")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch per run")
    parser.add_argument("--output", type=Path, default=Path("examples/results/quality.md"))
    parser.add_argument("rest", nargs="*", help="options for every fit, behind --")
    return parser


if __name__ == "__main__":
    main()
