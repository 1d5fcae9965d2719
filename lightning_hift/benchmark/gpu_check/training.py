"""Memory and speed of one large model: trained with HiFT, and all parameters at once for comparison."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_hift.benchmark.gpu_check.measuring import page_locking
from lightning_hift.benchmark.gpu_check.networks import (
    build_network,
    next_token_loss,
    random_tokens,
    set_checkpointing,
)
from lightning_hift.benchmark.gpu_check.profiling import profile
from lightning_hift.benchmark.gpu_check.sizes import ModelSize, Shape
from lightning_hift.benchmark.gpu_check.stage import Context, Measure
from lightning_hift.benchmark.kinds import Skipped
from lightning_hift.engine.engine import HiFTEngine
from lightning_hift.engine.options import PUBLISHED
from lightning_hift.offload.offloader import StateOffloader
from lightning_hift.planner.memory import available_host_memory, process_memory
from lightning_hift.table import format_bytes

ATTACH, FREED, PROFILE = "hift, first sweep", "hift, closed", "hift, profile"
_STATE_BYTES = 10  # per parameter: two moments in float32, and the remainder of a master in 16 bits
_LEARNING_RATE = 1e-5
_NO_MODEL = f"there is no model: see {ATTACH!r}"


class LargeModel:
    """HiFT (bfloat16, masters as remainders, state on the host) and full fine-tuning (bfloat16, plain AdamW).

    Both step with the fused AdamW, with and without activation checkpointing: where full fine-tuning fits only with it,
    there is still something to compare with.
    """

    def __init__(self, context: Context, size: ModelSize) -> None:
        self._context, self._size = context, size
        self._hift = Training(context, size, with_hift=True)
        self._full = Training(context, size, with_hift=False)

    @property
    def config(self) -> Mapping[str, Any]:
        told = {"warm_up_steps": self._context.sizes.warm_up, "learning_rate": _LEARNING_RATE}
        return {**asdict(self._size), **told, "dtype": "bfloat16", "master_weights": "split", "offload": "host"}

    def cells(self) -> Mapping[str, Measure]:
        first, *_ = self._size.shapes
        ways = [(shape, on) for shape in self._size.shapes for on in (False, True)]
        return {
            ATTACH: self._hift.attach,
            **{_cell_name("hift", *way): partial(self._hift.measure, *way) for way in ways},
            **({PROFILE: partial(self._hift.profile, first)} if self._size.profiled else {}),
            FREED: self._hift.close,
            **{_cell_name("full", *way): partial(self._measure_full, *way) for way in ways},
        }

    def close(self) -> None:
        self._hift.close()
        self._full.close()

    def _measure_full(self, shape: Shape, checkpointed: bool) -> Mapping[str, Any]:
        self._hift.close()  # in case its last cell had no time
        if self._full.network is None:
            self._full.build()
        return self._full.measure(shape, checkpointed)


def _cell_name(method: str, shape: Shape, checkpointed: bool) -> str:
    return f"{method}, {shape}" + ", checkpointed" * checkpointed


class Training:
    """One model with its optimizer.

    Args:
        context: Where and how long.
        size: Of the model.
        with_hift: Whether an engine is attached, by ``attach``; otherwise ``build`` is enough.
    """

    def __init__(self, context: Context, size: ModelSize, with_hift: bool) -> None:
        self._context, self._size, self._meter, self._with_hift = context, size, context.meter, with_hift
        self.network: Any = None
        self._optimizer: Any = None
        self._engine: HiFTEngine | None = None

    def build(self) -> None:
        """The model and a plain AdamW, on the device."""
        self.network = build_network(self._size.fields, self._context.device, torch.bfloat16, self._context.seed)
        self._optimizer = torch.optim.AdamW(self.network.parameters(), lr=_LEARNING_RATE, fused=True)

    def attach(self) -> Mapping[str, Any]:
        """Build all, attach an engine, and train for one sweep, after which all state has its place on the host.

        Raises:
            Skipped: The host has too little memory, or no time is left; nothing stays.
        """
        try:
            return self._attach()
        except BaseException:
            self.close()
            raise

    def _attach(self) -> Mapping[str, Any]:
        device, before = self._context.device, _host_memory()
        begin = time.perf_counter()
        self.build()
        self._meter.synchronize()
        built = time.perf_counter()
        _refuse_small_host(sum(p.numel() for p in self.network.parameters()))
        with page_locking(device) as locked:
            self._engine = HiFTEngine.attach(
                self.network,
                self._optimizer,
                make_offloader=lambda: StateOffloader(device, offload="host"),
                master_weights="split",
                **PUBLISHED,
            )
            attached = time.perf_counter()
            set_checkpointing(self.network, True)  # whatever fits later on fits now
            batch = self._batch(self._size.shapes[0])
            for _ in self._engine.groups:
                self._context.budget.check()
                self._step(batch)
            self._meter.synchronize()
        end = time.perf_counter()
        return {
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "groups": len(self._engine.groups),
            "build_seconds": built - begin,
            "attach_seconds": attached - built,
            "first_sweep_seconds": end - attached,
            "page_lock": asdict(locked),
            "host_bytes": self._engine.offloader.host_bytes,
            "before": before,
            "after": _host_memory(),
        }

    def measure(self, shape: Shape, checkpointed: bool) -> Mapping[str, Any]:
        """Steps of one shape: of HiFT for a sweep, which a few steps of warm-up have begun.

        A mark follows each step on the compute stream, and the host is at most one step ahead of the last one.
        """
        engine, meter, sizes = self._engine, self._meter, self._context.sizes
        batch = self._start(shape, checkpointed)
        losses: list[Tensor] = []
        trained: list[str] = []
        exposed: list[float] = []
        begin, marks = time.perf_counter(), [meter.mark()]
        for index in range(sizes.full_steps if engine is None else len(engine.groups)):
            self._context.budget.check()
            trained.append("all" if engine is None else f"{engine.active_group.index}: {engine.active_group.name}")
            losses = [*losses[:1], self._step(batch)]
            marks.append(meter.mark())
            meter.wait_for(marks[index])
            if engine is not None and index:
                exposed.append(engine.offloader.exposed_ms())
        meter.synchronize()
        seconds = time.perf_counter() - begin
        if engine is not None:
            exposed.append(engine.offloader.exposed_ms())
        ms = [meter.ms_between(*pair) for pair in pairwise(marks)]
        return {
            "shape": shape,
            "checkpointed": checkpointed,
            "steps": len(ms),
            "step_ms_median": statistics.median(ms),
            "step_ms_mean": statistics.mean(ms),
            "step_ms": list(zip(trained, ms, strict=True)),
            "tokens_per_second": len(ms) * batch.numel() / seconds,
            "losses": [loss.item() for loss in losses],
            **({} if engine is None else {"exposed_ms_mean": statistics.mean(exposed), "exposed_ms": exposed}),
            **meter.peaks(),
            **self._bytes(),
        }

    def profile(self, shape: Shape) -> Mapping[str, Any]:
        """Time by range and by kernel over one sweep with activation checkpointing."""
        batch = self._start(shape, checkpointed=True)
        assert self._engine is not None
        steps = len(self._engine.groups)
        return {"shape": shape, "of": steps, **profile(lambda: self._step(batch), steps, self._context)}

    def close(self) -> Mapping[str, Any]:
        """Free the device and the host, and say what the process still holds."""
        if self._engine is not None:
            self._engine.close()
        self.network = self._optimizer = self._engine = None
        self._meter.free()
        return {"after": _host_memory()}

    def _start(self, shape: Shape, checkpointed: bool) -> Tensor:
        """Warm up, and return the batch; peaks count from before the warm-up."""
        if self.network is None or (self._with_hift and self._engine is None):
            raise Skipped(_NO_MODEL)
        set_checkpointing(self.network, checkpointed)
        self._optimizer.zero_grad()  # a step that did not fit has left gradients
        batch = self._batch(shape)
        self._meter.reset_peaks()
        for _ in range(self._context.sizes.warm_up):
            self._step(batch)
        self._meter.synchronize()
        return batch

    def _batch(self, shape: Shape) -> Tensor:
        (batch,) = random_tokens(self._size.fields, shape, 1, self._context.device, self._context.seed)
        return batch

    def _step(self, batch: Tensor) -> Tensor:
        loss = next_token_loss(self.network, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        if self._engine is None:
            self._optimizer.zero_grad()
        return loss.detach()

    def _bytes(self) -> Mapping[str, int]:
        """Of weights, of the largest gradients at once, and of state."""
        weights = sum(t.nbytes for t in (*self.network.parameters(), *self.network.buffers()))
        if self._engine is None:
            gradients = sum(p.nbytes for p in self.network.parameters())
            state = sum(t.nbytes for each in self._optimizer.state.values() for t in each.values())
            return {"weight_bytes": weights, "gradient_bytes": gradients, "state_bytes_device": state}
        gradients = max(sum(p.nbytes for p in group.parameters.values()) for group in self._engine.groups)
        offloader = self._engine.offloader
        found = {"state_bytes_device": offloader.device_bytes, "state_bytes_host": offloader.host_bytes}
        return {"weight_bytes": weights, "gradient_bytes": gradients, **found}


def _host_memory() -> dict[str, int | None]:
    """Resident bytes of this process, and bytes that can still be had."""
    return {"resident": process_memory("VmRSS"), "available": available_host_memory()}


def _refuse_small_host(numel: int) -> None:
    """Skip what the system would end the whole process for."""
    needed, there = _STATE_BYTES * numel, available_host_memory()
    if there is not None and needed > there:
        raise Skipped(f"the state takes {format_bytes(needed)} of host memory, and {format_bytes(there)} are free")
