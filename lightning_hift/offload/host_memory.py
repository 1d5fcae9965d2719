"""Host memory of exactly the size that is asked for: page-locked, ordinary, or mapped from files in a directory."""

from __future__ import annotations

import mmap
import os
import platform
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FOLDER = "hift-state-"
_HOST = platform.node()


class HostMemory:
    """Gives out tensors that lie side by side, so that many of them are page-locked, or written to disk, at once.

    torch's own page-locked memory comes in powers of two: 2.4 GB of state would take 4.3 GB. Here only the last page of
    each allocation is padding.

    Args:
        pin_for: Page-lock the memory for this device. If the system refuses, there is one warning, and all is pageable
            from then on.
        directory: Map files in a new folder of this directory instead. It needs as much free space as is asked for.

    Raises:
        NotADirectoryError: ``directory`` is no directory.
        PermissionError: It cannot be written to.
    """

    def __init__(self, pin_for: torch.device | None = None, directory: str | os.PathLike[str] | None = None) -> None:
        self._pin_for = pin_for if directory is None else None
        self.nbytes = 0
        self._reserved: list[mmap.mmap] = []
        self._folder: Path | None = None
        self._files = 0
        if directory is not None:
            self._folder = _make_folder(Path(directory))
            self._remove = weakref.finalize(self, _remove_folder, self._folder, os.getpid())

    @property
    def is_page_locked(self) -> bool:
        """Whether what is given out is page-locked."""
        return self._pin_for is not None

    def reserve(self, nbytes: int) -> None:
        """Map and page-lock memory for one stretch of at most so many bytes, which will be allocated later."""
        if self._pin_for is not None and nbytes > 0:
            self._reserved.append(self._map_anonymous(nbytes))

    def release_reserved(self) -> None:
        """Let go of what was reserved in vain."""
        self._reserved = []

    def allocate(self, like: Sequence[Tensor]) -> list[Tensor]:
        """One-dimensional tensors with as many elements, and of the dtypes, of those in ``like``; in their order.

        Raises:
            OSError: The disk is full. Nothing was allocated.
        """
        found: dict[int, Tensor] = {}
        # One stretch for each dtype: torch.save refuses memory that is seen as two.
        for dtype in dict.fromkeys(tensor.dtype for tensor in like):
            # Multiples of 16 bytes first, so that all of them are aligned although nothing is padded.
            indices = [i for i, tensor in enumerate(like) if tensor.dtype == dtype]
            indices.sort(key=lambda i: like[i].numel() * like[i].element_size() % 16 != 0)
            counts = [like[i].numel() for i in indices]
            memory = self._map(sum(counts) * dtype.itemsize).view(dtype)
            self.nbytes += sum(counts) * dtype.itemsize
            found |= zip(indices, torch.split(memory, counts), strict=True)
        return [found[i] for i in range(len(like))]

    def remove_files(self) -> None:
        """Delete the files. What was allocated stays valid, and its space in use, as long as tensors refer to it."""
        if self._folder is not None:
            self._remove()

    def _map(self, nbytes: int) -> Tensor:
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        if self._folder is not None:
            path, mapped = self._map_file(self._folder, nbytes)
            memory = torch.frombuffer(mapped, dtype=torch.uint8)
            weakref.finalize(memory.untyped_storage(), _remove_file, path, os.getpid()).atexit = False
            return memory
        # The smallest that is large enough, or small groups would take the places of large ones.
        for mapped in sorted(self._reserved, key=len):
            if nbytes <= len(mapped):
                self._reserved.remove(mapped)
                return torch.frombuffer(mapped, dtype=torch.uint8, count=nbytes)
        return torch.frombuffer(self._map_anonymous(nbytes), dtype=torch.uint8)

    def _map_anonymous(self, nbytes: int) -> mmap.mmap:
        mapped = mmap.mmap(-1, nbytes)
        if self._pin_for is not None:
            try:
                page_lock(mapped, self._pin_for)
            except RuntimeError as error:
                self._pin_for = None
                warnings.warn(
                    f"Page-locked host memory was refused ({error}). Optimizer state goes to pageable memory: copies go"
                    " through a small buffer, at a half to a third of the speed, beside the training all the same."
                    " Raise the limit (ulimit -l), or pass pin_memory=False to silence this.",
                    stacklevel=2,
                )
        return mapped

    def _map_file(self, folder: Path, nbytes: int) -> tuple[Path, mmap.mmap]:
        folder.mkdir(exist_ok=True)  # after remove_files
        path = folder / f"{self._files}.bin"
        self._files += 1
        try:
            with path.open("w+b") as file:
                # Space that is not reserved would be missed only when it is written to, by a crash of the process.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, nbytes)
                else:
                    file.truncate(nbytes)
                return path, mmap.mmap(file.fileno(), nbytes)
        except OSError as error:
            path.unlink(missing_ok=True)
            free = shutil.disk_usage(folder).free
            raise OSError(
                error.errno,
                f"Could not reserve {nbytes:,} bytes for optimizer state in {folder} ({error.strerror}; {free:,} bytes"
                " are free). Nothing was lost. Free some space, or name another directory.",
            ) from error


def can_page_lock(device: torch.device) -> bool:
    """Whether ``device`` copies faster, and without the host, from and to memory that is page-locked for it."""
    return device.type != "cpu" and hasattr(torch.get_device_module(device), "cudart")


def page_lock(memory: mmap.mmap, device: torch.device) -> None:
    """Page-lock mapped memory for ``device``, as long as it exists.

    Raises:
        RuntimeError: The device's runtime refused.
    """
    runtime: Any = torch.get_device_module(device).cudart()
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    result = runtime.cudaHostRegister(address, len(memory), 0)
    if int(result) != 0:
        _forget_last_error(device)
        raise RuntimeError(runtime.cudaGetErrorString(result))
    weakref.finalize(memory, _unlock, runtime, address, os.getpid()).atexit = False


def _unlock(runtime: Any, address: int, owner: int) -> None:
    if os.getpid() == owner:  # a fork's memory is a copy, which was never locked
        runtime.cudaHostUnregister(address)


def _forget_last_error(device: torch.device) -> None:
    """CUDA remembers a failed call, and torch would report it at the next kernel, which has nothing to do with it."""
    with suppress(RuntimeError):
        torch.zeros(1, device=device)


def check_directory(directory: str | os.PathLike[str]) -> None:
    """Refuse what is no directory.

    Raises:
        NotADirectoryError: As said.
    """
    if not Path(directory).is_dir():
        raise NotADirectoryError(f"{directory} is no directory. Create it, or name one that exists.")


def _make_folder(directory: Path) -> Path:
    check_directory(directory)
    _remove_leftovers(directory)
    try:
        return Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{_HOST}-{os.getpid()}-", dir=directory))
    except OSError as error:
        raise PermissionError(
            error.errno, f"Cannot write to {directory} ({error.strerror}). Name a directory that can be written to."
        ) from error


def _remove_folder(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked worker that ends
        shutil.rmtree(folder, ignore_errors=True)


def _remove_file(path: Path, owner: int) -> None:
    if os.getpid() == owner:
        path.unlink(missing_ok=True)


def _remove_leftovers(directory: Path) -> None:
    """Delete what killed processes of this machine have left there."""
    for folder in directory.glob(f"{_FOLDER}{_HOST}-*-*"):
        process = folder.name.removeprefix(f"{_FOLDER}{_HOST}-").split("-")[0]
        if process.isdigit() and not _is_alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it exists, and is someone else's
    return True
