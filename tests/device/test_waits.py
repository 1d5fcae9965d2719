"""The host waits for the device nowhere on the step path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_hift import HFT, LISA, BAdam, HiFTCallback, StateOffloader
from tests.matrices import crossed
from tests.models import (
    Automatic,
    Manual,
    Net,
    adamw,
    as_published,
    attach_published,
    loader,
    next_token_loss,
    tokens,
    trainer,
)

pytestmark = pytest.mark.device

WARM_UP = 14  # steps: first states, the proof of the first sweep
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "split": lambda: {"master_weights": "split"},
    "full": lambda: {"master_weights": "full"},
    "slices": lambda: {"max_group_numel": 100},
    "two_steps": lambda: {"steps_per_group": 2},
    "always_active": lambda: {"always_active": ["embedding"]},
    "BAdam": lambda: {"policy": BAdam(3)},
    "LISA": lambda: {"policy": LISA(2, 2)},
    "HFT": lambda: {"policy": HFT(3)},
}
PLACES: dict[str, dict[str, Any]] = {"early": {}, "late": {"prefetch": False}, "resident": {"offload": "none"}}


@pytest.mark.parametrize(("options", "place", "fused"), crossed(OPTIONS, PLACES, [False, True]))
def test_the_engine_waits_for_nothing(options, place, fused, softgpu):
    chosen = OPTIONS[options]()
    model = Net().to("softgpu", torch.bfloat16 if "master_weights" in chosen else torch.float32)
    engine = attach_published(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.01, fused=True) if fused else adamw(model.parameters()),
        make_offloader=lambda: StateOffloader("softgpu", **PLACES[place]),
        **chosen,
    )
    batches = [batch.to("softgpu") for batch in tokens(WARM_UP + 12)]
    for i, batch in enumerate(batches):
        if i == WARM_UP:
            softgpu.set_sync_debug_mode("warn")
        next_token_loss(model, batch).backward()
        engine.optimizer.step()
        engine.offloader.exposed_ms()
    found = list(softgpu.syncs)
    softgpu.set_sync_debug_mode("default")
    assert not found


class Listens(pl.Callback):
    """Lists host syncs after the warm-up."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def on_train_batch_end(self, run: pl.Trainer, *args: Any) -> None:
        if run.global_step == WARM_UP:
            self.device.set_sync_debug_mode("warn")

    def on_train_end(self, *args: Any) -> None:
        self.found = list(self.device.syncs)
        self.device.set_sync_debug_mode("default")


class Plain(Automatic):
    """Reads no value of the device itself."""

    def training_step(self, batch, batch_idx):
        return next_token_loss(self.net, batch)


@pytest.mark.parametrize("turns", [as_published, HiFTCallback])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("module", [Plain, Manual])
def test_the_trainer_waits_for_nothing(module, precision, turns, softgpu):
    listens = Listens(softgpu)
    run = trainer(
        accelerator="softgpu", strategy="hift", precision=precision, callbacks=[turns(), listens], log_every_n_steps=50
    )
    run.fit(module(), loader(WARM_UP + 12))
    assert not listens.found
