"""Checkpoints that are whole or absent, written without a second copy in memory."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from typing_extensions import override


class StreamingCheckpointIO(TorchCheckpointIO):
    """Writes a local checkpoint straight to disk and renames it into place once it is safely there.

    Lightning's default first builds the whole file in memory. Here the tensors stream into a temporary file beside the
    target, which is flushed to the disk and then renamed, so a process killed at any moment leaves the previous file or
    the new one. Remote paths (``s3://...``) are left to Lightning.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            TypeError: ``storage_options`` is given.
            OSError: The disk is full or not writable; an existing file at ``path`` is then untouched.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)

    @override
    def load_checkpoint(
        self,
        path: _PATH,
        map_location: Any = "cpu",
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint; a local one only as far, and when, its tensors are used.

        Raises:
            FileNotFoundError: There is no file at ``path``.
            IsADirectoryError: It is the folder of a sharded checkpoint.
            RuntimeError: The file is truncated or not a checkpoint.
        """
        if "://" not in str(path) and Path(path).is_dir():
            raise IsADirectoryError(
                f"{path} is a folder, as strategy='hift_fsdp' writes it. Load it with that strategy, or make a file of"
                f" it: lightning-hift consolidate --checkpoint {path} --output FILE"
            )
        try:
            if "://" in str(path) or not zipfile.is_zipfile(path):
                return super().load_checkpoint(path, map_location, weights_only)
            found: dict[str, Any] = torch.load(path, map_location, weights_only=weights_only, mmap=True)
            return found
        except Exception as error:  # damaged bytes raise whatever they happen to mean
            if "://" in str(path) or not Path(path).is_file() or _is_whole(Path(path)):
                raise
            raise RuntimeError(
                f"The checkpoint {path} ({Path(path).stat().st_size:,} bytes) is truncated or damaged and cannot be"
                " read. Resume from another checkpoint of the run; those written by StreamingCheckpointIO are whole."
            ) from error


def _is_whole(path: Path) -> bool:
    """Whether the file is a complete zip archive; its directory stands at the very end."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, OSError):
        return False


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut, where the system allows it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
