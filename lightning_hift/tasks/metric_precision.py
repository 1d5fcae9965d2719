"""Metrics in 32 bits, whatever the precision of the network that they measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from typing_extensions import Self, override

from lightning_hift.precision.master_weights import HALF_DTYPES


def full_precision(values: Tensor) -> Tensor:
    """Values in float32 if they are floats of 16 bits; else as they are."""
    return values.float() if values.dtype in HALF_DTYPES else values


@contextmanager
def full_precision_default() -> Iterator[None]:
    """New tensors are float32 where they would have 16 bits, as in a Trainer with ``precision="bf16-true"``."""
    before = torch.get_default_dtype()
    if before in HALF_DTYPES:
        torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class FullPrecisionMetrics(MetricCollection):
    """Metrics that add up in float32: in 16 bits, a sum soon stops growing, as each term is lost in rounding.

    States change their device with the module, but not their dtype. What is added may have 16 bits.

    Args:
        metrics: By name; made under ``full_precision_default``.
        prefix: Of the names under which they are logged.
    """

    def __init__(self, metrics: Mapping[str, Metric], prefix: str) -> None:
        super().__init__(dict(metrics), prefix=prefix)
        self._wrap_metrics()

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._wrap_metrics()  # a metric's copy has the methods of its class

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        def move(values: Tensor) -> Tensor:
            moved = fn(values)
            # Not the moved values: they may be rounded already.
            return moved if moved.dtype == values.dtype else values.to(moved.device)

        with full_precision_default():  # a metric takes its own dtype from a new tensor
            return super()._apply(move, *args, **kwargs)  # type: ignore[no-untyped-call, no-any-return]

    def _wrap_metrics(self) -> None:
        # Each by itself: a task may update one of them alone.
        for metric in self.values(copy_state=False):
            for name in ("update", "compute"):
                setattr(metric, name, _in_full_precision(getattr(metric, name)))


def _in_full_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with full_precision_default():
            return method(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})

    return call


def _widened(argument: Any) -> Any:
    return full_precision(argument) if isinstance(argument, Tensor) else argument
