"""Evidence, gathered until every group has trained, that every trainable parameter was really updated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hift.engine.row_slices import Piece
from lightning_hift.precision.master_weights import HALF_DTYPES

_PART = 2**22  # elements


class SweepReport(NamedTuple):
    """What the first sweep did, or all sweeps until every group had a turn.

    Args:
        num_parameters: How many parameters were watched.
        without_gradient: Names of those that never received a gradient.
        unchanged: Names of those that received one but kept their value (a learning rate of 0, or a gradient of 0).
        rounded: Names of those in 16 bits without masters that kept their value though neither of the two was 0.
        skipped: Names of those whose step was skipped, because the gradients overflowed or a batch gave no loss.
    """

    num_parameters: int
    without_gradient: list[str]
    unchanged: list[str]
    rounded: list[str]
    skipped: list[str]

    @property
    def complete(self) -> bool:
        """Whether every parameter moved."""
        return not (self.without_gradient or self.unchanged or self.rounded or self.skipped)


class FirstSweepProof:
    """Compares a checksum of each parameter before and after its steps, on the device and without waiting for it.

    Args:
        optimizer: Steps the parameters.
        parameters: By name.
        num_groups: How many groups there are.
    """

    def __init__(self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], num_groups: int) -> None:
        self._optimizer = optimizer
        self._parameters = {name: p for name, p in parameters.items() if p.numel() > 0}
        self._stepped: set[nn.Parameter] = set()
        self._with_gradient: set[nn.Parameter] = set()
        self._before: list[tuple[nn.Parameter, nn.Parameter, Tensor]] = []
        self._moved: dict[nn.Parameter, Tensor] = {}
        self._asked: dict[nn.Parameter, Tensor] = {}  # whether a step should have moved it, of those in 16 bits
        self._unvisited = set(range(num_groups))
        self._over = False
        self.is_complete = False
        """Whether all groups have had a turn, and the sweep of the last one is over."""

    def count_step(self, groups: Iterable[int], ends_sweep: bool) -> None:
        """A step of these groups begins; the first one after the proof is complete ends it."""
        self._over = self.is_complete
        self._unvisited.difference_update(groups)
        self.is_complete |= ends_sweep and not self._unvisited

    def before_step(self, pieces: Iterable[Piece]) -> None:
        """Note which of the pieces have a gradient, and their checksums."""
        for piece in () if self._over else pieces:
            self._stepped.add(piece.parameter)
            if piece.handle.grad is not None and piece.handle.numel() > 0:
                self._with_gradient.add(piece.parameter)
                self._before.append((piece.parameter, piece.handle, _checksum(piece.handle)))
        rounded = {handle: p for p, handle, _ in self._before if handle.dtype in HALF_DTYPES}
        for options in self._optimizer.param_groups if rounded else ():
            for handle in options["params"]:
                if handle in rounded and handle.grad is not None:
                    _note(self._asked, rounded[handle], _is_asked_to_move(handle.grad, options.get("lr")))

    def after_step(self) -> None:
        """Compare the checksums with those taken before the step."""
        for p, handle, before in self._before:
            _note(self._moved, p, (_checksum(handle) != before).any())
        self._before = []

    def report(self, sum_parts: Callable[[Tensor], Tensor]) -> SweepReport:
        """The result; waits for the device, once.

        Args:
            sum_parts: Of numbers that several processes have found, each about what it steps, makes the sum of all.
        """
        seen = (self._stepped, self._with_gradient, _those(self._moved), _those(self._asked))
        counts = torch.tensor([[p in each for each in seen] for p in self._parameters.values()], dtype=torch.int32)
        found = dict(zip(self._parameters, sum_parts(counts).bool().tolist(), strict=True))
        return SweepReport(
            len(found),
            without_gradient=[n for n, (stepped, with_gradient, *_) in found.items() if stepped and not with_gradient],
            unchanged=[n for n, (_, there, moved, asked) in found.items() if there and not moved and not asked],
            rounded=[n for n, (_, _, moved, asked) in found.items() if asked and not moved],
            skipped=[n for n, (stepped, *_) in found.items() if not stepped],
        )


def describe_sweep(report: SweepReport, first: str = "first sweep") -> str:
    """One line that says that all parameters were updated, or which were not, and why.

    Args:
        report: What was found.
        first: Until when.
    """
    if report.complete:
        return f"HiFT: {first} done, all {report.num_parameters} trainable parameters were updated."
    reasons = {
        "received no gradient (unused in the forward pass, or left out in their turn)": report.without_gradient,
        "received a gradient but kept their value (learning rate 0, or a gradient of 0)": report.unchanged,
        "kept their value because 16 bits round their updates away (keep master weights: strategy='hift' with"
        " precision='bf16-true'; or train in 32 bits)": report.rounded,
        "were not stepped (gradients overflowed, or training_step returned None)": report.skipped,
    }
    lines = [
        f"{len(names)} {why}: {', '.join(names[:8])}" + ("..." if len(names) > 8 else "")
        for why, names in reasons.items()
        if names
    ]
    return (
        f"HiFT: after the {first}, some of the {report.num_parameters} trainable parameters were not updated. "
        + "; ".join(lines)
    )


def _note(flags: dict[nn.Parameter, Tensor], p: nn.Parameter, flag: Tensor) -> None:
    flags[p] = flags[p] | flag if p in flags else flag


def _those(flags: dict[nn.Parameter, Tensor]) -> set[nn.Parameter]:
    values = torch.stack([*flags.values()]).tolist() if flags else []
    return {p for p, value in zip(flags, values, strict=True) if value}


def _is_asked_to_move(gradient: Tensor, lr: float | Tensor | None) -> Tensor:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    flag = values.any()
    return flag if lr is None else flag & (lr.to(flag.device) != 0 if isinstance(lr, Tensor) else lr != 0)


def _checksum(parameter: nn.Parameter) -> Tensor:
    """Two sums over the values, shape (2,): changes that cancel in one of them do not cancel in the other."""
    values = parameter.detach()
    values = torch.view_as_real(values) if values.is_complex() else values
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    # In parts: some devices copy what they sum up in another dtype.
    parts = torch.split(values.reshape(-1), _PART)
    sums = [torch.stack([part.sum(dtype=dtype), torch.linalg.vector_norm(part, dtype=dtype)]) for part in parts]
    return torch.stack(sums).sum(dim=0)
