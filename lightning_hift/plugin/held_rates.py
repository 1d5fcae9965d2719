"""Learning rates that are held within a sweep, in a Trainer: its schedulers, each in a ``SweepLR``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_hift.engine.engine import HiFTEngine
from lightning_hift.engine.lr_forecast import SPANS_RUN
from lightning_hift.engine.sweep_lr import HoldLR, SweepLR, schedule_of
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
        in_use = [schedule for config in configs if (schedule := schedule_of(config.scheduler)) is not None]
        for engine in self._engines:
            engine.rates.keep(in_use)
        for config in configs:
            owner = self._owner_of(config)
            if owner is None or len(owner.groups) == 1 or not _can_be_held(config.scheduler):
                continue
            config.scheduler = cast(Any, SweepLR(config.scheduler, owner, self._hold_lr))
            if self._knows_length:
                self._expect(config)

    def find_length(self) -> None:
        """At the start of training, and not earlier: counting the batches sets up the data loaders."""
        trainer = self._trainer
        self.total_steps = run_length(trainer, len(self._engines)).total_steps
        self._knows_length = True
        self.hold()
        for config in trainer.strategy.lr_scheduler_configs:
            if schedule_of(config.scheduler) is not None:
                self._expect(config)
        for rates in (engine.rates for engine in self._engines):
            if trainer.global_step == 0 and not cast(Any, trainer).fast_dev_run:
                rates.refuse_waste()
            if rates.changes:
                rank_zero_info(
                    f"HiFT: {', '.join(rates.changes)}: not as the checkpoint was written. That counts from now on, in"
                    " the place of what was held for the rest of the sweep."
                )
            for scheduler in rates.unforeseen:
                rank_zero_info(f"HiFT: {scheduler}, so each sweep has the learning rate of its start.")

    def warn_about_single_steps(self) -> None:
        """Warn of schedules of which ``hold_lr="once"`` leaves out most."""
        for config in self._trainer.strategy.lr_scheduler_configs if self._hold_lr == "once" else ():
            spans_run = getattr(config.scheduler, SPANS_RUN, False)
            if schedule_of(config.scheduler) is None or config.interval != "step" or spans_run:
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

    def flush(self) -> None:
        """Choose the learning rates of sweeps that have begun."""
        for engine in self._engines:
            engine.rates.flush()

    def finish(self) -> None:
        """Let the schedulers' learning rates be in force: the run ends here."""
        for engine in self._engines:
            engine.rates.finish()

    def _owner_of(self, config: Any) -> HiFTEngine | None:
        return next((engine for engine in self._engines if engine.optimizer is config.scheduler.optimizer), None)

    def _expect(self, config: Any) -> None:
        engine = cast(HiFTEngine, self._owner_of(config))
        before = self._trainer.global_step // len(self._engines) - engine.step
        config.scheduler.expect(run_length(self._trainer, len(self._engines), config, before))


def _can_be_held(scheduler: Any) -> bool:
    is_held = schedule_of(scheduler) is not None
    return not is_held and type(scheduler).__module__ != _LR_FINDER and callable(getattr(scheduler, "step", None))
