"""Every block of the README and every example runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from lightning_hift.cli import main
from tests.text_models import save_network

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def blocks(language):
    return [text for name, text in BLOCKS if name == language]


def run(command, folder):
    """In a process of its own, as a user does it; the fixture ``call`` is faster."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_readme_has_no_other_kinds_of_blocks():
    assert {name for name, _ in BLOCKS} == {"bash", "python", "yaml", "text"}


def test_python_of_the_readme_runs_as_a_program(tmp_path):
    (tmp_path / "block.py").write_text(blocks("python")[1])  # which needs no Lightning, and so starts fast
    result = run([sys.executable, "block.py"], tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[0])
def test_readme_python_runs(code, tmp_path, call):
    (tmp_path / "block.py").write_text(code)
    call(["block.py"], tmp_path)  # raises what the code raises


@pytest.fixture
def readme_folder(tmp_path):
    """The YAML files of the README, and its commands."""
    for text in blocks("yaml"):
        (tmp_path / text.splitlines()[0].removeprefix("# ")).write_text(text)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "memory.yaml",
        "orders.yaml",
        "reviews.yaml",
        "run.yaml",
        "two_gpus.yaml",
    ]
    return tmp_path


def readme_commands():
    commands = [line.split("#")[0].strip() for line in "".join(blocks("bash")).splitlines()]
    return [line for line in commands if line.startswith("lightning-hift")]


def test_readme_commands_on_the_readme_yaml(readme_folder, call):
    ours = [line for line in readme_commands() if "run.yaml" in line or "memory.yaml" in line]
    assert [line.split()[1] for line in ours] == ["groups", "fit", "plan"]
    as_a_program = run(ours[0].split(), readme_folder)
    assert as_a_program.returncode == 0, as_a_program.stderr
    assert "head" in as_a_program.stdout
    fit, plan, fit_within = [
        call(line.split(), readme_folder) for line in [*ours[1:], "lightning-hift fit --config memory.yaml"]
    ]
    assert "same batch, other ways" in plan
    for printed in (fit, fit_within):
        assert "first sweep done, all" in printed


@pytest.mark.usefixtures("runs_in_this_process")
def test_readme_commands_from_files_to_a_transformers_folder(readme_folder, call):
    save_network(readme_folder / "my_model")
    rows = [f"{word} film,{verdict}" for word, verdict in (("good", "yes"), ("bad", "no")) for _ in range(8)]
    (readme_folder / "reviews.csv").write_text("\n".join(["review,verdict", *rows, ""]))
    (readme_folder / "new_reviews.csv").write_text("review\ngood plot\nbad plot\n")
    ours = [line for line in readme_commands() if "run.yaml" not in line and "memory.yaml" not in line]
    assert [line.split()[1] for line in ours] == ["fit", "predict", "export", "bench", "bench"]
    for line in ours:
        call(line.split(), readme_folder)
    records = [json.loads(line) for line in (readme_folder / "verdicts.jsonl").read_text().splitlines()]
    assert [record["label"] in ("no", "yes") for record in records] == [True, True]
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(readme_folder / "reviewer")
    assert opened.config.id2label == {0: "no", 1: "yes"}
    results = readme_folder / "benchmarks" / "orders.jsonl"
    assert [json.loads(line)["status"] for line in results.read_text().splitlines()] == ["measured"] * 7


@pytest.mark.parametrize("plain", ["false", "true"])
def test_readme_reviews_are_learned_in_their_few_steps(readme_folder, plain, monkeypatch):
    """A run of 16 steps, as the README has it but for the learning rate, which a network from nowhere needs."""
    monkeypatch.chdir(readme_folder)
    save_network(Path("my_model"), initializer_range=0.2)
    rows = [f"{word} film,{verdict}" for word, verdict in (("good", "yes"), ("bad", "no")) for _ in range(150)]
    Path("reviews.csv").write_text("\n".join(["review,verdict", *rows, ""]))
    before = load_file("my_model/model.safetensors")
    main(["fit", "--config", "reviews.yaml", f"--plain={plain}", "--model.init_args.optimizer.init_args.lr=0.01"])
    checkpoint = torch.load("best.ckpt", weights_only=True)
    (best,) = (state for name, state in checkpoint["callbacks"].items() if name.startswith("ModelCheckpoint"))
    assert float(best["best_model_score"]) == 1.0
    unchanged = [name for name, w in before.items() if torch.equal(w, checkpoint["state_dict"][f"network.bert.{name}"])]
    assert not unchanged


def test_readme_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"`?make ([\w-]+)", README))
    assert {"quickstart", "test", "bench-cpu", "test-all"} <= named <= targets


def test_readme_files_and_arguments_exist():
    for path in re.findall(r"`(configs/[\w./-]+)`", README) + re.findall(r"\]\((examples/[\w./-]+)\)", README):
        assert (ROOT / path).exists(), path


