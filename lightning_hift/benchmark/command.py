"""``lightning-hift bench --config FILE``: a matrix of runs, each in a process of its own, and one report."""

from __future__ import annotations

import argparse
import signal
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import yaml  # type: ignore[import-untyped]
from tqdm import tqdm

from lightning_hift.benchmark.cell_process import MEASURED, shorten
from lightning_hift.benchmark.kinds import Plan, Planned, kind_of, plan_function, report_function
from lightning_hift.benchmark.matrix import BUDGET, Benchmark, Cell, load_benchmark
from lightning_hift.benchmark.records import Record, merge_records
from lightning_hift.benchmark.runner import Runner, read_own_records
from lightning_hift.table import format_bytes, format_table

_PASSING = ("seed", BUDGET)  # axes that change neither the memory nor, much, the time of a run


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``lightning-hift bench``."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        for name in ("SIGTERM", "SIGHUP"):  # what is running must not outlive this process
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.default_int_handler)
        _main(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "Interrupted. What is recorded is not repeated: start again to go on.\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-hift bench", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("--config", "-c", required=True, help="a YAML file, as those in configs/benchmark")
    parser.add_argument("--output", help="where results go, in the place of what the file says: a path without suffix")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="options of all runs, over the file's"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="AXIS=VALUE[,VALUE]", help="a part of the matrix")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; times are comparable with 1 only")
    parser.add_argument("--again", action="store_true", help="also repeat runs that failed or were skipped")
    parser.add_argument(
        "--merge", nargs="+", type=Path, default=[], metavar="JSONL", help="add results of other machines"
    )
    parser.add_argument("--report", action="store_true", help="run nothing, write the report of what there is")
    parser.add_argument(
        "--dry-run", action="store_true", help="run nothing, list the runs with planned memory and time"
    )
    return parser


def _main(options: argparse.Namespace) -> None:
    benchmark = load_benchmark(options.config)
    kind_of(benchmark.kind)
    if options.output:
        benchmark = replace(benchmark, output=options.output)
    benchmark = replace(benchmark, options={**benchmark.options, **_settings(options.set)})
    if options.jobs < 1:
        raise ValueError(f"Got --jobs {options.jobs}; it must be at least 1.")
    every = benchmark.cells()
    cells = _chosen(every, benchmark, options.only)
    path = Path(f"{benchmark.output}.jsonl")
    if options.dry_run:
        print(_dry_run(benchmark, cells, Runner(benchmark, path).known(every)))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if options.merge:
        for other in options.merge:
            read_own_records(other)
        print(f"{merge_records(path, options.merge)} records were added to {path}.")
    progress = _Progress()
    runner = Runner(benchmark, path, options.jobs, progress.note)
    if not options.report:
        progress.start(cells, runner.done(every, options.again), options.jobs)
        runner.run(cells, again=options.again)
        progress.end()
    by_device = {device: runner.known(every, device) for device in runner.devices()}
    if others := runner.described_otherwise(by_device):
        print(f"{others} runs in {path} are described otherwise now, by other files or options, and are not reported.")
    files = report_function(benchmark.kind)(benchmark, every, by_device)
    print("\n".join(f"Written: {file}" for file in (path, *files)))


def _settings(words: Sequence[str]) -> dict[str, Any]:
    found = {}
    for word in words:
        key, is_given, value = word.partition("=")
        if not is_given:
            raise ValueError(f"Got --set {word}; write KEY=VALUE, such as trainer.max_steps=100.")
        found[key] = yaml.safe_load(value)
    return found


def _chosen(cells: Sequence[Cell], benchmark: Benchmark, only: Sequence[str]) -> list[Cell]:
    """Cells that have one of the values named for each axis, and the trials that they depend on."""
    wanted: dict[str, list[str]] = {}
    for word in only:
        axis, _, values = word.partition("=")
        if axis not in benchmark.axes or not values:
            raise ValueError(f"Got --only {word}; write AXIS=VALUE with one of {', '.join(benchmark.axes)}.")
        known = {str(cell.values[axis]) for cell in cells if cell.trial is None}
        if unknown := set(values.split(",")) - known:
            raise ValueError(
                f"Got --only with {axis}={','.join(sorted(unknown))}; there are {', '.join(sorted(known))}."
            )
        wanted[axis] = values.split(",")
    final = [c for c in cells if c.trial is None and all(str(c.values[a]) in names for a, names in wanted.items())]
    needed = {trial.key for cell in final for trial in cell.trials}
    chosen = {cell.key for cell in final}
    return [cell for cell in cells if cell.key in (chosen if cell.trial is None else needed)]


