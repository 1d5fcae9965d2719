"""The check of a GPU, in small and on a CPU: what it writes, what a cut leaves, and that it notices a wrong result."""

import gc
import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lightning_hift.benchmark.gpu_check import correctness
from lightning_hift.benchmark.gpu_check.__main__ import STAGES, main, run_check
from lightning_hift.benchmark.gpu_check.correctness import Case, count_differing
from lightning_hift.benchmark.gpu_check.report import write_report
from lightning_hift.benchmark.gpu_check.sizes import SMALL
from lightning_hift.benchmark.gpu_check.stage import Budget, Context, StageFile, measure_cells

CPU = torch.device("cpu")
SHORT = replace(SMALL, steps=4)


def read(folder):
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in STAGES}


def statuses(stage):
    return [cell["status"] for cell in stage["cells"].values()]


@pytest.fixture(scope="module", autouse=True)
def fast_collection():
    """The check collects garbage after each cell, and need not look at all that the tests before it have left."""
    import transformers

    assert transformers.LlamaForCausalLM
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    assert main(["run", "--device", "cpu", "--small", "--output", str(folder)]) == 0
    return folder


def test_each_stage_writes_what_it_measured(checked):
    stages = read(checked)
    assert {path.name for path in checked.iterdir()} >= {f"{name}.json" for name in STAGES}
    assert not list(checked.glob("*.part"))
    for name, stage in stages.items():
        assert set(statuses(stage)) == {"skipped" if name == "copies" else "measured"}, name
        passport = stage["passport"]
        assert passport["versions"]["torch"] == torch.__version__
        assert {"device", "driver", "cuda", "commit", "config", "seed", "started", "environment"} <= passport.keys()
        assert all(cell["started"] >= passport["started"] for cell in stage["cells"].values())
    assert all(cell["measured"]["equal"] for cell in stages["correctness"]["cells"].values())


def test_steps_are_measured_by_group(checked):
    cells = read(checked)["llama-2-7b"]["cells"]
    groups = cells["hift, first sweep"]["measured"]["groups"]
    found = cells["hift, 4x16"]["measured"]
    assert {int(name.split(":")[0]) for name, _ in found["step_ms"]} == set(range(groups))
    assert len(found["exposed_ms"]) == found["steps"] == groups
    assert found["weight_bytes"] > found["gradient_bytes"] > 0
    full = cells["full, 4x16"]["measured"]
    assert full["steps"] == SMALL.full_steps
    assert full["gradient_bytes"] > 2 * found["gradient_bytes"]
    assert all(math.isfinite(loss) for run in (found, full) for loss in run["losses"])
    assert any(each["name"].startswith("HiFT::") for each in cells["hift, profile"]["measured"]["ranges"])


def test_report(checked):
    paths = write_report(checked)
    text = (checked / "report.md").read_text()
    assert "**Right: all 14 runs" in text
    assert "proves that the program runs" in text
    assert "| fp32, fused, disk | 30 |" in text
    assert "skipped: on a CPU, host and device are the same memory" in text
    assert "not measured" not in text
    assert {path.name for path in paths} == {"report.md", "llama-2-7b_steps.png", "llama-3-8b_steps.png"}
    assert all(f"({path.name})" in text and path.stat().st_size for path in paths[1:])


def test_a_cut_after_the_first_stage_leaves_its_results(tmp_path):
    seconds = [0.0]

    def say(line):
        if line.startswith(f"correctness | {correctness.make_cases()[-1].name}:"):
            seconds[0] = 1000.0

    context = Context(CPU, SHORT, Budget(540, clock=lambda: seconds[0]), tmp_path)
    assert run_check(context, say=say)
    stages = read(tmp_path)
    assert set(statuses(stages["correctness"])) == {"measured"}
    for name in STAGES[1:]:
        assert all(cell["reason"] == "no time left" for cell in stages[name]["cells"].values())
    write_report(tmp_path)
    assert (
        "| hift, 4x16 | - | - | - | - | - | - | - | - | skipped: no time left |" in (tmp_path / "report.md").read_text()
    )


def test_no_time_left_in_the_middle_of_a_cell(tmp_path):
    ticks = iter(range(10**6))  # each look at the clock takes a second
    context = Context(CPU, SHORT, Budget(12, clock=lambda: next(ticks)), tmp_path)
    assert not run_check(context, ["correctness"])  # not known to be right
    found = statuses(json.loads((tmp_path / "correctness.json").read_text()))
    assert found[0] == "measured"
    assert set(found[2:]) == {"skipped"}
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "**Not known to be right" in text
    assert "Not measured." in text  # the stages that were not asked for


