"""Weights in 16 bits and their 32-bit masters: rounding, and the 16-bit remainder that makes up for it.

A bfloat16 number is the upper half of a float32 number. ``split`` keeps that half, rounded, as the live weight, and
what rounding took or added, a signed 16-bit integer, as the remainder. The remainder of a number right between two
bfloat16 numbers fits into 16 bits only if such ties go away from zero, so that is how everything is rounded here.
"""

from __future__ import annotations

from itertools import cycle
from typing import Literal, get_args

import torch
from torch import Tensor

MasterWeights = Literal["auto", "full", "split", "none"]

HALF_DTYPES = (torch.bfloat16, torch.float16)
MASTER, REMAINDER = MASTER_KEYS = ("hift_master", "hift_remainder")
"""Keys under which masters (float32) and remainders (int16) are kept beside an optimizer's own state."""
_PART = 2**28  # elements, of which a byte each is needed at once
_TIE = -(2**15)  # as a remainder


def check_master_weights(mode: str) -> None:
    """Refuse an unknown mode.

    Raises:
        ValueError: ``mode`` is unknown.
    """
    if mode not in get_args(MasterWeights):
        allowed = ", ".join(map(repr, get_args(MasterWeights)))
        raise ValueError(f"Got master_weights={mode!r}; choose one of {allowed}.")


def resolve_master_weights(mode: MasterWeights, dtypes: set[torch.dtype]) -> Literal["full", "split", "none"]:
    """What ``mode`` means for trainable weights of these dtypes.

    ``"auto"`` is the cheapest exact choice: ``"split"`` for bfloat16, ``"full"`` if there is float16, else ``"none"``.

    Raises:
        ValueError: Masters are asked for weights that need none, or remainders for weights that have none.
    """
    check_master_weights(mode)
    halves = dtypes & set(HALF_DTYPES)
    if mode == "auto":
        if not halves:
            return "none"
        return "full" if torch.float16 in halves else "split"
    if mode != "none" and not halves:
        raise ValueError(
            f"Got master_weights={mode!r}, but the trainable weights are {_names(dtypes)}: they are their own masters."
            " Use master_weights='none' (or 'auto'), or 16-bit weights: precision='bf16-true'."
        )
    if mode == "split" and torch.float16 in halves:
        raise ValueError(
            "Got master_weights='split' with float16 weights. Only a bfloat16 number is the upper half of a float32"
            " number, so only it has a 16-bit remainder. Use master_weights='full', or precision='bf16-true'."
        )
    return mode


def join_masters(master: Tensor, views: list[Tensor], lives: list[Tensor], remainder: Tensor) -> None:
    """Fill flat masters from live weights and their remainders, in two passes over memory and two that check it.

    A remainder that does not fit, because someone has set the weight to zero or infinity since, counts as 0: it would
    make a NaN. Any other weight that was set anew keeps the old remainder, which is less than half of its last place.

    Args:
        master: float32, shape (n,), or any shape.
        views: Views of it, one for each weight.
        lives: The bfloat16 weights, of the shapes of ``views``.
        remainder: int16, of the shape of ``master``.
    """
    torch._foreach_copy_(views, lives)
    for part, rest in zip(_parts(master), _parts(remainder), strict=True):
        bits = part.view(torch.int32)
        bits += rest
        bits.addcmul_(rest, part.isnan(), value=-1)


def store_masters(master: Tensor, views: list[Tensor], lives: list[Tensor], remainder: Tensor | None = None) -> None:
    """Round flat masters to live weights; ties go away from zero for bfloat16, to even for float16.

    Args:
        master: As in ``join_masters``. With a remainder, it may be changed.
        views: Views of it, of those that are to be rounded.
        lives: The weights, of the shapes of ``views``.
        remainder: int16, of the shape of ``master``, to be filled with what rounding to bfloat16 takes and adds.
    """
    dtypes = {live.dtype for live in lives}
    if len(dtypes) > 1:
        for view, live in zip(views, lives, strict=True):
            store_masters(view, [view], [live])
        return
    if torch.bfloat16 not in dtypes and remainder is None:
        torch._foreach_copy_(lives, views)
        return
    # The conversion rounds ties to even. So they are made a little larger first; a NaN stays one.
    rests = [None] if remainder is None else _parts(remainder)
    ties = []
    for part, rest in zip(_parts(master), cycle(rests), strict=False):
        bits = part.view(torch.int32)
        low = bits.to(torch.int16) if rest is None else rest.copy_(bits)
        ties.append(low == _TIE)
        bits += ties[-1]
    torch._foreach_copy_(lives, views)
    if remainder is None:
        for part, tie in zip(_parts(master), ties, strict=True):
            part.view(torch.int32).add_(tie, alpha=-1)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """The live bfloat16 weight and the int16 remainder of ``master`` (float32), all of one shape.

    ``join_master`` gives back every bit, signed zeros, subnormal numbers and infinities included; a NaN stays a NaN.
    """
    scratch = master.clone()
    live, remainder = torch.empty_like(scratch, dtype=torch.bfloat16), torch.empty_like(scratch, dtype=torch.int16)
    store_masters(scratch, [scratch], [live], remainder)
    return live, remainder


def join_master(live: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master of a bfloat16 weight and its int16 remainder, all of one shape; see ``join_masters``."""
    master = torch.empty_like(live, dtype=torch.float32)
    join_masters(master, [master], [live], remainder)
    return master


def recheck_masters(master: Tensor, views: list[Tensor], lives: list[Tensor]) -> None:
    """Set flat float32 masters anew, in place, where the live weights are not the rounded masters any more."""
    if len({live.dtype for live in lives}) > 1:
        for view, live in zip(views, lives, strict=True):
            recheck_masters(view, [view], [live])
    elif lives[0].dtype == torch.bfloat16:
        # As with remainders, so that both come to the same.
        join_masters(master, views, lives, master.view(torch.int32).to(torch.int16))
    else:
        for view, live in zip(views, lives, strict=True):
            view.copy_(torch.where(view.to(live.dtype) == live, view, live.float()))


def adopt_master(weight: Tensor, master: Tensor) -> int:
    """Round ``master`` (float32) to ``weight``, in place, where that is what it was rounded to in any precision.

    Args:
        weight: Of any float dtype.
        master: Of the same shape. Both may be on any device.

    Returns:
        Number of weights that ``master`` is rounded to in no precision, which stay as they are.
    """
    before, master = weight.cpu(), master.cpu()
    belongs = torch.zeros_like(before, dtype=torch.bool)
    for dtype in (*HALF_DTYPES, torch.float32):
        belongs |= _rounded(master, dtype).to(before.dtype) == before
    weight.copy_(torch.where(belongs, _rounded(master, before.dtype), before))
    return int((~belongs).sum())


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor, _PART) if tensor.dim() == 1 else (tensor,)


def _rounded(master: Tensor, dtype: torch.dtype) -> Tensor:
    return split_master(master)[0] if dtype == torch.bfloat16 else master.to(dtype)


def _names(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
