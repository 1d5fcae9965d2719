"""Rows that compare weights: state on the host against state on the device, the GPU against the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_hift.engine.engine import HiFTEngine
from lightning_hift.engine.options import PUBLISHED
from lightning_hift.offload.offloader import Offload, StateOffloader

_WIDTH, _STEPS, _STEPS_ON_BOTH = 4096, 500, 25


class _Wide(nn.Module):
    """Large layers and little work: copies take longer than the step, so that a missing wait shows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, width), nn.Linear(width, 64), nn.Linear(64, width)) for _ in range(4)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def compare_weights(name: str, device: torch.device, small: bool) -> dict[str, Any]:
    """Train twice and count the elements of the weights that differ.

    Args:
        name: Of the row, without ``"check-"``.
        device: Where to train.
        small: A narrow model and few steps.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    width, steps = (64, 8) if small else (_WIDTH, _STEPS)
    if name == "cpu":
        steps = min(steps, _STEPS_ON_BOTH)
        width = min(width, 512)
        here, there = (_train(where, width, steps) for where in (device, torch.device("cpu")))
        # The two sum up in another order, which AdamW amplifies where a gradient is close to 0.
        differing = sum(
            int((~torch.isclose(a, b, rtol=1e-3, atol=1e-4)).sum()) for a, b in zip(here, there, strict=True)
        )
    else:
        disturbed = _train(device, width, steps, pressure="pressure" in name, busy="busy" in name)
        resident = _train(device, width, steps, offload="none")
        differing = sum(int((a != b).sum()) for a, b in zip(disturbed, resident, strict=True))
    return {"differing": differing, "steps": steps}


def _train(
    device: torch.device, width: int, steps: int, offload: Offload = "host", pressure: bool = False, busy: bool = False
) -> list[Tensor]:
    """Weights after some steps, on the host. NaN does not equal itself, so it counts as a difference."""
    model = _Wide(width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    engine = HiFTEngine.attach(model, optimizer, make_offloader=lambda: StateOffloader(device, offload), **PUBLISHED)
    on_gpu = device.type == "cuda"
    other: Any = torch.cuda.Stream() if on_gpu and busy else None  # type: ignore[no-untyped-call]
    ballast = torch.ones(width, width, device=device)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        if other is not None:
            with torch.cuda.stream(other):
                ballast = (ballast @ ballast).clamp(-1, 1)
        if pressure:
            # Memory that is freed at once is handed out again at once.
            torch.empty(width * 2**14, device=device).fill_(torch.nan)
        x = torch.randn(2, width, generator=generator).to(device)
        model(x).square().mean().backward()
        optimizer.step()
    engine.close()
    return [p.detach().cpu() for p in model.parameters()]
