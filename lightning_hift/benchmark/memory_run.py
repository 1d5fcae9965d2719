"""One row, measured in this process, which does nothing else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_hift.benchmark.correctness import compare_weights
from lightning_hift.benchmark.kinds import Skipped
from lightning_hift.benchmark.memory_plan import PlannedRow
from lightning_hift.benchmark.memory_rows import MODELS
from lightning_hift.groups.grouping import find_layer_units
from lightning_hift.planner.memory import process_memory
from lightning_hift.plugin.callback import HiFTCallback, find_callback
from lightning_hift.plugin.strategy import HiFTStrategy
from lightning_hift.tasks import CausalLM

_REFERENCE_WARM_UP, _REFERENCE_STEPS = 3, 10
_ARENA = "RssShmem"  # it consists of anonymous shared mappings


def run_row(planned: PlannedRow, device: torch.device, max_steps: int | None = None) -> dict[str, Any]:
    """Measured values by name: bytes, seconds, milliseconds, shares, counts.

    Args:
        planned: The row.
        device: Where to train.
        max_steps: Measure no more steps than that, and warm up with no more; default: one whole sweep each.

    Raises:
        Skipped: A package or a device that the row needs is missing.
    """
    row = planned.row
    if row.name == "check-cpu" and device.type == "cpu":
        raise Skipped("there is no other device to compare with the CPU")
    if row.kind == "check":
        return compare_weights(row.name.removeprefix("check-"), device, small=device.type == "cpu")
    before = DeviceUse.now(device)
    if row.cap is not None and device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(row.cap / torch.cuda.get_device_properties(device).total_memory)
    train = _train_with_hift if row.kind == "hift" else _train_all_parameters
    measured = train(planned, device, max_steps)
    tokens = row.setup.batch_size * row.setup.sequence_length
    measured["tokens_per_second"] = tokens / measured["seconds_per_step"]
    if "exposed_ms" in measured:
        measured["exposed_share"] = measured["exposed_ms"] / 1000 / measured["seconds_per_step"]
    if measured.get("device_used") is not None:
        measured["device_used_before"] = before.used
    if planned.allocated is not None and measured.get("allocated"):
        measured["planner_error"] = planned.allocated / measured["allocated"] - 1
    return {name: value for name, value in measured.items() if value is not None}


@dataclass(frozen=True)
class DeviceUse:
    """Bytes in use on the device, by whomever, as the driver counts them; ``None`` on a CPU."""

    used: int | None

    @classmethod
    def now(cls, device: torch.device) -> DeviceUse:
        if device.type != "cuda":
            return cls(None)
        free, total = torch.cuda.mem_get_info(device)
        return cls(total - free)


def _peaks(device: torch.device) -> dict[str, int | None]:
    on_gpu = device.type == "cuda"
    return {
        "allocated": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "reserved": torch.cuda.max_memory_reserved(device) if on_gpu else None,
        "device_used": DeviceUse.now(device).used,
    }


# --- the model and its data -------------------------------------------------------------------------------------------


class _CheapRandom(TorchFunctionMode):
    """Fills weights from one short random stretch, over and over: 7B normal numbers would take minutes."""

    def __init__(self) -> None:
        super().__init__()
        self._values = 0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return func(*args, **(kwargs or {}))
        flat = args[0].detach().view(-1)
        for part in flat.split(len(self._values)):
            part.copy_(self._values[: len(part)])
        return args[0]


def build_module(planned: PlannedRow) -> CausalLM:
    """The row's model with weights in 32 bits on the host."""
    row = planned.row
    module = CausalLM(
        model_type="llama",
        model_config={**MODELS[row.model], "num_hidden_layers": planned.layers},
        optimizer=_optimizer(row.setup.eight_bit),
        loss_chunk_tokens=row.chunk_tokens,
    )
    with _CheapRandom():
        module.configure_model()
    return module


def _optimizer(eight_bit: bool) -> Any:
    if not eight_bit:
        return lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise Skipped("torchao is not installed") from error
    return lambda parameters: AdamW8bit(parameters, lr=1e-5)


def _batch(planned: PlannedRow) -> dict[str, Tensor]:
    setup, generator = planned.row.setup, torch.Generator().manual_seed(0)
    vocabulary = MODELS[planned.row.model]["vocab_size"]
    return {"input_ids": torch.randint(vocabulary, (setup.batch_size, setup.sequence_length), generator=generator)}


# --- HiFT -------------------------------------------------------------------------------------------------------------


