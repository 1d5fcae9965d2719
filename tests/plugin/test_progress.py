"""Samples and tokens per second, in bars and loggers."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_hift import TrainingSpeed
from lightning_hift.plugin import training_speed
from lightning_hift.tasks import CausalLM
from tests.models import Automatic, as_published, loader, trainer

GPT2 = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 32}
TOKENS, SAMPLES = "train_tokens_per_second", "train_samples_per_second"


class Clock:
    """A clock that the test winds on."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(training_speed, "time", made)
    return made


class Paced(CausalLM):
    """Each micro-batch takes as many seconds as it has tokens in its first row; a validation batch takes 1000."""

    def __init__(self, clock: Clock, **options: Any) -> None:
        super().__init__(model_type="gpt2", model_config=GPT2, **options)
        self.clock = clock
        self.seen: list[dict[str, float]] = []  # what loggers would get, batch by batch

    def training_loss(self, batch: Any, batch_idx: int) -> Any:
        self.clock.now += float(batch["attention_mask"][0].sum())
        return super().training_loss(batch, batch_idx)

    def on_train_batch_end(self, *rest: Any) -> None:
        metrics = self.trainer.callback_metrics
        self.seen.append({name: float(value) for name, value in metrics.items() if name.endswith("per_second")})

    def on_validation_epoch_start(self) -> None:
        self.clock.now += 1000

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        pass


def padded(lengths: list[int]) -> list[dict[str, torch.Tensor]]:
    """Batches of two rows: one with so many tokens, one with 2; of 8 columns."""
    batches = []
    for length in lengths:
        mask = (torch.arange(8) < torch.tensor([[length], [2]])).long()
        batches.append({"input_ids": torch.ones(2, 8, dtype=torch.long), "attention_mask": mask})
    return batches


def rates(clock: Clock, lengths: list[int], every: int, **options: Any) -> list[dict[str, float]]:
    batches: Any = padded(lengths)
    module = Paced(clock, **options)
    run = trainer(log_every_n_steps=every, val_check_interval=1, num_sanity_val_steps=1)
    run.fit(module, DataLoader(batches, batch_size=None), DataLoader(batches[:1], batch_size=None))
    return module.seen


def test_real_tokens_over_the_logging_interval_without_validation(clock: Clock) -> None:
    # Seconds are 4, 8, 2, 6; tokens two more each, for the second row.
    found = rates(clock, [4, 8, 2, 6], every=2)
    assert [values[TOKENS] for values in found] == pytest.approx([6 / 4, 16 / 12, 14 / 10, 12 / 8])
    assert [values[SAMPLES] for values in found] == pytest.approx([2 / 4, 4 / 12, 4 / 10, 4 / 8])


def test_the_interval_is_that_of_the_loggers_under_accumulation(clock: Clock, tmp_path: Path) -> None:
    class Slow(Automatic):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            clock.now += batch_idx + 1
            return super().training_step(batch, batch_idx)

    logger = CSVLogger(tmp_path)
    run = trainer(callbacks=TrainingSpeed(), logger=logger, log_every_n_steps=2, accumulate_grad_batches=2)
    run.fit(Slow(), loader(8, batch_size=4))
    rows = list(csv.DictReader((Path(str(run.log_dir)) / "metrics.csv").open()))
    assert [float(row[SAMPLES]) for row in rows] == pytest.approx([16 / (1 + 2 + 3 + 4), 16 / (5 + 6 + 7 + 8)])


def test_a_second_fit_starts_anew(clock: Clock) -> None:
    assert rates(clock, [4], every=50) == rates(clock, [4], every=50)


@pytest.mark.parametrize(
    ("batch", "samples", "tokens"),
    [
        ({"input_ids": torch.ones(3, 5)}, 3, 15),
        ({"input_ids": torch.ones(3, 5), "attention_mask": torch.ones(3, 1, 5, 5)}, 3, 15),
        ({"pixels": torch.ones(4, 2)}, 4, None),
        ([torch.ones(4, 2), torch.ones(4)], 4, None),
        (("name", [torch.ones(6)]), 6, None),
        (torch.tensor(1.0), 1, None),
        ("nothing", None, None),
    ],
)
def test_any_batch(batch: Any, samples: int | None, tokens: int | None) -> None:
    assert training_speed._count_samples(batch) == samples
    assert training_speed.count_tokens(batch) == tokens


def test_a_module_without_tokens_shows_samples() -> None:
    run = trainer(callbacks=[as_published(), TrainingSpeed()])
    run.fit(Automatic(), loader(6))
    assert run.progress_bar_metrics[SAMPLES] > 0
    assert TOKENS not in run.callback_metrics


# --- bars and loggers -------------------------------------------------------------------------------------------------


def fit(**options: Any) -> pl.Trainer:
    run = trainer(log_every_n_steps=2, callbacks=[as_published(), *options.pop("callbacks", [])], **options)
    run.fit(CausalLM(model_type="gpt2", model_config=GPT2), DataLoader(padded([4] * 6), batch_size=None))  # type: ignore[arg-type]
    return run


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_bars_show_sweep_group_loss_and_tokens(
    bar: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    fit(callbacks=[bar(refresh_rate=1)], enable_progress_bar=True)
    shown = "".join(capsys.readouterr())
    for name in ("hift/sweep", "hift/group", "train_loss", TOKENS):
        assert name in shown, shown[-2000:]


def test_ones_own_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    own = TrainingSpeed()
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        run = fit(callbacks=[own])
    assert [c for c in run.callbacks if isinstance(c, TrainingSpeed)] == [own]  # type: ignore[attr-defined]
    assert "will override" not in caplog.text


def test_csv_logger(tmp_path: Path) -> None:
    run = fit(logger=CSVLogger(tmp_path))
    steps: dict[str, dict[str, str]] = {}
    for row in csv.DictReader((Path(str(run.log_dir)) / "metrics.csv").open()):  # a row for each source of values
        steps.setdefault(row["step"], {}).update({name: value for name, value in row.items() if value})
    assert [*steps] == ["1", "3", "5"]
    for row in steps.values():
        assert float(row[TOKENS]) == pytest.approx(6 / 2 * float(row[SAMPLES]), rel=1e-4)
        assert row["hift/group"] != ""
        assert row["hift/sweep"] != ""
        assert row["train_loss"] != ""


def test_tensorboard_logger(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fit(logger=TensorBoardLogger(str(tmp_path)))
    events = EventAccumulator(str(run.log_dir))
    events.Reload()
    for name in (TOKENS, SAMPLES, "hift/group", "hift/sweep", "train_loss"):
        assert [scalar.step for scalar in events.Scalars(name)] == [1, 3, 5]
    assert all(scalar.value > 0 for scalar in events.Scalars(TOKENS))


def test_the_command_line_adds_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_hift.cli import HiFTCLI

    monkeypatch.setattr(sys, "argv", ["lightning-hift"])
    own = pl.Callback()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults = {"accelerator": "cpu", "max_steps": 1, **quiet, "callbacks": own}
    cli = HiFTCLI(
        CausalLM,
        run=False,
        args=["--model.model_type=gpt2", f"--model.model_config={json.dumps(GPT2)}"],
        trainer_defaults=defaults,
    )
    cli.trainer.fit(cli.model, DataLoader(padded([4]), batch_size=None))  # type: ignore[arg-type]
    callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]
    assert sum(isinstance(callback, TrainingSpeed) for callback in callbacks) == 1
    assert own in callbacks
