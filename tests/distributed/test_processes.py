"""Several processes: each gets other rows, and metrics are those of all rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_hift import MeZO
from lightning_hift.data import ClassificationDataModule
from lightning_hift.data.batches import OrderedExamples, ShuffledExamples
from lightning_hift.tasks import SequenceClassification
from tests.models import trainer
from tests.processes import Processes, succeeded
from tests.text_models import save_network

ROWS = [{"text": "good film" if i % 2 else "bad plot was awful", "label": int(i % 3 == 0)} for i in range(26)]


def collate(examples: list[int]) -> dict[str, Any]:
    return {"n": examples}


@pytest.mark.parametrize(("count", "world_size"), [(24, 2), (23, 4), (9, 3), (3, 4)])
def test_processes_share_a_pass(count: int, world_size: int) -> None:
    loaders = [ShuffledExamples(range(count), None, 3, 0, collate, {}, rank, world_size) for rank in range(world_size)]
    drawn = [list(loader) for loader in loaders]
    assert {len(batches) for batches in drawn} == {len(loaders[0])}
    seen = [n for batches in drawn for batch in batches for n in batch["n"]]
    assert set(seen) == set(range(count))
    if count % (3 * world_size) == 0:
        assert len(seen) == count


def test_evaluation_takes_each_row_once() -> None:
    loaders = [OrderedExamples(range(20), 3, collate, rank, 3) for rank in range(3)]
    assert [len(list(loader)) for loader in loaders] == [len(loader) for loader in loaders] == [3, 2, 2]
    assert sorted(n for loader in loaders for batch in loader for n in batch["n"]) == list(range(20))
    with pytest.raises(ValueError, match="Got 6 examples to evaluate in batches of 3 by 3 processes"):
        OrderedExamples(range(6), 3, collate, 0, 3)


def fit(folder: Path, devices: int, optimizer: str) -> dict[str, Any]:
    """Validate and fit on the rows in ``folder``, as one of ``devices`` processes."""
    os.chdir(folder)
    pl.seed_everything(0)
    data = ClassificationDataModule(
        text="text",
        label="label",
        files={"train": "rows.jsonl", "validation": "rows.jsonl"},
        batch_size=4,
        cache_dir="cache",
    )
    make = {"AdamW": torch.optim.AdamW, "MeZO": lambda parameters: MeZO(parameters, lr=1e-2)}[optimizer]
    task = SequenceClassification(model="model", optimizer=make)
    several = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    fitting = trainer(num_sanity_val_steps=0, **several)
    (found,) = fitting.validate(task, data, verbose=False)
    fitting.fit(task, data)
    weights = sum(p.double().sum().item() for p in task.parameters())
    return {"metrics": found, "weights": weights, "steps": fitting.global_step}


@pytest.mark.parametrize("optimizer", ["AdamW", "MeZO"])
def test_metrics_of_two_processes_are_those_of_one(
    optimizer: str, tmp_path: Path, two: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    save_network(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    one = fit(tmp_path, 1, optimizer)
    first, second = succeeded(two.run(fit, tmp_path, 2, optimizer))
    assert first == second
    assert first["metrics"] == pytest.approx(one["metrics"], rel=1e-5)  # float32 sums in another order
    assert set(one["metrics"]) == {"val_loss", "val_accuracy", "val_f1", "val_matthews"}
    assert (one["steps"], first["steps"]) == (7, 4)
