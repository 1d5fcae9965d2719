"""One learning rate for all groups of a sweep, for any scheduler."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch.optim import Optimizer

from lightning_hift.engine import HiFTEngine

HoldLR = Literal["replay", "once", "off"]

_SCHEDULED = ("lr", "momentum", "betas")  # the options that torch's schedulers change
_NEGLIGIBLE = 0.01  # a learning rate below this share of the next sweep's wastes the first sweep
_OWN = {"_scheduler", "_engine", "_hold_lr", "_pending", "_first", "_unfinished"}

Options = list[dict[str, Any]]


class SweepLR:
    """Holds back the steps of a learning-rate scheduler until the sweep is over (HiFT, algorithm 1, delayed update).

    It stands in for the scheduler: every other attribute, and its class, are the scheduler's own. So is its
    ``state_dict``, as if nothing were held back: what is held travels in the state of the optimizer, where plain torch
    ignores it.

    A schedule that starts at a learning rate of (nearly) 0 would waste the whole first sweep. The first sweep then
    already uses the learning rate of the second.

    Args:
        scheduler: Any scheduler with ``step`` and ``state_dict``.
        engine: The engine of the scheduler's optimizer.
        hold_lr: ``"replay"`` makes up for all held-back steps at the end of the sweep, so the schedule ends when it
            should. ``"once"`` makes one step per sweep, as in the paper: a schedule that was sized in optimizer steps
            gets only 1/k of the way. ``"off"`` holds nothing back.
        steps_ahead: How many steps of the schedule lie between two sweeps; default: one per optimizer step.

    Raises:
        ValueError: ``hold_lr`` is unknown.
    """

    def __init__(
        self, scheduler: Any, engine: HiFTEngine, hold_lr: HoldLR = "replay", steps_ahead: int | None = None
    ) -> None:
        check_hold_lr(hold_lr)
        self._scheduler = scheduler
        self._engine = engine
        self._hold_lr = hold_lr
        self._pending: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._first: Options | None = None  # the options that a wasted first sweep would have
        self._unfinished: dict[str, Any] | None = None
        engine.held_schedulers.append(self)
        if hold_lr != "off" and engine.step == 0 and _steps_without_arguments(scheduler):
            self._avoid_waste(1 if hold_lr == "once" else steps_ahead or engine.policy.steps_per_sweep)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Take note of a step of the schedule, and make up for all of them if the sweep is over."""
        if self._hold_lr == "off":
            self._scheduler.step(*args, **kwargs)
            return
        self._pending.append((args, kwargs))
        self.flush()

    def flush(self) -> None:
        """Apply what was held back, if no sweep is under way."""
        if self._pending and self._engine.at_sweep_start:
            self._apply(self._scheduler, self._engine.optimizer)
            self._pending, self._first = [], None

    def finish(self) -> None:
        """Apply what was held back although the sweep is not over: the run ends here.

        A checkpoint that is written later still has the learning rate of the unfinished sweep, so that a longer run
        which resumes from it is the same as one that was never interrupted.
        """
        if self._pending and self._unfinished is None:
            self._unfinished = {**self.held_state(), "scheduler": self._copies()[0].state_dict()}
            self._apply(self._scheduler, self._engine.optimizer)
            self._pending, self._first = [], None

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state as if nothing were held back."""
        return dict(self._caught_up()[0].state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of the bare scheduler, then what the optimizer's state says is held back."""
        self._scheduler.load_state_dict(state_dict)
        self._pending, self._first, self._unfinished = [], None, None
        self._engine.restore_held(self)

    # --- what travels with the optimizer ------------------------------------------------------------------------------

    def held_state(self) -> dict[str, Any]:
        """The scheduler's state without the steps that are held back, these steps, and the options in force."""
        if self._unfinished is not None:
            return self._unfinished
        return {
            "scheduler": self._scheduler.state_dict(),
            "pending": [(_plain(args), _plain(kwargs)) for args, kwargs in self._pending],
            "first": self._first,
            "options": _options(self._engine.optimizer),
        }

    def restore_held(self, held: dict[str, Any]) -> None:
        """Undo what a checkpoint made up for, so that the sweep goes on as it was."""
        self._scheduler.load_state_dict(held["scheduler"])
        self._pending = [(tuple(args), dict(kwargs)) for args, kwargs in held["pending"]]
        self._first = held["first"]
        self._unfinished = None
        _set_options(self._engine.optimizer, held["options"])

    def caught_up_options(self) -> Options | None:
        """Learning rate and the like of each parameter group, as if nothing were held back; ``None`` if nothing is."""
        return _options(self._caught_up()[1]) if self._pending else None

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _apply(self, scheduler: Any, optimizer: Optimizer) -> None:
        if self._first is not None:
            _set_options(optimizer, self._first)
        for args, kwargs in self._pending[-1:] if self._hold_lr == "once" else self._pending:
            scheduler.step(*args, **kwargs)

    def _caught_up(self) -> tuple[Any, Optimizer]:
        """Scheduler and optimizer without anything held back: copies, if there is something."""
        if not self._pending:
            return self._scheduler, self._engine.optimizer
        scheduler, optimizer = self._copies()
        with _without_step_order_warnings():
            self._apply(scheduler, optimizer)
        return scheduler, optimizer

    def _copies(self) -> tuple[Any, Optimizer]:
        """A scheduler that can be stepped without harm, on an optimizer that has nothing but options."""
        optimizer = self._engine.optimizer
        stand_in = torch.optim.SGD([torch.zeros(())], lr=0.0)
        stand_in.param_groups = [
            {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in group.items() if k != "params"}
            | {"params": []}
            for group in optimizer.param_groups
        ]
        stand_in.defaults = optimizer.defaults
        return _copy_scheduler(self._scheduler, optimizer, stand_in), stand_in

    def _avoid_waste(self, steps: int) -> None:
        scheduler, stand_in = self._copies()
        with _without_step_order_warnings():
            for _ in range(min(steps, getattr(scheduler, "total_steps", steps))):
                scheduler.step()
        now, ahead = _options(self._engine.optimizer), _options(stand_in)
        used = [{**n, "lr": a["lr"]} if n["lr"] < _NEGLIGIBLE * a["lr"] else n for n, a in zip(now, ahead, strict=True)]
        if used != now:
            self._first = now
            _set_options(self._engine.optimizer, used)

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


