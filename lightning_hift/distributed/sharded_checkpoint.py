"""Checkpoints as folders: what is sharded is written by all processes together, the rest by the first one.

What is sharded goes through ``torch.distributed.checkpoint``. In the place of each such tensor the rest, a file as
``StreamingCheckpointIO`` writes it, says under which name. Both are written beside the target, which is renamed into
place once all of it is on the disk.
"""

from __future__ import annotations

import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.load import _METADATA_FILENAME as _REST  # as in Lightning's own sharded checkpoints
from lightning.fabric.utilities.types import _PATH
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from lightning_hift.engine.optimizer_state import parameters_of
from lightning_hift.engine.state_gathering import raise_in_all
from lightning_hift.offload.host_memory import HostMemory
from lightning_hift.offload.sharded_tensors import as_sharded, is_sharded, local_part
from lightning_hift.plugin.checkpoint_io import StreamingCheckpointIO, sync_folder

_MARK = "hift_sharded"  # key of {_MARK: name}, which stands in the rest where a sharded tensor belongs
_MODEL, _OPTIMIZERS = "state_dict", "optimizer_states"

Place = tuple[Any, ...]  # keys and indices that lead to a value in a checkpoint
_MakePlace = Callable[[Place, Tensor], Tensor | None]


def is_sharded_checkpoint(path: _PATH) -> bool:
    """Whether ``path`` is the folder of a whole sharded checkpoint."""
    return (Path(path) / _REST).is_file()


def load_callback_states(path: _PATH) -> dict[str, Any]:
    """The states of the callbacks in a checkpoint, a file or a folder, without the rest of it.

    A strategy that loads checkpoints after its setup forms layer groups before callbacks are restored.
    """
    file = Path(path) / _REST if is_sharded_checkpoint(path) else path
    states: dict[str, Any] = StreamingCheckpointIO().load_checkpoint(file, weights_only=True).get("callbacks", {})
    return states


def save_sharded(checkpoint: dict[str, Any], path: _PATH) -> None:
    """Write ``checkpoint`` to the folder ``path``, by all processes at once. What was there stays until it is whole.

    Raises:
        OSError: The disk is full or not writable for the first process. In all processes.
        CheckpointException: It is for another one. In all processes.
    """
    target = Path(path)
    part, old = target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.old")

    def begin() -> None:
        _remove(part)
        part.mkdir(parents=True)

    def finish() -> None:
        StreamingCheckpointIO().save_checkpoint(rest, part / _REST)
        _remove(old)
        if target.exists():
            target.rename(old)
        part.rename(target)
        sync_folder(target.parent)
        _remove(old)

    _in_first(begin)
    shards: dict[str, Tensor] = {}

    def take_out(place: Place, value: Any) -> Any:
        if not is_sharded(value):
            return value
        name = ".".join(map(str, place))
        shards[name] = value
        return {_MARK: name}

    rest = _map_leaves(checkpoint, take_out)
    save(shards, storage_writer=FileSystemWriter(part), planner=DefaultSavePlanner(flatten_state_dict=False))
    _in_first(finish)


def load_sharded(
    path: _PATH, module: nn.Module, optimizers: Sequence[Optimizer], weights_only: bool | None = None
) -> dict[str, Any]:
    """What ``save_sharded`` has written, with the parts that this process has to hold of a sharded module's tensors.

    Args:
        path: The folder, written by any number of processes.
        module: Already sharded.
        optimizers: Its optimizers.
        weights_only: As of ``torch.load``.
    """
    weights = module.state_dict()
    parameters = [parameters_of(optimizer) for optimizer in optimizers]

    def make_place(place: Place, whole: Tensor) -> Tensor | None:
        if place[0] == _OPTIMIZERS and not optimizers:  # nothing is trained
            return None
        like = _tensor_like(place, weights, parameters)
        if like is None or not is_sharded(like) or like.shape != whole.shape:
            return torch.empty_like(whole, device="cpu")
        return as_sharded(torch.empty_like(local_part(whole, like), device="cpu"), like)

    return _load(path, make_place, weights_only)


def consolidate(checkpoint: str, output: str) -> None:
    """Make one file of a sharded checkpoint, such as ``strategy="hift"`` writes and ``export`` takes.

    It is put together in the folder of ``output``, which for a while needs room for it twice, and not in memory.

    Args:
        checkpoint: Folder that ``strategy="hift_fsdp"`` has written.
        output: File to write.

    Raises:
        ValueError: ``checkpoint`` is no sharded checkpoint, or was interrupted while it was written.
        FileExistsError: ``output`` exists.
        OSError: The disk is full.
    """
    if not is_sharded_checkpoint(checkpoint):
        raise ValueError(
            f"Got checkpoint={checkpoint!r}, which is no folder of a sharded checkpoint: it has no {_REST}."
        )
    if Path(output).exists():
        raise FileExistsError(f"Got output={output!r}, which exists. Name another file, or remove it.")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    memory = HostMemory(directory=Path(output).parent)
    try:
        whole = _load(checkpoint, lambda _, like: memory.allocate([like])[0].view(like.shape), weights_only=False)
        StreamingCheckpointIO().save_checkpoint(whole, output)
    finally:
        memory.remove_files()


def _load(
    path: _PATH, make_place: Callable[[Place, Tensor], Tensor | None], weights_only: bool | None
) -> dict[str, Any]:
    """Everything; what is sharded goes into what ``make_place`` returns for its place and a likeness of the whole."""
    rest = StreamingCheckpointIO().load_checkpoint(Path(path) / _REST, weights_only=weights_only)
    reader = FileSystemReader(path)
    known: dict[str, Any] = reader.read_metadata().state_dict_metadata
    places: dict[str, Tensor] = {}

    def put_back(place: Place, value: Any) -> Any:
        if not (isinstance(value, dict) and value.keys() == {_MARK}):
            return value
        name = value[_MARK]
        saved = known[name]
        tensor = make_place(place, torch.empty(saved.size, dtype=saved.properties.dtype, device="meta"))
        if tensor is not None:
            places[name] = tensor
        return tensor

    found: dict[str, Any] = _map_leaves(rest, put_back)
    alone = not dist.is_initialized()
    with warnings.catch_warnings():
        if alone:  # as it should be
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        load(places, storage_reader=reader, planner=planner, no_dist=alone)
    return found


def _tensor_like(place: Place, weights: dict[str, Any], parameters: Sequence[Sequence[nn.Parameter]]) -> Tensor | None:
    """The weight or parameter to which what stands at ``place`` belongs."""
    if place[0] == _MODEL:
        return weights.get(place[1])
    if place[0] == _OPTIMIZERS and place[1] < len(parameters):
        own = parameters[place[1]]
        index = next((key for key in place[2:] if isinstance(key, int)), len(own))
        return own[index] if index < len(own) else None
    return None


def _map_leaves(value: Any, function: Callable[[Place, Any], Any], place: Place = ()) -> Any:
    """``value`` with what ``function`` makes of all that is in its dicts, lists and tuples."""
    if type(value) in (dict, OrderedDict) and value.keys() != {_MARK}:
        return {key: _map_leaves(entry, function, (*place, key)) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map_leaves(entry, function, (*place, i)) for i, entry in enumerate(value))
    return function(place, value)


def _in_first(function: Callable[[], None]) -> None:
    """Call ``function`` in the first process; the others wait for it, and raise what it raises."""
    error = None
    if dist.get_rank() == 0:
        try:
            function()
        except OSError as raised:
            error = raised
    raise_in_all(error)


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)
