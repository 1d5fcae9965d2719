"""The report of a benchmark: tables in Markdown, all runs in CSV, pictures."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

from lightning_hift.benchmark.cell_process import MEASURED
from lightning_hift.benchmark.matrix import BUDGET, EQUAL_STEPS, EQUAL_TIME, Benchmark, Cell
from lightning_hift.benchmark.plots import KINDS, plot_curves, plot_groups, plot_memory, plot_scatter
from lightning_hift.benchmark.records import Record
from lightning_hift.benchmark.runner import clock_of, has_score, is_loss
from lightning_hift.benchmark.summary import Line, summarize
from lightning_hift.table import format_bytes, format_markdown

# What quality is drawn against, its name in the records, and which runs can be compared by it.
_CURVES = (("time", "seconds", EQUAL_TIME), ("tokens", "tokens", EQUAL_STEPS), ("steps", "step", EQUAL_STEPS))
_TIMES = {"seconds": "seconds of training", "cpu_seconds": "the processor's seconds of training"}
_NOT_IN_CSV = ("curve", "losses", "memory_by_group")
_BY_GROUP = (
    "Groups are in the order of their first turns, from above. The state is the room of the largest group's, which is"
    " kept free; activations are those of the largest batch at which a group was looked at, and batches differ in size."
)


def write_report(
    benchmark: Benchmark, cells: Sequence[Cell], by_device: Mapping[str, Mapping[str, Record]]
) -> list[Path]:
    """Write all files of the report, and return their paths."""
    table, markdown = Path(f"{benchmark.output}.csv"), Path(f"{benchmark.output}.md")
    write_csv(table, cells, by_device)
    parts = [f"# {benchmark.title or 'Benchmark'}", benchmark.about.strip()]
    pictures: list[Path] = []
    for number, (device, records) in enumerate(by_device.items()):
        lines = summarize(benchmark, cells, records)
        heading = [f"## On {device}"] if len(by_device) > 1 else []
        suffix = f"_{number + 1}" if number else ""
        drawn = _draw(benchmark, lines, suffix) if find_spec("matplotlib") else {}
        pictures += drawn.values()
        parts += [*heading, *_sections(benchmark, cells, records, lines, drawn)]
    if not find_spec("matplotlib"):
        parts.append("No pictures: matplotlib is not installed (`pip install lightning-hift[plot]`).")
    markdown.write_text("\n\n".join(part for part in parts if part) + "\n")
    return [markdown, table, *pictures]


def write_tables(
    benchmark: Benchmark,
    cells: Sequence[Cell],
    by_device: Mapping[str, Mapping[str, Record]],
    title: str,
    sections: Callable[[Sequence[Cell], Mapping[str, Record]], list[str]],
) -> list[Path]:
    """A report of tables alone: what ``sections`` makes of each device's records, and all values in CSV.

    Args:
        title: Where the benchmark has none.
    """
    markdown, table = Path(f"{benchmark.output}.md"), Path(f"{benchmark.output}.csv")
    parts = [f"# {benchmark.title or title}", benchmark.about.strip()]
    for device, records in by_device.items():
        heading = [f"## On {device}"] if len(by_device) > 1 else []
        parts += [*heading, *sections(cells, records), *missing_runs(cells, records), *measured_on(records)]
    markdown.write_text("\n\n".join(part for part in parts if part) + "\n")
    write_csv(table, cells, by_device)
    return [markdown, table]


def write_csv(path: Path, cells: Sequence[Cell], by_device: Mapping[str, Mapping[str, Record]]) -> None:
    """One line for each run that was recorded, with all measured values."""
    rows: list[dict[str, Any]] = []
    for device, records in by_device.items():
        for cell in cells:
            if (record := records.get(cell.key)) is not None:
                told = {"device": device, **cell.values, "trial": cell.trial or "", "status": record["status"]}
                rows.append({**told, "reason": record.get("reason", ""), **_flat(record.get("measured", {}))})
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _flat(measured: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in measured.items():
        if isinstance(value, dict) and name not in _NOT_IN_CSV:
            found |= {f"{name}.{key}": each for key, each in _flat(value).items()}
        elif name not in _NOT_IN_CSV:
            found[name] = value
    return found


# --- tables -----------------------------------------------------------------------------------------------------------


def _sections(
    benchmark: Benchmark,
    cells: Sequence[Cell],
    records: Mapping[str, Record],
    lines: Sequence[Line],
    drawn: Mapping[str, Path],
) -> list[str]:
    def picture(name: str, *notes: str) -> list[str]:
        return [f"![{name}]({drawn[name].name})", *notes] if name in drawn else []

    measured = [line for line in lines if line.records]
    return [
        *(["## Result", _verdicts(benchmark, measured)] if measured else []),
        *_over_tasks(benchmark, measured),
        *(line for against, *_ in _CURVES for line in picture(f"quality against {against}")),
        *picture("loss against time"),
        *(["## Steps", _steps(measured)] if measured else []),
        *_memory(benchmark, measured),
        *picture("memory on the device"),
        *picture("memory by active group", _BY_GROUP),
        *picture("speed against memory"),
        *_trials(benchmark, cells, records),
        *missing_runs(cells, records, benchmark),
        *measured_on(records),
    ]


def _verdicts(benchmark: Benchmark, lines: Sequence[Line]) -> str:
    compared = bool(benchmark.baseline)
    header = [*(axis for axis in lines[0].values), "metric", "by seed", "mean", "spread"]
    header += ["gain", "time", "speed per step", "memory"] if compared else []
    rows = []
    for line in lines:
        digits = 3 if is_loss(line.metric) else 1
        row: list[str] = [*(str(value) for value in line.values.values()), line.metric.removeprefix("val_")]
        row += [" ".join(f"{score:.{digits}f}" for score in line.scores), f"{line.mean:.{digits + 1}f}"]
        row += ["-" if line.spread is None else f"{line.spread:.{digits + 1}f}"]
        if compared:
            speed = line.ratio("time_per_step")
            row += [number_text(line.gain, f"+.{digits + 1}f"), number_text(line.ratio("time"), ".2f")]
            row += ["-" if not speed else f"{1 / speed:.2f}", number_text(line.ratio("memory.total"), ".2f")]
        rows.append(row)
    notes = "Mean and spread (standard deviation) over seeds; percentages, or a loss as it is."
    if compared:
        base = ", ".join(map(str, benchmark.baseline.values()))
        notes += (
            f" Against {base} in the same task with the same seed: gain (positive is better), and as ratios the seconds"
            " of training, steps per second, and memory."
        )
    notes += " Seconds are the processor's on a CPU, and the clock's elsewhere; validation is left out."
    return f"{format_markdown(header, rows)}\n\n{notes}"


def _steps(lines: Sequence[Line]) -> str:
    header = [*(axis for axis in lines[0].values), "steps", "s/step", "tokens/s", "exposed transfer", "state on device"]
    header += ["trains at once", "updates per parameter", "largest learning rate"]
    rows = []
    for line in lines:
        row: list[str] = [*(str(value) for value in line.values.values()), number_text(line.value("step"), ",.0f")]
        row += [number_text(line.value("time_per_step"), ".3f"), number_text(line.value("tokens_per_second"), ",.0f")]
        row += [number_text(line.value("exposed_ms_per_step"), ".1f ms"), size_text(line.value("state_on_device"))]
        row += [
            number_text(line.value("trainable_at_once"), ",.0f"),
            number_text(line.value("updates_per_parameter"), ",.1f"),
        ]
        rows.append([*row, number_text(line.value("learning_rate"), ".2g")])
    return format_markdown(header, rows)


def _over_tasks(benchmark: Benchmark, lines: Sequence[Line]) -> list[str]:
    """Gains by method, over the tasks that all methods were measured in."""
    if "task" not in benchmark.axes or len(benchmark.axes["task"]) < 2 or not benchmark.baseline:
        return []
    found: dict[tuple[Any, ...], dict[str, Line]] = {}
    for line in lines:
        if line.gain is not None:
            kind = tuple(value for axis, value in line.values.items() if axis != "task")
            found.setdefault(kind, {})[str(line.values["task"])] = line
    if not found:
        return []
    tasks = list(dict.fromkeys(task for by_task in found.values() for task in by_task))
    header = [*(axis for axis in lines[0].values if axis != "task"), *tasks, "mean gain", "mean time", "mean speed"]
    rows = []
    for kind, by_task in found.items():
        gains = [by_task[task].gain if task in by_task else None for task in tasks]
        times = [ratio for line in by_task.values() if (ratio := line.ratio("time")) is not None]
        speeds = [1 / ratio for line in by_task.values() if (ratio := line.ratio("time_per_step"))]
        known = [gain for gain in gains if gain is not None]
        of = "" if len(known) == len(tasks) else f" ({len(known)} of {len(tasks)} tasks)"
        told = f"{mean(known):+.2f}{of}"
        rows.append([*map(str, kind), *(number_text(gain, "+.2f") for gain in gains), told])
        rows[-1] += [
            number_text(mean(times) if times else None, ".2f"),
            number_text(mean(speeds) if speeds else None, ".2f"),
        ]
    return ["### Gains over tasks", format_markdown(header, rows)]


def _memory(benchmark: Benchmark, lines: Sequence[Line]) -> list[str]:
    chosen = _one_task(lines)
    rows = []
    for name, line in chosen.items():
        parts = [line.value(f"memory.{kind}") for kind in (*KINDS, "total")]
        ratio = line.ratio("memory.total")
        rows.append([name, *map(size_text, parts), number_text(ratio, ".2f"), size_text(line.value("host_peak"))])
    if not rows:
        return []
    header = ["run", *KINDS, "total", "against baseline", "host, peak of the process"]
    on_gpu = not _device_of(lines).startswith("CPU")
    how = (
        "At torch's peak of forward and backward; the residual is what is not accounted for by the other three."
        if on_gpu
        else "Counted tensor by tensor: it is what would live on a device. On a CPU, host and device are one memory,"
        " and nothing is saved."
    )
    where = f" In the task {next(iter(chosen.values())).values['task']}." if "task" in benchmark.axes else ""
    return ["## Memory", f"{format_markdown(header, rows)}\n\n{how}{where}"]


def _trials(benchmark: Benchmark, cells: Sequence[Cell], records: Mapping[str, Record]) -> list[str]:
    rows = []
    for cell in cells:
        record = records.get(cell.key)
        if cell.trial is not None and record is not None:
            metric = benchmark.trial_metric or benchmark.metric_of(cell.values)
            score = record["measured"].get(metric) if record["status"] == MEASURED else None
            values = {k.rpartition(".")[2]: f"{v:g}" if isinstance(v, float) else v for k, v in cell.trial.items()}
            told = ", ".join(f"{name} {value}" for name, value in values.items())
            shown = record["status"] if score is None else f"{score:.3f}" if is_loss(metric) else f"{100 * score:.1f}"
            names = [str(value) for axis, value in cell.values.items() if axis not in ("seed", BUDGET)]
            rows.append([*names, told, shown])
    if not rows:
        return []
    header = [*(axis for axis in benchmark.axes if axis not in ("seed", BUDGET)), "trial", "result"]
    where = ", ".join(f"{axis} {value}" for axis, value in benchmark.trial_at.items() if axis in benchmark.axes)
    by = f" by {benchmark.trial_metric.removeprefix('val_')}" if benchmark.trial_metric else ""
    note = f"Tried out with {where}; the best of each{by} is used above, for all runs."
    return ["## Settings that were tried", f"{format_markdown(header, rows)}\n\n{note}"]


def missing_runs(cells: Sequence[Cell], records: Mapping[str, Record], benchmark: Benchmark | None = None) -> list[str]:
    """A section with those that were not measured, by reason; empty if there are none.

    Args:
        cells: All that there should be.
        records: Those that there are, by ``Cell.key``.
        benchmark: Name those without its metric, too.
    """
    found: dict[str, list[str]] = {}
    for cell in cells:
        record = records.get(cell.key)
        if record is None:
            found.setdefault("not measured", []).append(cell.name)
        elif record["status"] != MEASURED:
            found.setdefault(f"{record['status']}: {record['reason']}", []).append(cell.name)
        elif benchmark is not None and not has_score(record, metric := benchmark.metric_of(cell.values)):
            there = ", ".join(name for name in record["measured"] if name.startswith("val")) or "none"
            found.setdefault(f"measured, but without {metric}; there are {there}", []).append(cell.name)
    if not found:
        return []
    lines = [
        f"- {why}: {'; '.join(names[:8])}{f' and {len(names) - 8} more' * (len(names) > 8)}"
        for why, names in found.items()
    ]
    return ["## Not measured, and why", "\n".join(lines)]


def measured_on(records: Mapping[str, Record]) -> list[str]:
    """A section with what the runs were measured on; empty if there are none."""
    found: dict[str, Counter[str]] = {}
    for record in records.values():
        found.setdefault(_machine(record), Counter())[str(record["passport"]["commit"])] += 1
    if not found:
        return []
    lines = [
        f"- {machine}; {'commits' if len(commits) > 1 else 'commit'} "
        + ", ".join(f"{commit} ({count} {'runs' if count > 1 else 'run'})" for commit, count in commits.items())
        for machine, commits in found.items()
    ]
    return ["## Measured on", "\n".join(lines)]


def _machine(record: Record) -> str:
    """What a run was measured on, but for the memory that was free and the commit."""
    passport = record["passport"]
    packages = ", ".join(f"{name} {number}" for name, number in passport["versions"].items())
    driver = f", driver {passport['driver']}" if passport["driver"] else ""
    return f"{passport['device']}{driver}; {packages}"


# --- pictures ---------------------------------------------------------------------------------------------------------


def _draw(benchmark: Benchmark, lines: Sequence[Line], suffix: str) -> dict[str, Path]:
    """Files by what they show."""
    measured = [line for line in lines if line.records]
    chosen = _one_task(measured)
    drawn: dict[str, Path] = {}

    def draw(what: str, plot: Callable[..., None], content: Any, *arguments: str) -> None:
        if content:
            drawn[what] = Path(f"{benchmark.output}_{what.replace(' ', '_')}{suffix}.png")
            plot(content, drawn[what], *arguments)

    clock = clock_of(next(iter(measured[0].records.values()))) if measured else "seconds"
    for against, key, budget in _CURVES:
        what, axis = f"quality against {against}", clock if key == "seconds" else key
        panels = _panels(_of_budget(measured, budget), axis)
        draw(what, plot_curves, panels, _TIMES.get(axis, against), "Quality on the validation split")
    losses = _losses(_of_budget(measured, EQUAL_TIME), clock)
    draw("loss against time", plot_curves, losses, _TIMES[clock], "Training loss, running mean")
    bars = {name: _parts(line) for name, line in chosen.items() if line.value("memory.total") is not None}
    draw("memory on the device", plot_memory, bars, "Memory on the device")
    groups = {name: found for name, line in chosen.items() if len(found := _groups(line)) > 1}
    draw("memory by active group", plot_groups, groups, "Memory by active group")
    points = {
        name: (memory, 1 / time)
        for name, line in chosen.items()
        if (memory := line.ratio("memory.total")) and (time := line.ratio("time_per_step"))
    }
    origin = {name: (1.0, 1.0) for name, line in chosen.items() if benchmark.baseline and not line.baselines}
    draw("speed against memory", plot_scatter, points and {**origin, **points}, "Speed against memory")
    return drawn


def _one_task(lines: Sequence[Line]) -> dict[str, Line]:
    """Lines of the first task that was measured, by what distinguishes them; those of equal steps."""
    first = lines[0].values.get("task") if lines else None
    of_task = [line for line in lines if line.values.get("task") == first]
    return {_name(line, lines): line for line in _of_budget(of_task, EQUAL_STEPS)}


def _name(line: Line, lines: Sequence[Line]) -> str:
    """By the axes that have several values, but for task and budget."""
    varying = [axis for axis in line.values if len({str(other.values[axis]) for other in lines}) > 1]
    return " ".join(str(line.values[axis]) for axis in varying if axis not in ("task", BUDGET)) or "run"


def _of_budget(lines: Sequence[Line], budget: str) -> list[Line]:
    """One line for all that differ in the budget alone: the one of this budget, if there is one."""
    found: dict[str, Line] = {}
    for line in lines:
        rest = str([value for axis, value in line.values.items() if axis != BUDGET])
        if rest not in found or line.values.get(BUDGET) == budget:
            found[rest] = line
    return list(found.values())


def _panels(lines: Sequence[Line], key: str) -> dict[str, dict[str, list[list[tuple[float, float]]]]]:
    panels: dict[str, dict[str, list[list[tuple[float, float]]]]] = {}
    for line in lines:
        scale = 1 if is_loss(line.metric) else 100
        curves = [
            [(point[key], scale * point[line.metric]) for point in points if {key, line.metric} <= point.keys()]
            for points in (record["measured"].get("curve", []) for record in line.records.values())
        ]
        if all(len(curve) > 1 for curve in curves):
            panel = f"{line.values.get('task', '')} {line.metric.removeprefix('val_')}".strip()
            panels.setdefault(panel, {})[_name(line, lines)] = curves
    return panels


def _losses(lines: Sequence[Line], clock: str) -> dict[str, dict[str, list[list[tuple[float, float]]]]]:
    """The training loss of the first seed, each point the mean of those around it."""
    panels: dict[str, dict[str, list[list[tuple[float, float]]]]] = {}
    for line in lines:
        points = next(iter(line.records.values()))["measured"].get("losses", [])
        if len(points) > 1:
            reach = len(points) // 20
            around = [points[max(0, i - reach) : i + reach + 1] for i in range(len(points))]
            curve = [(p[clock], mean(q["loss"] for q in near)) for p, near in zip(points, around, strict=True)]
            panels.setdefault(str(line.values.get("task", "")), {})[_name(line, lines)] = [curve]
    return panels


def _parts(line: Line) -> dict[str, float]:
    return {kind: line.value(f"memory.{kind}") or 0.0 for kind in KINDS}


def _groups(line: Line) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = next(iter(line.records.values()))["measured"].get("memory_by_group", {})
    return found


def _device_of(lines: Sequence[Line]) -> str:
    return str(next(iter(lines[0].records.values()))["passport"]["device"]) if lines else ""


def number_text(value: float | None, form: str) -> str:
    """A number in a format, which may have a unit behind a space; ``None`` is a dash."""
    number, _, unit = form.partition(" ")
    return "-" if value is None else f"{value:{number}} {unit}".rstrip()


def size_text(value: float | None) -> str:
    """A number of bytes in the largest unit that fits; ``None`` is a dash."""
    return "-" if value is None else format_bytes(value)
