"""Master weights as they are kept beside the optimizer's state, saved, and taken over from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_hift.engine.row_slices import Piece, join_states
from lightning_hift.offload.state_tree import State
from lightning_hift.precision.master_weights import (
    HALF_DTYPES,
    MASTER,
    MASTER_KEYS,
    REMAINDER,
    adopt_master,
    join_master,
    split_master,
)


class KeptMasters:
    """Masters of the pieces of parameters.

    Args:
        mode: ``"full"``, ``"split"`` or ``"none"``; see ``HiFTEngine``.
        kept: What is kept of a piece, by its handle.
    """

    def __init__(self, mode: str, kept: Callable[[nn.Parameter], State]) -> None:
        self.mode = mode
        self._kept = kept

    def dtype_of(self, p: nn.Parameter) -> torch.dtype:
        """The dtype in which ``p`` is stepped."""
        return torch.float32 if self.mode != "none" and p.dtype in HALF_DTYPES else p.dtype

    def saved(self, pieces: Sequence[Piece]) -> Tensor | None:
        """What a checkpoint keeps of the master of a parameter, of which these are all ``pieces``."""
        states = [{k: v for k, v in self._kept(piece.handle).items() if k in MASTER_KEYS} for piece in pieces]
        return next(iter(join_states(states, pieces).values()), None)

    def state_without(self, pieces: Sequence[Piece]) -> State:
        """The optimizer's own state of a parameter, of which these are all ``pieces``."""
        states = [{k: v for k, v in self._kept(piece.handle).items() if k not in MASTER_KEYS} for piece in pieces]
        return join_states(states, pieces)

    def restored(self, piece: Piece, saved: Tensor | None) -> tuple[State, int]:
        """What to keep beside the state of ``piece``, from a checkpoint's float32 master, remainder, or neither.

        And how many of its weights are not those of that master.

        In a precision that is not the checkpoint's, its weights are rounded anew from their masters. For that they must
        have been loaded already; in the same precision, by the next step at the latest.
        """
        p = piece.parameter
        weight = piece.rows_of(p.detach())
        keeps_masters = self.mode != "none" and p.dtype in HALF_DTYPES
        if saved is None:
            return (self.packed(weight.float()) if keeps_masters else {}), 0
        saved = piece.rows_of(saved)
        if saved.dtype == torch.int16:
            if keeps_masters and p.dtype == torch.bfloat16:
                return {REMAINDER: saved}, 0  # until the first step: its weights may still have to be loaded
            saved = join_master(weight.cpu().bfloat16(), saved)
        adopts = keeps_masters or p.dtype == torch.float32
        num_edited = adopt_master(weight, saved) if adopts else 0
        return (self.packed(saved) if keeps_masters else {}), num_edited

    def packed(self, master: Tensor) -> State:
        """What to keep of a float32 master."""
        return {MASTER: master} if self.mode == "full" else {REMAINDER: split_master(master)[1]}
