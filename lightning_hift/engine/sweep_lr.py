"""One learning rate for all groups of a sweep, for any scheduler."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from torch.optim import Optimizer

from lightning_hift.engine.engine import HiFTEngine
from lightning_hift.engine.lr_forecast import (
    SPANS_RUN,
    LRForecast,
    Options,
    RunLength,
    apply_calls,
    can_be_read_ahead,
    copy_scheduler,
    options_of,
    plain,
    set_options,
)

HoldLR = Literal["replay", "once", "off"]

_OWN = {"_scheduler", "_engine", "_hold_lr", "_run", "_pending", "_own", "_used", "_sweep", "_unfinished"}


class SweepLR:
    """Holds the learning rate constant in each sweep, for any scheduler (HiFT, algorithm 1, delayed update).

    In a sweep all groups use the mean of what plain training would use over the same optimizer steps, so each layer
    sees the learning rates of plain training on average. Calls of ``step`` are held back until the sweep is over; then
    the schedule is where plain training would have it. Where the schedule ends with the run, a sweep that the run does
    not finish uses the mean over the steps that are left: nothing is read beyond the end of a schedule.

    It stands in for the scheduler: every other attribute, and its class, are the scheduler's own. So is its
    ``state_dict``, as if nothing were held back: what is held travels in the state of the optimizer, where plain torch
    ignores it.

    Args:
        scheduler: Any scheduler with ``step`` and ``state_dict``. One whose ``step`` needs an argument, such as a
            metric, cannot be read ahead: a sweep then uses the learning rate of its start.
        engine: The engine of the scheduler's optimizer.
        hold_lr: ``"replay"`` makes up for all held-back steps at the end of the sweep, so the schedule ends when it
            should. ``"once"`` makes one step per sweep, as in the paper, and is for schedules that are sized in sweeps.
            Where that starts at a learning rate of (nearly) 0, the first sweep uses the second one's. ``"off"`` holds
            nothing back.
        steps_ahead: How many steps of the schedule lie between two sweeps; default: one per optimizer step.
        total_steps: Optimizer steps of the run, if they are known.

    Raises:
        ValueError: ``hold_lr`` is unknown.
    """

    def __init__(
        self,
        scheduler: Any,
        engine: HiFTEngine,
        hold_lr: HoldLR = "replay",
        steps_ahead: int | None = None,
        total_steps: float = math.inf,
    ) -> None:
        check_hold_lr(hold_lr)
        per_sweep = engine.policy.steps_per_sweep
        ahead = per_sweep if steps_ahead is None else steps_ahead
        self._scheduler = scheduler
        self._engine = engine
        self._hold_lr = "replay" if hold_lr == "once" and getattr(scheduler, SPANS_RUN, False) else hold_lr
        self._run = RunLength(total_steps, lambda step: step * ahead // per_sweep)
        self._pending: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._own: Options | None = None  # the scheduler's own options, while those of a sweep are in force
        self._used: Options = []  # the latter
        self._sweep = engine.sweep  # whose they are
        self._unfinished: dict[str, Any] | None = None
        engine.held_schedulers.append(self)
        self._hold()

    def expect(self, run: RunLength) -> None:
        """Choose the learning rates of sweeps that have not begun by what is known of the run now."""
        self._run = run
        if self._own is None or self._engine.at_sweep_start:
            self._release()
            self._hold()

    def refuse_waste(self) -> None:
        """For a run that has not begun.

        Raises:
            ValueError: No learning rate in it would reach 1 % of what was asked for.
        """
        if self._reads_ahead and self._forecast().is_wasted():
            raise ValueError(
                f"In this run of {self._run.total_steps:g} optimizer steps {type(self._scheduler).__name__} never"
                " reaches 1 % of the learning rate that was asked for, so nothing would be learned. Make its warm-up"
                f" shorter than the run{', use hold_lr=replay' if self._hold_lr == 'once' else ''}, or train longer."
            )

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Take note of a step of the schedule, and make up for all of them if the sweep is over."""
        if self._hold_lr == "off":
            self._scheduler.step(*args, **kwargs)
            return
        self._unfinished = None
        self._pending.append((args, kwargs))
        self.flush()

    def flush(self) -> None:
        """If a sweep begins, apply what was held back, and choose the learning rate of the new one."""
        if self._engine.at_sweep_start and (self._pending or self._sweep != self._engine.sweep):
            self._release()
            self._hold()

    def finish(self) -> None:
        """Apply what was held back although the sweep is not over: the run ends here.

        A checkpoint that is written later still has the learning rate of the unfinished sweep, so that a longer run
        which resumes from it is the same as one that was never interrupted.
        """
        if (self._pending or self._own is not None) and self._unfinished is None:
            scheduler, _ = copy_scheduler(self._scheduler, self._engine.optimizer)
            self._unfinished = {**self.held_state(), "scheduler": scheduler.state_dict()}
            self._release()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state as if nothing were held back."""
        return dict(self._caught_up()[0].state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of the bare scheduler, then what the optimizer's state says is held back."""
        self._pending, self._unfinished = [], None
        self._release()
        self._scheduler.load_state_dict(state_dict)
        self._engine.restore_held(self)
        if self._own is None:
            self._hold()

    # --- what travels with the optimizer ------------------------------------------------------------------------------

    def held_state(self) -> dict[str, Any]:
        """The scheduler's state without the steps that are held back, these steps, and the options in force."""
        if self._unfinished is not None:
            return self._unfinished
        return {
            "scheduler": self._scheduler.state_dict(),
            "pending": [(plain(args), plain(kwargs)) for args, kwargs in self._pending],
            "first": self._own,
            "options": options_of(self._engine.optimizer),
            "sweep": self._sweep,
        }

    def restore_held(self, held: dict[str, Any]) -> None:
        """Undo what a checkpoint made up for, so that the sweep goes on as it was."""
        self._scheduler.load_state_dict(held["scheduler"])
        self._pending = [(tuple(args), dict(kwargs)) for args, kwargs in held["pending"]]
        self._used = held["options"]
        self._own = held["first"] or self._used
        self._sweep = held.get("sweep", self._engine.sweep)
        self._unfinished = None
        set_options(self._engine.optimizer, self._used)

    def caught_up_options(self) -> Options | None:
        """Learning rate and the like of each parameter group, as if nothing were held back; ``None`` if nothing is."""
        return None if self._own is None and not self._pending else options_of(self._caught_up()[1])

    # --- helpers ------------------------------------------------------------------------------------------------------

    @property
    def _reads_ahead(self) -> bool:
        return self._hold_lr != "off" and can_be_read_ahead(self._scheduler)

    def _forecast(self) -> LRForecast:
        engine = self._engine
        once = self._hold_lr == "once"
        return LRForecast(*self._caught_up(), engine.policy, self._run, once, engine.step)

    def _hold(self) -> None:
        """Put the options of the sweep that begins, or of what is left of it, in the place of the scheduler's own."""
        self._sweep = self._engine.sweep
        if self._reads_ahead:
            optimizer, used = self._engine.optimizer, self._forecast().of_sweep(self._engine.step)
            self._own = options_of(optimizer)
            set_options(optimizer, used)
            self._used = options_of(optimizer)  # as a tensor has rounded it

    def _release(self) -> None:
        self._catch_up(self._scheduler, self._engine.optimizer)
        self._pending, self._own = [], None

    def _catch_up(self, scheduler: Any, optimizer: Optimizer) -> None:
        if self._own is not None:
            set_options(optimizer, self._own, where=self._used)  # what somebody else has changed stays
        apply_calls(scheduler, self._pending[-1:] if self._hold_lr == "once" else self._pending)

    def _caught_up(self) -> tuple[Any, Optimizer]:
        """Scheduler and optimizer without anything held back: copies, if there is something."""
        if self._own is None and not self._pending:
            return self._scheduler, self._engine.optimizer
        scheduler, optimizer = copy_scheduler(self._scheduler, self._engine.optimizer)
        self._catch_up(scheduler, optimizer)
        return scheduler, optimizer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._scheduler)

    def __getattr__(self, name: str) -> Any:
        if name in _OWN:  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self._scheduler, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._scheduler, name, value)


def is_held(scheduler: Any) -> bool:
    """Whether ``scheduler`` is a ``SweepLR``; ``isinstance`` sees the class of what it stands in for."""
    return type(scheduler) is SweepLR


def check_hold_lr(hold_lr: str) -> None:
    """Refuse a mode that does not exist.

    Raises:
        ValueError: ``hold_lr`` is unknown.
    """
    if hold_lr not in get_args(HoldLR):
        raise ValueError(f"Got hold_lr={hold_lr!r}; choose one of {', '.join(map(repr, get_args(HoldLR)))}.")
