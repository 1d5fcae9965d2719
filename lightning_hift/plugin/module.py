"""A LightningModule that does the HiFT step by hand, so that every part of it can be read and overridden."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override

_OFFLOADS = "CPUOffloadOptimizer"  # of torchao; it copies gradients to the host during the backward pass


class HiFTModule(pl.LightningModule):
    """Base class with manual optimization: loss, backward, accumulation, clipping, step, learning rate.

    Subclasses write ``training_loss`` and ``configure_optimizers`` and get, bit for bit, what automatic optimization
    does. Which group trains is decided by the ``HiFTCallback`` or ``strategy="hift"``; without them this is plain
    full fine-tuning. An optimizer whose class says ``needs_gradient = False``, such as ``MeZO``, gets a closure of
    forward passes instead of gradients.

    Args:
        accumulate_grad_batches: Micro-batches per optimizer step. The last window of an epoch may be shorter. (The
            Trainer's argument of this name works in automatic optimization only.)
        gradient_clip_val: Largest norm, or value, of the active group's gradients; ``None`` does not clip.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``.
        lr_monitor: Logged metric for a ``ReduceLROnPlateau`` scheduler, unless that has a ``monitor`` of its own.

    Raises:
        ValueError: ``accumulate_grad_batches`` is below 1. In ``fit``: gradients are to be clipped for an optimizer
            that does not use them, or has its own copies.
        MisconfigurationException: In ``fit``: the Trainer was to accumulate or to clip.
    """

    def __init__(
        self,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        lr_monitor: str = "val_loss",
    ) -> None:
        super().__init__()
        if accumulate_grad_batches < 1:
            raise ValueError(f"Got accumulate_grad_batches={accumulate_grad_batches}; it must be at least 1.")
        self.automatic_optimization = False
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = gradient_clip_algorithm
        self.lr_monitor = lr_monitor
        self._window: list[tuple[Any, int]] = []  # micro-batches that wait for a step without gradient

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor | None:
        """The loss of one micro-batch, a scalar; ``None`` skips it. To be written by the subclass."""
        raise NotImplementedError(f"{type(self).__name__} must define training_loss(batch, batch_idx).")

    @override
    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer), "HiFTModule takes one optimizer"
        if not getattr(optimizer, "needs_gradient", True):
            return self._step_without_gradient(optimizer, batch, batch_idx)
        loss = self.training_loss(batch, batch_idx)
        if batch_idx % self.accumulate_grad_batches == 0:
            optimizer.zero_grad()
        ends_window = (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        strategy = self.trainer.strategy
        if loss is None and self.trainer.world_size > 1:
            raise RuntimeError(
                f"training_loss returned None for batch {batch_idx} in one of {self.trainer.world_size} processes, and"
                " the others would wait for its gradients. Return a loss of 0 that depends on the parameters."
            )
        if loss is not None:
            waits = strategy if isinstance(strategy, ParallelStrategy) and not ends_window else None
            with nullcontext() if waits is None else waits.block_backward_sync():
                self.manual_backward(loss / self.accumulate_grad_batches)
        if ends_window:
            optimizer.step()
            self._step_lr_schedulers("step", batch_idx)
        if self.trainer.is_last_batch:
            self._step_lr_schedulers("epoch", self.current_epoch)
        return None if loss is None else loss.detach()

    def _step_without_gradient(self, optimizer: LightningOptimizer, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        """Let the optimizer compute the loss of all micro-batches of a step, as often as it needs to."""
        if batch_idx % self.accumulate_grad_batches == 0:
            self._window = []
        self._window.append((batch, batch_idx))
        loss = None
        if (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch:
            loss = optimizer.step(self._loss_of_window)
            self._window = []
            self._step_lr_schedulers("step", batch_idx)
        if self.trainer.is_last_batch:
            self._step_lr_schedulers("epoch", self.current_epoch)
        return loss

    def _loss_of_window(self) -> Tensor | None:
        losses = [loss for each in self._window if (loss := self.training_loss(*each)) is not None]
        if not losses:
            return None
        # Of all processes: they draw the same noise, and have to go the same way.
        return self.trainer.strategy.reduce(torch.stack(losses).sum() / self.accumulate_grad_batches, reduce_op="mean")

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        out_of_reach = not getattr(optimizer, "needs_gradient", True) or type(optimizer).__name__ == _OFFLOADS
        if self.gradient_clip_val is not None and out_of_reach:
            raise ValueError(
                f"Got gradient_clip_val={self.gradient_clip_val}, but {type(optimizer).__name__} has no gradients that"
                " could be clipped here. Leave gradient_clip_val out, or use another optimizer."
            )
        # Here, not before step(): mixed precision has only now undone the scaling of the gradients.
        self.clip_gradients(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        # Here, because Lightning's own refusal, which comes next, does not know of our arguments.
        for name, neutral in (("accumulate_grad_batches", 1), ("gradient_clip_val", None)):
            given = getattr(self.trainer, name)
            if given != neutral:
                raise MisconfigurationException(
                    f"Got Trainer({name}={given}), which works in automatic optimization only. Give it to the module"
                    f" instead: {type(self).__name__}({name}={given}), in YAML under model.init_args."
                )
        return []

    @override
    def on_validation_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                # LightningCLI's own class brings the name along.
                monitor = getattr(config.scheduler, "monitor", self.lr_monitor)
                metric = self.trainer.callback_metrics.get(monitor)
                if metric is None:
                    raise ValueError(
                        f"ReduceLROnPlateau waits for lr_monitor={monitor!r}, which was not logged; there are"
                        f" {sorted(self.trainer.callback_metrics)}."
                    )
                config.scheduler.step(metric)

    def _step_lr_schedulers(self, interval: str, index: int) -> None:
        for config in self.trainer.lr_scheduler_configs:
            due = config.interval == interval and (index + 1) % config.frequency == 0
            if due and not isinstance(config.scheduler, ReduceLROnPlateau):
                config.scheduler.step()
