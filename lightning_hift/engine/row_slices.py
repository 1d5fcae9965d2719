"""Large parameters in slices of rows, so that the largest group does not decide how much state the device must hold.

An element-wise optimizer computes the same for a slice as for the same rows of the whole, bit for bit. So a group that
is too large is stepped slice by slice, and only one slice's state is on the device at a time. For the same reason each
process can step its part of a parameter that is sharded over processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hift.engine.optimizer_twin import twin_of
from lightning_hift.offload.sharded_tensors import as_sharded, is_sharded, local_numel, local_part
from lightning_hift.offload.state_tree import State

_VECTOR = 64  # elements


@dataclass(frozen=True, eq=False)
class Piece:
    """What is stepped at once of one parameter.

    Args:
        parameter: The parameter.
        handle: What the optimizer gets to see, and the owner of the state: the parameter itself, or a stand-in.
        start: First row, of those that this process holds if the parameter is sharded; ``None`` for the whole.
        stop: Row after the last one.
    """

    parameter: nn.Parameter
    handle: nn.Parameter
    start: int | None = None
    stop: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether this is the parameter itself."""
        return self.start is None

    @property
    def share(self) -> float:
        """Its elements relative to those of the parameter that this process holds."""
        return (
            1.0 if self.is_whole else self.rows_of(self.parameter.detach()).numel() / (local_numel(self.parameter) or 1)
        )

    def rows_of(self, tensor: Tensor) -> Tensor:
        """The rows of ``tensor``, of the shape of the parameter, that belong to this piece, as a view."""
        return tensor if self.is_whole else local_part(tensor, self.parameter)[self.start : self.stop]


def cut_into_turns(parameters: Sequence[nn.Parameter], max_numel: int | None) -> list[list[Piece]]:
    """Pieces of ``parameters`` in their order, in turns of at most ``max_numel`` elements, or of one row.

    Only what is larger than ``max_numel`` altogether is cut at all. Of sharded parameters the part that this process
    holds is what counts.
    """
    if max_numel is None or sum(local_numel(p) for p in parameters) <= max_numel:
        return [[_uncut(p) for p in parameters]]
    turns: list[list[Piece]] = []
    free = 0
    for p in parameters:
        pieces = [_uncut(p)] if local_numel(p) <= max_numel else _cut(p, max_numel)
        for piece in pieces:
            numel = piece.rows_of(p).numel()
            # Two slices of one parameter never share a turn: in the optimizer they take the same place.
            if numel > free or (turns and turns[-1] and turns[-1][-1].parameter is p):
                turns.append([])
                free = max(max_numel, numel)
            turns[-1].append(piece)
            free -= numel
    return turns


def split_state(state: State, piece: Piece) -> State:
    """The part of a parameter's ``state`` that belongs to ``piece``; what has no rows is copied."""
    shape = piece.parameter.shape

    def part(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return piece.rows_of(value) if value.shape == shape else value.clone()

    return state if piece.is_whole else {key: part(value) for key, value in state.items()}


def join_states(states: Sequence[State], pieces: Sequence[Piece]) -> State:
    """The state of a parameter from those of its pieces; sharded if the parameter is."""
    p = pieces[0].parameter
    if pieces[0].is_whole or not states[0]:
        return states[0]
    shape = pieces[0].rows_of(p.detach()).shape

    def whole(key: Any, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != shape:
            return value
        return as_sharded(value if len(states) == 1 else torch.cat([state[key] for state in states]), p)

    return {key: whole(key, value) for key, value in states[0].items()}


def steps_element_wise(optimizer: Optimizer) -> bool:
    """Whether ``optimizer`` computes the same for slices as for the whole, found out by a few steps on the CPU."""
    return all(_steps_element_wise(optimizer, options) for options in optimizer.param_groups)


def _uncut(parameter: nn.Parameter) -> Piece:
    if not is_sharded(parameter):
        return Piece(parameter, parameter)
    return _rows(parameter, 0, len(local_part(parameter.detach(), parameter)))


def _cut(parameter: nn.Parameter, max_numel: int) -> list[Piece]:
    if parameter.dim() == 0:
        return [Piece(parameter, parameter)]
    numel, rows = local_numel(parameter), len(local_part(parameter.detach(), parameter))
    step = max(1, max_numel * rows // numel)
    # A vector loop may round the elements that are left over at its end otherwise; so cut where none are.
    aligned = _VECTOR // math.gcd(_VECTOR, numel // rows)
    step = step // aligned * aligned or step
    starts = range(0, rows, step)
    stops = [min(start + step, rows) for start in starts]
    return [_rows(parameter, start, stop) for start, stop in zip(starts, stops, strict=True)]


def _rows(parameter: nn.Parameter, start: int, stop: int) -> Piece:
    stand_in = nn.Parameter(local_part(parameter.detach(), parameter).new_empty(0), requires_grad=False)
    return Piece(parameter, stand_in, start, stop)


def _steps_element_wise(optimizer: Optimizer, options: Mapping[str, Any]) -> bool:
    # Large enough for quantized state, which begins at some thousand elements, and slices too small for it.
    generator = torch.Generator().manual_seed(0)
    whole = nn.Parameter(torch.randn(128, 128, generator=generator))
    slices = [nn.Parameter(part.detach().clone()) for part in (whole[:23], whole[23:])]
    try:
        one, several = twin_of(optimizer, options, [whole]), twin_of(optimizer, options, slices)
        for _ in range(5):
            whole.grad = torch.randn(whole.shape, generator=generator)
            slices[0].grad, slices[1].grad = whole.grad[:23].clone(), whole.grad[23:].clone()
            one.step()
            several.step()
    except Exception:  # anything may happen in a foreign optimizer; then nothing is known about it
        return False
    return torch.equal(whole, torch.cat([*slices]))
