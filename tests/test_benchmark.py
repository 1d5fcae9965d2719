"""The benchmark of memory and speed: rows in processes of their own, records, tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hift.benchmark import memory, memory_plan
from lightning_hift.benchmark.memory_plan import PlannedRow, plan_row
from lightning_hift.benchmark.memory_report import format_report, latest_records, value_of, verdict
from lightning_hift.benchmark.memory_rows import GIB, ROWS, Row, Target, tiny
from lightning_hift.benchmark.passport import make_passport
from lightning_hift.benchmark.records import append_record
from lightning_hift.planner.forecast import Setup

PASSPORT = {
    "device": "a card",
    "device_bytes": 80 * GIB,
    "driver": "1",
    "host_bytes_available": GIB,
    "versions": {"torch": "2"},
    "commit": "abc",
}


def row(name: str) -> Row:
    return tiny(next(row for row in ROWS if row.name == name))


def record(name: str, **values: Any) -> dict[str, Any]:
    planned = plan_row(row(name), None)
    return memory._complete(planned, {"status": "measured", "measured": values}, PASSPORT)


def cells(table: str, name: str) -> list[str]:
    return [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith(f"| {name} |")][0]  # noqa: RUF015


def test_tiny_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory.main(["--tiny", "--rows", "llama3,speed-full,check-busy", "--output", str(tmp_path)])
    records = latest_records(tmp_path / "memory_tiny.jsonl")
    assert list(records) == ["llama3", "speed-full", "check-busy"]
    assert {one["status"] for one in records.values()} == {"measured"}, records
    hift, full, check = (records[name]["measured"] for name in records)
    assert hift["steps"] == 5  # embedding, three blocks, head
    # Each slice of a sliced parameter has a step counter of its own, which the planner leaves out.
    assert 0 <= hift["host_exact"] - records["llama3"]["planned"]["host"] < 100
    assert hift["tokens_per_second"] == pytest.approx(32 / hift["seconds_per_step"])
    assert 5 < hift["loss"] < 8  # near ln 512: nothing was learnt, nothing blew up
    assert 5 < full["loss"] < 8
    if not torch.cuda.is_available():
        assert check["differing"] == 0
    table = (tmp_path / "memory_tiny.md").read_text()
    assert cells(table, "llama3")[15] == "measured"
    assert cells(table, "split")[15] == "not measured"
    assert "check-busy | elements that differ | at most 0 | - | 0 | met" in table
    assert "llama3: measured" in capsys.readouterr().out


def test_a_failing_row_is_a_row(tmp_path: Path) -> None:
    planned = plan_row(row("split"), None)
    too_small = replace(planned, row=replace(planned.row, setup=replace(planned.row.setup, activation_budget=1)))
    result = memory._start_child(too_small, max_steps=1, timeout=300)
    assert result["status"] == "failed"
    assert "ValueError: Got activation_budget=1 (1 B)" in result["reason"]

    complete = memory._complete(too_small, result, PASSPORT)
    table = format_report([too_small], {"split": complete}, "x")
    assert cells(table, "split")[15] == "failed"
    assert "- split: failed: ValueError" in table


def test_a_killed_process_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "executable", "/bin/false")
    result = memory._start_child(plan_row(row("split"), None), None, timeout=60)
    assert result == {"status": "failed", "reason": "the process ended with code 1: no message"}


def test_slow_rows_end(monkeypatch: pytest.MonkeyPatch) -> None:
    result = memory._start_child(plan_row(row("split"), None), None, timeout=0.01)
    assert result == {"status": "failed", "reason": "took more than 0.01 seconds"}


def test_the_largest_batch_is_searched_downwards(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def start(planned: PlannedRow, *_: Any) -> dict[str, Any]:
        tried.append(planned.row.setup.batch_size)
        fits = planned.row.setup.batch_size <= 1
        return {"status": "measured", "measured": {}} if fits else {"status": "failed", "reason": "out of memory: x"}

    monkeypatch.setattr(memory, "_start_child", start)
    options = memory._parser().parse_args([])
    planned, result = memory._measure(plan_row(row("cap-48-fp32"), None), options)
    assert tried == [2, 1]
    assert (planned.row.setup.batch_size, result["status"]) == (1, "measured")


def test_dry_run_lists_the_rows_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory.main(["--tiny", "--dry-run", "--output", str(tmp_path)])
    table = capsys.readouterr().out
    for one in ROWS:
        assert cells(table, one.name)
    assert cells(table, "split")[5].endswith("iB")  # planned
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_rows_are_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "ROWS", tuple(tiny(one) for one in ROWS))  # planning the real ones takes a minute
    memory.main(["--output", str(tmp_path)])
    assert "There is no CUDA device here: all rows are written as not measured." in capsys.readouterr().out
    records = latest_records(tmp_path / "memory_gpu.jsonl")
    assert {one["status"] for one in records.values()} == {"not measured"}
    assert len(records) == len(ROWS)
    assert "not measured: no CUDA device was at hand" in (tmp_path / "memory_gpu.md").read_text()


def test_unknown_rows_are_refused() -> None:
    with pytest.raises(SystemExit, match="Got --rows with fp23; there are fp32, full-masters"):
        memory.main(["--tiny", "--rows", "fp32,fp23"])


def test_the_last_record_of_a_row_counts_unless_it_was_not_measured(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_record(path, record("split", reserved=1))
    append_record(path, record("fp32", reserved=2))
    append_record(path, record("split", reserved=3))
    append_record(path, {**record("fp32"), "status": "not measured"})
    found = latest_records(path)
    assert {name: one["measured"]["reserved"] for name, one in found.items()} == {"split": 3, "fp32": 2}
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize(
    ("target", "value", "expected"),
    [
        (Target("reserved", 18 * GIB), 18 * GIB, "met"),
        (Target("reserved", 18 * GIB), 18 * GIB + 1, "missed"),
        (Target("reserved", 18 * GIB), None, "not measured"),
        (Target("planner_error", 0.05, unit="%"), -0.06, "missed"),
        (Target("speed_over:speed-full", 1.85, True, "x"), 1.85, "met"),
        (Target("speed_over:speed-full", 1.85, True, "x"), 1.84, "missed"),
    ],
)
def test_verdicts(target: Target, value: float | None, expected: str) -> None:
    assert verdict(target, value) == expected


def test_speeds_are_compared_on_the_same_device_and_model_only() -> None:
    target = Target("speed_over:speed-full", 1.85, True, "x")
    hift, full = record("speed-hift", tokens_per_second=20.0), record("speed-full", tokens_per_second=10.0)
    assert value_of(target, hift, {"speed-full": full}) == 2
    assert value_of(target, hift, {}) is None
    other_device = {**full, "passport": {**PASSPORT, "device": "another card"}}
    assert value_of(target, hift, {"speed-full": other_device}) is None
    fewer_layers = {**full, "config": {**full["config"], "layers": 2}}
    assert value_of(target, hift, {"speed-full": fewer_layers}) is None


def test_the_planner_must_be_right_on_six_rows() -> None:
    target = Target("planner_error", 0.05, unit="%")
    rows = [PlannedRow(Row(f"r{i}", "x", targets=(target,)), 1) for i in range(7)]

    def last_line(errors: list[float]) -> str:
        records = {
            planned.row.name: memory._complete(
                planned, {"status": "measured", "measured": {"planner_error": e}}, PASSPORT
            )
            for planned, e in zip(rows, errors, strict=False)
        }
        return " | ".join(cells(format_report(rows, records, "x"), "all")[4:])

    assert last_line([]) == "- | not measured"
    assert last_line([0.01] * 5 + [0.2]) == "5 of 6 | missed"
    assert last_line([0.01, -0.04, 0.0, 0.049, -0.05, 0.01, 0.3]) == "6 of 7 | met"


def test_layers_are_left_out_until_full_fine_tuning_fits() -> None:
    two = memory_plan.forecast(memory_plan._workload("tiny", 2, None), row("speed-full").setup).peak
    for name in ("speed-full", "speed-hift", "speed-cpu-offload"):
        assert plan_row(row(name), None).layers == 3
        assert plan_row(row(name), round(two / 0.95) + 1).layers == 2


def test_the_budget_is_the_largest_that_fits() -> None:
    workload = memory_plan._workload("tiny", 3, None)
    setup = Setup(precision="bf16-true", batch_size=1024, sequence_length=64)

    def budget(limit: int) -> int:
        found = memory_plan._largest_budget(workload, setup, limit)
        assert limit == 1 or memory_plan.forecast(workload, found).peak <= limit
        return found.activation_budget or 0

    smallest = budget(1)
    limit = memory_plan.forecast(workload, replace(setup, activation_budget=smallest)).peak + 2 * 2**26
    assert smallest < budget(limit) <= budget(2**60)


def test_passport_knows_the_versions_and_survives_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    passport = make_passport()
    assert passport["commit"] is None
    assert passport["versions"]["torch"] == torch.__version__  # type: ignore[index]
