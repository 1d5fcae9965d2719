"""The YAML files of generation, instructions and pre-training: each runs, and the large ones fit where they say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_hift.cli import main
from tests.tiny_texts import byte_tokenizer, write_rows

CONFIGS = Path(__file__).parents[1] / "configs"
TINY_LLAMA = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
TINY_GPT2 = {"vocab_size": 300, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512}
LLAMA_2_7B = yaml.safe_load((CONFIGS / "plan" / "llama2_7b.yaml").read_text())["model"]["init_args"]["model_config"]

MEANINGS = [{"mr": f"name[Place {i // 2}], food[pie]", "ref": f"Place {i // 2} has pie {i}."} for i in range(12)]
QUERIES = [
    {"question": f"Who is {i}?", "context": "CREATE TABLE people (id INT)", "answer": f"SELECT * FROM people {i}"}
    for i in range(12)
]
ALPACA = [{"instruction": f"Say {i}.", "input": "loud" * (i % 2), "output": f"{i}!"} for i in range(12)]
TEXTS = [{"text": "A short text about nothing. " * (i + 1)} for i in range(12)]

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:[\s\S]*deprecated in v4"),
]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-hift"])


def files_of(task: str, model: str, method: str) -> list[str]:
    names = (f"task/{task}", f"model/{model}", f"method/{method}")
    return [part for name in names for part in ("-c", str(CONFIGS / f"{name}.yaml"))]


def tiny(model: str) -> dict[str, Any]:
    is_llama = model.startswith("llama")
    return {
        "model": None,
        "model_type": "llama" if is_llama else "gpt2",
        "model_config": TINY_LLAMA if is_llama else TINY_GPT2,
    }


@pytest.mark.parametrize(
    ("task", "model", "method", "rows", "splits"),
    [
        ("e2e", "gpt2_medium", "mixed_hi_24gb", MEANINGS, ("train", "validation", "test")),
        ("viggo", "gpt2_large", "mixed_hi_48gb", MEANINGS, ("train", "validation", "test")),
        ("text_to_sql", "llama2_7b", "mixed_hi_48gb", QUERIES, ("train",)),
        ("alpaca", "llama2_7b", "mixed_hi_24gb", ALPACA, ("train",)),
        ("pretraining", "llama2_7b", "mixed_hi_24gb", TEXTS, ("train",)),
    ],
)
def test_configs_run(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    task: str,
    model: str,
    method: str,
    rows: list[dict[str, Any]],
    splits: tuple[str, ...],
) -> None:
    byte_tokenizer([" ".join(map(str, row.values())) for row in rows], tmp_path / "tokenizer")
    path = write_rows(tmp_path / "rows.jsonl", rows)
    overrides: dict[str, Any] = {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "limit_train_batches": 3,
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}},
            "enable_checkpointing": False,
            "enable_progress_bar": False,
        },
        "model": {"init_args": tiny(model)},
        "data": {
            "init_args": {
                "files": dict.fromkeys(splits, path),
                "tokenizer": str(tmp_path / "tokenizer"),
                "cache_dir": str(tmp_path / "cache"),
                "batch_size": 2,
            }
        },
    }
    if "generation" in (CONFIGS / "task" / f"{task}.yaml").read_text():
        overrides["model"]["init_args"]["generation"] = {"max_new_tokens": 4}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(overrides))
    main(["fit", *files_of(task, model, method), "-c", str(tmp_path / "tiny.yaml")])
    (metrics,) = tmp_path.rglob("metrics.csv")
    header = metrics.read_text().splitlines()[0].split(",")
    assert "val_loss" in header
    assert ("val_bleu" if rows in (MEANINGS, QUERIES) else "val_perplexity") in header


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "method", "memory"),
    [("alpaca", "mixed_hi_24gb", "24GiB"), ("text_to_sql", "mixed_hi_48gb", "48GiB")],
)
def test_llama2_7b_fits_where_the_configs_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, method: str, memory: str
) -> None:
    """From the configuration alone, as the weights are not at hand."""
    described = {"model": None, "model_type": "llama", "model_config": LLAMA_2_7B}
    (tmp_path / "described.yaml").write_text(yaml.safe_dump({"model": {"init_args": described}}))
    main(
        [
            "plan",
            *files_of(task, "llama2_7b", method),
            "-c",
            str(tmp_path / "described.yaml"),
            "--compare",
            "false",
            "--device_memory",
            memory,
        ]
    )
    printed = capsys.readouterr().out
    assert "batch 8 x 512 tokens" in printed
    assert f"Fits {memory.removesuffix('GiB')}.00 GiB on the device" in printed


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("task/*.yaml")), ids=lambda path: path.stem)
def test_the_first_line_is_the_command_that_runs_it(path: Path) -> None:
    command = path.read_text().splitlines()[0]
    assert command.startswith(f"# lightning-hift fit -c configs/task/{path.name} -c configs/model/")
