"""The engine in a plain loop: on the device as on the CPU, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_hift import HFT, LISA, BAdam, HiFTEngine, StateOffloader
from tests.matrices import crossed
from tests.models import Net, adamw, attach_published, next_token_loss, tokens

pytestmark = pytest.mark.device

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
}
TIERS = ["host", "disk", "none"]
TURNS: dict[str, Callable[[], dict[str, Any]]] = {
    "two_steps": lambda: {"steps_per_group": 2},
    "random": lambda: {"order": "random", "reshuffle": True, "group_size": 2},
    "always_active": lambda: {"always_active": ["embedding"]},
    "slices": lambda: {"max_group_numel": 100},
    "LISA": lambda: {"policy": LISA(2, 2)},
    "LISA_reset": lambda: {"policy": LISA(1, 3, "reset")},
    "BAdam": lambda: {"policy": BAdam(3)},
    "HFT": lambda: {"policy": HFT(2, "reset")},
}


def run(
    device: str,
    folder: Any,
    optimizer: str = "adamw",
    offload: Any = "host",
    prefetch: bool = True,
    pin_memory: bool = True,
    masters: Any = "none",
    resume_at: int | None = None,
    steps: int = 13,
    **options: Any,
) -> dict[str, Any]:
    """Weights and all that a checkpoint has, after some steps, and weights after one more step without HiFT."""

    def start() -> tuple[Net, HiFTEngine]:
        model = Net().to(device, torch.float32 if masters == "none" else torch.bfloat16)
        directory = folder if offload == "disk" else None
        return model, attach_published(
            model,
            OPTIMIZERS[optimizer](model.parameters()),
            make_offloader=lambda: StateOffloader(device, offload, prefetch, pin_memory, directory),
            master_weights=masters,
            **options,
        )

    model, engine = start()
    for i, batch in enumerate(tokens(steps)):
        if i == resume_at:
            torch.save((model.state_dict(), engine.optimizer.state_dict()), folder / "middle.pt")
            model, engine = start()
            weights, state = torch.load(folder / "middle.pt", map_location="cpu" if i % 2 else None)
            model.load_state_dict(weights)
            engine.optimizer.load_state_dict(state)
        next_token_loss(model, batch.to(device)).backward()
        engine.optimizer.step()
    found = copy.deepcopy({"weights": model.state_dict(), **engine.optimizer.state_dict()})
    engine.close()
    if masters == "none":
        next_token_loss(model, tokens(1)[0].to(device)).backward()
        engine.optimizer.step()
        found["afterwards"] = copy.deepcopy(model.state_dict())
    return found


def assert_equal(a: Any, b: Any, path: str = "") -> None:
    """Bit for bit, wherever the tensors are."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a.cpu(), b.cpu()), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{path}.{i}")
    else:
        assert a == b, path


def assert_as_on_the_cpu(folder: Any, make_options: Callable[[], dict[str, Any]] = dict, **options: Any) -> None:
    on_device, on_cpu = (run(d, folder, **options, **make_options()) for d in ("softgpu", "cpu"))
    assert_equal(on_cpu, on_device)


@pytest.mark.parametrize(("optimizer", "masters"), crossed(OPTIMIZERS, ["none", "split", "full"]))
def test_optimizers(optimizer, masters, tmp_path):
    assert_as_on_the_cpu(tmp_path, optimizer=optimizer, masters=masters)


@pytest.mark.parametrize(
    ("offload", "prefetch", "pin_memory", "masters"),
    crossed(TIERS, [True, False], [True, False], ["none", "split", "full"]),
)
def test_tiers(offload, prefetch, pin_memory, masters, tmp_path):
    assert_as_on_the_cpu(tmp_path, offload=offload, prefetch=prefetch, pin_memory=pin_memory, masters=masters)


PLACES = {"host": ("host", True), "late": ("host", False), "disk": ("disk", True), "none": ("none", True)}


@pytest.mark.parametrize(("turns", "place", "masters"), crossed(TURNS, PLACES, ["none", "split", "full"]))
def test_turns(turns, place, masters, tmp_path):
    offload, prefetch = PLACES[place]
    assert_as_on_the_cpu(tmp_path, TURNS[turns], offload=offload, prefetch=prefetch, masters=masters)


@pytest.mark.parametrize(
    ("offload", "masters", "resume_at", "turns"),
    crossed(TIERS, ["none", "split", "full"], [3, 8], [*TURNS]),
)
def test_resume(offload, masters, resume_at, turns, tmp_path):
    assert_as_on_the_cpu(tmp_path, TURNS[turns], offload=offload, masters=masters, resume_at=resume_at)
