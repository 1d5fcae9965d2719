"""Makes the runs of a benchmark that are missing, each in a process of its own, and keeps a record of each."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path

from lightning_hift.benchmark.cell_process import (
    MEASURED,
    OUT_OF_MEMORY,
    SKIPPED,
    TIMED_OUT,
    run_cell,
    shorten,
    status_of,
    write_request,
)
from lightning_hift.benchmark.kinds import kind_of
from lightning_hift.benchmark.matrix import BUDGET, EQUAL_STEPS, EQUAL_TIME, Benchmark, Cell
from lightning_hift.benchmark.passport import make_passport
from lightning_hift.benchmark.records import Record, append_record, read_records
from lightning_hift.planner.memory import process_memory

SCHEMA = 1
_LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "mse", "mae", "error", "wer", "cer")
_POLL_SECONDS = 0.5


class Runner:
    """Runs cells and records them.

    Args:
        benchmark: What to run.
        path: The file of records.
        jobs: Runs at a time.
        tell: Called with each cell and its record as it becomes known.

    Raises:
        ValueError: The file holds records of another schema.
    """

    def __init__(
        self, benchmark: Benchmark, path: Path, jobs: int = 1, tell: Callable[[Cell, Record], None] | None = None
    ) -> None:
        self.benchmark = benchmark
        self.path = path
        self._jobs = jobs
        self._tell = tell or (lambda cell, record: None)
        self._all = read_own_records(path)
        self._device = str(make_passport()["device"])
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    # --- what is known ------------------------------------------------------------------------------------------------

    def devices(self) -> list[str]:
        """On which something was run."""
        return list(dict.fromkeys(record["passport"]["device"] for record in self._all))

    def described_otherwise(self, by_device: Mapping[str, Mapping[str, Record]]) -> int:
        """How many measured records are none of those that are ``known``, by device, of all cells."""
        used = {id(record) for known in by_device.values() for record in known.values()}
        return sum(record["status"] == MEASURED and id(record) not in used for record in self._all)

    def known(self, cells: Iterable[Cell], device: str | None = None) -> dict[str, Record]:
        """The record of each cell that was run just as it is described now, by ``Cell.key``.

        The first one that was measured, which others may depend on and which records that are merged do not replace;
        or the last one, if none was.

        Args:
            cells: In an order in which those that others depend on come first.
            device: Where they were run; default: the device of this process.
        """
        here = [r for r in self._all if r["passport"]["device"] == (device or self._device)]
        by_run: dict[tuple[str, str], Record] = {}
        for record in here:
            run = json.dumps([record["cell"], record["trial"]], sort_keys=True), record["fingerprint"]
            if run not in by_run or by_run[run]["status"] != MEASURED:
                by_run[run] = record
        found: dict[str, Record] = {}
        for cell in cells:  # those that others depend on come first
            resolved, _ = self.resolve(cell, found)
            if resolved is not None and (key := (cell.key, self._fingerprint(resolved))) in by_run:
                found[cell.key] = by_run[key]
        return found

    def done(self, cells: Iterable[Cell], again: bool = False) -> dict[str, Record]:
        """What ``run`` does not repeat: what is known, or with ``again`` what of it was measured."""
        known = self.known(cells)
        return {key: record for key, record in known.items() if not again or record["status"] == MEASURED}

    def resolve(self, cell: Cell, known: Mapping[str, Record]) -> tuple[Cell | None, str]:
        """The cell with nothing left open; or ``None``, and what it waits for.

        What is left open are settings that are tried out before, and the number of steps in the baseline's time.
        """
        options = dict(cell.options)
        if cell.trials:
            missing = [trial.name for trial in cell.trials if trial.key not in known]
            if missing:
                return None, f"waits for {missing[0]}"
            best = self._best(cell.trials, known)
            if best is None:
                return None, f"none of its {len(cell.trials)} trials has come to a finite result"
            options |= best.trial or {}
        if cell.values.get(BUDGET) == EQUAL_TIME:
            steps, why = self._steps_in_time(cell, known)
            if steps is None:
                return None, why
            options |= {"trainer.max_steps": steps, "trainer.max_epochs": -1}
        return replace(cell, options=options), ""

    def _best(self, trials: Sequence[Cell], known: Mapping[str, Record]) -> Cell | None:
        metric = self.benchmark.trial_metric or self.benchmark.metric_of(trials[0].values)
        sign = -1 if is_loss(metric) else 1
        scored = [trial for trial in trials if has_score(known[trial.key], metric)]
        scores = {trial.key: sign * score_of(known[trial.key], metric) for trial in scored}
        finite = [trial for trial in scored if math.isfinite(scores[trial.key])]
        return max(finite, key=lambda trial: scores[trial.key], default=None)

    def _steps_in_time(self, cell: Cell, known: Mapping[str, Record]) -> tuple[int | None, str]:
        """As many steps as the baseline's time has room for, by the time that a step took with equal steps."""
        own = {**cell.values, BUDGET: EQUAL_STEPS}
        found: list[Record] = []
        for values in (self.benchmark.baseline_of(cell.values), own):
            record = known.get(Cell(values).key)
            if record is None or record["status"] != MEASURED:
                return None, f"needs {Cell(values).name}, which was not measured"
            found.append(record["measured"])
        base, mine = found
        clock = clock_of(known[Cell(own).key])
        time, per_step = base.get(clock), mine.get(f"{clock}_per_step")
        if not time or not per_step:
            return None, f"needs {clock} of the baseline and {clock}_per_step, which were not measured"
        return max(1, round(float(time) / float(per_step))), ""

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self, cells: Sequence[Cell], again: bool = False) -> dict[str, Record]:
        """Make the runs that are missing, and return the records of all cells by ``Cell.key``.

        Args:
            cells: In an order in which those that others depend on come first.
            again: Repeat those that failed, too.
        """
        stages = groupby(cells, key=lambda cell: (cell.trial is None, cell.values.get(BUDGET) == EQUAL_TIME))
        known: dict[str, Record] = {}
        made: dict[str, Record] = {}
        with ThreadPoolExecutor(self._jobs) as pool:
            try:
                for _, stage in stages:
                    # Anew: where a trial was repeated, another one may be the best now.
                    known = {**self.done(cells, again), **made}
                    missing = [cell for cell in stage if cell.key not in known]
                    records = pool.map(partial(self._run, known=known), missing)
                    made |= {cell.key: record for cell, record in zip(missing, records, strict=True)}
            except BaseException:
                self.stop()
                pool.shutdown(cancel_futures=True)
                raise
        return {**known, **made}

    def stop(self) -> None:
        """End what is running, without records."""
        self._stopped = True
        for process in list(self._running):
            _kill(process)

    def _run(self, cell: Cell, known: Mapping[str, Record]) -> Record:
        resolved, why = self.resolve(cell, known)
        if resolved is None:
            skipped: Record = {"status": SKIPPED, "reason": why, "passport": make_passport()}
            self._tell(cell, skipped)
            return skipped
        since = time.perf_counter()
        outcome = self._in_process(resolved)
        record: Record = {
            "schema": SCHEMA,
            "cell": cell.values,
            "trial": cell.trial,
            "fingerprint": self._fingerprint(resolved),
            "options": resolved.options,
            "configs": list(resolved.configs),
            **outcome,
            "wall_seconds": round(time.perf_counter() - since, 1),
        }
        with self._lock:
            if not self._stopped:
                append_record(self.path, record)
                self._all.append(record)
                self._tell(cell, record)
        return record

    def _fingerprint(self, cell: Cell) -> str:
        return cell.fingerprint(self.benchmark.kind, self.benchmark.threads)

    def _in_process(self, cell: Cell) -> Record:
        limits, threads = self.benchmark.limits, self.benchmark.threads
        with tempfile.TemporaryDirectory() as folder:
            if not kind_of(self.benchmark.kind).apart:
                return run_cell(self.benchmark.kind, cell.configs, cell.options, Path(folder))
            log, device_memory = Path(folder, "log.txt"), limits.bytes_of("device_memory")
            out, command = write_request(
                Path(folder), self.benchmark.kind, cell.configs, cell.options, threads, device_memory
            )
            environment = {"TOKENIZERS_PARALLELISM": "false", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
            environment |= {**os.environ} | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
            with log.open("w") as file:
                process = subprocess.Popen(
                    command, stdout=file, stderr=file, text=True, env=environment, start_new_session=True
                )
                self._running.add(process)
                if self._stopped:
                    _kill(process)
                ended = _watch(process, limits.seconds, limits.bytes_of("host_memory"))
                self._running.discard(process)
            if ended is None and out.exists():
                found: Record = json.loads(out.read_text())
                return found
            status, reason = ended or _last_words(log.read_text(), process.returncode)
            return {"status": status, "reason": reason, "passport": make_passport()}


def read_own_records(path: Path) -> list[Record]:
    """Records of this schema.

    Raises:
        ValueError: There are others.
    """
    found = read_records(path)
    others = {record.get("schema") for record in found} - {SCHEMA}
    if others:
        raise ValueError(
            f"{path} holds records of the schema {', '.join(map(str, others))}; this version reads and writes"
            f" {SCHEMA}. Name another output, or move the file away."
        )
    return found


def score_of(record: Record, metric: str) -> float:
    """What a run has reached.

    Raises:
        ValueError: It does not have this metric.
    """
    found = record["measured"]
    if metric not in found:
        known = sorted(name for name in found if name.startswith("val"))
        raise ValueError(f"Got metric={metric!r}, which the run {record['cell']} does not have; it has {known}.")
    return float(found[metric])


def has_score(record: Record, metric: str) -> bool:
    """Whether a run was measured, and with this metric."""
    return record["status"] == MEASURED and metric in record["measured"]


def is_loss(metric: str) -> bool:
    """Whether less of it is better."""
    return metric.endswith(_LOWER_IS_BETTER)


def clock_of(record: Record) -> str:
    """The clock to go by: on a CPU that of the processor, which other programs on the machine hardly lengthen."""
    on_cpu = record["passport"]["device"].startswith("CPU") or record.get("measured", {}).get("device") == "cpu"
    return "cpu_seconds" if on_cpu else "seconds"


def _watch(process: subprocess.Popen[str], seconds: float | None, host_memory: int | None) -> tuple[str, str] | None:
    """Wait until the process ends; end it where it takes too much, and say so."""
    since = time.monotonic()
    while True:
        try:
            process.wait(_POLL_SECONDS)
            return None
        except subprocess.TimeoutExpired:
            pass
        if seconds is not None and time.monotonic() - since > seconds:
            _kill(process)
            return TIMED_OUT, f"took more than {seconds:g} seconds"
        if host_memory is not None and (process_memory("VmRSS", process.pid) or 0) > host_memory:
            _kill(process)
            return OUT_OF_MEMORY, f"took more than {host_memory / 2**30:.2f} GiB of host memory"


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_words(log: str, code: int) -> tuple[str, str]:
    """What became of a process that has ended without a result, as far as it has said so."""
    if code == -signal.SIGKILL:
        return OUT_OF_MEMORY, "the process was killed, as by the system when memory runs out"
    words = log.rpartition("error:")[2] if "error:" in log else (log.strip().splitlines() or ["no message"])[-1]
    return status_of(words), shorten(f"the process ended with code {code}: {words}")
