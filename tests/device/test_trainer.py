"""Strategy and callback in the Trainer: on the device as on the CPU, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_hift import HFT, BAdam, HiFTCallback, HiFTStrategy
from tests.matrices import crossed
from tests.models import Automatic, Manual, ResumableLoader, as_published, assert_same_weights, loader, tokens, trainer

pytestmark = pytest.mark.device

WAYS = ["callback", "strategy", "both"]
PRECISIONS: dict[str, dict[str, Any]] = {
    "32": {},
    "bf16": {"precision": "bf16-true"},
    "bf16_full": {"precision": "bf16-true", "strategy": {"master_weights": "full"}},
    "bf16_none": {"precision": "bf16-true", "strategy": {"master_weights": "none"}},
    "16": {"precision": "16-true"},
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "host": {},
    "late": {"prefetch": False},
    "pageable": {"pin_memory": False},
    "resident": {"offload": "none"},
    "slices": {"max_group_numel": 100},
    "budget": {"activation_budget": "30KiB"},
}
TURNS: dict[str, Callable[[], HiFTCallback]] = {
    "published": as_published,
    "defaults": HiFTCallback,
    "pairs": lambda: HiFTCallback(group_size=2, steps_per_group=3, order="random"),
    "BAdam": lambda: HiFTCallback(policy=BAdam(3)),
    "HFT": lambda: HiFTCallback(policy=HFT(2)),
}


def fit(
    device: str,
    module: pl.LightningModule,
    way: str = "both",
    make_callback: Callable[[], HiFTCallback] = as_published,
    strategy: dict[str, Any] | None = None,
    data: Any = None,
    ckpt_path: Path | None = None,
    callbacks: Any = (),
    **options: Any,
) -> pl.LightningModule:
    """Train on ``device``."""
    if way != "callback":
        options["strategy"] = HiFTStrategy(**(strategy or {}))
    own = [] if way == "strategy" else [make_callback()]
    options = {"max_steps": 13, "max_epochs": -1, **options}
    run = trainer(accelerator=device, callbacks=[*callbacks, *own], **options)
    run.fit(module, data or loader(8), loader(2), ckpt_path=ckpt_path)
    return module.cpu()


@pytest.mark.parametrize(("module", "way"), crossed([Automatic, Manual], WAYS))
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=str)
def test_ways_in(module, way, options):
    if module is Manual:  # whose own they are
        on_cpu, on_device = (fit(device, Manual(**options), way) for device in ("cpu", "softgpu"))
    else:
        on_cpu, on_device = (fit(device, module(), way, **options) for device in ("cpu", "softgpu"))
    assert_same_weights(on_cpu, on_device)


@pytest.mark.parametrize(("turns", "precision", "strategy"), crossed(TURNS, PRECISIONS, STRATEGIES))
def test_options(turns, precision, strategy):
    options = {**PRECISIONS[precision]}
    options["strategy"] = {**STRATEGIES[strategy], **options.get("strategy", {})}
    on_cpu, on_device = (
        fit(device, Automatic(), make_callback=TURNS[turns], **options) for device in ("cpu", "softgpu")
    )
    assert_same_weights(on_cpu, on_device)


@pytest.mark.parametrize(("precision", "strategy"), crossed(PRECISIONS, STRATEGIES))
def test_resumed_equals_uninterrupted(precision, strategy, tmp_path):
    options = {**PRECISIONS[precision]}
    options["strategy"] = {**STRATEGIES[strategy], **options.get("strategy", {})}

    def run(**more: Any) -> pl.LightningModule:
        return fit("softgpu", Automatic(), data=ResumableLoader(tokens(20)), **options, **more)

    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=8)
    whole = run(callbacks=[saves], enable_checkpointing=True)
    assert_same_weights(whole, run(ckpt_path=tmp_path / "step=8.ckpt"))


def test_a_long_run_with_random_delays(softgpu):
    softgpu.set_delays(compute=(0, 20), side=(0, 500))
    options = {"data": ResumableLoader(tokens(200)), "strategy": {}}

    def run(device: str) -> pl.LightningModule:
        return fit(device, Automatic(lambda p: torch.optim.AdamW(p, lr=0.001, fused=True)), **options, max_steps=200)

    assert_same_weights(run("cpu"), run("softgpu"))
