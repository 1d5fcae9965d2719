"""Predictions in a file: one record per input, in order, whole or absent."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_hift import PredictionWriter
from lightning_hift.cli import main
from tests.models import trainer


class Echo(pl.LightningModule):
    """Predicts what ``make`` makes of a batch of numbers."""

    def __init__(self, make: Any = lambda batch: batch) -> None:
        super().__init__()
        self.make = make

    def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.make(batch)


def predict(make: Any, path: Path, *loaders: DataLoader[Any]) -> list[Any]:
    data = list(loaders) or DataLoader(range(5), batch_size=2)  # type: ignore[arg-type]
    trainer(callbacks=[PredictionWriter(path)]).predict(Echo(make), data, return_predictions=False)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("make", "record"),
    [
        (
            lambda batch: [{"number": n, "twice": 2 * n} for n in batch.tolist()],
            lambda n: {"number": n, "twice": 2 * n},
        ),
        (lambda batch: {"number": batch, "name": [f"é{n}" for n in batch]}, lambda n: {"number": n, "name": f"é{n}"}),
        (lambda batch: batch, lambda n: {"prediction": n}),
        (lambda batch: torch.stack([batch, batch + 1], dim=1).bfloat16(), lambda n: {"prediction": [n, n + 1]}),
        (lambda batch: [f"text {n}" for n in batch.tolist()], lambda n: {"prediction": f"text {n}"}),
        (lambda batch: [{"scores": n.float() / 0} for n in batch], lambda n: {"scores": None}),
        (lambda batch: list(batch.unbind()), lambda n: {"prediction": n}),
    ],
)
def test_one_record_per_input_in_order(make: Any, record: Any, tmp_path: Path) -> None:
    assert predict(make, tmp_path / "new" / "out.jsonl") == [record(n) for n in range(5)]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.jsonl"]


def test_texts_stay_readable(tmp_path: Path) -> None:
    predict(lambda batch: ["größer\nzweite Zeile"] * len(batch), tmp_path / "out.jsonl")
    first = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert first == '{"prediction": "größer\\nzweite Zeile"}'


def test_several_loaders_follow_each_other(tmp_path: Path) -> None:
    loaders = [DataLoader(range(start, start + 3), batch_size=2) for start in (0, 3)]  # type: ignore[arg-type]
    assert predict(lambda batch: batch, tmp_path / "out.jsonl", *loaders) == [{"prediction": n} for n in range(6)]


def test_a_run_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("old\n")

    def fail(batch: Tensor) -> Tensor:
        if 2 in batch:
            raise OSError("the disk is on fire")
        return batch

    with pytest.raises(OSError, match="on fire"):
        predict(fail, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "old\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda batch: {"a": batch, "b": [1]}, ValueError, r"columns of lengths .*'b': 1.* one value per input"),
        (lambda batch: {"a": 3.0}, ValueError, "one value per input"),
        (lambda batch: [object()] * len(batch), TypeError, "a object, which JSON has no word for"),
    ],
)
def test_what_cannot_be_written(make: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        predict(make, tmp_path / "out.jsonl")


def test_nothing_is_written_in_fit_and_a_second_run_starts_anew(tmp_path: Path) -> None:
    writer = PredictionWriter(tmp_path / "out.jsonl")
    run = trainer(callbacks=[writer])
    for _ in range(2):
        run.predict(Echo(), DataLoader(range(3)), return_predictions=False)  # type: ignore[arg-type]
        assert writer.num_records == 3
        assert len(writer.path.read_text().splitlines()) == 3


# --- the command line -------------------------------------------------------------------------------------------------


class Weighted(pl.LightningModule):
    """Multiplies by its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.0))

    def predict_step(self, batch: Tensor, batch_idx: int) -> list[dict[str, float]]:
        return [{"score": float(self.weight * number)} for number in batch]


class Numbers(pl.LightningDataModule):
    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(range(5), batch_size=2)  # type: ignore[arg-type]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-hift"])
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    content = {
        "seed_everything": 0,
        "trainer": quiet,
        "model": {"class_path": "tests.plugin.test_predictions.Weighted"},
        "data": {"class_path": "tests.plugin.test_predictions.Numbers"},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    return "mine.yaml"


pytestmark = [
    pytest.mark.filterwarnings(r"ignore:[\s\S]*deprecated in v4"),
    pytest.mark.filterwarnings(r"ignore:[\s\S]*JsonargparseDeprecationWarning"),
]


def test_predict_writes_a_file_by_default(config: str, tmp_path: Path) -> None:
    main(["predict", "-c", config])
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["score"] for line in lines] == [0, 1, 2, 3, 4]


def test_predict_with_a_checkpoint_and_a_file_of_another_name(config: str, tmp_path: Path) -> None:
    module = Weighted()
    module.weight.data.fill_(3.0)
    run = trainer()
    run.strategy.connect(module)
    run.save_checkpoint(tmp_path / "mine.ckpt")
    main(["predict", "-c", config, "--ckpt_path", "mine.ckpt", "--predictions", "folder/scores.jsonl"])
    lines = (tmp_path / "folder" / "scores.jsonl").read_text().splitlines()
    assert [json.loads(line)["score"] for line in lines] == [0, 3, 6, 9, 12]
    assert not (tmp_path / "predictions.jsonl").exists()


def test_a_writer_in_the_configuration_takes_precedence(config: str, tmp_path: Path) -> None:
    writer = '{"class_path": "lightning_hift.PredictionWriter", "init_args": {"path": "own.jsonl"}}'
    main(["predict", "-c", config, f"--trainer.callbacks=[{writer}]"])
    assert (tmp_path / "own.jsonl").exists()
    assert not (tmp_path / "predictions.jsonl").exists()


def test_help_tells_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    assert "--predictions PREDICTIONS" in capsys.readouterr().out
