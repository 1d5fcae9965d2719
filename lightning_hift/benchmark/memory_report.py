"""The report of the kind ``"memory"``: planned beside measured, which targets were met, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lightning_hift.benchmark.cell_process import MEASURED
from lightning_hift.benchmark.matrix import Benchmark, Cell
from lightning_hift.benchmark.memory_plan import PlannedRow, plan_row
from lightning_hift.benchmark.memory_rows import GIB, Target, find_row
from lightning_hift.benchmark.records import Record
from lightning_hift.benchmark.report import measured_on, missing_runs, number_text, size_text, write_csv
from lightning_hift.planner.memory import CONTEXT_BYTES
from lightning_hift.table import format_bytes, format_markdown

_LABELS = {
    "reserved": "peak reserved",
    "host_arena": "host memory of the arena",
    "peak_over_parts": "peak over weights + gradients + slot + activations",
    "planner_error": "planner against peak allocated",
    "host_over_exact": "arena over exact bytes",
    "exposed_share": "exposed transfer, share of the step",
    "differing": "elements that differ",
}
NOT_MEASURED = "not measured"
_NOTE = (
    "Each row ran in a process of its own, with random weights of the published configuration. Peaks are those of the"
    " whole run, times are means of a sweep after a sweep of warm-up. Device in use is what the driver counts, whoever"
    " uses it. torch's allocator had expandable segments. The planner takes the driver and the CUDA context to hold"
    f" {format_bytes(CONTEXT_BYTES)} besides, which its numbers in the second table contain. Host: the arena of state"
    " and masters."
)


def write_report(
    benchmark: Benchmark, cells: Sequence[Cell], by_device: Mapping[str, Mapping[str, Record]]
) -> list[Path]:
    """All tables, and all values in CSV. Devices on which nothing was measured are left out if there are others."""
    markdown, table = Path(f"{benchmark.output}.md"), Path(f"{benchmark.output}.csv")
    measured = {device: found for device, found in by_device.items() if any(map(_was_measured, found.values()))}
    parts = [f"# {benchmark.title or 'Memory'}", benchmark.about.strip()]
    shown: Mapping[str, Mapping[str, Record]] = measured or by_device or {"": {}}
    for device, records in shown.items():
        if len(shown) > 1:
            parts.append(f"## On {device}")
        rows = [_as_recorded(cell, records.get(cell.key)) for cell in cells]
        by_row = {p.row.name: records[c.key] for c, p in zip(cells, rows, strict=True) if c.key in records}
        parts += [*format_tables(rows, by_row), *missing_runs(cells, records), *measured_on(records)]
    markdown.write_text("\n\n".join(part for part in [*parts, _NOTE] if part) + "\n")
    write_csv(table, cells, by_device)
    return [markdown, table]


def _was_measured(record: Record) -> bool:
    return bool(record["status"] == MEASURED)


def _as_recorded(cell: Cell, record: Record | None) -> PlannedRow:
    """A row as it was when it was measured; otherwise as it would be run now."""
    row = find_row(cell.options.get("row", ""), bool(cell.options.get("tiny")))
    if record is None or not _was_measured(record):
        return plan_row(row, None if record is None else record["passport"]["device_bytes"])
    config, planned = record["measured"]["config"], record["measured"]["planned"]
    row = replace(row, setup=replace(row.setup, **config["setup"]))
    return PlannedRow(row, config["layers"], planned["device"], planned["host"])


# --- targets ----------------------------------------------------------------------------------------------------------


def value_of(target: Target, record: Record, records: Mapping[str, Record]) -> float | None:
    """What was measured for ``target``; ``None``: nothing."""
    if not target.measure.startswith("speed_over:"):
        value = record.get("measured", {}).get(target.measure)
        return None if value is None else float(value)
    other = records.get(target.measure.removeprefix("speed_over:"), {})
    if not _comparable(record, other):
        return None
    return float(record["measured"]["tokens_per_second"] / other["measured"]["tokens_per_second"])


def _comparable(record: Record, other: Record) -> bool:
    both = [one.get("measured", {}) for one in (record, other)]
    models = [(one["config"]["model"], one["config"]["layers"]) for one in both if "tokens_per_second" in one]
    return len(models) == 2 and models[0] == models[1]


def verdict(target: Target, value: float | None) -> str:
    """``"met"``, ``"missed"`` or ``"not measured"``."""
    if value is None:
        return NOT_MEASURED
    if target.at_least:
        return "met" if value >= target.limit else "missed"
    return "met" if abs(value) <= target.limit else "missed"


# --- tables -----------------------------------------------------------------------------------------------------------


def format_tables(rows: Sequence[PlannedRow], records: Mapping[str, Record]) -> list[str]:
    """What was measured, and the targets.

    Args:
        rows: In the order in which they are shown.
        records: Of one device, by name of the row.
    """
    trained = [planned for planned in rows if planned.row.kind != "check"]
    return [_measured_table(trained, records), "## Targets", _target_table(rows, records)]


def _measured_table(rows: Sequence[PlannedRow], records: Mapping[str, Record]) -> str:
    header = [
        "row",
        "model",
        "batch",
        "what",
        "activation budget",
        "planned, allocated",
        "peak allocated",
        "peak reserved",
        "device in use",
        "host: planned",
        "host: arena",
        "s/step",
        "tokens/s",
        "exposed ms",
        "target",
        "result",
        "published by others",
    ]
    lines = []
    for planned in rows:
        row, record = planned.row, records.get(planned.row.name, {})
        found, setup = record.get("measured", {}), planned.row.setup
        main = row.targets[0] if row.targets else None
        value = None if main is None else value_of(main, record, records)
        lines.append(
            [
                row.name,
                row.model + (f", {planned.layers} layers" if row.like_full else ""),
                f"{setup.batch_size} x {setup.sequence_length}",
                row.what,
                size_text(setup.activation_budget),
                size_text(planned.allocated),
                size_text(found.get("allocated")),
                size_text(found.get("reserved")),
                size_text(found.get("device_used")),
                size_text(planned.host),
                size_text(found.get("host_arena")),
                number_text(found.get("seconds_per_step"), ".3f"),
                number_text(found.get("tokens_per_second"), ",.0f"),
                number_text(found.get("exposed_ms"), ".1f"),
                "-" if main is None else _limit(main),
                _result(record) if main is None else verdict(main, value) if found else _result(record),
                row.published or "-",
            ]
        )
    return format_markdown(header, lines)


def _target_table(rows: Sequence[PlannedRow], records: Mapping[str, Record]) -> str:
    lines, errors = [], []
    for planned in rows:
        record = records.get(planned.row.name, {})
        for target in planned.row.targets:
            value = value_of(target, record, records)
            expected = {"reserved": planned.device, "host_arena": planned.host}.get(target.measure)
            forecast = "-" if expected is None else f"{_in_unit(target, expected)}: {verdict(target, expected)}"
            found = [_in_unit(target, value), verdict(target, value)]
            lines.append([planned.row.name, _label(target), _limit(target), forecast, *found])
            if target.measure == "planner_error" and value is not None:
                errors.append(verdict(target, value) == "met")
    lines.append(["all", "rows in which the planner is within 5 %", "at least 6", "-", *_planner_summary(errors)])
    return format_markdown(["row", "measure", "target", "planned", "measured", "result"], lines)


def _planner_summary(within: Sequence[bool]) -> tuple[str, str]:
    if not within:
        return "-", NOT_MEASURED
    return f"{sum(within)} of {len(within)}", "met" if sum(within) >= 6 else "missed"


def _label(target: Target) -> str:
    if target.measure.startswith("speed_over:"):
        return f"tokens/s over those of {target.measure.removeprefix('speed_over:')}"
    return _LABELS[target.measure]


def _limit(target: Target) -> str:
    return f"{'at least' if target.at_least else 'at most'} {_in_unit(target, target.limit)}"


def _in_unit(target: Target, value: float | None) -> str:
    if value is None:
        return "-"
    return {
        "GiB": f"{value / GIB:.2f} GiB",
        "%": f"{100 * value:.2f} %",
        "x": f"{value:.3f}x",
        "": f"{value:,.0f}",
    }[target.unit]


def _result(record: Record) -> str:
    return str(record.get("status", NOT_MEASURED))
