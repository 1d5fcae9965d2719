"""What autograd holds for the backward pass, counted in the plainest way: walk every tensor that is handed to hooks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, loss_of: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The loss, and the bytes of all distinct storages saved while it was computed, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of()
    return loss, sum(saved.values())
