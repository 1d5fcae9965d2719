"""The most bytes of tensors that are alive at once, by following every tensor that an operator returns."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While entered, keeps ``peak``: activations, gradients and passing results, without ``ignored`` tensors."""

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in ignored}
        self._now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self._now -= nbytes


def peak_bytes(model: torch.nn.Module, run: Any) -> int:
    """Peak while ``run()``, parameters and buffers not counted."""
    with LiveBytes((*model.parameters(), *model.buffers())) as live:
        run()
    return live.peak
