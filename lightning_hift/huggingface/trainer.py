"""HiFT in transformers' Trainer, and so in TRL's, which are subclasses of it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from lightning_hift.activations.reentrant import refuse_reentrant_modules
from lightning_hift.engine.engine import HiFTEngine
from lightning_hift.huggingface.refusals import refuse_unsupported
from lightning_hift.huggingface.run import Run

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # it is mixed with one


class HiFTTrainerMixin(Trainer):  # type: ignore[misc]
    """Lets a Trainer of transformers fine-tune all parameters, one layer group at a time (HiFT, arXiv 2401.15207).

    One line before any Trainer class; the rest of the script stays as it is::

        class SFTTrainer(HiFTTrainerMixin, trl.SFTTrainer):
            hift = {"order": "top2down"}

    Groups take turns at steps of the optimizer, whatever ``gradient_accumulation_steps`` is. Between them, for
    evaluation, checkpoints and callbacks, ``requires_grad`` is the user's own. Weights that were loaded in 16 bits get
    master weights, and then gradients are clipped in 32 bits. ``resume_from_checkpoint`` continues in the middle of a
    sweep.
    """

    hift: Mapping[str, Any] = MappingProxyType({})
    """Fields of ``HiFTOptions`` and ``hold_lr`` (see ``SweepLR``); ``seed`` is that of the arguments unless given."""

    optimizer: Any
    _hift_run: Run | None = None

    @property
    def hift_engine(self) -> HiFTEngine | None:
        """What decides which parameters train now; ``None`` outside of ``train``."""
        return None if self._hift_run is None else self._hift_run.engine

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does.

        Raises:
            ValueError: HiFT cannot train in this way, or an option is out of range.
            TypeError: An option does not exist, or the optimizer cannot step one group at a time.
        """
        refuse_unsupported(self)
        try:
            output = super().train(*args, **kwargs)
            if self._hift_run is not None:
                self._hift_run.finish()
            return output
        finally:
            self._close_hift()

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        """Runs when the optimizer is ready, but before a checkpoint is loaded into it: the time to attach an engine."""
        self._close_hift()  # of a try with larger batches
        refuse_reentrant_modules(self.model)
        prepared = self.optimizer
        # Engine and scheduler belong to the same optimizer, and not to accelerate's wrapper around it.
        self.optimizer = _without_wrappers(optimizer or prepared)
        try:
            self._hift_run = Run(self, num_training_steps)
            self.lr_scheduler = self._hift_run.hold(super().create_scheduler(num_training_steps))
        finally:
            self.optimizer = prepared
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward pass of a micro-batch, through the group that trains now."""
        run = self._hift_run
        if run is None:
            return super().training_step(*args, **kwargs)
        run.begin_batch(self)
        loss = super().training_step(*args, **kwargs)
        run.end_batch(self, loss)
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As that of the Trainer."""
        found = super().compute_loss(*args, **kwargs)
        if self._hift_run is not None and torch.is_grad_enabled():
            self._hift_run.check_loss(found[0] if isinstance(found, tuple) else found)
        return found

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log also which group was trained, and with which learning rate."""
        if self._hift_run is not None and "learning_rate" in logs:
            logs = {**logs, **self._hift_run.values}
        super().log(logs, *args, **kwargs)

    def _close_hift(self) -> None:
        if self._hift_run is not None:
            self._hift_run.engine.close()
            self.lr_scheduler = self._hift_run.scheduler
            self._hift_run = None


def _without_wrappers(optimizer: Optimizer) -> Optimizer:
    from accelerate.optimizer import AcceleratedOptimizer

    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
