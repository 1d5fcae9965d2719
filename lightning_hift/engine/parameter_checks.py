"""Whether an optimizer, its parameters and the layer groups over them go together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_hift.engine.optimizer_state import parameters_of
from lightning_hift.engine.row_slices import steps_element_wise
from lightning_hift.groups.grouping import LayerGroup
from lightning_hift.offload.sharded_tensors import is_sharded

ORPHAN_REMEDY = "Add them to the optimizer, or name them in frozen=[...]."


def check_ownership(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse layer groups that do not hold the optimizer's trainable parameters exactly.

    Args:
        optimizer: Whose parameters.
        parameters: Those of all groups, by name.

    Raises:
        ValueError: As said.
    """
    grouped = {id(p): name for name, p in parameters.items()}
    owned = {id(p): p for p in parameters_of(optimizer)}
    strangers = [p for i, p in owned.items() if p.requires_grad and i not in grouped]
    if strangers:
        raise ValueError(
            f"The optimizer holds {len(strangers)} trainable parameters that no layer group has, of shapes"
            f" {[tuple(p.shape) for p in strangers[:4]]}; they would train at every step. Build the optimizer from"
            " the parameters of the module that is trained."
        )
    orphans = [name for i, name in grouped.items() if i not in owned]
    if orphans:
        raise ValueError(f"No optimizer holds the parameters {orphans[:8]} of the layer groups. {ORPHAN_REMEDY}")


def check_slicing(
    optimizer: Optimizer,
    parameters: Iterable[nn.Parameter],
    groups: Sequence[LayerGroup],
    cut: Sequence[Sequence[Any]],
    max_group_numel: int | None,
) -> None:
    """Refuse parts of parameters for an optimizer that does not compute the same for them as for the whole.

    Args:
        optimizer: What would step them.
        parameters: Those of all groups.
        groups: The layer groups.
        cut: The turns of each.
        max_group_numel: Elements above which a group is cut.

    Raises:
        ValueError: As said, or ``max_group_numel`` is below 1.
    """
    if max_group_numel is not None and max_group_numel < 1:
        raise ValueError(f"Got max_group_numel={max_group_numel}; it must be at least 1.")
    kind = type(optimizer).__name__
    if any(is_sharded(p) for p in parameters) and not steps_element_wise(optimizer):
        raise ValueError(
            f"{kind} does not compute the same for parts of a parameter as for the whole, but the parameters are"
            " sharded over processes. Use an element-wise optimizer, such as torch.optim.AdamW, or strategy='hift_ddp',"
            " with which each process has whole parameters."
        )
    sliced = [group for group, turns in zip(groups, cut, strict=True) if len(turns) > 1]
    if sliced and not steps_element_wise(optimizer):
        largest = max(sliced, key=lambda group: group.numel)
        raise ValueError(
            f"Got max_group_numel={max_group_numel:,}, and group {largest.name} has {largest.numel:,} elements, but"
            f" {kind} does not compute the same for slices as for the whole. Use an element-wise optimizer, such as"
            " torch.optim.AdamW, or leave max_group_numel out."
        )


def check_unchanged(
    optimizer: Optimizer,
    num_owned: int,
    parameters: Mapping[str, nn.Parameter],
    trainable: Sequence[nn.Parameter],
    placed: Sequence[nn.Parameter],
    device: torch.device,
) -> None:
    """Refuse what others have changed since an engine was attached.

    Args:
        optimizer: Its optimizer.
        num_owned: Parameters that it had.
        parameters: Those of all groups, by name.
        trainable: Those that have to be trainable now.
        placed: Those that have to be on ``device``.
        device: What the state is kept for.

    Raises:
        RuntimeError: Parameters were added, frozen or moved.
    """
    if len(parameters_of(optimizer)) != num_owned:
        raise RuntimeError(
            "The optimizer got new parameters after HiFT was attached to it; they belong to no layer group and"
            " would train at every step. Hand all parameters to the optimizer when it is built; to unfreeze layers"
            " later, do so between two calls of fit."
        )
    frozen = {id(p) for p in trainable if not p.requires_grad}
    if frozen:
        names = [name for name, p in parameters.items() if id(p) in frozen]
        raise RuntimeError(
            f"{names[:8]} were frozen after HiFT had put them into layer groups. Freeze them earlier (in __init__"
            " or configure_model), or name them in frozen=[...]."
        )
    moved = [p for p in placed if p.device.type != device.type]
    if moved:
        raise RuntimeError(
            f"The parameters are on {moved[0].device}, but the optimizer state is kept for {device}. Move the"
            " model before HiFT is attached to its optimizer."
        )


def check_shapes(parameters: Mapping[str, nn.Parameter], shapes: Mapping[str, torch.Size]) -> None:
    """Refuse parameters that have other shapes than their masters or slices were made for.

    Args:
        parameters: By name.
        shapes: Those that they had, by name.

    Raises:
        RuntimeError: As said.
    """
    changed = [name for name, p in parameters.items() if p.shape != shapes[name]]
    if changed:
        before, now = (tuple(shape) for shape in (shapes[changed[0]], parameters[changed[0]].shape))
        raise RuntimeError(
            f"{changed[:8]} were resized after HiFT had made masters or slices of them ({changed[0]}: {before}, now"
            f" {now}). Resize layers before the optimizer is built: in __init__, configure_model or setup."
        )


def find_replaced(
    module: nn.Module, optimizers: Iterable[Optimizer], parameters: Mapping[str, nn.Parameter]
) -> tuple[list[str], list[str]]:
    """What became of the parameters of ``module`` since its layer groups were formed.

    Args:
        module: What is trained.
        optimizers: Its optimizers.
        parameters: Those of all groups, by name.

    Returns:
        Names of parameters in groups that are not in the module any more, and names of trainable ones in the module
        that no optimizer holds.
    """
    present = {id(p) for p in module.parameters()}
    owned = {id(p) for optimizer in optimizers for p in parameters_of(optimizer)}
    gone = [name for name, p in parameters.items() if id(p) not in present]
    new = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in owned]
    return gone, new
