"""One call of ``Trainer.train`` under HiFT."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

from torch import Tensor

from lightning_hift.activations.reentrant import refuse_reentrant_graph
from lightning_hift.engine.engine import HiFTEngine
from lightning_hift.engine.lr_forecast import RunLength
from lightning_hift.engine.optimizer_groups import turns_of_run
from lightning_hift.engine.options import HiFTOptions
from lightning_hift.engine.run_words import doubts_about_length, summarize_run, tell_first_sweep
from lightning_hift.engine.sweep_lr import SweepLR, check_hold_lr
from lightning_hift.groups.turns import Turns
from lightning_hift.huggingface.refusals import warn_about_compilation

_KEY = "hift"  # in trainer_state.json, among the states of callbacks


class Run:
    """An engine and held learning rates for a ``transformers.Trainer``, from before a checkpoint is loaded to the end.

    Args:
        trainer: With a ``hift``, and with the bare optimizer.
        num_steps: Optimizer steps of the run.
    """

    def __init__(self, trainer: Any, num_steps: int) -> None:
        options = {"seed": trainer.args.seed, **trainer.hift}
        self._hold_lr = options.pop("hold_lr", "replay")
        check_hold_lr(self._hold_lr)
        self._options = HiFTOptions(**options)
        self._num_steps = num_steps
        self._turns = self._choose_turns(trainer)
        grouping = self._options.with_turns(self._turns)
        self.engine = HiFTEngine.attach(trainer.model, trainer.optimizer, options=grouping, advance_on_step=False)
        self.engine.unfreeze()
        self.scheduler: Any = trainer.lr_scheduler
        """The Trainer's own."""
        self._held: SweepLR | None = None
        self.values: dict[str, Any] = {}
        """To be logged of the last step."""
        self._has_begun = self._graph_was_checked = False

    def _choose_turns(self, trainer: Any) -> Turns:
        """A run that resumes goes on as it was, whatever its length is now."""
        asked, saved = self._options, trainer.state.stateful_callbacks.get(_KEY)
        if saved is None or asked.policy is not None:
            turns = turns_of_run(
                trainer.model, [trainer.optimizer], asked, lambda: self._num_steps, trainer.args.device
            )
        else:
            size, steps, per_unit = saved["turns"]
            turns = Turns(asked.group_size or size, asked.steps_per_group or steps, per_unit)
        trainer.state.stateful_callbacks[_KEY] = {"turns": list(turns)}
        return turns

    def hold(self, scheduler: Any) -> Any:
        """What is to be stepped in the place of ``scheduler``, and holds its learning rates in each sweep."""
        self.scheduler = scheduler
        # An earlier call of train may have left the optimizer in the middle of a sweep.
        total_steps = self.engine.step + self._num_steps
        self._held = SweepLR(scheduler, self.engine, self._hold_lr, total_steps=total_steps)
        return self._held

    def begin_batch(self, trainer: Any) -> None:
        """Before the forward pass of a micro-batch."""
        if not self._has_begun:
            self._has_begun = True
            self._begin(trainer)
        self.engine.rates.flush()  # a step that was skipped may have ended a sweep, and does not step the scheduler
        self._report_sweep()
        self.engine.activate()

    def _begin(self, trainer: Any) -> None:
        """Once a checkpoint was loaded, if there is one."""
        engine = self.engine
        ahead = trainer.state.global_step - engine.step
        if self._held is not None:
            self._held.expect(RunLength(self._num_steps - ahead, lambda step: step + ahead))
        if engine.step == 0:
            engine.rates.refuse_waste()
        for doubt in doubts_about_length([engine], self._num_steps, self._options, self._turns):
            warnings.warn(doubt, stacklevel=2)
        warn_about_compilation(trainer, len(engine.groups))
        print(summarize_run(trainer.model, [engine], self._num_steps))

    def check_loss(self, loss: Tensor) -> None:
        """Before the backward pass."""
        if not loss.requires_grad and len(self.engine.groups) > 1:  # the active group has no part in it
            loss.requires_grad_(True)
        elif not self._graph_was_checked:
            refuse_reentrant_graph(loss)
            self._graph_was_checked = True

    def end_batch(self, trainer: Any, loss: Tensor) -> None:
        """After the backward pass of a micro-batch, of which the last one is followed by clipping and a step."""
        engine = self.engine
        engine.observe(loss)
        engine.unfreeze()
        if not trainer.accelerator.sync_gradients:
            return
        engine.note_gradients()
        engine.announce_step()
        engine.settle_step()  # nothing is saved before it is made
        if trainer.accelerator.scaler is None:  # which may skip the step, and knows of no masters
            engine.prepare_step(slices=trainer.args.max_grad_norm > 0)
        found = {
            "learning_rate": engine.optimizer.param_groups[0].get("lr"),  # that of the scheduler is held back
            "hift/lr": engine.learning_rate,
            "hift/group": engine.active_group.index,
            "hift/sweep": engine.sweep,
            "hift/state_bytes_device": engine.offloader.device_bytes,
            "hift/state_bytes_host": engine.offloader.host_bytes,
        }
        self.values = {
            name: value.item() if isinstance(value, Tensor) else value
            for name, value in found.items()
            if value is not None
        }

    def finish(self) -> None:
        """The run is over, and not by an exception."""
        self._report_sweep()
        if self._held is not None:
            self._held.finish()

    def _report_sweep(self) -> None:
        tell_first_sweep(self.engine, print, partial(warnings.warn, stacklevel=4))
