"""A benchmark as its YAML file describes it, and the cells of its matrix: one run each, with nothing left open.

::

    axes:
      task: [trec, mrpc]
      method: [full, hift, {name: hift_random, as: hift, options: {hift.order: random}}]
      seed: [0, 1, 2]
    configs: ["configs/task/{task}.yaml", "configs/method/{method}.yaml", "configs/files/{task}.yaml?"]
    options: {seed_everything: "{seed}"}
    baseline: {method: full}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from lightning_hift.benchmark.axis_values import Entry, choices_of, existing_path, fill_in, matches
from lightning_hift.planner.memory import parse_bytes

BUDGET = "budget"
"""The axis of equal steps and equal time."""
EQUAL_STEPS, EQUAL_TIME = "steps", "time"


_SHAPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "axes": (dict, "{method: [full, hift], seed: [0, 1]}"),
    "output": (str, "benchmarks/mine"),
    "kind": (str, "fit"),
    "configs": (list, '["configs/task/{task}.yaml"]'),
    "options": (dict, '{seed_everything: "{seed}"}'),
    "exclude": (list, "[{method: full, seed: [1, 2]}]"),
    "baseline": (dict, "{method: full}"),
    "metric": ((str, dict), "val_accuracy"),
    "trial_metric": (str, "val_loss"),
    "trial_at": (dict, "{seed: 100}"),
    "threads": (int, "1"),
}


@dataclass(frozen=True)
class Limits:
    """What one run may use; more ends it, and becomes its row.

    Args:
        seconds: Of the clock, from the start of its process.
        host_memory: Of its process, such as ``"12GiB"``.
        device_memory: Of the GPU, likewise.
    """

    seconds: float | None = None
    host_memory: str | None = None
    device_memory: str | None = None

    def __post_init__(self) -> None:
        if self.seconds is not None and not (isinstance(self.seconds, (int, float)) and self.seconds > 0):
            raise ValueError(f"Got limits.seconds={self.seconds!r}; it must be a number above 0.")
        for name in ("host_memory", "device_memory"):
            if (value := getattr(self, name)) is not None:
                parse_bytes(value, f"limits.{name}")

    def bytes_of(self, name: str) -> int | None:
        """A limit of memory in bytes."""
        value = getattr(self, name)
        return None if value is None else parse_bytes(value, name)


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        values: Name of the value on each axis.
        configs: Files of configuration, in the order in which they are read.
        options: Settings behind them, by dotted key.
        trial: The settings that are tried out here, which belong to the choice for other cells.
        trials: The cells among which the best one has to be found before this one can run.
    """

    values: dict[str, Any]
    configs: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    trial: dict[str, Any] | None = None
    trials: tuple[Cell, ...] = ()

    @property
    def name(self) -> str:
        """For people."""
        return " ".join([*map(str, self.values.values()), *([self.trial_name] if self.trial else [])])

    @property
    def trial_name(self) -> str:
        """The settings that are tried out, for people."""
        return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in (self.trial or {}).items())

    @property
    def key(self) -> str:
        """The same for the same place in the matrix."""
        return json.dumps([self.values, self.trial], sort_keys=True)

    def fingerprint(self, kind: str, threads: int | None = None) -> str:
        """Changes with everything that this run is told."""
        texts = [[path, Path(path).read_text()] for path in self.configs]
        more = [] if threads is None else [threads]
        told = json.dumps([kind, texts, self.options, self.trial, *more], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Benchmark:
    """A matrix of runs, as described in YAML.

    Args:
        axes: Values by axis. A value is a plain one, or a mapping with ``name``, ``as`` (what stands for it in
            templates; default: the name), ``configs`` and ``options`` of its own, and ``trials``: values by dotted key
            that are tried out as ``trial_at`` says before the best one is taken for all runs.
        kind: What a run does: ``"fit"`` or another one of ``kinds.KINDS``, or a function of your own; see ``kind_of``.
        configs: Files that each run reads, with ``{axis}`` in the place of the value. One that ends in ``?`` is left
            out where it does not exist.
        options: Settings by dotted key, which take precedence over the files. ``{axis}`` likewise.
        exclude: What not to run: values, or lists of them, by axis.
        baseline: The value of some axes that others are compared with.
        metric: The metric that counts, or one for each value of the axis ``task``.
        trial_metric: What trials are compared by, such as a loss, which is less noisy; default: ``metric``.
        trial_at: The values of some axes in trials, such as a seed that is not used otherwise, or one task for all.
        limits: Of each run.
        threads: Of torch, per run; default: torch's own choice.
        output: Results go to ``OUTPUT.jsonl``, ``.md``, ``.csv`` and pictures beside them.
        title: Of the report.
        about: What the report should say of itself.

    Raises:
        ValueError: Something is missing, unknown, or there twice.
    """

    axes: dict[str, list[Any]]
    output: str
    kind: str = "fit"
    configs: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    exclude: list[dict[str, Any]] = field(default_factory=list)
    baseline: dict[str, Any] = field(default_factory=dict)
    metric: str | dict[str, str] = "val_loss"
    trial_metric: str | None = None
    trial_at: dict[str, Any] = field(default_factory=lambda: {"seed": 100})
    limits: Limits = field(default_factory=Limits)
    threads: int | None = None
    title: str = ""
    about: str = ""

    def __post_init__(self) -> None:
        if not self.axes:
            raise ValueError("Got no axes; a benchmark has at least one, such as {method: [full, hift]}.")
        for axis, values in self.axes.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"Got axes.{axis}={values!r}; it must be a list with at least one value.")
        names = {axis: [entry.name for entry in entries] for axis, entries in self._entries.items()}
        for where, named in [("baseline", self.baseline), *(("exclude", each) for each in self.exclude)]:
            _check_values(where, named, names)
        strange = [axis for axis in self.trial_at if axis not in self.axes and axis != "seed"]
        if strange:
            raise ValueError(f"Got trial_at with the axis {strange[0]!r}; there are {', '.join(self.axes)}.")
        unknown = set(self.budgets) - {EQUAL_STEPS, EQUAL_TIME}
        if unknown:
            raise ValueError(f"Got axes.{BUDGET} with {sorted(unknown)}; choose {EQUAL_STEPS!r} and {EQUAL_TIME!r}.")
        if EQUAL_TIME in self.budgets and (EQUAL_STEPS not in self.budgets or not self.baseline):
            raise ValueError(
                f"Got axes.{BUDGET} with {EQUAL_TIME!r}, which takes as many steps as the baseline's time has room for:"
                f" it needs {EQUAL_STEPS!r} beside it, to know how long a step takes, and a baseline."
            )

    @cached_property
    def _entries(self) -> dict[str, list[Entry]]:
        return {axis: [Entry.read(axis, value) for value in values] for axis, values in self.axes.items()}

    @property
    def budgets(self) -> list[Any]:
        """Values of the axis ``budget``."""
        return self.axes.get(BUDGET, [])

    def metric_of(self, cell_values: Mapping[str, Any]) -> str:
        """The metric that counts for a cell.

        Raises:
            ValueError: None is named for its task.
        """
        if isinstance(self.metric, str):
            return self.metric
        task = str(cell_values.get("task"))
        if task not in self.metric:
            raise ValueError(f"Got no metric for the task {task!r}; there are some for {sorted(self.metric)}.")
        return self.metric[task]

    def baseline_of(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the cell that one with ``values`` is compared with, in the same task, with the same seed."""
        steps = {BUDGET: EQUAL_STEPS} if BUDGET in self.axes else {}
        return {**values, **self.baseline, **steps}

    def cells(self) -> list[Cell]:
        """All cells, trials first, then those whose steps are given, then those that are given the baseline's time.

        Those that are compared with each other follow each other, so that a machine that slows down slows them alike.

        Raises:
            ValueError: A file does not exist, or two cells are the same.
        """
        compared = [axis for axis in self.axes if axis in self.baseline]
        slow = [axis for axis in self.axes if axis not in compared]
        found: list[Cell] = []
        for chosen in product(*(self._entries[axis] for axis in (*slow, *compared))):
            by_axis = dict(zip((*slow, *compared), chosen, strict=True))
            by_axis = {axis: by_axis[axis] for axis in self.axes}
            if not any(matches(by_axis, each) for each in self.exclude):
                found.append(self._cell(by_axis))
        final = sorted(found, key=lambda cell: cell.values.get(BUDGET) == EQUAL_TIME)
        trials = {trial.key: trial for cell in final for trial in cell.trials}
        cells = [*trials.values(), *final]
        for cell in cells:
            self.metric_of(cell.values)
        _check_twins(cells, self.kind)
        return cells

    def _entry(self, axis: str, name: Any) -> Entry:
        """The entry of this name, or a plain one."""
        return next((entry for entry in self._entries.get(axis, []) if entry.name == name), Entry(name, name))

    def _cell(self, entries: Mapping[str, Entry], trial: dict[str, Any] | None = None) -> Cell:
        names = {axis: entry.stands_for for axis, entry in entries.items()}
        files = [*self.configs, *(path for entry in entries.values() for path in entry.configs)]
        options = {**self.options}
        for entry in entries.values():
            options |= entry.options
        tried = {} if trial is not None else {k: v for entry in entries.values() for k, v in entry.trials.items()}
        fixed = {axis: self._entry(axis, value) for axis, value in {**self.trial_at, BUDGET: EQUAL_STEPS}.items()}
        as_tried = {axis: fixed.get(axis, entry) for axis, entry in entries.items()}
        return Cell(
            {axis: entry.name for axis, entry in entries.items()},
            tuple(path for file in files if (path := existing_path(file, names)) is not None),
            {**{key: fill_in(value, names) for key, value in options.items()}, **(trial or {})},
            trial,
            tuple(self._cell(as_tried, choice) for choice in choices_of(tried)),
        )


def load_benchmark(path: str | Path) -> Benchmark:
    """Read a benchmark from YAML.

    Raises:
        ValueError: The file is no description of a benchmark.
        OSError: It cannot be read.
    """
    found = yaml.safe_load(Path(path).read_text())
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} holds {type(found).__name__}; a benchmark is a mapping with at least axes and output."
        )
    known = [each.name for each in fields(Benchmark)]
    unknown = [key for key in found if key not in known]
    missing = [key for key in ("axes", "output") if key not in found]
    if unknown or missing:
        raise ValueError(f"{path}: unknown keys {unknown}, missing keys {missing}; there are {', '.join(known)}.")
    found = {key: value for key, value in found.items() if value is not None}  # a key without a value
    for key, (kind, example) in _SHAPES.items():
        if key in found and not isinstance(found[key], kind):
            raise ValueError(f"{path}: got {key}: {found[key]!r}; write it like {key}: {example}.")
    limits = found.get("limits", {})
    allowed = [each.name for each in fields(Limits)]
    if not isinstance(limits, dict) or set(limits) - set(allowed):
        raise ValueError(f"{path}: got limits={limits!r}; it takes {', '.join(allowed)}.")
    return Benchmark(**{**found, "limits": Limits(**limits)})


def _check_values(where: str, named: Mapping[str, Any], names: Mapping[str, Sequence[Any]]) -> None:
    for axis, value in named.items():
        if axis not in names:
            raise ValueError(f"Got {where} with the axis {axis!r}; there are {', '.join(names)}.")
        for each in value if isinstance(value, list) else [value]:
            if each not in names[axis]:
                raise ValueError(f"Got {where} with {axis}={each!r}; there are {', '.join(map(repr, names[axis]))}.")


def _check_twins(cells: Iterable[Cell], kind: str) -> None:
    names: dict[str, str] = {}
    runs: dict[str, Cell] = {}
    for cell in cells:
        if cell.key in names:
            raise ValueError(f"The cell {cell.name!r} is there twice; list each value of an axis once.")
        names[cell.key] = cell.name
        if cell.values.get(BUDGET) == EQUAL_TIME or cell.trial is not None:
            continue  # they differ in what is found out on the way, or are made to be alike
        twin = runs.setdefault(cell.fingerprint(kind), cell)
        if twin is not cell:
            raise ValueError(
                f"The cells {twin.name!r} and {cell.name!r} are the same run: same files, same options. Exclude one, or"
                " let an option or a file depend on what distinguishes them."
            )
