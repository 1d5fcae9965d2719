"""Steps one optimizer turn by turn, each with its own state, counters, learning rate and masters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_hift.engine.optimizer_checks import check_counts, counts_of
from lightning_hift.engine.probe import StateBytes, live_state_bytes
from lightning_hift.engine.row_slices import Piece
from lightning_hift.engine.state_partition import UndividedState
from lightning_hift.engine.step_view import StepView, Turn
from lightning_hift.groups.grouping import LayerGroup
from lightning_hift.offload.offloader import StateOffloader

_ALWAYS = "always"  # owner of the counters of always-active units


class StepWatcher(Protocol):
    """Looks at the weights around each step, in 32 bits where there are masters."""

    def before_step(self, pieces: Sequence[Piece]) -> None:
        """``pieces`` are about to be stepped, by their handles; with slices, several times per step.

        Where other processes step some of them (see ``HiFTEngine.partition``), they are those that this one steps.
        """

    def after_step(self) -> None:
        """They were stepped."""


class Stepper:
    """Makes of one step of an optimizer a step of each turn.

    Args:
        optimizer: What is stepped.
        offloader: Keeps the state.
        master_weights: How masters are kept, if at all.
        partition: Which process steps what.
        lr_scales: By what to multiply the learning rate of each layer group.
        cut: The pieces of each layer group, in turns.
        always: Those that are stepped at every step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        offloader: StateOffloader,
        master_weights: Literal["full", "split", "none"],
        partition: UndividedState,
        lr_scales: Sequence[float],
        cut: Sequence[Sequence[list[Piece]]],
        always: list[Piece],
    ) -> None:
        self.view = StepView(optimizer, offloader, master_weights)
        self.watchers: list[StepWatcher] = []
        self._optimizer = optimizer
        self._offloader = offloader
        self._partition = partition
        self.fixed = self._make_turn(_ALWAYS, always, stays=True)
        self._turns = [[self._make_turn(index, pieces) for pieces in turns] for index, turns in enumerate(cut)]
        self._lr_scales = lr_scales
        self._needs_gradient = getattr(optimizer, "needs_gradient", True)
        self._shown: list[Turn] = []
        self._counts: dict[str, float] = {}

    def _make_turn(self, owner: int | str, pieces: list[Piece], stays: bool = False) -> Turn:
        own = [piece for piece in pieces if self._partition.owns(piece)]
        return Turn(owner, pieces, own, self._offloader.add([piece.handle for piece in own], stays))

    @property
    def turns(self) -> list[Turn]:
        """All there are."""
        return [*(turn for turns in self._turns for turn in turns), self.fixed]

    @property
    def cuts(self) -> bool:
        """Whether anything is stepped in slices."""
        return any(not piece.is_whole for turn in self.turns for piece in turn.pieces)

    def turns_of(self, groups: Iterable[LayerGroup]) -> list[Turn]:
        """What is stepped together of some groups, turn by turn."""
        return [turn for group in groups for turn in self._turns[group.index]]

    def hold_first(self, groups: Sequence[LayerGroup]) -> None:
        """Fetch what will be stepped first of ``groups``, and release all else."""
        self._offloader.hold(self.turns_of(groups)[0].state)

    def prepare(self, groups: Sequence[LayerGroup]) -> None:
        """Raise the precision of what of ``groups`` is not stepped in several turns."""
        turns = self.turns_of(groups)
        for turn in (*(turns if len(turns) == 1 else ()), self.fixed):
            self.view.prepare(turn)

    def begin(self, groups: Sequence[LayerGroup], active: Sequence[nn.Parameter]) -> None:
        """Step all turns of ``groups`` but the last, and show that to the step that is under way.

        Args:
            groups: What is to be stepped, beside what always is.
            active: All their parameters.
        """
        self.prepare(groups)
        rounds = [[turn] for turn in (self.fixed, *self.turns_of(groups)) if turn.pieces]
        if not self._needs_gradient:  # one closure, so one step for all
            rounds = [[turn for turns in rounds for turn in turns]]
        for turns, following in pairwise(rounds):
            self._show(turns, active)
            if any(turn.own for turn in turns):
                _bare_step(self._optimizer)
            self._hide(keep_options=turns[-1].owner != following[-1].owner)
            self._offloader.hold(following[-1].state)
        self._show(rounds[-1], active)
        self._counts = counts_of(self._optimizer)

    def end(self, ends_sweep: bool) -> None:
        """After the step.

        Raises:
            TypeError: It has changed what belongs to no parameter and no group.
        """
        self._hide()
        self._partition.finish()
        self.view.lower_gradients()
        self._offloader.end_step(ends_sweep)
        check_counts(self._optimizer, self._counts)

    def _show(self, turns: list[Turn], active: Sequence[nn.Parameter]) -> None:
        self._shown, pieces = turns, [piece for turn in turns for piece in turn.own]
        now, owner = {piece.parameter for piece in pieces}, turns[-1].owner
        scale = self._lr_scales[owner] if isinstance(owner, int) else 1.0
        self.view.show(turns, [p for p in active if p not in now], scale)
        for watcher in self.watchers:
            watcher.before_step(pieces)

    def _hide(self, keep_options: bool = True) -> None:
        for watcher in reversed(self.watchers):
            watcher.after_step()
        self.view.hide(keep_options)
        for turn in self._shown:
            self._partition.share(turn.pieces)

    def switch(self, name: str) -> None:
        """``train`` or ``eval`` of a schedule-free optimizer, which needs the state of all parameters, turn by turn."""
        turns = [turn for turn in self.turns if turn.pieces]
        for i, turn in enumerate(turns):
            self.view.show([turn], to_step=False)
            getattr(type(self._optimizer), name)(self._optimizer)
            self.view.hide(keep_options=i + 1 == len(turns) or turn.owner != turns[i + 1].owner)
            self._offloader.hold(None)

    def reserve_host_memory(self) -> None:
        """For the state that will come to the host, as far as it is there not yet and can be foretold."""
        if not self._offloader.reserves:
            return
        try:
            known = live_state_bytes(self._optimizer, None if self.view.master_weights == "none" else torch.float32)
        except RuntimeError:  # a foreign optimizer may refuse to be tried out
            return
        sizes = []
        for turn in self.turns[:-1]:
            if all(is_master for is_master, _ in turn.state.flats):
                found = [(known.get(piece.parameter, StateBytes()), piece.share) for piece in turn.own]
                sizes.append(sum(math.ceil(each.device * share) + each.host for each, share in found))
        self._offloader.reserve(sizes)


def _bare_step(optimizer: Optimizer) -> None:
    """One step without the hooks around it."""
    step = type(optimizer).step
    getattr(step, "__wrapped__", step)(optimizer)
