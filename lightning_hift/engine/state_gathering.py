"""State that is divided among processes, brought together in the first one, to be saved.

What comes from others goes to memory-mapped files there, so that the first process needs no memory for all of it. It
goes from host to host and never over a device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hift.engine.row_slices import Piece
from lightning_hift.engine.state_partition import UndividedState
from lightning_hift.offload.host_memory import HostMemory
from lightning_hift.offload.state_tree import State, flatten_state


def gather_states(
    pieces: Sequence[Piece],
    partition: UndividedState,
    state_of: Callable[[nn.Parameter], State],
    directory: str | os.PathLike[str],
    group: dist.ProcessGroup | None = None,
) -> dict[nn.Parameter, State]:
    """Bring the states of ``pieces`` to the process of rank 0. All processes have to call it.

    Args:
        pieces: The same ones in the same order in all processes.
        partition: Who has the state of each.
        state_of: The state of a piece of this process, by its handle.
        directory: Where the first process puts the files. They are deleted at once; their space is in use for as long
            as there are tensors in them.
        group: All processes, over a backend for tensors on the host; default: the default group.

    Returns:
        In the process of rank 0 the states of all other processes' pieces, by handle; elsewhere nothing.

    Raises:
        OSError: In all processes: the disk of the first one is full.
    """
    flats = {i: flatten_state(state_of(piece.handle)) for i, piece in enumerate(pieces) if partition.owns(piece)}
    structures = {i: flat.rebuild([tensor.to("meta") for tensor in flat.tensors]) for i, flat in flats.items()}
    everyone: list[Any] | None = [None] * partition.world_size if partition.rank == 0 else None
    dist.gather_object(structures, everyone, dst=0, group=group)
    of_others = {} if everyone is None else {i: state for theirs in everyone[1:] for i, state in theirs.items()}
    coming = {i: flatten_state(of_others[i]) for i in sorted(of_others)}
    targets = iter(_make_room([tensor for flat in coming.values() for tensor in flat.tensors], directory, group))

    found: dict[nn.Parameter, State] = {}
    for i, piece in enumerate(pieces):
        owner = partition.owner_of(piece)
        if owner and partition.rank == 0:
            tensors = [next(targets) for _ in coming[i].tensors]
            for tensor in tensors:
                dist.recv(_bytes_of(tensor), owner, group=group)
            found[piece.handle] = coming[i].rebuild(tensors)
        elif owner == partition.rank:
            for tensor in flats[i].tensors if owner else ():
                dist.send(_bytes_of(tensor), 0, group=group)
    return found


def _make_room(
    like: Sequence[Tensor], directory: str | os.PathLike[str], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Mapped tensors with the shapes, strides and dtypes of those in ``like``; all processes learn if that fails."""
    targets: list[Tensor] = []
    failed = None
    if like:
        try:
            memory = HostMemory(directory=directory)
            flats = memory.allocate(like)
            memory.remove_files()
            targets = [flat.as_strided(t.shape, t.stride()) for flat, t in zip(flats, like, strict=True)]
        except OSError as error:
            failed = error
    raise_in_all(failed, group)
    return targets


def raise_in_all(error: OSError | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise in all processes what the first one has run into; without that, they only wait for it.

    Args:
        error: Of this process, which counts in the first one.
        group: All processes; default: the default group.
    """
    found = [error]
    dist.broadcast_object_list(found, 0, group=group)
    if found[0] is not None:
        raise found[0]


def _bytes_of(tensor: Tensor) -> Tensor:
    """All bytes of ``tensor`` on the host: those of a tensor there that has no gaps, or of a copy that has none."""
    dense = torch.empty_like(tensor, device="meta").stride() == tensor.stride()
    there = tensor.cpu() if dense else torch.empty_like(tensor, device="cpu").copy_(tensor)
    return there.as_strided((there.numel(),), (1,)).view(torch.uint8)
