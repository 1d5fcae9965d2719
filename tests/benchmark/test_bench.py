"""``lightning-hift bench``: the matrix, the runs in processes of their own, the records, the report."""

import contextlib
import csv
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lightning_hift.benchmark import report
from lightning_hift.benchmark.command import main
from lightning_hift.benchmark.matrix import Benchmark, Cell, Limits, load_benchmark
from lightning_hift.benchmark.plots import plot_curves, shorten_group
from lightning_hift.benchmark.records import append_record, merge_records, read_records
from lightning_hift.benchmark.report import measured_on, write_report
from lightning_hift.benchmark.runner import Runner, is_loss
from lightning_hift.benchmark.summary import summarize
from tests.processes import loaded_context
from tests.text_models import WORDS, save_network, save_tokenizer

ROOT = Path(__file__).parents[2]
KIND = "tests.bench_kinds:run"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def benchmark(**options):
    return Benchmark(**{"axes": {"seed": [0]}, "output": "out/it", "kind": KIND, "metric": "val_accuracy", **options})


def write(path="bench.yaml", **options):
    told = {"axes": {"seed": [0]}, "output": "out/it", "kind": KIND, "metric": "val_accuracy", **options}
    Path(path).write_text(yaml.safe_dump(told, sort_keys=False))
    return path


# --- the matrix -------------------------------------------------------------------------------------------------------


