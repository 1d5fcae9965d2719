"""Keeps a loss something that backward can be called on where the forward pass leaves out all that trains.

In plain training other layers give such a loss its graph. Here they are frozen, and ``loss.backward()`` would fail.
"""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


class OutputGraph:
    """A forward hook: what a module returns requires a gradient, as in plain training, if need be one of nothing.

    Args:
        module: Whose hook it is; on a copy of the module, or a pickled one, it does nothing.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self._module = None if module is None else weakref.ref(module)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._module is None or self._module() is not module:
            return None
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return None
        if any(isinstance(each, Tensor) and each.requires_grad for each in tree_leaves(output)):
            return None
        apply, root = cast(Any, _FromRoot).apply, torch.zeros((), requires_grad=True)
        return tree_map_only(Tensor, lambda t: apply(root, t) if t.is_floating_point() else t, output)

    def __reduce__(self) -> tuple[type[OutputGraph], tuple[()]]:
        return OutputGraph, ()


class _FromRoot(torch.autograd.Function):
    """The second argument, as if it depended on the first."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, None]:
        return None, None
