"""Rows of a data set that cannot be used: an error that names each, or a count of what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning.fabric.utilities.rank_zero import rank_zero_warn

OnBadRow = Literal["error", "skip"]

_SHOWN = 5


class BadRow(ValueError):
    """Why one row cannot be used.

    Args:
        column: Where the fault is; ``None`` if it is the row as a whole.
        reason: What was got, and what is allowed.
    """

    def __init__(self, column: str | None, reason: str) -> None:
        super().__init__(reason if column is None else f"column {column!r}: {reason}")


def settle(faults: Sequence[str], num_rows: int, on_bad_row: OnBadRow) -> None:
    """Raise an error that lists the faults, or warn that their rows are left out.

    Args:
        faults: One text per bad row, with its place.
        num_rows: All rows, bad ones included.
        on_bad_row: Whether they are an error.

    Raises:
        ValueError: There are faults, and they are not to be skipped.
    """
    if not faults:
        return
    shown = "\n".join(f"  {fault}" for fault in faults[:_SHOWN])
    rest = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    count = f"{len(faults)} of {num_rows} rows cannot be used"
    if on_bad_row == "error":
        raise ValueError(f"{count}:\n{shown}{rest}\nMend them, or leave them out with on_bad_row='skip'.")
    rank_zero_warn(f"{count} and are left out:\n{shown}{rest}")