EXAMPLES = {  # arguments, how the last line starts, and between what its number must lie
    "plain_torch.py": ([], "final loss", 0.0, 3.0),
    "existing_module.py": ([], "validation accuracy", 0.9, 1.0),
    "vision_transformer_digits.py": ([], "validation accuracy", 0.8, 1.0),
    "gan.py": ([], "mean distance from the circle", 0.0, 0.25),  # 0.9 before training
    "train_tokenizer.py": (
        ["train_tokenizer.py", "--folder", "tokenizer", "--size", "400"],
        "bytes of text per token, with 400 tokens",
        1.5,
        20.0,
    ),
    "own_cli.py": (["fit", "--config", "own_cli.yaml"], "validation accuracy", 0.9, 1.0),
}


@pytest.mark.parametrize(
    "path",
    [
        path for path in sorted((ROOT / "examples").glob("*.py")) if path.name != "quickstart.py"
    ],  # see test_quickstart.py
    ids=lambda path: path.name,
)
def test_example_runs(path, tmp_path, call):
    for file in (path, *path.parent.glob(f"{path.stem}.yaml")):
        shutil.copy(file, tmp_path)
    arguments, start, low, high = EXAMPLES[path.name]
    last = call([path.name, *arguments], tmp_path).strip().splitlines()[-1]
    assert last.startswith(start)
    assert low <= float(last.split()[-1]) <= high


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PARTS = [path for path in CONFIGS if path.parent.name in ("task", "model", "method", "files")]


@pytest.mark.parametrize(
    "path",
    [path for path in CONFIGS if path not in PARTS and path.parent.name != "benchmark"],  # see test_bench.py
    ids=lambda path: path.name,
)
def test_config_parses_and_shows_its_groups(path, tmp_path, call):
    assert yaml.safe_load(path.read_text())
    assert "group" in call(["lightning-hift", "groups", "--config", str(path)], tmp_path)


@pytest.fixture
def printed_config(monkeypatch, capsys):
    """What the configs in ``parts`` come to, with all defaults."""
    monkeypatch.setattr(sys, "argv", ["lightning-hift"])

    def parse(parts):
        options = [word for path in parts for word in ("--config", str(path))]
        with pytest.raises(SystemExit, match="0"):
            main(["fit", *options, "--print_config"])
        return yaml.safe_load(capsys.readouterr().out)

    return parse


def assert_holds(found, given):
    """Nothing in ``given`` was lost on the way to ``found``."""
    if isinstance(given, dict):
        for name, value in given.items():
            assert_holds(found[name], value)
    elif isinstance(given, list):
        for one, other in zip(found, given, strict=True):
            assert_holds(one, other)
    else:
        assert found == given


@pytest.mark.parametrize("path", [path for path in PARTS if path.parent.name == "task"], ids=lambda path: path.stem)
def test_a_task_begins_with_the_command_that_runs_it(path, printed_config):
    program, subcommand, *options = path.read_text().splitlines()[0].removeprefix("# ").split()
    assert (program, subcommand) == ("lightning-hift", "fit")
    assert options[::2] == ["-c"] * 3
    parts = [ROOT / name for name in options[1::2]]
    assert [part.parent.name for part in parts] == ["task", "model", "method"]
    assert parts[0] == path
    found = printed_config(parts)
    assert_holds(found, yaml.safe_load(path.read_text()))
    assert found["model"]["init_args"]["optimizer"]["init_args"]["lr"] > 0
    assert found["model"]["class_path"].startswith("lightning_hift.tasks.")
    overlay = ROOT / "configs" / "files" / path.name
    if overlay.exists():
        data = printed_config([*parts, overlay])["data"]["init_args"]
        assert_holds(data, yaml.safe_load(overlay.read_text())["data"]["init_args"])
        assert all(name.startswith("data/") for name in data["files"].values())


def test_every_part_of_a_config_goes_with_a_task(printed_config):
    tasks = [path for path in PARTS if path.parent.name == "task"]
    named = {word for path in tasks for word in path.read_text().splitlines()[0].split()}
    classification = ROOT / "configs" / "task" / "sst2.yaml"
    for path in PARTS:
        if path.parent.name == "files":
            assert path.name in {task.name for task in tasks}
        elif str(path.relative_to(ROOT)) not in named:
            assert printed_config([classification, path])["model"]["class_path"]


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_architecture_fits_on_three_screens():
    assert len(ARCHITECTURE.splitlines()) <= 120


def test_all_that_the_architecture_names_is_there():
    package = ROOT / "lightning_hift"
    for name, path in re.findall(r"`(\w+)` \| `([\w/]+\.py)`", ARCHITECTURE):
        assert re.search(rf"^class {name}\b", (package / path).read_text(), flags=re.MULTILINE), name
    for path in re.findall(r"`((?:tests|offload|groups)/[\w/]+\.py)`", ARCHITECTURE):
        assert (ROOT / path).is_file() or (package / path).is_file(), path
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    assert rooms == {room.rstrip("/") for room in re.findall(r"`([a-z]+/)`", ARCHITECTURE)}
