"""Tensors of which each process holds a part (torch's ``DTensor``), as one process sees them.

Optimizer state and masters of a sharded parameter are plain tensors of the shape of the part that this process holds.
Only what goes into a checkpoint, or back to a plain optimizer, is made a ``DTensor`` again.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def is_sharded(tensor: object) -> bool:
    """Whether each process holds a part of ``tensor`` only."""
    # Its import takes most of a second; without it there are none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process holds of ``tensor``, without copying it.

    Args:
        tensor: Sharded as ``like`` is, or whole.
        like: A parameter of the same shape. If it is not sharded, its part is all of it.
    """
    if is_sharded(tensor):
        return cast(Any, tensor).to_local()  # type: ignore[no-any-return]
    if not is_sharded(like):
        return tensor
    mesh, placements = cast(Any, like).device_mesh, cast(Any, like).placements
    for axis, placement in enumerate(placements):
        if placement.is_shard():
            chunks = tensor.chunk(mesh.size(axis), placement.dim)
            place = mesh.get_local_rank(axis)
            tensor = chunks[place] if place < len(chunks) else tensor.narrow(placement.dim, 0, 0)
    return tensor


def local_shape(tensor: Tensor) -> torch.Size:
    """Shape of what this process holds of ``tensor``."""
    return cast(Any, tensor)._local_tensor.shape if is_sharded(tensor) else tensor.shape


def local_numel(tensor: Tensor) -> int:
    """Number of elements of what this process holds of ``tensor``."""
    return local_shape(tensor).numel()


def as_sharded(part: Tensor, like: Tensor) -> Tensor:
    """The sharded tensor of which this process holds ``part``; ``part`` itself if ``like`` is not sharded."""
    if not is_sharded(like) or is_sharded(part):
        return part
    from torch.distributed.tensor import DTensor

    mesh = cast(Any, like).device_mesh
    return DTensor.from_local(
        part,
        mesh if mesh.device_type == part.device.type else _mesh_on(part.device.type, mesh),
        cast(Any, like).placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


@cache
def _mesh_on(device_type: str, mesh: DeviceMesh) -> DeviceMesh:
    """The same processes with memory of another kind, such as the host's."""
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh(device_type, mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