def _steps_without_arguments(scheduler: Any) -> bool:
    """Whether ``step()`` can be called as it is: not with a metric, as on a plateau, nor with an epoch."""
    parameters = inspect.signature(scheduler.step).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return not any(p.kind in positional and p.default is p.empty for p in parameters)


def _copy_scheduler(scheduler: Any, optimizer: Optimizer, stand_in: Optimizer) -> Any:
    """A copy on another optimizer, schedulers inside it included, but nothing that its functions may belong to."""

    def copied(value: Any) -> Any:
        if value is optimizer:
            return stand_in
        if getattr(value, "optimizer", None) is optimizer and hasattr(value, "state_dict"):
            return _copy_scheduler(value, optimizer, stand_in)
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return type(value)(copied(v) for v in value)
        return copy.copy(value) if isinstance(value, dict) else value

    twin = copy.copy(scheduler)
    vars(twin).update({name: copied(value) for name, value in vars(scheduler).items()})
    return twin


@contextmanager
def _without_step_order_warnings() -> Iterator[None]:
    """torch warns where a scheduler is stepped and its optimizer was not; a copy's never is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        warnings.filterwarnings("ignore", message="Seems like `optimizer.step")
        yield


def _options(optimizer: Optimizer) -> Options:
    return [{key: _plain(group[key]) for key in _SCHEDULED if key in group} for group in optimizer.param_groups]


def _set_options(optimizer: Optimizer, options: Options) -> None:
    for group, saved in zip(optimizer.param_groups, options, strict=True):
        for key, value in saved.items():
            if isinstance(group[key], torch.Tensor):
                group[key].fill_(value)
            else:
                group[key] = value


def _plain(value: Any) -> Any:
    """``value`` with tensors of one element as numbers, so that it can be loaded without trusting the file."""
    if isinstance(value, torch.Tensor):
        return value.item()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_plain(v) for v in value])
    return value
