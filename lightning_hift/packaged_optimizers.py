"""Optimizers of other packages, under names that say what is missing, and with what they need beside arguments.

Each is a name that YAML can give where an optimizer is, ``class_path: lightning_hift.packaged_optimizers.GaLoreAdamW``;
calling it makes an optimizer of the package. They save memory, as HiFT does, and are there to be compared with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT


class AdamW8bit(Optimizer):
    """AdamW with moments of 8 bits, by torchao: 2 bytes of state per parameter instead of 8.

    Args:
        params: Parameters or parameter groups. Those of less than 4096 elements keep moments of 32 bits.
        lr: Learning rate.
        betas: As in AdamW.
        eps: As in AdamW.
        weight_decay: As in AdamW.
        block_size: Elements that share a scale.

    Raises:
        RuntimeError: torchao is not installed.
    """

    def __new__(  # type: ignore[misc]
        cls,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        block_size: int = 256,
    ) -> Optimizer:
        kind = _import("torchao.optim", "torchao").AdamW8bit
        optimizer: Optimizer = kind(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, block_size=block_size
        )
        return optimizer


class OffloadedAdamW(Optimizer):
    """AdamW that steps on the host, by torchao's CPUOffloadOptimizer: state and a copy of the weights are there.

    Gradients go to the host as soon as they are there, so nothing can clip them, and mixed precision must not scale
    them. Only for plain Lightning: under HiFT, state is on the host anyway.

    Args:
        params: Parameters or parameter groups, on the GPU.
        lr: Learning rate.
        betas: As in AdamW.
        eps: As in AdamW.
        weight_decay: As in AdamW.
        offload_gradients: Free gradients on the GPU as soon as they are on the host. Not with accumulation.

    Raises:
        RuntimeError: torchao is not installed, or there is no CUDA GPU.
    """

    def __new__(  # type: ignore[misc]
        cls,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        offload_gradients: bool = False,
    ) -> Optimizer:
        kind = _import("torchao.optim", "torchao").CPUOffloadOptimizer
        if not _has_gpu():
            raise RuntimeError(
                "Got OffloadedAdamW, which needs a CUDA GPU to take the state from, and there is none. Use"
                " torch.optim.AdamW, which keeps its state on the host where the weights are."
            )
        options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        optimizer: Optimizer = kind(params, torch.optim.AdamW, offload_gradients=offload_gradients, **options)
        # It never calls Optimizer.__init__, but Lightning looks for these.
        optimizer.state, optimizer.defaults = {}, options  # type: ignore[assignment]
        return optimizer


class GaLoreAdamW(Optimizer):
    """AdamW on gradients that are projected to a low rank, by galore-torch (GaLore, arXiv 2403.03507).

    All matrices with more than ``rank`` rows and columns are projected, embeddings too; the rest is stepped as usual.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: As in AdamW.
        eps: As in AdamW.
        weight_decay: As in AdamW.
        rank: Of the projection.
        update_proj_gap: Steps between two decompositions of the gradient, which take long.
        scale: Of the projected updates.
        proj_type: ``"std"``, ``"reverse_std"``, ``"right"``, ``"left"`` or ``"full"``.

    Raises:
        RuntimeError: galore-torch is not installed, or bitsandbytes, which it imports.
        ValueError: ``rank`` or ``update_proj_gap`` is below 1, or no matrix is large enough to be projected.
    """

    def __new__(  # type: ignore[misc]
        cls,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
    ) -> Optimizer:
        if rank < 1 or update_proj_gap < 1:
            raise ValueError(f"Got rank={rank} and update_proj_gap={update_proj_gap}; both must be at least 1.")
        kind = _import("galore_torch", "galore-torch").GaLoreAdamW
        projector = _import("galore_torch.galore_projector", "galore-torch").GaLoreProjector
        torch.serialization.add_safe_globals([projector])  # it is in the state, and so in checkpoints
        projection = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
        groups: list[dict[str, Any]] = []
        for group in _as_groups(params):
            is_large = [p.ndim == 2 and min(p.shape) > rank for p in group["params"]]
            for options, wanted in ((projection, True), ({}, False)):
                chosen = [p for p, large in zip(group["params"], is_large, strict=True) if large == wanted]
                groups += [{**group, "params": chosen, **options}] if chosen else []
        if not any("rank" in group for group in groups):
            raise ValueError(f"Got rank={rank}, but no matrix has more rows and columns than that. Use a lower rank.")
        optimizer: Optimizer = kind(
            groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, no_deprecation_warning=True
        )
        return optimizer


def _as_groups(params: Any) -> list[dict[str, Any]]:
    given = list(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    return [{**group, "params": _listed(group["params"])} for group in groups]


def _listed(params: Any) -> list[nn.Parameter]:
    return [params] if isinstance(params, nn.Parameter) else list(params)


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _import(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        missing = (error.name or module).split(".")[0]
        packages = package if missing == module.split(".")[0] else f"{package} {missing}"
        raise RuntimeError(
            f"Got an optimizer of {package}, but {missing} is not installed. Run: pip install {packages}"
        ) from error
