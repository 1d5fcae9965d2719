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
_PART = 2**24  # elements rounded at once


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


def store_master(master: Tensor, live: Tensor, remainder: Tensor | None = None) -> None:
    """Write ``master`` (float32) into ``live`` and, for bfloat16, ``remainder`` (int16), all of one shape, in place.

    Ties go away from zero for bfloat16, to even for float16.
    """
    if live.dtype != torch.bfloat16:
        live.copy_(master)
    elif not (master.is_contiguous() and live.is_contiguous()):
        _store(master, live, remainder)
    else:
        # In parts: rounding needs several times the memory of what it rounds.
        remainders = [None] if remainder is None else torch.split(remainder.view(-1), _PART)
        parts = zip(torch.split(master.view(-1), _PART), torch.split(live.view(-1), _PART), strict=True)
        for (part, live_part), remainder_part in zip(parts, cycle(remainders), strict=False):
            _store(part, live_part, remainder_part)


def _store(master: Tensor, live: Tensor, remainder: Tensor | None) -> None:
    rounded, rest = split_master(master)
    live.copy_(rounded)
    if remainder is not None:
        remainder.copy_(rest)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """The live bfloat16 weight and the int16 remainder of ``master`` (float32), all of one shape.

    ``join_master`` gives back every bit, signed zeros, subnormal numbers and infinities included; a NaN stays a NaN.
    """
    bits = master.contiguous().view(torch.int32)
    upper = bits + 0x8000
    upper >>= 16  # arithmetic: the sign moves along
    # Adding to a NaN could turn it into something else; its upper half, made a quiet NaN, is one already.
    is_nan = master.isnan()
    upper = torch.where(is_nan, (bits >> 16) | 0x40, upper)
    remainder = (bits - (upper << 16)).masked_fill_(is_nan, 0).to(torch.int16)
    return upper.to(torch.int16).view(torch.bfloat16), remainder


def join_master(live: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master of a bfloat16 weight and its int16 remainder.

    A remainder that cannot be that of this weight, because someone has changed the weight since, counts as 0.
    """
    bits = live.contiguous().view(torch.int16).to(torch.int32)
    bits <<= 16
    bits += remainder
    return _unless_changed(bits.view(torch.float32), live)


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


def recheck_master(master: Tensor, live: Tensor) -> Tensor:
    """Set ``master`` (float32) anew, in place, where the live weight is not the rounded master any more."""
    return _unless_changed(master, live)


def _unless_changed(master: Tensor, live: Tensor) -> Tensor:
    if not (master.is_contiguous() and live.is_contiguous()):
        parts = [(master, live)]
    else:
        parts = list(zip(torch.split(master.view(-1), _PART), torch.split(live.view(-1), _PART), strict=True))
    for part, live_part in parts:
        same = _rounded(part, live.dtype).view(torch.int16) == live_part.contiguous().view(torch.int16)
        part.copy_(torch.where(same, part, live_part.float()))
    return master


def _rounded(master: Tensor, dtype: torch.dtype) -> Tensor:
    return split_master(master)[0] if dtype == torch.bfloat16 else master.to(dtype)


def _names(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
