"""What one fit took and reached, as a file of JSON for a table of many."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override


class FitReport(Callback):
    """Writes metrics, optimizer steps, largest learning rate and seconds of training to a file when a fit ends.

    Seconds are those between the first batch and the last one, without validation: of the wall clock, and of the
    processor, which other programs on the machine do not lengthen.

    Args:
        path: The file, replaced if it exists.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._seconds = {"wall": 0.0, "cpu": 0.0}
        self._started: dict[str, float] | None = None
        self._rates: set[float] = set()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = _now()

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._rates.update(group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._started = _now()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()
        rate = max(self._rates, default=0.0)
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        report = {"steps": trainer.global_step, "epochs": trainer.current_epoch, "seconds": self._seconds}
        report["learning_rate"] = rate
        self.path.write_text(json.dumps({**report, "metrics": found}) + "\n")

    def _stop(self) -> None:
        if self._started is not None:
            self._seconds = {name: self._seconds[name] + now - self._started[name] for name, now in _now().items()}
            self._started = None


def _now() -> dict[str, float]:
    return {"wall": time.perf_counter(), "cpu": time.process_time()}
