"""The state of torch's random numbers, so that a resumed run draws the dropout of one that was never interrupted."""

from __future__ import annotations

import torch
from torch import Tensor


def get_random_state() -> dict[str, Tensor]:
    """Of the CPU and of the current GPU, if this process has one in use; integer tensors on the CPU."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    """Go on from what ``get_random_state`` returned; the state of a GPU that is not in use is left out."""
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.set_rng_state(states["cuda"].cpu())
