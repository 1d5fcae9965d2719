"""Where the state lives changes no number, and neither does a resume: weights and state are compared bit for bit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_hift.benchmark.gpu_check.networks import build_network, next_token_loss, random_tokens
from lightning_hift.benchmark.gpu_check.stage import Context, Measure
from lightning_hift.engine.engine import HiFTEngine
from lightning_hift.engine.options import PUBLISHED
from lightning_hift.offload.offloader import Offload, StateOffloader

_LEARNING_RATE = 1e-3
_BATCHES = 8
_MOST_NAMES = 3
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers, by bytes


@dataclass(frozen=True)
class Case:
    """One run, which has to end as the same run with ``offload="none"`` does. With ``"none"`` it repeats that one.

    Args:
        weights: ``"fp32"``, or ``"bf16, split"``: bfloat16 with float32 masters as remainders.
        optimizer: Implementation of AdamW.
        offload: Where the state lives.
        prefetch: Whether it is fetched ahead of its use.
        resumed: Whether all is saved after half the steps, and loaded into a new model and engine.
    """

    weights: Literal["fp32", "bf16, split"]
    optimizer: Literal["plain", "foreach", "fused"] = "fused"
    offload: Offload = "host"
    prefetch: bool = True
    resumed: bool = False

    @property
    def name(self) -> str:
        """For the report."""
        words = [self.weights, self.optimizer, self.offload]
        return ", ".join(words + ["no prefetch"] * (not self.prefetch) + ["resumed"] * self.resumed)

    @property
    def reference(self) -> Case:
        """The run that it is compared with."""
        return replace(self, offload="none", prefetch=True, resumed=False)


def make_cases() -> list[Case]:
    """The most important first; those with the same reference follow one another."""
    by_weights = [Case("fp32"), Case("bf16, split")]
    near = [
        each
        for case in by_weights
        for each in (case.reference, case, replace(case, prefetch=False), replace(case, resumed=True))
    ]
    disk = [replace(case, offload="disk") for case in by_weights]
    others = [replace(case, optimizer=name) for name in ("foreach", "plain") for case in by_weights]
    return near + disk + others


class Ended(NamedTuple):
    """What a run left: tensors on the host and plain values by path, and its first and last loss."""

    values: dict[str, Any]
    losses: tuple[float, float]


class Correctness:
    """Runs of a small transformer, each beside one whose state stays on the device."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._reference: tuple[Any, Ended] | None = None  # the last one, with what it is the reference of

    @property
    def config(self) -> Mapping[str, Any]:
        sizes = self._context.sizes
        told = {name: getattr(sizes, name) for name in ("steps", "wide", "narrow", "batch")}
        return {**told, "learning_rate": _LEARNING_RATE, "warm_up_steps": 0, "deterministic": True}

    def cells(self) -> Mapping[str, Measure]:
        return {case.name: partial(self._compare, case) for case in make_cases()}

    def close(self) -> None:
        self._reference = None

    def _compare(self, case: Case) -> Mapping[str, Any]:
        on_disk = case.offload == "disk"
        key = (case.reference, on_disk)
        with tempfile.TemporaryDirectory(dir=self._context.folder) as folder, deterministic():
            if self._reference is None or self._reference[0] != key:
                self._reference = None
                self._reference = key, train(case.reference, self._context, Path(folder), on_disk)
            expected, found = self._reference[1], train(case, self._context, Path(folder), on_disk)
        differing, compared, names = count_differing(expected.values, found.values)
        finite = all(abs(loss) < float("inf") for loss in (*found.losses, *expected.losses))
        return {
            "equal": differing == 0 and finite,
            "differing": differing,
            "compared": compared,
            "first_differing": names,
            "steps": self._context.sizes.steps,
            "losses": found.losses,
            "case": asdict(case),
        }


@contextmanager
def deterministic() -> Iterator[None]:
    """Take operations whose result does not depend on timing, and warn of others; the cells with "none" show them."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def train(case: Case, context: Context, folder: Path, narrow: bool = False) -> Ended:
    """Train a small transformer.

    Args:
        case: How.
        context: Where and how long. No step waits for the device, so the host runs ahead as it does in real runs.
        folder: For the files of ``"disk"`` and for a checkpoint.
        narrow: Take the narrow model.
    """
    sizes, device = context.sizes, context.device
    fields = sizes.narrow if narrow else sizes.wide
    batches = random_tokens(fields, sizes.batch, _BATCHES, device, context.seed)
    run = _Run(case, fields, device, folder, context.seed)
    losses: list[Tensor] = []
    for step in range(sizes.steps):
        context.budget.check()
        if case.resumed and step == sizes.steps // 2:
            run = _resume(run, context)
        loss = next_token_loss(run.network, batches[step % _BATCHES])
        loss.backward()  # type: ignore[no-untyped-call]
        run.optimizer.step()
        losses = [*losses[:1], loss.detach()]
    values = dict(_flatten(run.state()))
    run.engine.close()
    return Ended(values, (losses[0].item(), losses[-1].item()))


class _Run:
    """Model, optimizer and engine of a case."""

    def __init__(self, case: Case, fields: Mapping[str, Any], device: torch.device, folder: Path, seed: int) -> None:
        self.case, self.fields, self.folder = case, fields, folder
        dtype = torch.float32 if case.weights == "fp32" else torch.bfloat16
        self.network = build_network(fields, device, dtype, seed, attention="eager")
        foreach, fused = (case.optimizer == name for name in ("foreach", "fused"))
        parameters = self.network.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, foreach=foreach, fused=fused)
        directory = folder if case.offload == "disk" else None
        self.engine = HiFTEngine.attach(
            self.network,
            self.optimizer,
            make_offloader=lambda: StateOffloader(
                device, offload=case.offload, prefetch=case.prefetch, directory=directory
            ),
            master_weights="none" if case.weights == "fp32" else "split",
            **PUBLISHED,
        )

    def state(self) -> dict[str, Any]:
        """All that a checkpoint has."""
        return {"weights": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}


def _resume(run: _Run, context: Context) -> _Run:
    """Save to a file, and load into a model of other weights."""
    path = run.folder / "checkpoint.pt"
    torch.save(run.state(), path)
    run.engine.close()
    resumed = _Run(run.case, run.fields, context.device, run.folder, context.seed + 1)
    saved = torch.load(path, map_location="cpu", weights_only=True)
    path.unlink()
    resumed.network.load_state_dict(saved["weights"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    return resumed


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested containers by path, tensors as copies on the host."""
    if isinstance(value, Mapping):
        for key in value:
            yield from _flatten(value[key], f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from _flatten(each, f"{path}/{index}")
    else:
        yield path, value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def count_differing(expected: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[int, int, Sequence[str]]:
    """Elements that differ in a bit, elements that were compared, and the first paths that differ."""
    differing, compared, names = 0, 0, []
    for path in sorted(expected.keys() | found.keys()):
        count = _differing(expected.get(path), found.get(path))
        value = expected.get(path)
        compared += value.numel() if isinstance(value, Tensor) else 1
        differing += count
        if count:
            names.append(path)
    return differing, compared, names[:_MOST_NAMES]


def _differing(a: Any, b: Any) -> int:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return int(isinstance(a, Tensor) != isinstance(b, Tensor) or a != b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return max(1, a.numel())
    bits = _BITS[a.dtype.itemsize]
    return 0 if torch.equal(a.view(bits), b.view(bits)) else int((a.view(bits) != b.view(bits)).sum())
