"""Learning rates that are held within a sweep, in a Trainer: its schedulers, each in a ``SweepLR``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_warn

from lightning_hift.engine.engine import HiFTEngine
from lightning_hift.engine.lr_forecast import SPANS_RUN
from lightning_hift.engine.sweep_lr import HoldLR, SweepLR, is_held
from lightning_hift.plugin.run_length import run_length

_LR_FINDER = "lightning.pytorch.tuner.lr_finder"  # whose schedulers try a learning rate at each step


class HeldRates:
    """Puts schedulers into a ``SweepLR`` each, as soon as they are there, and tells these the length of the run.

    Args:
        hold_lr: See ``HiFTCallback``.
        trainer: Whose schedulers.
        engines: One for each optimizer.
    """

    def __init__(self, hold_lr: HoldLR, trainer: pl.Trainer, engines: Sequence[HiFTEngine]) -> None:
        self.total_steps = math.inf
        """Optimizer steps of the run, once that is known."""
        self._hold_lr = hold_lr
        self._trainer = trainer
        self._engines = engines
        self._knows_length = False
        self.hold()

    def hold(self) -> None:
        """Hold schedulers that are not held yet: a callback may have put one in the place of another."""
        if self._hold_lr == "off":
            return
        configs = self._trainer.strategy.lr_scheduler_configs
        in_use = {id(config.scheduler) for config in configs}
        for engine in self._engines:
            engine.held_schedulers[:] = [s for s in engine.held_schedulers if id(s) in in_use]
        for config in configs:
            owner = self._owner_of(config)
            if owner is None or is_held(config.scheduler) or type(config.scheduler).__module__ == _LR_FINDER:
                continue
            config.scheduler = cast(Any, SweepLR(config.scheduler, owner, self._hold_lr))
            if self._knows_length:
                self._expect(config)

    def find_length(self) -> None:
        """At the start of training, and not earlier: counting the batches sets up the data loaders."""
        trainer = self._trainer
        self.total_steps = run_length(trainer, len(self._engines)).total_steps
        self._knows_length = True
        for config in trainer.strategy.lr_scheduler_configs:
            if is_held(config.scheduler):
                self._expect(config)
                if trainer.global_step == 0 and not cast(Any, trainer).fast_dev_run:
                    cast(Any, config.scheduler).refuse_waste()

    def warn_about_single_steps(self) -> None:
        """Warn of schedules of which ``hold_lr="once"`` leaves out most."""
        for config in self._trainer.strategy.lr_scheduler_configs if self._hold_lr == "once" else ():
            spans_run = getattr(config.scheduler, SPANS_RUN, False)
            if not is_held(config.scheduler) or config.interval != "step" or spans_run:
                continue
            length, total = cast(HiFTEngine, self._owner_of(config)).policy.steps_per_sweep, self.total_steps
            if length > 1:
                known = math.isfinite(total)
                share = f"about {total / length:.0f} of the {total:g} steps" if known else f"one of {length} steps that"
                rank_zero_warn(
                    f"hold_lr='once' takes one scheduler step per sweep of {length} optimizer steps, so"
                    f" {config.scheduler.__class__.__name__} will get {share} it would get without HiFT. Size the"
                    " schedule in sweeps, or use hold_lr='replay'."
                )

    def flush(self, flush: Callable[[SweepLR], None]) -> None:
        """Call ``flush`` of each scheduler that is in use."""
        for config in self._trainer.strategy.lr_scheduler_configs:
            if is_held(config.scheduler):
                flush(cast(SweepLR, config.scheduler))

    def _owner_of(self, config: Any) -> HiFTEngine | None:
        return next((engine for engine in self._engines if engine.optimizer is config.scheduler.optimizer), None)

    def _expect(self, config: Any) -> None:
        engine = cast(HiFTEngine, self._owner_of(config))
        before = self._trainer.global_step // len(self._engines) - engine.step
        config.scheduler.expect(run_length(self._trainer, len(self._engines), config, before))