def test_cells_are_the_product_with_files_and_options_filled_in(here):
    for name in ("t/x.yaml", "m/a.yaml", "m/b.yaml", "own/x_b.yaml", "extra.yaml"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(name)
    cells = benchmark(
        axes={
            "task": ["x"],
            "method": [
                "a",
                {"name": "c", "as": "b", "options": {"lr": 3, "note": "is {method}"}, "configs": ["extra.yaml"]},
            ],
            "seed": [0, 1],
        },
        configs=["t/{task}.yaml", "m/{method}.yaml", "own/{task}_{method}.yaml?"],
        options={"seed_everything": "{seed}", "lr": 1, "deep": {"list": ["{task}!", 2]}},
        exclude=[{"method": "a", "seed": [1]}],
        baseline={"method": "a"},
    ).cells()
    assert [tuple(cell.values.values()) for cell in cells] == [("x", "a", 0), ("x", "c", 0), ("x", "c", 1)]
    first, second, _ = cells
    assert first.configs == ("t/x.yaml", "m/a.yaml")
    assert first.options == {"seed_everything": 0, "lr": 1, "deep": {"list": ["x!", 2]}}
    assert second.configs == ("t/x.yaml", "m/b.yaml", "own/x_b.yaml", "extra.yaml")
    assert second.options == {"seed_everything": 0, "lr": 3, "deep": {"list": ["x!", 2]}, "note": "is b"}


def test_what_is_compared_runs_side_by_side(here):
    axes = {"method": ["a", "b"], "seed": [0, 1]}
    options = {"m": "{method}", "s": "{seed}"}
    cells = benchmark(axes=axes, options=options, baseline={"method": "a"}).cells()
    assert [tuple(cell.values.values()) for cell in cells] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_a_fingerprint_changes_with_all_that_a_run_is_told(here):
    Path("a.yaml").write_text("1")
    cell = Cell({"seed": 0}, ("a.yaml",), {"lr": 1})
    first = cell.fingerprint("fit")
    assert first == Cell({"seed": 0}, ("a.yaml",), {"lr": 1}).fingerprint("fit")
    others = {cell.fingerprint("speed"), Cell({"seed": 0}, ("a.yaml",), {"lr": 2}).fingerprint("fit")}
    Path("a.yaml").write_text("2")
    assert len({first, cell.fingerprint("fit"), *others}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": {}}, "Got no axes"),
        ({"axes": {"seed": 3}}, "axes.seed=3; it must be a list"),
        ({"axes": {"seed": []}}, "at least one value"),
        ({"axes": {"seed": [0, 0]}}, "cell '0' is there twice"),
        ({"axes": {"method": ["a", "b"]}}, "cells 'a' and 'b' are the same run"),
        ({"axes": {"m": [{"as": "b"}]}}, "it needs a name"),
        ({"axes": {"m": [{"name": "b", "option": 1}]}}, "may have as, configs, options, trials"),
        ({"axes": {"m": [{"name": "b", "trials": {"lr": 1}}]}}, "each key needs a list"),
        ({"exclude": [{"colour": "red"}]}, "exclude with the axis 'colour'; there are seed"),
        ({"trial_at": {"colour": "red"}}, "trial_at with the axis 'colour'; there are seed"),
        ({"baseline": {"seed": 5}}, "baseline with seed=5; there are 0"),
        ({"axes": {"budget": ["energy"]}}, "'steps' and 'time'"),
        ({"axes": {"budget": ["time"]}, "baseline": {}}, "needs 'steps' beside it"),
        ({"options": {"lr": "{colour}"}}, "in braces there can be seed"),
        ({"kind": "dance"}, "Got kind='dance'; choose one of 'fit'"),
        ({"limits": {"seconds": 0}}, "limits.seconds=0"),
        ({"limits": {"host_memory": "lots"}}, "limits.host_memory='lots'"),
        ({"limits": {"watts": 3}}, "it takes seconds, host_memory, device_memory"),
        ({"colour": "red"}, "unknown keys"),
    ],
)
def test_bad_descriptions(here, options, message, capsys):
    path = write(**options)
    with pytest.raises(SystemExit) as ended:
        main(["--config", path, "--dry-run"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_unknown_methods_are_answered_with_those_that_there_are(here, capsys):
    shutil.copytree(ROOT / "configs", "configs")
    path = write(axes={"method": ["full", "hfit"]}, configs=["configs/method/{method}.yaml"])
    with pytest.raises(SystemExit):
        main(["--config", path])
    told = capsys.readouterr().err
    assert "Got 'hfit'" in told
    for name in ("full", "hift", "lora", "mezo", "lisa", "badam"):
        assert name in told


# --- records ----------------------------------------------------------------------------------------------------------


def test_records_are_added_as_whole_lines(tmp_path):
    path = tmp_path / "r.jsonl"
    append_record(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2')  # whoever wrote this was killed
    with pytest.warns(UserWarning, match="the last line was cut off"):
        assert read_records(path) == [{"a": 1}]
    append_record(path, {"a": 3})
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'


def test_a_broken_line_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}\n[2]\n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"r\.jsonl, line 2, is no record: '\[2\]'"):
        read_records(path)


def fill_the_disk(path, found):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        append_record(path, {"a": "x" * 200})
    except OSError as error:
        found.send(str(error))


def test_a_full_disk_leaves_no_torn_line(tmp_path):
    path = tmp_path / "r.jsonl"
    append_record(path, {"a": 1})
    ours, theirs = loaded_context().Pipe()
    process = loaded_context().Process(target=fill_the_disk, args=(path, theirs))
    process.start()
    assert ours.poll(60)
    assert "Make room and start again" in ours.recv()
    process.join()
    assert path.read_text() == '{"a": 1}\n'


def test_records_of_another_schema_are_refused(here, capsys):
    path = write()
    Path("out").mkdir()
    Path("out/it.jsonl").write_text('{"run": ["trec", "full", 0]}\n')
    with pytest.raises(SystemExit):
        main(["--config", path])
    assert "records of the schema None; this version reads and writes 1. Name another output" in capsys.readouterr().err


def test_merging_adds_what_is_new(tmp_path):
    one, two = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    for path, values in ((one, [1, 2]), (two, [2, 3])):
        for value in values:
            append_record(path, {"a": value})
    assert merge_records(one, [two]) == 1
    assert [record["a"] for record in read_records(one)] == [1, 2, 3]
    with pytest.raises(FileNotFoundError, match="There is no file nowhere to merge"):
        merge_records(one, [Path("nowhere")])


def test_a_file_of_another_schema_is_not_merged(here, capsys):
    path = write()
    Path("other.jsonl").write_text('{"schema": 0}\n')
    with pytest.raises(SystemExit):
        main(["--config", path, "--merge", "other.jsonl"])
    assert "other.jsonl holds records of the schema 0" in capsys.readouterr().err
    assert not Path("out/it.jsonl").exists()


def test_a_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')
    assert [record["a"] for record in read_records(path)] == [1, 2]
    append_record(path, {"a": 3})
    assert [record["a"] for record in read_records(path)] == [1, 2, 3]


def write_many(path, writer):
    for i in range(100):
        append_record(path, {"writer": writer, "i": i})


def test_two_writers_lose_nothing(tmp_path):
    path = tmp_path / "r.jsonl"
    writers = [loaded_context().Process(target=write_many, args=(path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert sorted((r["writer"], r["i"]) for r in read_records(path)) == [(w, i) for w in "ab" for i in range(100)]


# --- runs -------------------------------------------------------------------------------------------------------------


def run_here(runner, monkeypatch):
    """Runs in this process, with a list of those that were made."""
    from tests.bench_kinds import run

    made = []

    def in_process(self, cell):
        made.append(cell)
        passport = {"device": "CPU, a test", "cores": 1, "driver": None, "versions": {}, "commit": "0"}
        return {"status": "measured", "measured": run(cell.configs, cell.options, Path()), "passport": passport}

    monkeypatch.setattr(Runner, "_in_process", in_process)
    runner._device = "CPU, a test"
    return made


def test_runs_once_what_is_missing(here, monkeypatch):
    Path("out").mkdir()
    options = {"seed_everything": "{seed}"}
    few = benchmark(axes={"seed": [0, 1]}, options=options)
    made = run_here(runner := Runner(few, Path("out/it.jsonl")), monkeypatch)
    runner.run(few.cells())
    assert [cell.values["seed"] for cell in made] == [0, 1]
    more = benchmark(axes={"seed": [0, 1, 2]}, options=options)
    made = run_here(runner := Runner(more, Path("out/it.jsonl")), monkeypatch)
    known = runner.run(more.cells())
    assert [cell.values["seed"] for cell in made] == [2]
    assert len(known) == 3
    changed = benchmark(axes={"seed": [0, 1, 2]}, options={**options, "lr": 2})
    made = run_here(runner := Runner(changed, Path("out/it.jsonl")), monkeypatch)
    runner.run(changed.cells())
    assert [cell.values["seed"] for cell in made] == [0, 1, 2]
    assert len(read_records(Path("out/it.jsonl"))) == 6


def test_the_best_trial_is_taken_for_all_seeds(here, monkeypatch):
    Path("out").mkdir()
    tried = benchmark(
        axes={"method": [{"name": "a", "trials": {"lr": [2, 5, 3]}}, "b"], "seed": [0, 1]},
        options={"seed_everything": "{seed}", "lr": 1, "m": "{method}"},
        trial_at={"seed": 7},
    )
    made = run_here(runner := Runner(tried, Path("out/it.jsonl")), monkeypatch)
    runner.run(tried.cells())
    assert [(c.trial, c.options["seed_everything"], c.options["lr"]) for c in made] == [
        ({"lr": 2}, 7, 2),
        ({"lr": 5}, 7, 5),
        ({"lr": 3}, 7, 3),
        (None, 0, 5),
        (None, 1, 5),
        (None, 0, 1),
        (None, 1, 1),
    ]
    by_loss = replace(tried, trial_metric="val_loss", output="out/loss")
    made = run_here(runner := Runner(by_loss, Path("out/loss.jsonl")), monkeypatch)
    runner.run(by_loss.cells())
    assert {c.options["lr"] for c in made if c.trial is None and c.values["method"] == "a"} == {5}


def test_a_trial_that_diverged_is_never_the_best(here, monkeypatch):
    Path("out").mkdir()
    options = {"what": "diverged", "lr": 9}
    tried = benchmark(
        axes={"method": [{"name": "a", "trials": {"what": ["diverged", "fine"]}}, {"name": "b", "options": options}]},
        metric="val_loss",
        trial_at={},
    )
    made = run_here(runner := Runner(tried, Path("out/it.jsonl")), monkeypatch)
    runner.run(tried.cells())
    assert [c.options["what"] for c in made if c.trial is None] == ["fine", "diverged"]
    alone = benchmark(axes={"method": [{"name": "a", "trials": {"what": ["diverged"]}}]}, trial_at={}, output="out/no")
    run_here(runner := Runner(alone, Path("out/no.jsonl")), monkeypatch)
    (found,) = [r for key, r in runner.run(alone.cells()).items() if r["status"] == "skipped"]
    assert found["reason"] == "none of its 1 trials has come to a finite result"


def test_runs_without_the_metric_are_named_and_no_end_of_the_report(here, monkeypatch):
    Path("out").mkdir()
    mixed = benchmark(axes={"what": ["fine", "without metric"]}, options={"what": "{what}"})
    run_here(runner := Runner(mixed, Path("out/it.jsonl")), monkeypatch)
    records = runner.run(mixed.cells())
    write_report(mixed, mixed.cells(), {"CPU, a test": records})
    text = Path("out/it.md").read_text()
    assert "measured, but without val_accuracy; there are val_f1: without metric" in text


def test_trials_over_words_are_reported(here, monkeypatch):
    Path("out").mkdir()
    tried = benchmark(axes={"method": [{"name": "a", "trials": {"order": ["up", "down"]}}]}, trial_at={})
    run_here(runner := Runner(tried, Path("out/it.jsonl")), monkeypatch)
    write_report(tried, tried.cells(), {"CPU, a test": runner.run(tried.cells())})
    assert "order down" in Path("out/it.md").read_text()


@pytest.mark.parametrize("metric", ["val_mse", "val_rmse", "val_mae", "val_wer", "val_loss"])
def test_errors_are_better_if_smaller(metric):
    assert is_loss(metric)
    assert not is_loss("val_accuracy")


def test_a_repeated_trial_may_change_what_is_run(here, monkeypatch):
    Path("out").mkdir()
    tried = benchmark(axes={"method": [{"name": "a", "trials": {"lr": [2, 5]}}]}, trial_at={"seed": 7})
    run_here(runner := Runner(tried, Path("out/it.jsonl")), monkeypatch)
    works = Runner._in_process
    failing = {"status": "failed", "reason": "?", "passport": {"device": "CPU, a test"}}
    monkeypatch.setattr(
        Runner, "_in_process", lambda self, cell: failing if cell.trial == {"lr": 5} else works(self, cell)
    )
    runner.run(tried.cells())
    assert [r["options"]["lr"] for r in read_records(Path("out/it.jsonl")) if r["trial"] is None] == [2]
    monkeypatch.setattr(Runner, "_in_process", works)
    again = Runner(tried, Path("out/it.jsonl"))
    again._device = "CPU, a test"
    known = again.run(tried.cells(), again=True)
    assert [r["options"]["lr"] for r in known.values() if r["trial"] is None] == [5]


def test_threads_belong_to_the_run():
    (one,), (other,) = (benchmark(threads=n).cells() for n in (1, 2))
    assert one.fingerprint(KIND, 1) != other.fingerprint(KIND, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "full"}, "write it like baseline: {method: full}"),
        ({"configs": "a.yaml"}, "write it like configs: "),
        ({"limits": {"seconds": "10m"}}, "limits.seconds='10m'; it must be a number"),
        ({"metric": {"x": "val_loss"}, "axes": {"task": ["x", "y"]}}, "no metric for the task 'y'"),
    ],
)
def test_values_of_other_kinds_are_refused(changes, words, here):
    path = write(**changes)
    with pytest.raises(ValueError, match=re.escape(words)):
        load_benchmark(path).cells()


def test_keys_without_a_value_have_their_default(here):
    assert load_benchmark(write(baseline=None, exclude=None, options=None, limits=None)).baseline == {}


def test_trials_in_one_task_count_for_all(here):
    tried = benchmark(
        axes={
            "task": ["x", {"name": "y", "options": {"of_y": 1}}],
            "method": [{"name": "a", "trials": {"lr": [1, 2]}}],
            "budget": ["steps", "time"],
            "seed": [0, 1],
        },
        options={"seed_everything": "{seed}", "task": "{task}"},
        baseline={"method": "a"},
        trial_at={"task": "y", "seed": 9},
    )
    cells = tried.cells()
    assert [(tuple(cell.values.values()), cell.options) for cell in cells[:2]] == [
        (("y", "a", "steps", 9), {"seed_everything": 9, "task": "y", "of_y": 1, "lr": lr}) for lr in (1, 2)
    ]
    assert len(cells) == 2 + 8
    assert all(list(cell.trials) == cells[:2] for cell in cells[2:])


def test_equal_time_takes_as_many_steps_as_the_baseline_has_room_for(here, monkeypatch):
    Path("out").mkdir()
    timed = benchmark(
        axes={
            "method": [{"name": "full", "options": {"speed": 1}}, {"name": "fast", "options": {"speed": 2.5}}],
            "budget": ["steps", "time"],
            "seed": [0, 1],
        },
        options={"seed_everything": "{seed}", "trainer.max_steps": 40},
        exclude=[{"method": "full", "budget": "time"}],
        baseline={"method": "full"},
    )
    made = run_here(runner := Runner(timed, Path("out/it.jsonl")), monkeypatch)
    known = runner.run(timed.cells())
    found = [(*c.values.values(), c.options["trainer.max_steps"], c.options.get("trainer.max_epochs")) for c in made]
    assert found == [
        ("full", "steps", 0, 40, None),
        ("fast", "steps", 0, 40, None),
        ("full", "steps", 1, 40, None),
        ("fast", "steps", 1, 40, None),
        ("fast", "time", 0, 100, -1),
        ("fast", "time", 1, 100, -1),
    ]
    lines = {tuple(line.values.values()): line for line in summarize(timed, timed.cells(), known)}
    assert lines["fast", "steps"].ratio("time") == pytest.approx(0.4)
    assert lines["fast", "time"].ratio("time") == pytest.approx(1.0)
    assert lines["fast", "time"].ratio("time_per_step") == pytest.approx(0.4)
    assert lines["full", "steps"].gain is None
    again = run_here(runner := Runner(timed, Path("out/it.jsonl")), monkeypatch)
    runner.run(timed.cells())
    assert again == []


def assert_a_row(limits, what, status, reason):
    Path("out").mkdir()
    bad = benchmark(options={"what": what}, limits=limits)
    (record,) = Runner(bad, Path("out/it.jsonl")).run(bad.cells()).values()
    assert record["status"] == status
    assert reason in record["reason"]
    assert read_records(Path("out/it.jsonl")) == [record]


@pytest.mark.parametrize(
    ("what", "status", "reason"),
    [
        pytest.param("crash", "failed", "RuntimeError: this one breaks", marks=pytest.mark.slow),
        ("exit", "failed", "the process ended with code 2: a bad option"),
        ("killed", "out of memory", "the process was killed"),
        ("hog", "out of memory", "took more than 0.98 GiB of host memory"),
        ("sleep", "timed out", "took more than 3 seconds"),
    ],
)
def test_what_goes_wrong_in_a_process_is_a_row(here, what, status, reason):
    limits = Limits(seconds=3 if what == "sleep" else 120, host_memory="1000MiB" if what == "hog" else None)
    assert_a_row(limits, what, status, reason)


@pytest.mark.parametrize(
    ("what", "status", "reason"),
    [
        ("crash", "failed", "RuntimeError: this one breaks"),
        ("package", "skipped", "the package nowhere is not installed"),
        ("memory", "out of memory", "too much"),
    ],
)
def test_what_a_run_raises_is_a_row(here, what, status, reason, runs_in_this_process):
    assert_a_row(Limits(), what, status, reason)


def test_what_depends_on_a_failure_is_skipped(here, monkeypatch):
    Path("out").mkdir()
    axes = {"method": ["full", "fast"], "budget": ["steps", "time"]}
    timed = benchmark(axes=axes, options={"m": "{method}"}, baseline={"method": "full"})
    monkeypatch.setattr(
        Runner, "_in_process", lambda self, cell: {"status": "failed", "reason": "no", "passport": {"device": "x"}}
    )
    runner = Runner(timed, Path("out/it.jsonl"))
    known = runner.run(timed.cells())
    assert [record["status"] for record in known.values()] == ["failed", "failed", "skipped", "skipped"]
    assert [record["reason"] for record in known.values()][-1] == "needs full steps, which was not measured"
    assert len(read_records(Path("out/it.jsonl"))) == 2  # what was not run can be run later


def eventually(happened):
    return any(happened() or time.sleep(0.1) for _ in range(600))


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_benchmark_goes_on(here, sent, call, request):
    path = write(axes={"seed": [0, 1, 2]}, options={"seed_everything": "{seed}"})
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_hift", "bench", "--config", path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests may run where it is ignored
    )
    records = Path("out/it.jsonl")
    assert eventually(lambda: records.exists() and len(read_records(records)) >= 1)
    process.send_signal(sent)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "Interrupted. What is recorded is not repeated" in told
    first = read_records(records)
    assert 1 <= len(first) < 3
    request.getfixturevalue("runs_in_this_process")
    assert "Written: out/it.md" in call(["lightning-hift", "bench", "--config", path], here)
    assert read_records(records)[: len(first)] == first
    assert sorted(record["cell"]["seed"] for record in read_records(records)) == [0, 1, 2]


