"""The records of many runs as tables in Markdown: what was measured, and which targets were met."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_hift.benchmark.memory_plan import PlannedRow
from lightning_hift.benchmark.memory_rows import GIB, Target
from lightning_hift.benchmark.records import Record, read_records
from lightning_hift.memory import CONTEXT_BYTES
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


def latest_records(path: Path) -> dict[str, Record]:
    """The last record of each row; a row that was not measured this time does not hide one that was.

    Each has ``row``, ``config``, ``planned``, ``status`` ("measured", "failed", "skipped", "not measured"), ``reason``,
    ``measured``, ``passport``.
    """
    found: dict[str, Record] = {}
    for record in read_records(path):
        if record["status"] == NOT_MEASURED and record["row"] in found:
            continue
        found[record["row"]] = record
    return found


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
    def key(one: Record) -> tuple[Any, ...]:
        return one["passport"]["device"], one["config"]["model"], one["config"]["layers"]

    both = (record, other)
    return all("tokens_per_second" in one.get("measured", {}) for one in both) and key(record) == key(other)


def verdict(target: Target, value: float | None) -> str:
    """``"met"``, ``"missed"`` or ``"not measured"``."""
    if value is None:
        return NOT_MEASURED
    if target.at_least:
        return "met" if value >= target.limit else "missed"
    return "met" if abs(value) <= target.limit else "missed"


def format_report(rows: Sequence[PlannedRow], records: Mapping[str, Record], heading: str) -> str:
    """All tables, with passports below."""
    trained = [planned for planned in rows if planned.row.kind != "check"]
    parts = [f"# {heading}", _measured_table(trained, records), "## Targets", _target_table(rows, records)]
    parts += _reasons(records)
    parts += ["## Measured on", *_passports(records)]
    return "\n\n".join(parts) + "\n"


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
                _size(setup.activation_budget),
                _size(planned.allocated),
                _size(found.get("allocated")),
                _size(found.get("reserved")),
                _size(found.get("device_used")),
                _size(planned.host),
                _size(found.get("host_arena")),
                _number(found.get("seconds_per_step"), ".3f"),
                _number(found.get("tokens_per_second"), ",.0f"),
                _number(found.get("exposed_ms"), ".1f"),
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


def _size(value: float | None) -> str:
    return "-" if value is None else format_bytes(value)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _result(record: Record) -> str:
    return str(record.get("status", NOT_MEASURED))


def _reasons(records: Mapping[str, Record]) -> list[str]:
    found: dict[str, list[str]] = {}
    for name, record in records.items():
        if record.get("reason"):
            found.setdefault(f"{record['status']}: {record['reason']}", []).append(name)
    if not found:
        return []
    return ["## Not measured, and why", "\n".join(f"- {', '.join(names)}: {why}" for why, names in found.items())]


def _passports(records: Mapping[str, Record]) -> Iterable[str]:
    yield (
        "Each row ran in a process of its own, with random weights of the published configuration. Peaks are those of"
        " the whole run, times are means of a sweep after a sweep of warm-up. Device in use is what the driver counts,"
        " whoever uses it. torch's allocator had expandable segments. The planner takes the driver and the CUDA context"
        f" to hold {_size(CONTEXT_BYTES)} besides, which its numbers in the second table contain."
        " Host: the arena of state and masters."
    )
    found: dict[str, list[str]] = {}
    for name, record in records.items():
        found.setdefault(_passport_line(record), []).append(name)
    yield "\n".join(f"- {', '.join(names)}: {line}" for line, names in found.items()) or "- nothing yet"


def _passport_line(record: Record) -> str:
    passport = record["passport"]
    packages = ", ".join(f"{name} {number}" for name, number in passport["versions"].items())
    driver = f", driver {passport['driver']}" if passport["driver"] else ""
    host = _size(passport["host_bytes_available"])
    return f"{passport['device']}{driver}; {host} of host memory free; {packages}; commit {passport['commit']}"
