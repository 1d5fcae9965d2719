"""What one fit took and reached, as a file of JSON for a table of many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from lightning_hift.benchmark.run_meter import RunMeter


class FitReport(RunMeter):
    """Writes metrics, optimizer steps, largest learning rate and seconds of training to a file when a fit ends.

    Seconds are those between the first batch and the last one, without validation: of the wall clock, and of the
    processor, which other programs on the machine do not lengthen.

    Args:
        path: The file, replaced if it exists.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self._rates: set[float] = set()

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        self._rates.update(group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        rate = max(self._rates, default=0.0)
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        report = {"steps": trainer.global_step, "epochs": trainer.current_epoch, "seconds": self.elapsed._asdict()}
        report["learning_rate"] = rate
        self.path.write_text(json.dumps({**report, "metrics": found}) + "\n")