def runs_of(parent=None):
    """Numbers of the processes that make runs; default: all, else those that ``parent`` has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, started_by = path.read_text().rpartition(")")[2].split()[:2]
            makes_runs = b"benchmark.cell_process" in path.with_name("cmdline").read_bytes()
            if makes_runs and state != "Z" and parent in (None, int(started_by)):
                found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are looked up in /proc")
def test_a_killed_benchmark_leaves_no_run_behind(here):
    path = write(options={"what": "sleep"})
    started = subprocess.Popen([sys.executable, "-m", "lightning_hift", "bench", "--config", path])
    assert eventually(lambda: runs_of(started.pid))
    (run,) = runs_of(started.pid)
    started.kill()
    started.wait()
    assert run in runs_of()
    assert eventually(lambda: run not in runs_of())


# --- the command ------------------------------------------------------------------------------------------------------

COMPARED = {
    "title": "A title",
    "about": "What it is about.",
    "axes": {
        "task": ["x", "y"],
        "method": [
            {"name": "full", "options": {"lr": 5}},
            {"name": "fast", "options": {"speed": 2, "lr": 4}},
            "broken",
        ],
        "seed": [0, 1],
    },
    "options": {"seed_everything": "{seed}", "task": "{task}", "m": "{method}"},
    "baseline": {"method": "full"},
}


@pytest.fixture
def without_processes(here, monkeypatch):
    """Runs take place in this process, and those of the method ``broken`` fail."""
    from tests.bench_kinds import run

    def in_process(self, cell):
        passport = {"device": self._device, "cores": 1, "driver": None, "versions": {"torch": "9"}, "commit": "abc"}
        if cell.values["method"] == "broken":
            return {"status": "failed", "reason": "it is broken", "passport": passport}
        return {"status": "measured", "measured": run(cell.configs, cell.options, Path()), "passport": passport}

    monkeypatch.setattr(Runner, "_in_process", in_process)
    return here


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """A folder for the files of a report, which the first one to ask for them writes."""
    return tmp_path_factory.mktemp("reports")


@pytest.fixture
def reported(without_processes, reports):
    """All files of a report."""
    if not any(reports.iterdir()):
        main(["--config", write(**COMPARED)])
        shutil.copytree(without_processes, reports, dirs_exist_ok=True)
    shutil.copytree(reports, without_processes, dirs_exist_ok=True)
    return without_processes / "out"


def test_the_report_has_means_ratios_and_reasons(reported):
    text = (reported / "it.md").read_text()
    assert text.startswith("# A title\n\nWhat it is about.\n\n## Result\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["x", "full", "accuracy", "50.0 50.1", "50.05", "0.07", "-", "-", "-", "-"] in rows
    assert ["y", "fast", "accuracy", "40.0 40.1", "40.05", "0.07", "-10.00", "0.50", "2.00", "1.00"] in rows
    assert ["fast", "-10.00", "-10.00", "-10.00", "0.50", "2.00"] in rows
    assert "- failed: it is broken: x broken 0; x broken 1; y broken 0; y broken 1" in text
    assert "torch 9; commit abc (12 runs)" in text


def test_a_machine_is_named_once_with_all_its_commits():
    passport = {"device": "CPU", "driver": None, "versions": {"torch": "9"}}
    records = {str(i): {"passport": {**passport, "commit": commit}} for i, commit in enumerate(["abc", "def", "abc"])}
    assert measured_on(records) == ["## Measured on", "- CPU; torch 9; commits abc (2 runs), def (1 run)"]


def test_every_picture_that_the_report_shows_is_there(reported):
    text = (reported / "it.md").read_text()
    pictures = sorted(path.name for path in reported.glob("*.png"))
    assert len(pictures) == 7
    for name in pictures:
        assert f"]({name})" in text
        assert (reported / name).stat().st_size > 5000


def test_pictures_compare_what_had_the_same_budget(without_processes, monkeypatch):
    seen = {}
    monkeypatch.setattr(report, "plot_curves", lambda panels, path, *_: seen.update({path.stem: panels}))
    axes = {
        "method": [{"name": "full"}, {"name": "fast", "options": {"speed": 2}}],
        "budget": ["steps", "time"],
        "seed": [0],
    }
    exclude = [{"method": "full", "budget": "time"}]
    path = write(axes=axes, options={"trainer.max_steps": 40}, baseline={"method": "full"}, exclude=exclude)
    main(["--config", path])
    last = {
        name: {line: curves[0][-1][0] for panel in panels.values() for line, curves in panel.items()}
        for name, panels in seen.items()
    }
    assert last == {
        "it_quality_against_time": {"full": 40, "fast": 40},
        "it_quality_against_tokens": {"full": 280, "fast": 280},
        "it_quality_against_steps": {"full": 40, "fast": 40},
        "it_loss_against_time": {"full": 40, "fast": 50},
    }


def test_a_legend_of_many_long_names_is_not_cut(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    lines = {f"a method with a rather long name, number {i}": [[(0, i), (1, i + 1)]] for i in range(20)}
    plot_curves({"x": lines, "y": lines}, tmp_path / "out.png", "steps", "A title")
    pixels = image.imread(tmp_path / "out.png")[..., :3]
    for edge in (pixels[:, :2], pixels[:, -2:], pixels[-2:]):
        assert edge.min() == 1  # white


@pytest.mark.parametrize(
    ("group", "shown"),
    [
        ("embedding", "embedding"),
        ("net.layer.0 ... net.layer.5", "net.layer.0 ... 5"),
        ("embedding ... net.layer.5", "embedding ... net.layer.5"),
        ("x" * 50, "... " + "x" * 46),
    ],
)
def test_long_names_of_groups_are_cut(group, shown):
    assert shorten_group(group) == shown


def test_the_csv_has_a_line_for_each_run(reported):
    with (reported / "it.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    fast = next(row for row in rows if row["method"] == "fast" and row["seed"] == "1")
    assert (fast["val_accuracy"], fast["seconds"], fast["memory.total"]) == ("0.401", "50.0", "9.0")
    assert {row["reason"] for row in rows if row["method"] == "broken"} == {"it is broken"}


def test_results_of_another_machine_are_shown_apart(reported, capsys):
    other = reported.parent / "other.jsonl"
    for record in read_records(reported / "it.jsonl"):
        append_record(other, {**record, "passport": {**record["passport"], "device": "A GPU"}})
    capsys.readouterr()
    main(["--config", "bench.yaml", "--merge", str(other), "--report"])
    assert "12 records were added" in capsys.readouterr().out
    text = (reported / "it.md").read_text()
    assert "## On A GPU" in text
    assert text.count("## Result") == 2
    assert (reported / "it_memory_on_the_device_2.png").exists()


def test_a_dry_run_lists_the_cells_and_runs_nothing(reported, capsys, caplog):
    before = (reported / "it.jsonl").read_text()
    capsys.readouterr()
    main(["--config", "bench.yaml", "--dry-run", "--only", "method=full,fast", "seed=0"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["task", "method", "seed", "trial"]
    assert sum("measured" in line for line in lines) == 4
    assert lines[-1].startswith("4 runs, 0 to do")
    assert (reported / "it.jsonl").read_text() == before
    assert "available" not in caplog.text  # Lightning's words on devices


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "colour=red"], "write AXIS=VALUE with one of task, method, seed"),
        (["--only", "method=slow"], "there are broken, fast, full"),
        (["--jobs", "0"], "--jobs 0"),
        (["--set", "lr"], "Got --set lr; write KEY=VALUE"),
        (["--merge", "nowhere.jsonl"], "There is no file nowhere.jsonl"),
    ],
)
def test_bad_words(here, words, message, capsys):
    with pytest.raises(SystemExit):
        main(["--config", write(**COMPARED), *words])
    assert message in capsys.readouterr().err


def test_options_of_the_command_line_take_precedence(here, monkeypatch):
    made = []
    monkeypatch.setattr(Runner, "run", lambda self, cells, again: made.extend(cells))
    main(["--config", write(options={"lr": 1, "seed_everything": "{seed}"}), "--set", "lr=2.5", "name=a b"])
    assert [cell.options for cell in made] == [{"lr": 2.5, "seed_everything": 0, "name": "a b"}]


def test_a_missing_file_is_said(here, capsys):
    with pytest.raises(SystemExit):
        main(["--config", "nowhere.yaml"])
    assert "nowhere.yaml" in capsys.readouterr().err


def test_failures_are_repeated_on_demand_only(here, monkeypatch):
    made = []

    def in_process(self, cell):
        made.append(cell.values["method"])
        return {
            "status": "failed",
            "reason": "no",
            "passport": {"device": self._device, "cores": 1, "driver": None, "versions": {}, "commit": None},
        }

    monkeypatch.setattr(Runner, "_in_process", in_process)
    path = write(axes={"method": ["a", "b"]}, options={"m": "{method}"})
    main(["--config", path])
    main(["--config", path])
    assert made == ["a", "b"]
    main(["--config", path, "--again"])
    assert made == ["a", "b", "a", "b"]


def test_json_of_a_record_is_one_line(here, monkeypatch):
    Path("out").mkdir()
    one = benchmark(options={"note": "a\nb"})
    run_here(runner := Runner(one, Path("out/it.jsonl")), monkeypatch)
    runner.run(one.cells())
    (line,) = Path("out/it.jsonl").read_text().splitlines()
    assert json.loads(line)["options"] == {"note": "a\nb"}
    assert load_benchmark(write()).kind == KIND
    assert os.path.exists("bench.yaml")


# --- the configurations of this project -------------------------------------------------------------------------------


@pytest.fixture
def project(here, runs_in_this_process):
    """A folder with the project's configurations and tiny data; runs are made in this process."""
    shutil.copytree(ROOT / "configs", "configs")
    save_network(here / "model", max_position_embeddings=64)
    save_tokenizer(here / "model", model_max_length=64)
    Path("data", "trec6").mkdir(parents=True)
    for name in ("TREC.train.all", "TREC.test.all"):
        Path("data", "trec6", name).write_text("".join(f"{i % 6} {WORDS[i % 6]} {WORDS[i % 5]}\n" for i in range(24)))
    rows = "".join(f"{WORDS[i % 4]} film,{i % 2}\n" for i in range(24))
    for name in ("train.csv", "validation.csv"):
        Path(name).write_text(f"sentence,label\n{rows}")
    return here