@dataclass
class _Meter(pl.Callback):
    """Measures the steps after the warm-up, and what is in use when the last one has ended."""

    warm_up: int
    steps: int
    device: torch.device
    shared_before: int | None
    measured: dict[str, Any] = field(default_factory=dict)
    _exposed: list[float] = field(default_factory=list)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.warm_up:
            _wait(self.device)
            self._since = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        hift = find_callback(trainer)
        assert hift is not None
        (engine,) = hift.engines
        if batch_idx >= self.warm_up:
            self._exposed.append(engine.offloader.exposed_ms())
        if batch_idx < self.warm_up + self.steps - 1:
            return
        _wait(self.device)
        seconds = time.perf_counter() - self._since
        self.measured = {
            "seconds_per_step": seconds / self.steps,
            "steps": self.steps,
            "loss": float(trainer.callback_metrics["train_loss"]),
            "exposed_ms": sum(self._exposed) / len(self._exposed),
            **_peaks(self.device),
            **self._host(engine.offloader.host_bytes),
        }
        if self.device.type == "cuda" and trainer.strategy.activation_budget is None:  # type: ignore[attr-defined]
            parts = _sum_of_parts(trainer, pl_module, batch, engine)
            self.measured["peak_over_parts"] = self.measured["allocated"] / parts

    def _host(self, exact: int) -> dict[str, Any]:
        shared = process_memory(_ARENA)
        if self.device.type == "cpu" or shared is None or self.shared_before is None:
            return {"host_exact": exact}  # host and device are the same memory: there is no arena
        arena = shared - self.shared_before
        return {"host_exact": exact, "host_arena": arena, "host_over_exact": arena / exact}


def _train_with_hift(planned: PlannedRow, device: torch.device, max_steps: int | None) -> dict[str, Any]:
    setup = planned.row.setup
    module = build_module(planned)
    sweep = len(find_layer_units(module))
    steps = min(sweep, max_steps or sweep)
    meter = _Meter(steps, steps, device, process_memory(_ARENA))
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=1,
        precision=setup.precision,  # type: ignore[arg-type]
        strategy=HiFTStrategy(
            offload=setup.offload,
            prefetch=setup.prefetch,
            master_weights=setup.master_weights,
            max_group_numel=setup.max_group_numel,
            activation_budget=setup.activation_budget,
        ),
        callbacks=[HiFTCallback(setup.group_size, steps_per_group=1, always_active=[]), meter],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = [_batch(planned)] * (2 * steps)
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return meter.measured


def _sum_of_parts(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, engine: Any) -> int:
    """Weights, gradients of the active group, one slot, and activations as measured without anything else.

    The largest sum over the groups among which the peak is: the ends, and the lowest block.
    """
    weights = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    slot = engine.offloader.device_bytes
    sums: list[int] = []
    for index in (0, 1, -1):
        active = list(engine.groups[index].parameters.values())
        activations = _measured_activations(trainer, module, batch, active)
        sums.append(weights + slot + sum(p.nbytes for p in active) + activations)
    return max(sums)


def _measured_activations(
    trainer: pl.Trainer, module: pl.LightningModule, batch: Any, active: Sequence[nn.Parameter]
) -> int:
    """Peak of forward and backward beyond the gradients; leaves no gradients."""
    for p in module.parameters():
        p.grad = None
        p.requires_grad_(False)
    for p in active:
        p.requires_grad_(True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with trainer.precision_plugin.forward_context():
        module({**batch, "labels": batch["input_ids"]}).loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = sum(p.grad.nbytes for p in active if p.grad is not None)
    for p in active:
        p.grad = None
    return int(peak - gradients)


# --- the references ---------------------------------------------------------------------------------------------------


def _train_all_parameters(planned: PlannedRow, device: torch.device, max_steps: int | None) -> dict[str, Any]:
    """All parameters in bf16, in a plain loop: no framework takes part in what HiFT is measured against."""
    make = _offloading_optimizer(device) if planned.row.kind == "cpu_offload" else _optimizer(eight_bit=False)
    network: Any = build_module(planned).network
    network.to(device, torch.bfloat16).train()
    optimizer = make(network.parameters())
    batch = {name: value.to(device) for name, value in _batch(planned).items()}
    steps = min(_REFERENCE_STEPS, max_steps or _REFERENCE_STEPS)
    for step in range(_REFERENCE_WARM_UP + steps):
        if step == _REFERENCE_WARM_UP:
            _wait(device)
            since = time.perf_counter()
        loss = network(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    _wait(device)
    seconds = (time.perf_counter() - since) / steps
    return {"seconds_per_step": seconds, "steps": steps, "loss": float(loss.detach()), **_peaks(device)}


def _offloading_optimizer(device: torch.device) -> Any:
    if device.type != "cuda":
        raise Skipped("CPUOffloadOptimizer needs a CUDA device")
    try:
        from torchao.optim import CPUOffloadOptimizer
    except ImportError as error:
        raise Skipped("torchao is not installed") from error
    return lambda parameters: CPUOffloadOptimizer(parameters, torch.optim.AdamW, lr=1e-5, fused=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
