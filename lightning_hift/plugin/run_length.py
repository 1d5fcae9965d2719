"""How long a fit is, in optimizer steps, and when Lightning steps a scheduler in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from lightning_hift.engine.lr_forecast import RunLength
from lightning_hift.plugin.module import HiFTModule


def run_length(trainer: pl.Trainer, num_optimizers: int = 1, config: Any = None, before: int = 0) -> RunLength:
    """What is known of a fit before its first step. Sets up the data loaders, unless they are.

    Args:
        trainer: In a fit.
        num_optimizers: All are stepped in each window of micro-batches; Lightning counts each step.
        config: Lightning's configuration of the scheduler whose calls are asked for; default: one per optimizer step.
        before: Optimizer steps that were made before step 0 of the answer, as in a checkpoint of plain Lightning.
    """
    module: Any = trainer.lightning_module
    own = getattr(module, "accumulate_grad_batches", 1)  # of modules that accumulate by themselves
    window = trainer.accumulate_grad_batches * (own if isinstance(own, int) else 1)
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    per_epoch = math.ceil(batches / window) if math.isfinite(batches) else math.inf
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    total = per_epoch * epochs if epochs else 0
    if trainer.max_steps >= 0:
        total = min(total, trainer.max_steps / num_optimizers)
    calls_by = _calls_by(config, per_epoch, window, batches)
    by_epoch = config is not None and config.interval == "epoch"
    if (
        not module.automatic_optimization
        and getattr(type(module), "training_step", None) is not HiFTModule.training_step
    ):
        return RunLength(total - before, None, is_whole=by_epoch)  # its scheduler is stepped by hand, nobody knows when
    return RunLength(total - before, lambda step: calls_by(step + before), is_whole=by_epoch)


def _calls_by(config: Any, per_epoch: float, window: int, batches: float) -> Callable[[int], int]:
    if config is None or (config.interval == "step" and config.frequency == 1):
        return int
    if config.interval == "epoch":
        return lambda step: int(step // per_epoch) // int(config.frequency)
    every = config.frequency // math.gcd(config.frequency, window)  # Lightning goes by the number of the batch

    def due(steps: float) -> int:
        """Calls in the first ``steps`` optimizer steps of an epoch, whose last window may be shorter."""
        if steps < per_epoch:
            return int(steps // every)
        return int((steps - 1) // every) + int(batches % config.frequency == 0)

    def calls_by(step: int) -> int:
        if math.isinf(per_epoch):
            return due(step)
        epochs, steps = divmod(step, int(per_epoch))
        return epochs * due(per_epoch) + due(steps)

    return calls_by