TINY = ["model.init_args.model=model", "trainer.max_steps=2", "trainer.accelerator=cpu"]
OWN_ROWS = ["dataset=null", "config_name=null", "splits=null", "files={train: train.csv, validation: validation.csv}"]


def test_the_benchmark_of_methods_on_a_cpu_runs(project):
    only = ["task=trec", "method=full,HiFT groups of one,LISA", "seed=0"]
    main(["--config", "configs/benchmark/quality_cpu.yaml", "--set", *TINY, "--only", *only])
    records = read_records(Path("examples/results/quality_cpu.jsonl"))
    assert [record["status"] for record in records] == ["measured"] * (3 * 4 + 3 + 2), records
    text = Path("examples/results/quality_cpu.md").read_text()
    assert "| trec | LISA | time | accuracy |" in text
    assert "Tried out with task trec_dev, seed 100" in text


@pytest.mark.parametrize(
    ("name", "cells"), [pytest.param("paper_ablation", 13, marks=pytest.mark.slow), ("paper_quality", 15)]
)
def test_the_papers_benchmarks_run(project, name, cells):
    data = [f"data.init_args.{setting}" for setting in OWN_ROWS]
    only = ["model=roberta_base", "task=sst2", "seed=0"]
    main(["--config", f"configs/benchmark/{name}.yaml", "--set", *TINY, *data, "--only", *only])
    records = read_records(Path(f"examples/results/{name}.jsonl"))
    assert len(records) == cells
    lacking = {"adamw_8bit", "cpu_offload", "galore"}  # packages, or a GPU
    failed = [r for r in records if r["status"] != "measured" and r["cell"].get("method") not in lacking]
    assert not failed, failed
    updates = {r["cell"].get("method"): r["measured"]["updates_per_parameter"] for r in records if "measured" in r}
    assert all(updates[method] == 2 for method in {"full", "lora", "mezo", "linear_probing"} & updates.keys())
    assert {r["status"] for r in records} <= {"measured", "skipped"}
