"""The table of quality: runs in processes of their own, resumed, averaged over seeds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lightning_hift.benchmark.quality import format_report, main
from tests.text_models import WORDS, save_network, save_tokenizer

ROOT = Path(__file__).parent.parent


def record(task, method, seed, metrics, seconds):
    passport = {"device": "a machine", "versions": {"Python": "3"}, "commit": "0"}
    about = {"epochs": 3, "learning_rate": 0.1, "model": "m", "threads": 1, "passport": passport}
    return {"run": [task, method, seed], "metrics": metrics, "seconds": {"wall": seconds, "cpu": 2 * seconds}, **about}


def table_of(text):
    lines = text.splitlines()
    return [line.split() for line in lines[3 : lines.index("```", 1)]]


def test_table_has_means_spreads_and_ratios_by_seed():
    rows = table_of(
        format_report(
            [
                record("trec", "full", 0, {"val_accuracy": 0.8}, 10.0),
                record("trec", "full", 1, {"val_accuracy": 0.9}, 20.0),
                record("trec", "hift", 0, {"val_accuracy": 0.84}, 5.0),
                record("trec", "hift", 1, {"val_accuracy": 0.9}, 30.0),
                record("cola", "hift", 0, {"val_matthews": 0.5, "val_accuracy": 0.7}, 1.0),
            ]
        )
    )
    assert rows == [
        ["trec", "accuracy", "full", "80.0", "90.0", "85.00", "7.07", "-", "1.00", "1.00", "3", "0.1"],
        ["trec", "accuracy", "hift", "84.0", "90.0", "87.00", "4.24", "+2.00", "1.00", "1.00", "3", "0.1"],
        ["cola", "matthews", "hift", "50.0", "50.00", "-", "-", "-", "-", "3", "0.1"],
    ]


def test_losses_are_no_percentages():
    metrics = {"val_loss": 1.5, "val_bleu": 0.25, "val_rougeL": 0.5}
    rows = table_of(format_report([record("viggo", "full", 0, metrics, 1.0)]))
    assert [row[1:5] for row in rows] == [
        ["loss", "full", "1.500", "1.50"],
        ["bleu", "full", "25.0", "25.00"],
        ["rougeL", "full", "50.0", "50.00"],
    ]


def test_runs_once_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    save_network(tmp_path / "model", max_position_embeddings=64)
    save_tokenizer(tmp_path / "model", model_max_length=64)
    Path("data", "trec6").mkdir(parents=True)
    lines = "".join(f"{i % 6} {WORDS[i % 6]} {WORDS[i % 5]}\n" for i in range(24))
    for name in ("TREC.train.all", "TREC.test.all"):
        Path("data", "trec6", name).write_text(lines)
    options = ["--tasks", "trec", "--model", "model", "--output", "table.md"]
    main([*options, "--methods", "full"])
    (first,) = map(json.loads, Path("table.jsonl").read_text().splitlines())
    assert first["run"] == ["trec", "full", 0]
    assert first["steps"] == 3  # one batch in each of three epochs
    main([*options, "--methods", "full", "hift", "--", "--trainer.max_epochs=2"])
    again, second = map(json.loads, Path("table.jsonl").read_text().splitlines())
    assert again == first
    assert (second["run"], second["epochs"]) == (["trec", "hift", 0], 2)
    assert [row[2] for row in table_of(Path("table.md").read_text())] == ["full", "hift"]
    assert "hift" in capsys.readouterr().out


def test_a_run_that_fails_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    with pytest.raises(RuntimeError, match=r"ended with \d+:[\s\S]*TREC.train.all, which does not exist"):
        main(["--tasks", "trec", "--model", "nowhere", "--output", "table.md"])
    assert not Path("table.jsonl").exists()
