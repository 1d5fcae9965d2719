"""Bytes of optimizer state, found by one step of a throw-away instance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hift.engine.optimizer_twin import bare_twin
from lightning_hift.offload.sharded_tensors import local_shape
from lightning_hift.offload.state_tree import flatten_state

_PROBE_NUMEL = 2**22


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one parameter's optimizer state that move with its group, and of what stays on the host."""

    device: int = 0
    host: int = 0


def state_bytes(
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
    parameters: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> list[StateBytes]:
    """Bytes of state that an optimizer will keep for each of ``parameters``, found by one throw-away step.

    The step is made on tensors of the same shapes without memory. Where it needs values, it is made on small tensors:
    along its longest dimension a large parameter is cut to two lengths, and the bytes are continued in a straight line,
    which is right for state per element, per block of elements and per row or column alike.

    Args:
        make_optimizer: Builds the optimizer from parameters.
        parameters: On any device, "meta" included; they are not touched.
        dtype: Dtype in which they will be stepped (that of master weights); default: their own.

    Raises:
        RuntimeError: The optimizer cannot be stepped once on such parameters.
    """
    kinds = {(tuple(local_shape(p)), dtype or p.dtype): StateBytes() for p in parameters}
    for shape, kind in kinds:
        kinds[shape, kind] = _state_bytes_of(make_optimizer, shape, kind)
    return [kinds[tuple(local_shape(p)), dtype or p.dtype] for p in parameters]


def live_state_bytes(optimizer: Optimizer, dtype: torch.dtype | None = None) -> dict[nn.Parameter, StateBytes]:
    """``state_bytes`` for each parameter of an optimizer that exists, with the options of its groups; see there.

    The optimizer itself is neither stepped nor changed.
    """
    found: dict[nn.Parameter, StateBytes] = {}
    for group in optimizer.param_groups:
        measured = state_bytes(partial(probing_twin, optimizer, group), group["params"], dtype)
        found.update(zip(group["params"], measured, strict=True))
    return found


def _state_bytes_of(
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer], shape: tuple[int, ...], dtype: torch.dtype
) -> StateBytes:
    try:
        return _measure(make_optimizer, make_probe(shape, dtype, "meta"))
    except Exception:  # whatever a kernel or a check says about tensors without values
        pass
    lengths, cut = _lengths(shape)
    try:
        measured = [_measure(make_optimizer, make_probe(cut(length), dtype, "cpu")) for length in lengths]
    except Exception as error:
        raise RuntimeError(
            f"The bytes of optimizer state are unknown: a step on one parameter of shape {shape} failed with"
            f" {type(error).__name__}: {error}"
        ) from error
    if len(lengths) == 1:
        return measured[0]
    (short, long), (first, second) = lengths, measured
    slope = (second.device - first.device) / (long - short)
    return StateBytes(round(first.device + slope * (max(shape) - short)), second.host)


def _lengths(shape: tuple[int, ...]) -> tuple[list[int], Callable[[int], tuple[int, ...]]]:
    numel = torch.Size(shape).numel()
    if numel <= _PROBE_NUMEL:
        return [max(shape, default=1)], lambda length: shape
    longest = shape.index(max(shape))
    length = max(2, _PROBE_NUMEL // (numel // shape[longest]))
    length -= length % 512 if length > 512 else 0  # whole blocks of block-wise quantized state, in both lengths
    return [length // 2, length], lambda n: (*shape[:longest], n, *shape[longest + 1 :])


def make_probe(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> nn.Parameter:
    """A parameter with a gradient, to try out an optimizer on."""
    probe = nn.Parameter(torch.full(shape, 1e-3, dtype=dtype, device=device))
    probe.grad = torch.full_like(probe, 1e-3)
    return probe


def _measure(make_optimizer: Callable[[list[nn.Parameter]], Optimizer], probe: nn.Parameter) -> StateBytes:
    optimizer = make_optimizer([probe])
    step_probe(optimizer)
    device = host = 0
    for t in flatten_state(optimizer.state.get(probe, {})).tensors:
        counter = t.ndim == 0 and t.device.type == "cpu"  # torch keeps step counters on the host
        device, host = (device, host + t.nbytes) if counter else (device + t.nbytes, host)
    return StateBytes(device, host)


def probing_twin(optimizer: Optimizer, group: Mapping[str, Any], probes: list[nn.Parameter]) -> Optimizer:
    """An optimizer like ``optimizer``, with the options of one of its ``param_groups``, over ``probes``."""
    twin = bare_twin(optimizer)
    # Kernels for one device only do not change what is kept.
    plain = {k: False for k in ("fused", "capturable") if group.get(k)}
    twin.param_groups = [{**group, **plain, "params": probes}]
    return twin


def step_probe(optimizer: Optimizer) -> None:
    """One step, which nobody else notices."""
    step: Any = type(optimizer).step
    arguments: list[Any] = [optimizer]
    if not getattr(optimizer, "needs_gradient", True):
        optimizer.zero_grad()
        arguments.append(lambda: torch.zeros(()))
    # Hooks that were set for all optimizers must not see a probe, and nothing is worth compiling for one step.
    with torch.compiler.set_stance("force_eager"):
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(*arguments)