def test_a_killed_check_leaves_rows_that_were_not_measured(tmp_path):
    def say(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_check(Context(CPU, SHORT, Budget(540), tmp_path), say=say)
    stages = read(tmp_path)
    assert statuses(stages["correctness"]) == ["measured"] + ["not measured"] * 13
    write_report(tmp_path)
    assert "| fp32, fused, disk | - | - | - | - | not measured |" in (tmp_path / "report.md").read_text()


def test_a_broken_copy_is_noticed(tmp_path, monkeypatch, capsys):
    calls, loss_of = [], correctness.next_token_loss

    def loss_with_fault(network, batch):
        calls.append(1)
        files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".json"]
        if files and len(calls) % 30 == 20:  # of the state on disk, flip the last bit of all numbers
            for path in files:
                flipped = bytes(b ^ (i % 4 == 0) for i, b in enumerate(path.read_bytes()))
                with path.open("r+b") as file:  # in place: it is mapped
                    file.write(flipped)
        return loss_of(network, batch)

    monkeypatch.setattr(correctness, "next_token_loss", loss_with_fault)
    monkeypatch.setattr(correctness, "make_cases", lambda: [Case("fp32", offload="disk"), Case("fp32")])
    words = ["run", "--device", "cpu", "--small", "--stages", "correctness", "--output", str(tmp_path)]
    assert main(words) == 1
    broken, sound = json.loads((tmp_path / "correctness.json").read_text())["cells"].values()
    assert not broken["measured"]["equal"]
    assert broken["measured"]["differing"] > 0
    assert sound["measured"]["equal"]
    assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "**WRONG: 1 of 2 runs" in text
    assert "NOT EQUAL" in text


@pytest.mark.parametrize(
    ("found", "count"),
    [
        ({"a": torch.tensor([1.0, 2.0]), "b": 3}, 0),
        ({"a": torch.tensor([1.0, 2.5]), "b": 3}, 1),
        ({"a": torch.tensor([1.0, 2.0], dtype=torch.float64), "b": 3}, 2),
        ({"a": torch.tensor([1.0, 2.0]), "b": 4}, 1),
        ({"a": torch.tensor([1.0, 2.0])}, 1),
    ],
)
def test_differences_are_counted(found, count):
    assert count_differing({"a": torch.tensor([1.0, 2.0]), "b": 3}, found)[0] == count


def test_zeros_of_both_signs_differ_and_nan_equals_itself():
    a, b = {"a": torch.tensor([0.0, math.nan])}, {"a": torch.tensor([-0.0, math.nan])}
    assert count_differing(a, b) == (1, 2, ["a"])


class Cells:
    """A stage whose cells end in each possible way."""

    def __init__(self):
        self.config, self.closed = {}, False

    def cells(self):
        return {"too large": self.too_large, "wrong": lambda: 1 / 0, "fine": lambda: {"x": 1}}

    def too_large(self):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def close(self):
        self.closed = True


def test_what_goes_wrong_is_the_outcome_of_its_cell(tmp_path):
    stage, lines = Cells(), []
    file = StageFile(tmp_path, "any", stage.cells(), {})
    measure_cells(stage, file, Context(CPU, SHORT, Budget(540), tmp_path), lines.append)
    assert statuses(json.loads((tmp_path / "any.json").read_text())) == ["out of memory", "failed", "measured"]
    assert "ZeroDivisionError" in lines[1]
    assert stage.closed


def test_what_does_not_fit_is_reported_as_such(checked, tmp_path):
    stages = read(checked)
    cell = stages["llama-3-8b"]["cells"]["full, 2x32"]
    cell.pop("measured")
    cell |= {"status": "out of memory", "reason": "CUDA out of memory."}
    for name, stage in stages.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(stage))
    write_report(tmp_path)
    assert "| full, 2x32 | - | - | - | - | - | - | - | - | does not fit |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(
            [],
            "torch found no CUDA device. Run this on a machine with a CUDA GPU, or try",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
        (["--device", "cpu"], "Got --device cpu, which has no time .* --device cpu --small"),
        (["--device", "abacus"], "Got --device abacus, which torch cannot use here"),
        (["--stages", "dinner"], "invalid choice: 'dinner'"),
    ],
)
def test_bad_words_are_refused(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["run", *words, "--output", str(tmp_path)])
    assert re.search(message, capsys.readouterr().err)


def test_a_report_of_nothing_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "has none of correctness.json" in capsys.readouterr().err


def test_it_runs_without_what_only_the_command_line_needs():
    code = (
        "import sys; sys.modules |= dict.fromkeys(['jsonargparse', 'datasets'])\n"
        "import lightning_hift.benchmark.gpu_check.__main__, lightning_hift.benchmark.gpu_check.report"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_a_host_that_is_too_small_is_spared(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_hift.benchmark.gpu_check.training.available_host_memory", lambda: 1000)
    assert run_check(Context(CPU, SHORT, Budget(540), tmp_path), ["llama-3-8b"])
    cells = json.loads((tmp_path / "llama-3-8b.json").read_text())["cells"]
    assert "of host memory, and 1000 B are free" in cells["hift, first sweep"]["reason"]
    assert "see 'hift, first sweep'" in cells["hift, 2x32"]["reason"]
    assert cells["full, 2x32"]["status"] == "measured"
