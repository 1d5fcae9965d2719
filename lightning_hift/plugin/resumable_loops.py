"""The Trainer's loops of training, so that a resumed run is the one that was never interrupted, bit for bit.

A checkpoint of Lightning does not say where in its training data a run was: it holds the states of loaders that have
one, and forgets them at the end of an epoch; a ``DataLoader`` has none. There is no hook where a loader is iterated,
and none between the last ``on_train_start`` and the first batch, so these classes take the place of Lightning's own. In
a run that does not resume they only take notes.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from typing_extensions import override

from lightning_hift.engine.random_state import RandomState
from lightning_hift.plugin.run_position import RunPosition


class ResumableFitLoop(_FitLoop):
    """Tells its ``ResumableEpochLoop`` when the loader is iterated for the first time, and when a run begins."""

    epoch_loop: ResumableEpochLoop
    ends_epoch = False
    """Whether what follows the last batch of an epoch is going on."""
    owes_metric = False
    """Whether schedulers that wait for a metric get it at the end of a resumed epoch, too, where Lightning has none."""

    @override
    def _load_combined_loader_states(self) -> None:
        super()._load_combined_loader_states()
        self.epoch_loop.begin_pass(is_first=True)  # as the loader is iterated next

    @override
    def reset(self) -> None:
        resumed = self.epoch_loop.resumed
        if resumed is not None and resumed.is_known and self.epoch_progress.current.ready:
            self.restarting = resumed.is_within_epoch
            begun = self.epoch_progress.current.ready
            _count_as_done(self.epoch_progress, begun - 1 if self.restarting else _processed(self.epoch_progress))
            if self.restarting:
                self.epoch_progress.increment_ready()
                self.epoch_progress.increment_started()
            self.epoch_loop.begin_anew(resumed)
        super().reset()

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        self.epoch_loop.restore_run()  # now, as hooks may draw before it

    @override
    def on_advance_end(self) -> None:
        self.ends_epoch = True
        super().on_advance_end()
        if self.restarting and self.owes_metric and self.epoch_loop._num_ready_batches_reached():
            self.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        self.ends_epoch = self.owes_metric = False


class ResumableEpochLoop(_TrainingEpochLoop):
    """Knows the position of the run, and takes up a saved one before the first batch."""

    resumed: RunPosition | None = None
    """To be taken up."""

    _is_first_pass = True
    _pass_start: RandomState | None = None
    _first_fetch: RandomState | None = None
    _last_fetch: RandomState | None = None
    _before_batch: RandomState | None = None
    _before_validation: RandomState | None = None
    _steps_before_batch = 0
    _ends_batch = False  # or trains on it
    _resumed_batch_ends = False

    def position(self) -> RunPosition:
        """Where a run goes on that resumes from what is saved now."""
        batches, validation = self.batch_progress, self.val_loop.batch_progress
        is_midway = batches.current.ready > _processed(batches)
        is_validated = validation.is_last_batch and validation.current.completed == validation.current.ready
        now = None
        if is_midway:
            now = self._before_batch
        elif self.trainer.validating and not is_validated:
            now = self._before_validation
        return RunPosition(
            now or self._random_state(),
            self._pass_start,
            self._first_fetch,
            self._last_fetch if is_midway else self._before_batch,
            self._is_first_pass,
            _processed(batches),
            batches.is_last_batch and not is_midway,
            is_midway,
            is_midway and self.global_step > self._steps_before_batch,
            self._ends_batch and not is_midway,
            self.trainer.validating and is_validated,
            cast(ResumableFitLoop, self.trainer.fit_loop).ends_epoch,
            {name: torch.as_tensor(value).detach().cpu() for name, value in self.trainer.callback_metrics.items()},
        )

    def begin_run(self) -> None:
        """Forget a run before this one, which an exception may have ended anywhere."""
        self.resumed = self._pass_start = None
        self._ends_batch = self._resumed_batch_ends = False

    def begin_pass(self, is_first: bool = False) -> None:
        """The loader is iterated next."""
        self._is_first_pass = is_first
        self._pass_start = self._random_state()
        self._first_fetch = self._last_fetch = self._before_batch = None

    def begin_anew(self, resumed: RunPosition) -> None:
        """Let Lightning find a state that it takes for what it is."""
        if resumed.is_within_epoch:
            _count_as_done(self.batch_progress, _processed(self.batch_progress))
        self.val_loop.restarting = self.val_loop._has_run = False
        if resumed.ends_batch and not resumed.is_validated:
            _count_as_done(self.val_loop.batch_progress, 0)  # it is run as a whole
        self._resumed_batch_ends = resumed.ends_batch
        self._skip_next_val = resumed.is_validated

    def restore_run(self) -> None:
        """Go on with the saved random numbers, if the run resumes, and make up for what an epoch had left."""
        if self.resumed is None:
            return
        self.resumed.now.restore(self._generators())
        self.trainer._logger_connector._callback_metrics.update(self.resumed.metrics)
        if self.resumed.ends_epoch:
            self.update_lr_schedulers("epoch", update_plateau_schedulers=True)

    @override
    def reset(self) -> None:
        if self.resumed is None or not self.resumed.is_known:
            super().reset()
            return
        stepped = self._batches_that_stepped
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before")
            super().reset()
        self._batches_that_stepped = stepped

    @override
    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        fit_loop = self.trainer.fit_loop
        if self.trainer.current_epoch > 0 and not fit_loop.is_resuming and not self.restarting:
            self.begin_pass()
        super().on_run_start(data_fetcher)
        if self.resumed is not None:
            self._take_up(self.resumed, data_fetcher)
            self.resumed = None
        if self._first_fetch is None:
            self._first_fetch = self._random_state()

    @override
    def advance(self, data_fetcher: _DataFetcher) -> None:
        if self._resumed_batch_ends:
            self._resumed_batch_ends, self._ends_batch = False, True
            return
        self._last_fetch, self._before_batch = self._before_batch, self._random_state()
        self._steps_before_batch = self.global_step
        self._ends_batch = True
        super().advance(data_fetcher)

    @override
    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        super().on_advance_end(data_fetcher)
        self._ends_batch = False

    @override
    def _should_check_val_fx(self, data_fetcher: _DataFetcher) -> bool:
        is_due = super()._should_check_val_fx(data_fetcher)
        if is_due:
            self._before_validation = self._random_state()
        return is_due

    # --- how a position is taken up -----------------------------------------------------------------------------------

    def _take_up(self, saved: RunPosition, fetcher: _DataFetcher) -> None:
        cast(ResumableFitLoop, self.trainer.fit_loop).owes_metric = saved.is_known
        if saved.is_known and not saved.is_over:
            self.restarting = False  # or Lightning takes a validation for granted
            self._warn(saved)
            self._go_on_with_pass(saved, fetcher)
            saved.now.restore(self._generators())
            return
        here = self._random_state()  # hooks of the epoch may have drawn
        if self._load_states():
            self._iterate(fetcher)  # takes up the end of the last pass
        here.restore(self._generators())
        if self.batch_progress.current.ready == 0:
            self.begin_pass()
            self._iterate(fetcher)

    def _go_on_with_pass(self, saved: RunPosition, fetcher: _DataFetcher) -> None:
        loaders = self._loader.flattened
        if all(isinstance(loader, _Stateful) for loader in loaders):
            is_behind = self._load_states()
            for loader in loaders if saved.is_midway else ():
                if hasattr(loader, "step_back"):
                    loader.step_back()
            if is_behind:
                self._iterate(fetcher)
            return
        some_have_state = any(isinstance(loader, _Stateful) for loader in loaders)
        some_start_over = any((sized_len(loader) or saved.batches) < saved.batches for loader in loaders)
        if some_have_state or some_start_over or isinstance(fetcher, _DataLoaderIterDataFetcher):
            rank_zero_warn(
                "The run resumes in the middle of an epoch, and its data does not go on where it was: batches cannot be"
                f" passed over in {len(loaders)} loaders of which some have a state_dict or have started over, or in a"
                " training_step that takes the iterator. Give all loaders a state_dict, or resume from the end of an"
                " epoch."
            )
            return
        assert saved.pass_start is not None
        if saved.is_first_pass:
            self._loader.reset()  # of workers that persist
        saved.pass_start.restore(self._generators())
        self.begin_pass(saved.is_first_pass)
        iter(fetcher)
        if saved.first_fetch is not None:
            saved.first_fetch.restore(self._generators())
            self._first_fetch = saved.first_fetch
        for left in reversed(range(saved.batches)):
            if left == 0 and saved.last_fetch is not None:
                saved.last_fetch.restore(self._generators())
            next(fetcher)
        self._before_batch = saved.last_fetch

    def _warn(self, saved: RunPosition) -> None:
        """Of what no checkpoint of Lightning holds."""
        if saved.batches % self.trainer.accumulate_grad_batches:
            rank_zero_warn(
                "The checkpoint was written between the micro-batches of an optimizer step, and gradients are in none:"
                " those of this step begin anew. A run that resumes after a step is exact."
            )
        if saved.has_stepped:
            rank_zero_warn(
                "The checkpoint was written after the optimizer step of a batch that was not over, so this batch is"
                " trained on once more. A run that resumes from between two batches is exact."
            )
        if saved.is_midway:
            for loader in self._loader.flattened:
                if isinstance(loader, _Stateful) and not hasattr(loader, "step_back"):
                    rank_zero_warn(
                        f"The checkpoint was written while a batch was under way, which {type(loader).__name__} counts"
                        " as trained on, so it is left out. A run that resumes from between two batches is exact."
                    )

    def _load_states(self) -> bool:
        """Load the states of loaders that Lightning has left, and say whether there were any."""
        fit_loop = self.trainer.fit_loop
        states = fit_loop._combined_loader_states_to_load
        if states:
            self._loader._load_state_dicts(states)
            fit_loop._combined_loader_states_to_load = []
        return bool(states)

    def _iterate(self, fetcher: _DataFetcher) -> None:
        iter(fetcher)
        fetcher.fetched += self.batch_progress.current.ready

    @property
    def _loader(self) -> CombinedLoader:
        loader = self.trainer.fit_loop._combined_loader
        assert loader is not None
        return loader

    def _random_state(self) -> RandomState:
        return RandomState.capture(self._generators())

    def _generators(self) -> list[torch.Generator]:
        """Those that loaders of the user have of their own."""
        loader = self.trainer.fit_loop._combined_loader
        found: dict[torch.Generator, None] = {}
        for each in [] if loader is None else loader.flattened:
            batch_sampler = getattr(each, "batch_sampler", None)
            owners = (each, getattr(each, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
            for generator in (getattr(owner, "generator", None) for owner in owners):
                if isinstance(generator, torch.Generator):
                    found[generator] = None
        return list(found)


def _processed(progress: Any) -> int:
    return int(progress.current.processed)


def _count_as_done(progress: Any, number: int) -> None:
    """So many, and no more, are ready, started, processed and completed."""
    for name in ("ready", "started", "processed", "completed"):
        surplus = getattr(progress.current, name) - number
        setattr(progress.current, name, number)
        setattr(progress.total, name, getattr(progress.total, name) - surplus)


def make_loops_resumable(trainer: pl.Trainer) -> ResumableEpochLoop | None:
    """Give the loops of ``trainer`` the classes of this file. ``None`` if they are not Lightning's own."""
    fit_loop: Any = trainer.fit_loop
    if type(fit_loop) is _FitLoop and type(fit_loop.epoch_loop) is _TrainingEpochLoop:
        fit_loop.__class__, fit_loop.epoch_loop.__class__ = ResumableFitLoop, ResumableEpochLoop
    if not isinstance(fit_loop.epoch_loop, ResumableEpochLoop):
        return None
    fit_loop.ends_epoch = fit_loop.owes_metric = False
    fit_loop.epoch_loop.begin_run()
    return fit_loop.epoch_loop
