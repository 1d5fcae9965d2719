"""Processes that train one model together have to agree: about what they run, and in every weight."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hift.groups.grouping import list_names
from lightning_hift.plugin.callback import HiFTCallback
from lightning_hift.plugin.offloading import OffloadingStrategy

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_LONGEST = 200  # characters of a value in a message


def describe_run(strategy: OffloadingStrategy, callback: HiFTCallback) -> dict[str, Any]:
    """What a process is about to run, for ``check_agreement``."""
    module = strategy.lightning_module
    assert module is not None
    return {
        "the version of torch": torch.__version__,
        "the code of lightning_hift": _hash_of(*sorted(Path(__file__).parents[1].rglob("*.py"))),
        "the code of the module": _hash_of(*_files_of(type(module))),
        "precision": str(strategy.precision_plugin.precision),
        "how state is kept": (
            strategy.options.offload,
            strategy.options.master_weights,
            strategy.options.max_group_numel,
            strategy.num_parts,
        ),
        "hold_lr": callback.hold_lr,
        "parameters": [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in module.named_parameters()],
        "layer groups": [engine._fingerprint() for engine in callback.engines],
        "optimizers": [_described(engine.optimizer) for engine in callback.engines],
    }


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Compare what each process is about to run, in plain values, with what the first one is.

    Raises:
        RuntimeError: In all processes: they differ. The message names the processes and the first difference.
    """
    everyone = _of_everyone(dict(facts))
    first = everyone[0]
    others = [rank for rank, theirs in enumerate(everyone) if theirs != first]
    if not others:
        return
    theirs = everyone[others[0]]
    key = next(key for key in {**first, **theirs} if first.get(key) != theirs.get(key))
    raise RuntimeError(
        f"Process {', '.join(map(str, others))} differs from process 0 in {key}: {_shortened(theirs.get(key))} against"
        f" {_shortened(first.get(key))}. All processes must run the same code with the same configuration."
    )


def check_batch_counts(counts: Sequence[int | float], what: str) -> None:
    """Compare how many batches the processes are about to run through.

    Args:
        counts: For each data loader of this process; infinite where it does not tell.
        what: They are to ..., for the message.

    Raises:
        RuntimeError: In all processes: they differ, so that some would wait for the others without end.
    """
    everyone = _of_everyone(list(counts))
    rank = next((rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]), None)
    if rank is not None:
        raise RuntimeError(
            f"Process 0 has {everyone[0]} batches to {what}, process {rank} has {everyone[rank]}. With sharded weights"
            " each batch needs all processes, and they would wait for each other without end. Use another batch_size,"
            " with which all have the same number of batches, or give all of them as many rows."
        )


def check_identical(parameters: Mapping[str, nn.Parameter], step: int) -> None:
    """Compare sums of the bits of weights over processes, which takes little time and 8 bytes per parameter.

    Args:
        parameters: By name, the same ones in the same order in all processes.
        step: For the message.

    Raises:
        RuntimeError: In all processes: they differ.
    """
    mine = torch.stack([_sum_of_bits(p) for p in parameters.values()])
    first = mine.clone()
    dist.broadcast(first, 0)
    differs = (mine != first).to(torch.uint8)
    dist.all_reduce(differs, dist.ReduceOp.MAX)
    if bool(differs.any()):
        names = [name for name, differ in zip(parameters, differs.tolist(), strict=True) if differ]
        raise RuntimeError(
            f"After step {step} the processes have different weights in {list_names(names)}. Something is stepped or"
            " set in one process and not in the others, or is drawn at random by each of them. Mend that, and resume"
            " from the last checkpoint."
        )


def _of_everyone(value: Any) -> list[Any]:
    """What each process gives, in the order of their ranks."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _sum_of_bits(p: Tensor) -> Tensor:
    return p.detach().contiguous().view(_INTEGERS[p.element_size()]).sum(dtype=torch.int64)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _described(optimizer: Optimizer) -> tuple[str, list[dict[str, str]]]:
    groups = [{k: str(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return type(optimizer).__name__, groups


def _files_of(kind: type) -> list[Path]:
    """Where a class and its bases are written, as far as they are in files."""
    found = []
    for each in kind.__mro__:
        try:
            found.append(Path(inspect.getfile(each)))
        except (TypeError, OSError):  # built in, or typed in
            continue
    return [path for path in found if path.exists()]


def _hash_of(*files: Path) -> str:
    told = hashlib.sha256()
    for path in files:
        told.update(path.name.encode() + path.read_bytes())
    return told.hexdigest()[:12]
