"""A progress bar for what takes long before the first step."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from tqdm import tqdm

_LITTLE = 2**30  # bytes, for which there is no bar


class PageLockBar:
    """Shows how much host memory is page-locked, and how much will be."""

    def __init__(self) -> None:
        self._bar: Any = None

    @rank_zero_only
    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes are."""
        if self._bar is None:
            text = "HiFT: page-locking host memory for optimizer state"
            self._bar = tqdm(total=total, desc=text, unit="B", unit_scale=True, disable=total < _LITTLE)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()
            self._bar = None
