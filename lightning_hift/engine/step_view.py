"""What an optimizer sees during a step: the state of what is stepped, under its own parameters, and their masters.

Between steps it sees nothing that other code could move, cast or save by halves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function

from lightning_hift.engine.lr_scale import LRScaler
from lightning_hift.engine.row_slices import Piece
from lightning_hift.engine.stepped_options import SteppedOptions
from lightning_hift.offload.group_state import GroupState
from lightning_hift.offload.offloader import StateOffloader
from lightning_hift.offload.state_tree import State
from lightning_hift.precision.master_weights import (
    HALF_DTYPES,
    MASTER,
    MASTER_KEYS,
    join_masters,
    recheck_masters,
    store_masters,
)


class Turn(NamedTuple):
    """What is stepped together.

    Args:
        owner: Whose counters count it: the index of a layer group, or a name.
        pieces: All of it, also what other processes step.
        own: What this process steps.
        state: The state of that.
    """

    owner: Hashable
    pieces: list[Piece]
    own: list[Piece]
    state: GroupState


class _Raised(NamedTuple):
    """Float32 masters in the place of 16-bit weights.

    Args:
        master: All of a turn, one after another, shape (n,).
        remainder: What belongs to it, shape (n,); ``None``: the masters themselves are kept.
        views: The master of each piece.
        lives: The weights that stand aside, of those pieces that are raised.
    """

    master: Tensor
    remainder: Tensor | None
    views: dict[nn.Parameter, Tensor]
    lives: dict[nn.Parameter, Tensor]


class StepView:
    """Shows an optimizer what it steps, and hides it again.

    Args:
        optimizer: Whose view.
        offloader: Where state and masters are kept.
        master_weights: How masters of weights in 16 bits are kept, if at all.
    """

    def __init__(
        self, optimizer: Optimizer, offloader: StateOffloader, master_weights: Literal["full", "split", "none"]
    ) -> None:
        self.master_weights = master_weights
        self.options = SteppedOptions(optimizer)
        self.is_shown = False
        """Whether a step, or what ``show`` was called for, is under way."""
        self._optimizer = optimizer
        self._offloader = offloader
        self._lr = LRScaler(optimizer)
        self._turns: Sequence[Turn] = ()
        self._masters: dict[nn.Parameter, State] = {}  # by handle: what the optimizer does not get to see
        self._raised: dict[int, _Raised] = {}  # by the id of a turn's state
        self._gradients: list[nn.Parameter] = []  # those whose gradients are float32, and their weights are not
        self._undo: list[Callable[[], Any]] = []

    # --- a step -------------------------------------------------------------------------------------------------------

    def show(
        self,
        turns: Sequence[Turn],
        hidden: Iterable[nn.Parameter] = (),
        lr_scale: float = 1.0,
        to_step: bool = True,
    ) -> None:
        """Show all that a step needs: state, masters, slices, counters.

        Args:
            turns: What is to be stepped; the last one says whose counters count.
            hidden: Parameters that must not be stepped now although they have a gradient.
            lr_scale: By what to multiply the learning rates meanwhile.
            to_step: Whether it is for a step, which leaves out what has no gradient.
        """
        with record_function("HiFT::show"):
            self._turns, self.is_shown = turns, True
            self.options.enter(turns[-1].owner)
            self._lr.enter(lr_scale)
            try:
                self._show(hidden, to_step)
            except BaseException:
                self.hide(keep_options=False)
                raise

    def _show(self, hidden: Iterable[nn.Parameter], to_step: bool) -> None:
        for p in hidden:
            if p.grad is not None:
                self._undo.append(partial(setattr, p, "grad", p.grad))
                p.grad = None
        states = self._offloader.take(turn.state for turn in self._turns)
        for turn in self._turns:
            for piece in turn.own:
                if not piece.is_whole:
                    self._put_in_place(piece)
            self._raise(turn, turn.own, to_step)
        pieces = [piece for turn in self._turns for piece in turn.own]
        for piece in pieces:
            state = dict(states.get(piece.handle, {}))
            self._masters[piece.handle] = {key: state.pop(key) for key in MASTER_KEYS if key in state}
            if state:
                self._optimizer.state[piece.handle] = state
        # As if there were no others: some optimizers stumble over a param_group without gradients.
        shown, all_groups = {piece.handle for piece in pieces}, self._optimizer.param_groups
        self._undo.append(partial(setattr, self._optimizer, "param_groups", all_groups))
        self._optimizer.param_groups = [g for g in all_groups if not shown.isdisjoint(g["params"])]

    def hide(self, keep_options: bool = True) -> None:
        """Take away what ``show`` has shown, changed or not, and keep it."""
        with record_function("HiFT::hide"):
            # First the param_groups, all of them, with the counters.
            undo, self._undo = self._undo, []
            for each in reversed(undo):
                each()
            self._lr.leave()
            self.options.leave(self._turns[-1].owner, keep_options)
            # Reading optimizer.state[p] makes an empty entry, which must not take the place of the state that is kept.
            state = self._optimizer.state
            taken = {p: values for p in list(state) if isinstance(p, nn.Parameter) and (values := state.pop(p))}
            for turn in self._turns:
                self._lower(turn)
                self._offloader.give(
                    turn.state,
                    {
                        piece.handle: found
                        for piece in turn.own
                        if (found := {**taken.get(piece.handle, {}), **self._masters.pop(piece.handle, {})})
                    },
                )
            self._turns, self.is_shown = (), False

    def cancel(self) -> None:
        """Undo what is under way: hide what is shown, undo ``prepare``, and drop the gradients it has made."""
        if self.is_shown:
            self.hide()
        for raised in self._raised.values():
            for handle, live in raised.lives.items():
                _replace(handle, live)
        self._raised = {}
        self.lower_gradients()

    # --- slices -------------------------------------------------------------------------------------------------------

    def _put_in_place(self, piece: Piece) -> None:
        """Let the optimizer see a slice where it has its parameter."""
        p, handle = piece.parameter, piece.handle
        if p.grad is not None and p.grad.is_sparse:
            raise RuntimeError(
                f"A parameter of shape {tuple(p.shape)} has a sparse gradient, which cannot be cut into rows. Use a"
                " dense one (sparse=False), or a larger max_group_numel."
            )
        rows = piece.rows_of(p.detach())
        _replace(handle, rows)
        if p.grad is not None and p.grad.dtype == handle.dtype:  # another one comes with the master
            handle.grad = piece.rows_of(p.grad)
        for entries in (group["params"] for group in self._optimizer.param_groups):
            for index, entry in enumerate(entries):
                if entry is p:
                    entries[index] = handle
                    self._undo.append(partial(entries.__setitem__, index, p))

    # --- master weights -----------------------------------------------------------------------------------------------

    def prepare(self, turn: Turn) -> None:
        """Put masters in the place of weights, and float32 gradients in that of theirs, where there are masters.

        Of what the optimizer does not see as a whole, the gradients alone: that is where everybody else sees them.
        """
        if self.master_weights == "none" or id(turn.state) in self._raised:
            return
        # What others step is clipped and unscaled here, too, and has to come out the same.
        whole = [piece for piece in turn.own if piece.is_whole]
        self.raise_gradients(piece.parameter for piece in turn.pieces if piece not in whole)
        if whole:
            self._offloader.take([turn.state])
            self._raise(turn, whole, to_step=True)

    def raise_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make the gradients of 16-bit ``parameters`` float32 ones, and leave their weights as they are."""
        for p in parameters:
            is_half = self.master_weights != "none" and p.dtype in HALF_DTYPES
            if p.grad is not None and is_half and p.grad.dtype != torch.float32:
                gradient, p.grad = p.grad, None
                p.grad_dtype = torch.float32
                p.grad = gradient.float()
                self._gradients.append(p)

    def lower_gradients(self) -> None:
        """Drop the gradients that ``raise_gradients`` has made."""
        for p in self._gradients:
            p.grad = None
            p.grad_dtype = p.dtype
        self._gradients = []

    def _raise(self, turn: Turn, pieces: Sequence[Piece], to_step: bool) -> None:
        wanted = [piece for piece in pieces if not to_step or piece.parameter.grad is not None]
        raised = self._raised.get(id(turn.state)) or (self._join(turn) if wanted else None)
        if raised is None:
            return
        self._raised[id(turn.state)] = raised
        for piece in wanted:
            handle = piece.handle
            if handle in raised.views and handle not in raised.lives:
                gradient = None if piece.parameter.grad is None else piece.rows_of(piece.parameter.grad)
                raised.lives[handle] = piece.rows_of(piece.parameter.detach())
                _replace(handle, raised.views[handle])
                handle.grad = None if gradient is None else gradient.float()

    def _join(self, turn: Turn) -> _Raised | None:
        """The masters of a turn, where someone has set other weights (load_state_dict, clamping) from these."""
        remainders, masters = (turn.state.flats.get((True, dtype)) for dtype in (torch.int16, torch.float32))
        flat = remainders or masters  # of a checkpoint with remainders, also where whole masters are kept
        if flat is None or flat.device is None:
            return None
        master = flat.device if flat is masters else torch.empty_like(flat.device, dtype=torch.float32)
        views = {label.owner: view for label, view in flat.views(master).items()}
        weights = {piece.handle: piece.rows_of(piece.parameter.detach()) for piece in turn.own}
        lives = [weights[handle] for handle in views]
        if flat is masters:
            recheck_masters(master, [*views.values()], lives)
        else:
            join_masters(master, [*views.values()], lives, flat.device)
        return _Raised(master, None if flat is masters else flat.device, views, {})

    def _lower(self, turn: Turn) -> None:
        raised = self._raised.pop(id(turn.state), None)
        lives = {} if raised is None else raised.lives
        if raised is not None and lives:
            views = [raised.views[handle] for handle in lives]
            for handle, view in zip(lives, views, strict=True):
                if handle.data_ptr() != view.data_ptr():  # the step has made new weights
                    view.copy_(handle.detach())
            keeps_whole = self.master_weights == "full"
            store_masters(raised.master, views, [*lives.values()], None if keeps_whole else raised.remainder)
            if keeps_whole:
                self._masters |= {handle: {MASTER: view} for handle, view in raised.views.items()}
        for piece in turn.own:
            if piece.handle in lives:
                _replace(piece.handle, lives[piece.handle])
            elif not piece.is_whole:
                rows = piece.rows_of(piece.parameter.detach())
                if piece.handle.shape == rows.shape and piece.handle.data_ptr() != rows.data_ptr():
                    rows.copy_(piece.handle.detach())
            if not piece.is_whole:  # a stand-in holds on to nothing
                _replace(piece.handle, piece.handle.new_empty(0))


def _replace(handle: nn.Parameter, weight: Tensor) -> None:
    handle.grad = None
    handle.data = weight
