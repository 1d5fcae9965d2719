"""All state of one optimizer between its steps: taken from it, saved, loaded, and handed back."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hift.engine.kept_masters import KeptMasters
from lightning_hift.engine.kept_state import KeptState
from lightning_hift.engine.optimizer_twin import bare_twin, twin_of
from lightning_hift.engine.row_slices import Piece, split_state
from lightning_hift.engine.state_gathering import gather_states
from lightning_hift.engine.state_partition import UndividedState
from lightning_hift.engine.step_view import StepView, Turn
from lightning_hift.groups.fingerprint import cast_state
from lightning_hift.offload.offloader import StateOffloader
from lightning_hift.offload.sharded_tensors import as_sharded, is_sharded, local_part
from lightning_hift.offload.state_tree import State
from lightning_hift.precision.master_weights import (
    HALF_DTYPES,
    store_masters,
)


class Collected(NamedTuple):
    """What a checkpoint keeps, by index of the parameter in the optimizer.

    Args:
        state: The optimizer's own state.
        masters: float32 masters or int16 remainders, of the parameters that have them.
        dtypes: The dtype in which each parameter is stepped, for all of them.
    """

    state: dict[int, State]
    masters: dict[int, Tensor]
    dtypes: list[str]


class OptimizerState:
    """Moves the state of all parameters between an optimizer, its checkpoints and the offloader.

    Args:
        optimizer: Whose state.
        view: What the optimizer sees of it.
        offloader: Keeps it.
        turns: What is stepped together, whose state is kept side by side.
        partition: Which of it is kept in this process.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        view: StepView,
        offloader: StateOffloader,
        turns: Iterable[Turn],
        partition: UndividedState,
    ) -> None:
        self._optimizer = optimizer
        self._view = view
        self._offloader = offloader
        self._pieces: dict[nn.Parameter, list[Piece]] = {}
        self._partition = partition
        self._masters = KeptMasters(view.master_weights, self._kept)
        self._of_others: dict[nn.Parameter, State] = {}  # by handle, while they are gathered here
        self._starts_empty: bool | None = None
        self._turns = [turn.pieces for turn in turns]
        for piece in (piece for pieces in self._turns for piece in pieces):
            self._pieces.setdefault(piece.parameter, []).append(piece)
        offloader.add(p for p in parameters_of(optimizer) if p not in self._pieces)  # what never trains may have state

    def adopt(self) -> None:
        """Take state that exists already, from the optimizer's constructor or an earlier run, out of the optimizer.

        Raises:
            OSError: The disk is full; the optimizer has its state back.
        """
        state = self._optimizer.state
        existing = {p: state.pop(p) for p in parameters_of(self._optimizer) if p in state}
        states = {
            piece.handle: split_state(cast_state(values, str(p.dtype), self._masters.dtype_of(p)), piece)
            for p, values in existing.items()
            for piece in self._pieces_of(p)
            if self._partition.owns(piece)
        }
        try:
            self._put(states, self._optimizer.param_groups)
        except OSError:
            for p, values in existing.items():
                state[p] = values
            raise

    def keep_apart(self) -> None:
        """Put a ``KeptState`` in the place of ``optimizer.state``."""
        self._optimizer.state = KeptState(self._optimizer.state, self._look_up)

    def masters(self) -> dict[nn.Parameter, Tensor | None]:
        """Masters or remainders by parameter, as they are saved."""
        self._offloader.drain()
        return {p: self._masters.saved(pieces) for p, pieces in self._pieces.items()}

    def collect(self) -> Collected:
        """All state that is here as a whole, without copying what is in one piece and on the host."""
        self._offloader.drain()
        owned = dict(enumerate(parameters_of(self._optimizer)))
        here = {i: pieces for i, p in owned.items() if all(map(self._is_here, pieces := self._pieces_of(p)))}
        state = {i: self._masters.state_without(pieces) for i, pieces in here.items()}
        masters = {i: self._masters.saved(pieces) for i, pieces in here.items()}
        return Collected(
            {i: values for i, values in state.items() if values},
            {i: master for i, master in masters.items() if master is not None},
            [str(self._masters.dtype_of(p)) for p in owned.values()],
        )

    def gather(self, directory: str | os.PathLike[str], group: dist.ProcessGroup | None) -> None:
        """Bring what other processes keep to the first one, until ``forget_others``. See ``gather_states``."""
        if self._partition.world_size == 1:
            return
        self._offloader.drain()
        pieces = [piece for turn in self._turns for piece in turn]
        self._of_others = gather_states(pieces, self._partition, self._offloader.state_of, directory, group)

    def forget_others(self) -> None:
        """Let go of what ``gather`` has brought."""
        self._of_others = {}

    def replace(self, saved: Mapping[str, Any], dtypes: Sequence[str] | None, masters: Mapping[int, Tensor]) -> State:
        """Take over the state of a checkpoint, without the cast and the move to the device that torch would make.

        Args:
            saved: A ``state_dict`` with as many parameters in each group as the optimizer has.
            dtypes: As collected. Where there are none, as in a checkpoint of plain torch, float state is cast to the
                weights.
            masters: As collected.

        Returns:
            Entries of the saved state that belong to no parameter.
        """
        rest = dict(saved["state"])
        kept: dict[nn.Parameter, State] = {}
        total_edited = 0
        ids = [saved_id for group in saved["param_groups"] for saved_id in group["params"]]
        for i, (saved_id, p) in enumerate(zip(ids, parameters_of(self._optimizer), strict=True)):
            state = cast_state(rest.pop(saved_id, {}), dtypes[i] if dtypes else None, self._masters.dtype_of(p))
            for piece in self._pieces_of(p):
                # In every process, as it may set the weights. What is never stepped gets no new master.
                is_known = p in self._pieces or i in masters
                master, num_edited = self._masters.restored(piece, masters.get(i)) if is_known else ({}, 0)
                total_edited += num_edited
                if self._partition.owns(piece):
                    kept[piece.handle] = split_state(state, piece) | master
        if total_edited:
            warnings.warn(
                f"{total_edited:,} weights are not those that the checkpoint's masters are rounded to. They"
                " were changed since it was saved, or are still to be loaded; they train on from what they are.",
                stacklevel=2,
            )
        self._view.cancel()
        self._put(kept, saved["param_groups"])
        return rest

    def reset(self, turn: Turn) -> None:
        """Give a turn the state that a new optimizer would have, as if there had been no step. Masters stay."""
        self._offloader.drop(turn.state)
        self._view.options.forget(turn.owner)
        if self._starts_empty is None:
            self._starts_empty = not any(
                twin_of(self._optimizer, options, [nn.Parameter(torch.zeros(1))]).state
                for options in self._optimizer.param_groups
            )
        if self._starts_empty:
            return
        self._offloader.drain()
        new: dict[nn.Parameter, State] = {}
        for options in self._optimizer.param_groups:
            owned = set(options["params"])
            for piece in [piece for piece in turn.own if piece.parameter in owned]:
                stepped = piece.rows_of(piece.parameter.detach()).to(self._masters.dtype_of(piece.parameter))
                alone = nn.Parameter(stepped)
                state = twin_of(self._optimizer, options, [alone]).state.get(alone, {})
                new[piece.handle] = {**self._offloader.state_of(piece.handle), **state}
        self._put(new, self._optimizer.param_groups)

    def read_own_format(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """``state_dict`` in torch's format, for a class that saves and loads in its own way.

        Such a class may call no hooks and look for state on the device. So it loads into a twin on the host, whose
        parameters take no memory.
        """
        twin = bare_twin(self._optimizer)
        for group in twin.param_groups:
            group["params"] = [
                nn.Parameter(torch.empty((), dtype=self._masters.dtype_of(p)).expand(p.shape), requires_grad=False)
                for p in group["params"]
            ]
        twin.load_state_dict(dict(state_dict))
        owned = parameters_of(twin)
        indices = iter(range(len(owned)))
        groups = [{**group, "params": [next(indices) for _ in group["params"]]} for group in twin.param_groups]
        return {"state": {i: twin.state[p] for i, p in enumerate(owned) if p in twin.state}, "param_groups": groups}

    def hand_back(self, to_device: bool = True) -> None:
        """Give the optimizer all its state, and forget it here.

        Args:
            to_device: To be stepped: where the weights are, and in their dtype. Otherwise as it is.
        """
        if to_device and self._view.master_weights != "none":
            warnings.warn(
                "The optimizer is stepped after HiFT was closed: from now on each update is rounded to 16 bits, and the"
                " master weights are dropped. Attach HiFT again to go on with them.",
                stacklevel=2,
            )
        self._offloader.drain()
        self._optimizer.state = defaultdict(dict, self._optimizer.state)
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                if state := self._masters.state_without(self._pieces_of(p)):
                    if to_device:
                        state = cast_state(state, str(self._masters.dtype_of(p)), p.dtype)
                        stays = _keys_on_host(group)
                        moves = [k for k, v in state.items() if isinstance(v, Tensor) and k not in stays]
                        state |= {k: as_sharded(local_part(state[k], p).to(p.device), p) for k in moves}
                    self._optimizer.state[p] = state
        self._offloader.clear()

    def _look_up(self, p: nn.Parameter) -> State | None:
        if self._view.is_shown:
            return None
        self._offloader.drain()
        return self._masters.state_without(self._pieces_of(p))

    def _kept(self, handle: nn.Parameter) -> State:
        return self._of_others[handle] if handle in self._of_others else self._offloader.state_of(handle)

    def _is_here(self, piece: Piece) -> bool:
        return self._partition.owns(piece) or piece.handle in self._of_others

    def _pieces_of(self, p: nn.Parameter) -> list[Piece]:
        return self._pieces.get(p) or [Piece(p, p)]

    def _put(self, states: Mapping[nn.Parameter, State], options: Sequence[Mapping[str, Any]]) -> None:
        """Keep ``states``, by handle. ``options``: the param_groups that they come from."""
        stays: dict[nn.Parameter, tuple[str, ...]] = {}
        for group, saved in zip(self._optimizer.param_groups, options, strict=True):
            keys = _keys_on_host(saved)
            stays |= {piece.handle: keys for p in group["params"] for piece in self._pieces_of(p)}
        self._offloader.put({handle: state for handle, state in states.items() if handle in stays}, stays)

    def make_masters(
        self, dtype: torch.dtype | None = None, known: Mapping[nn.Parameter, Tensor | None] | None = None
    ) -> None:
        """Keep masters of all weights in 16 bits, from their present values.

        Args:
            dtype: Round the weights to this dtype now; default: they stay as they are.
            known: Masters or remainders that exist already, by parameter, as they are saved.
        """
        if self._view.master_weights == "none":
            return
        # Turn by turn, or there would be all masters twice for a while.
        for pieces in self._turns:
            self._make_masters([p for p in pieces if p.parameter.is_floating_point()], dtype, known or {})
        for p in self._pieces:
            if dtype is not None and p.dtype != dtype and p.is_floating_point() and dtype in HALF_DTYPES:
                weight = local_part(p.detach(), p)
                live = torch.empty_like(weight, dtype=dtype)
                master = weight.float()
                store_masters(master, [master], [live])
                if is_sharded(p):
                    weight.copy_(live)  # which needs no more rounding when the module is converted as a whole
                else:
                    p.data = live

    def _make_masters(
        self, pieces: Sequence[Piece], dtype: torch.dtype | None, known: Mapping[nn.Parameter, Tensor | None]
    ) -> None:
        states: dict[nn.Parameter, State] = {}
        for piece in pieces:
            p = piece.parameter
            if (dtype or p.dtype) in HALF_DTYPES and self._partition.owns(piece):
                saved = known.get(p) if p.dtype in HALF_DTYPES else None
                if saved is None:
                    master = self._masters.packed(piece.rows_of(p.detach()).float())
                else:
                    master, _ = self._masters.restored(piece, saved)
                states[piece.handle] = {**self._offloader.state_of(piece.handle), **master}
        self._offloader.put(states)


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters of ``optimizer``; a place in this list is an index in its ``state_dict``."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _keys_on_host(param_group: Mapping[str, Any]) -> tuple[str, ...]:
    """State that torch keeps on the host: the step count, unless a kernel on the device has to read it."""
    return () if param_group.get("fused") or param_group.get("capturable") else ("step",)