# --- what is planned --------------------------------------------------------------------------------------------------


def _dry_run(benchmark: Benchmark, cells: Sequence[Cell], known: Mapping[str, Record]) -> str:
    plan, notes = plan_function(benchmark.kind), []
    planned: dict[Any, Planned] = {}
    rows, seconds = [], []
    for cell in cells:
        like = _like(cell)
        if plan is not None and like not in planned:
            planned[like], why = _plan(plan, cell)
            notes += [f"{cell.name} cannot be planned: {why}"] if why else []
        expected = _expected_seconds(cell, known)
        if cell.key not in known:
            seconds.append(expected)
        place = planned.get(like, {})
        rows.append(
            [
                *(str(value) for value in cell.values.values()),
                cell.trial_name or "-",
                *("-" if (size := place.get(where)) is None else format_bytes(size) for where in ("device", "host")),
                "-" if expected is None else f"{expected:.0f} s",
                known[cell.key]["status"] if cell.key in known else "to do",
            ]
        )
    header = [*benchmark.axes, "trial", "device, planned", "host, planned", "time", "state"]
    left = [each for each in seconds if each is not None]
    total = (
        f"about {_duration(sum(left))} for {len(left)} of them, by runs that are recorded" if left else "time unknown"
    )
    return "\n".join([format_table(header, rows), "", f"{len(rows)} runs, {len(seconds)} to do, {total}.", *notes])


def _plan(plan: Plan, cell: Cell) -> tuple[Planned, str]:
    """What a run needs; or why it cannot be planned, which does not mean that it cannot be made."""
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(StringIO()) as told:
        try:
            return plan(cell.configs, cell.options, Path(folder)), ""
        except SystemExit:
            return {}, shorten(told.getvalue().rpartition("error:")[2])
        except Exception as error:
            return {}, shorten(f"{type(error).__name__}: {error}")


def _like(cell: Cell) -> tuple[Any, ...]:
    return tuple((axis, value) for axis, value in cell.values.items() if axis not in _PASSING)


def _expected_seconds(cell: Cell, known: Mapping[str, Record]) -> float | None:
    """The median time of runs that differ in the seed only; ``None`` if there are none."""
    like = [
        record["wall_seconds"]
        for record in known.values()
        if record["status"] == MEASURED and "wall_seconds" in record and _like(Cell(record["cell"])) == _like(cell)
    ]
    return median(like) if like else None


class _Progress:
    """A bar over runs, with the time left by the runs that are over."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._records: dict[str, Record] = {}
        self._left: list[Cell] = []
        self._jobs = 1

    def start(self, cells: Sequence[Cell], known: Mapping[str, Record], jobs: int) -> None:
        self._records, self._jobs = dict(known), jobs
        self._left = [cell for cell in cells if cell.key not in known]
        self._bar = tqdm(total=len(cells), initial=len(cells) - len(self._left), unit="run", bar_format=_BAR)
        self._show_left()

    def note(self, cell: Cell, record: Record) -> None:
        self._records[cell.key] = record
        self._left = [each for each in self._left if each.key != cell.key]
        what = record.get("reason") or f"{record['wall_seconds']:.0f} s"
        tqdm.write(f"{cell.name}: {record['status']}, {what}")
        self._bar.update()
        self._show_left()

    def end(self) -> None:
        self._bar.close()

    def _show_left(self) -> None:
        over = [
            r["wall_seconds"] for r in self._records.values() if r.get("status") == MEASURED and "wall_seconds" in r
        ]
        if not over or not self._left:
            self._bar.set_postfix_str("")
            return
        each = [_expected_seconds(cell, self._records) or median(over) for cell in self._left]
        self._bar.set_postfix_str(f"about {_duration(sum(each) / self._jobs)} left")


_BAR = "{l_bar}{bar:24}| {n_fmt}/{total_fmt} runs, {elapsed}{postfix}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min"
        if minutes
        else "less than a minute"
    )
