"""Which parameters of a sharded module the backward pass has reached, in any process.

Processes may use different parameters, such as the experts that their tokens are sent to. To sum up gradients they
still have to send the same, so torch's FSDP2 lets them send zeros for what they did not use. Then a parameter that none
of them used has a gradient of zeros, with which decay or momentum would move it. Here it loses that gradient again, as
it has none in one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_hift.distributed.gradient_sync import anywhere
from lightning_hift.offload.sharded_tensors import is_sharded


class GradientUse:
    """Takes gradients of zeros away from parameters that no process has used.

    Args:
        module: Modules in it are under ``fully_shard``.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._watched: dict[str, nn.Parameter] = {}  # whole ones, in the place of sharded ones while they are used
        self._reached: set[str] = set()  # names of those that were, until their gradients are there
        self._hooks: list[Any] = []
        for prefix, part in module.named_modules():
            if isinstance(part, FSDPModule):
                self._hooks.append(cast(nn.Module, part).register_forward_pre_hook(partial(self._watch, prefix)))
                if hasattr(part, "set_reduce_scatter_unused_params"):  # since torch 2.13
                    part.set_reduce_scatter_unused_params(True, recurse=False)

    @contextmanager
    def backward_pass(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Around a backward pass.

        Args:
            parameters: Those that train now, by their names in the module, the same in all processes.

        Raises:
            RuntimeError: The processes used different parameters, which this version of torch cannot handle.
        """
        self._watch("", self._module)
        new = {name: p for name, p in parameters.items() if p.grad is None}
        yield
        if new:
            self._settle(new)

    def close(self) -> None:
        """Leave the module alone."""
        for hook in self._hooks:
            hook.remove()

    def _watch(self, prefix: str, part: nn.Module, *args: Any) -> None:
        for name, p in part.named_parameters(prefix, remove_duplicate=False):
            if p.requires_grad and not is_sharded(p) and self._watched.get(name) is not p:
                self._watched[name] = p
                self._hooks.append(cast(Any, p).register_post_accumulate_grad_hook(partial(self._on_gradient, name)))

    def _on_gradient(self, name: str, p: nn.Parameter) -> None:
        self._reached.add(name)

    def _settle(self, parameters: Mapping[str, nn.Parameter]) -> None:
        used = [name in self._reached or name not in self._watched for name in parameters]
        somewhere = anywhere(used, next(iter(parameters.values())).device)
        for (name, p), here, there in zip(parameters.items(), used, somewhere, strict=True):
            if not there:
                p.grad = None
            elif not here and p.grad is None:
                raise RuntimeError(
                    f"Another process used {name}, and this one did not. FSDP of torch {torch.__version__} cannot sum"
                    " up their gradients. Use torch 2.13 or a later one, or use the same parameters in all processes."
                )
        self._reached.difference_update(name for name, p in parameters.items() if p.grad is not None)
