"""Lends the optimizer, for the length of one step, what that step needs, and takes it back.

That is the state of the pieces to be stepped, their own counters, and, with weights in 16 bits, their 32-bit masters in
place of the weights. Between steps the optimizer holds nothing that other code could move, cast or save by halves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function

from lightning_hift.lr_scale import LRScaler
from lightning_hift.master_weights import (
    HALF_DTYPES,
    adopt_master,
    join_master,
    recheck_master,
    split_master,
    store_master,
)
from lightning_hift.offload import StateOffloader
from lightning_hift.row_slices import Piece, join_states
from lightning_hift.sharded_tensors import is_sharded, local_part
from lightning_hift.state_tree import State
from lightning_hift.stepped_options import SteppedOptions

# Kept beside the optimizer's own state, under keys that no optimizer uses.
_MASTER = "hift_master"  # float32
_REMAINDER = "hift_remainder"  # int16
_OURS = (_MASTER, _REMAINDER)


class Lender:
    """Hands state, counters and master weights to an optimizer and takes them back.

    Args:
        optimizer: Whom to lend to.
        offloader: Where state and masters are kept.
        master_weights: How masters of weights in 16 bits are kept, if at all.
    """

    def __init__(
        self, optimizer: Optimizer, offloader: StateOffloader, master_weights: Literal["full", "split", "none"]
    ) -> None:
        self.master_weights = master_weights
        self.options = SteppedOptions(optimizer)
        self._lr = LRScaler(optimizer)
        self._optimizer = optimizer
        self._offloader = offloader
        self.is_lent = False
        """Whether a step, or what ``lend`` was called for, is under way."""
        self._pieces: list[Piece] = []  # on loan
        self._kept: dict[nn.Parameter, State] = {}  # by handle: what the optimizer does not get to see
        self._live: dict[nn.Parameter, Tensor] = {}  # by handle: the weights that stand aside for their masters
        self._hidden: list[tuple[nn.Parameter, Tensor]] = []
        self._replaced: list[tuple[list[Any], int, nn.Parameter]] = []
        self._raised: list[nn.Parameter] = []  # those whose gradients are float32, and their weights are not
        self._owner: Hashable = None
        self._all_groups = optimizer.param_groups

    # --- a step -------------------------------------------------------------------------------------------------------

    def prepare(self, pieces: Iterable[Piece]) -> None:
        """Put masters in the place of weights, and float32 gradients in that of theirs, where there are masters.

        Of what the optimizer does not see as a whole, the gradients alone: that is where everybody else sees them.
        """
        if self.master_weights == "none" or self._live:
            return
        pieces = list(pieces)
        self.raise_gradients(piece.parameter for piece in pieces if not piece.is_whole)
        pieces = [piece for piece in pieces if piece.is_whole]
        bags = self._offloader.take([piece.handle for piece in pieces])
        for piece in pieces:
            self._raise_precision(piece, bags.get(piece.handle, {}))

    def raise_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make the gradients of 16-bit ``parameters`` float32 ones, and leave their weights as they are."""
        for p in parameters:
            if p.grad is not None and self.dtype_of(p) != p.grad.dtype:
                gradient, p.grad = p.grad, None
                p.grad_dtype = torch.float32
                p.grad = gradient.float()
                self._raised.append(p)

    def lend(
        self,
        pieces: Sequence[Piece],
        owner: Hashable,
        hide: Iterable[nn.Parameter] = (),
        lr_scale: float = 1.0,
        to_step: bool = True,
    ) -> None:
        """Hand over all that a step of ``pieces`` needs.

        Args:
            pieces: What is to be stepped.
            owner: Whose counters to use.
            hide: Parameters that must not be stepped now although they have a gradient.
            lr_scale: By what to multiply the learning rates meanwhile.
            to_step: Whether it is for a step, which leaves out what has no gradient.
        """
        with record_function("HiFT::lend"):
            self._pieces, self._owner, self.is_lent = list(pieces), owner, True
            self._all_groups = self._optimizer.param_groups
            self.options.enter(owner)
            self._lr.enter(lr_scale)
            try:
                self._lend(hide, to_step)
            except BaseException:
                self.take_back(keep_options=False)
                raise

    def _lend(self, hide: Iterable[nn.Parameter], to_step: bool) -> None:
        for p in hide:
            if p.grad is not None:
                self._hidden.append((p, p.grad))
                p.grad = None
        bags = self._offloader.take([piece.handle for piece in self._pieces])
        for piece in self._pieces:
            bag = dict(bags.get(piece.handle, {}))
            if not piece.is_whole:
                self._put_in_place(piece)
            if piece.handle not in self._live:
                self._raise_precision(piece, bag, to_step)
            self._kept[piece.handle] = {key: bag.pop(key) for key in _OURS if key in bag}
            if bag:
                self._optimizer.state[piece.handle] = bag
        # As if there were no others: some optimizers stumble over a param_group without gradients.
        lent = {piece.handle for piece in self._pieces}
        self._optimizer.param_groups = [g for g in self._all_groups if not lent.isdisjoint(g["params"])]

    def take_back(self, keep_options: bool = True) -> None:
        """Take back what ``lend`` has handed over, changed or not."""
        with record_function("HiFT::take_back"):
            self._optimizer.param_groups = self._all_groups
            self._lr.leave()
            self.options.leave(self._owner, keep_options)
            for entries, index, p in self._replaced:
                entries[index] = p
            for p, gradient in self._hidden:
                p.grad = gradient
            self._replaced, self._hidden = [], []
            # Reading optimizer.state[p] makes an empty entry, which must not take the place of the state that is kept.
            state = self._optimizer.state
            taken = {p: values for p in list(state) if isinstance(p, nn.Parameter) and (values := state.pop(p))}
            for piece in self._pieces:
                kept = self._kept.pop(piece.handle, {})
                if piece.handle in self._live:
                    kept = self._lower_precision(piece, kept)
                elif not piece.is_whole:
                    self._put_back(piece)
                if kept:
                    taken[piece.handle] = {**taken.get(piece.handle, {}), **kept}
            self._pieces, self.is_lent = [], False
            self._offloader.give(taken)

    def cancel(self) -> None:
        """Undo what is under way: take back what is on loan, undo ``prepare``, and drop the gradients it has made."""
        if self.is_lent:
            self.take_back()
        for handle, live in self._live.items():
            handle.grad = None
            handle.data = live
        self._live = {}
        self.lower_gradients()

    def lower_gradients(self) -> None:
        """Drop the gradients that ``raise_gradients`` has made."""
        for p in self._raised:
            p.grad = None
            p.grad_dtype = p.dtype
        self._raised = []

    # --- slices -------------------------------------------------------------------------------------------------------

    def _put_in_place(self, piece: Piece) -> None:
        """Let the optimizer see a slice where it has its parameter."""
        p, handle = piece.parameter, piece.handle
        if p.grad is not None and p.grad.is_sparse:
            raise RuntimeError(
                f"A parameter of shape {tuple(p.shape)} has a sparse gradient, which cannot be cut into rows. Use a"
                " dense one (sparse=False), or a larger max_group_numel."
            )
        handle.grad = None
        handle.data = piece.rows_of(p.detach())
        if p.grad is not None and p.grad.dtype == handle.dtype:  # another one comes with the master
            handle.grad = piece.rows_of(p.grad)
        for entries in (group["params"] for group in self._optimizer.param_groups):
            for index, entry in enumerate(entries):
                if entry is p:
                    entries[index] = handle
                    self._replaced.append((entries, index, p))

    def _put_back(self, piece: Piece) -> None:
        rows = piece.rows_of(piece.parameter.detach())
        if piece.handle.shape == rows.shape and piece.handle.data_ptr() != rows.data_ptr():  # it has made new weights
            rows.copy_(piece.handle.detach())
        _empty(piece.handle)

    # --- master weights -----------------------------------------------------------------------------------------------

    def make_masters(
        self,
        pieces: Sequence[Piece],
        dtype: torch.dtype | None = None,
        known: Mapping[nn.Parameter, Tensor | None] | None = None,
        owns: Callable[[Piece], bool] = lambda piece: True,
    ) -> None:
        """Keep masters of ``pieces``, from their present values.

        Args:
            pieces: All pieces of some parameters. Those that are not in 16 bits, in the end, get no master.
            dtype: Round the weights to this dtype now; default: they stay as they are.
            known: Masters or remainders that exist already, as by ``saved_master``.
            owns: Whether the master of a piece is kept here; default: always.
        """
        if self.master_weights == "none":
            return
        bags: dict[nn.Parameter, State] = {}
        parameters: set[nn.Parameter] = set()
        for piece in pieces:
            p = piece.parameter
            if not (p.is_floating_point() and (dtype or p.dtype) in HALF_DTYPES):
                continue
            parameters.add(p)
            if owns(piece):
                saved = known.get(p) if known and p.dtype in HALF_DTYPES else None
                master = self._packed(piece.rows_of(p.detach()).float()) if saved is None else None
                bags[piece.handle] = {
                    **self._offloader.state_of(piece.handle),
                    **(self.restored_master(piece, saved)[0] if master is None else master),
                }
        self._offloader.put(bags)
        for p in parameters:
            if dtype is not None and p.dtype != dtype:
                weight = local_part(p.detach(), p)
                live = torch.empty_like(weight, dtype=dtype)
                store_master(weight.float(), live)
                if is_sharded(p):
                    weight.copy_(live)  # which needs no more rounding when the module is converted as a whole
                else:
                    p.data = live

    def dtype_of(self, p: nn.Parameter) -> torch.dtype:
        """The dtype in which ``p`` is stepped."""
        return torch.float32 if self.master_weights != "none" and p.dtype in HALF_DTYPES else p.dtype

    def saved_master(
        self, pieces: Sequence[Piece], kept: Callable[[nn.Parameter], State] | None = None
    ) -> Tensor | None:
        """What a checkpoint keeps of the master of the parameter of ``pieces``; ``drain`` the offloader first.

        Args:
            pieces: All pieces of a parameter.
            kept: What is kept of each, by its handle; default: what the offloader has.
        """
        kept = kept or self._offloader.state_of
        states = [{k: v for k, v in kept(piece.handle).items() if k in _OURS} for piece in pieces]
        return next(iter(join_states(states, pieces).values()), None)

    def state_of(self, pieces: Sequence[Piece], kept: Callable[[nn.Parameter], State] | None = None) -> State:
        """The optimizer's own state of the parameter of ``pieces``; see ``saved_master``."""
        states = [(kept or self._offloader.state_of)(piece.handle) for piece in pieces]
        return join_states([{k: v for k, v in state.items() if k not in _OURS} for state in states], pieces)

    def forget(self, pieces: Iterable[Piece], owner: Hashable) -> None:
        """Drop state and counters, as if there had been no step, but not the masters."""
        self._offloader.drop([piece.handle for piece in pieces], keep=_OURS)
        self.options.forget(owner)

    def restored_master(self, piece: Piece, saved: Tensor | None) -> tuple[State, int]:
        """What to keep beside the state of ``piece``, from a checkpoint's float32 master, remainder, or neither.

        And how many of its weights are not those of that master.

        In a precision that is not the checkpoint's, its weights are rounded anew from their masters. For that they must
        have been loaded already; in the same precision, by the next step at the latest.
        """
        p = piece.parameter
        weight = piece.rows_of(p.detach())
        keeps_masters = self.master_weights != "none" and p.dtype in HALF_DTYPES
        if saved is None:
            return (self._packed(weight.float()) if keeps_masters else {}), 0
        saved = piece.rows_of(saved)
        if saved.dtype == torch.int16:
            if keeps_masters and p.dtype == torch.bfloat16:
                return {_REMAINDER: saved}, 0  # until the first step: its weights may still have to be loaded
            saved = join_master(weight.cpu().bfloat16(), saved)
        adopts = keeps_masters or p.dtype == torch.float32
        num_edited = adopt_master(weight, saved) if adopts else 0
        return (self._packed(saved) if keeps_masters else {}), num_edited

    def _packed(self, master: Tensor) -> State:
        return {_MASTER: master} if self.master_weights == "full" else {_REMAINDER: split_master(master)[1]}

    def _raise_precision(self, piece: Piece, bag: State, to_step: bool = True) -> None:
        p, handle = piece.parameter, piece.handle
        gradient = None if p.grad is None else piece.rows_of(p.grad)
        if (gradient is None and to_step) or bag.keys().isdisjoint(_OURS):
            return
        live = piece.rows_of(p.detach())
        # Where someone has set other weights (load_state_dict, clamping), those become the masters.
        master = recheck_master(bag[_MASTER], live) if _MASTER in bag else join_master(live, bag[_REMAINDER])
        self._live[handle] = live
        handle.grad = None
        handle.data = master
        handle.grad = None if gradient is None else gradient.float()

    def _lower_precision(self, piece: Piece, kept: State) -> State:
        handle, live = piece.handle, self._live.pop(piece.handle)
        if self.master_weights == "full":
            store_master(handle.detach(), live)
            kept = {_MASTER: handle.detach()}
        else:
            store_master(handle.detach(), live, kept[_REMAINDER])
        handle.grad = None
        handle.data = live
        if not piece.is_whole:
            _empty(handle)
        return kept


def _empty(handle: nn.Parameter) -> None:
    """Let a stand-in hold on to nothing."""
    handle.grad = None
    handle.data = handle.new_empty(0)
