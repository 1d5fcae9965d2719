"""Which parameters weight decay is for."""

from __future__ import annotations

from typing import Any

from torch import nn


def decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: matrices and embeddings with its weight decay, norms and biases without.

    Decay pulls towards zero, which is no meaningful place for the scale of a norm or an offset. A group's
    ``weight_decay`` of 0 takes precedence over the optimizer's argument; optimizers without weight decay ignore it.

    Args:
        module: Its trainable parameters are divided; each appears once, tied ones too.

    Returns:
        One or two groups, without the empty ones.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for part in module.modules():
        is_norm = "norm" in type(part).__name__.lower()
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                (spared if is_norm or parameter.ndim < 2 or name.endswith("bias") else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
