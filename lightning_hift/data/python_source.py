"""A text corpus that every Python has: the source of its standard library, byte by byte."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

NUM_BYTE_VALUES = 256

# Other people's packages, tests (repetitive text), and programs that some systems ship apart from the library.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
)
_BETWEEN_FILES = b"\0"  # occurs in no Python source, so it marks where a file begins


class PythonSourceDataModule(pl.LightningDataModule):
    """Python source files as sequences of bytes (256 values), split by file into training and validation.

    A batch is ``{"input_ids": LongTensor}`` of shape (batch_size, sequence_length). The split, the order of the files
    and the order of the batches follow from ``seed`` alone. The training batches can be resumed in mid-epoch.

    Args:
        sequence_length: Bytes per sequence.
        batch_size: Sequences per batch. Training drops the last, smaller batch; validation keeps it.
        folder: Where to look for ``*.py``; default: the standard library of the running Python. Folders of installed
            packages, tests and demos inside it are skipped.
        max_train_bytes: Largest amount of training text, taken from files in an order that depends on ``seed``.
        max_val_bytes: Largest amount of validation text.
        val_fraction: Share of the files that is held out for validation.
        seed: Seed of the split and of the order.

    Raises:
        ValueError: An argument is out of range. In ``setup``: there is no ``*.py`` file, or too little text.
    """

    def __init__(
        self,
        sequence_length: int = 256,
        batch_size: int = 16,
        folder: str | None = None,
        max_train_bytes: int | None = None,
        max_val_bytes: int | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_at_least("sequence_length", sequence_length, 2)
        _check_at_least("batch_size", batch_size, 1)
        if not 0 < val_fraction < 1:
            raise ValueError(f"Got val_fraction={val_fraction}; it must lie between 0 and 1, both excluded.")
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.folder = Path(folder) if folder is not None else Path(sysconfig.get_path("stdlib"))
        self.max_train_bytes = max_train_bytes
        self.max_val_bytes = max_val_bytes
        self.val_fraction = val_fraction
        self.seed = seed
        self._texts: tuple[Tensor, Tensor] | None = None

    @property
    def train_bytes(self) -> Tensor:
        """The training text, a uint8 tensor of shape (bytes,); read from disk at first use."""
        return self._read()[0]

    @property
    def val_bytes(self) -> Tensor:
        """The validation text, a uint8 tensor of shape (bytes,); read from disk at first use."""
        return self._read()[1]

    def split_files(self) -> tuple[list[Path], list[Path]]:
        """Training and validation files, without a file in both.

        Raises:
            ValueError: ``folder`` holds no ``*.py`` file.
        """
        shares = {path: self._share(path) for path in _python_files(self.folder)}
        ordered = sorted(shares, key=lambda path: shares[path])
        validation = [path for path in ordered if shares[path] < self.val_fraction]
        return ordered[len(validation) :], validation

    @override
    def setup(self, stage: str) -> None:
        self._read()

    @override
    def train_dataloader(self) -> ShuffledBatches:
        return ShuffledBatches(_cut(self.train_bytes, self.sequence_length), self.batch_size, self.seed)

    @override
    def val_dataloader(self) -> OrderedBatches:
        return OrderedBatches(_cut(self.val_bytes, self.sequence_length), self.batch_size)

    @override
    def test_dataloader(self) -> OrderedBatches:
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> OrderedBatches:
        return self.val_dataloader()

    def _share(self, path: Path) -> float:
        """A number in [0, 1) that depends on the path inside the folder only, so it is the same on all machines."""
        return stable_hash(f"{self.seed}/{path.relative_to(self.folder).as_posix()}") / 2**63

    def _read(self) -> tuple[Tensor, Tensor]:
        if self._texts is None:
            train, validation = self.split_files()
            self._texts = (
                self._read_part("train", train, self.max_train_bytes, self.sequence_length * self.batch_size),
                self._read_part("val", validation, self.max_val_bytes, self.sequence_length),
            )
        return self._texts

    def _read_part(self, part: str, files: list[Path], limit: int | None, needed: int) -> Tensor:
        text = bytearray()
        for path in files:
            if limit is not None and len(text) >= limit:
                break
            text += path.read_bytes() + _BETWEEN_FILES
        text = text[:limit]
        if len(text) < needed:
            raise ValueError(
                f"Got {len(text):,} bytes of {part} text from {len(files)} files in {self.folder}, but one batch needs"
                f" {needed:,}. Use more text (another folder, a larger max_{part}_bytes or another"
                " val_fraction), or a smaller sequence_length or batch_size."
            )
        return torch.frombuffer(text, dtype=torch.uint8)


class ShuffledBatches:
    """Batches of shuffled sequences, an endless stream that is cut into passes and can be resumed anywhere.

    Each iteration yields ``len(self)`` batches and goes on where the last one, or a loaded state, stopped. So an epoch
    that was cut short (``limit_train_batches``) leaves its rest to the next one, and a resumed run sees what an
    uninterrupted one would have seen.

    Args:
        sequences: Values of shape (sequences, length).
        batch_size: Sequences per batch; the last ones of each shuffle that fill no batch are left out.
        seed: Each pass over the data is shuffled by this seed and its number.
    """

    def __init__(self, sequences: Tensor, batch_size: int, seed: int) -> None:
        self._sequences = sequences
        self._batch_size = batch_size
        self._seed = seed
        self._position = 0

    def __len__(self) -> int:
        return len(self._sequences) // self._batch_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        shuffled_pass, order = -1, torch.empty(0)
        for _ in range(len(self)):
            current_pass, place = divmod(self._position, len(self))
            if current_pass != shuffled_pass:
                shuffled_pass, order = current_pass, self._shuffle(current_pass)
            chosen = order[place * self._batch_size : (place + 1) * self._batch_size]
            self._position += 1
            yield {"input_ids": self._sequences[chosen].long()}

    def state_dict(self) -> dict[str, int]:
        """The number of the next batch, counted from the start of training, and what gives it its meaning."""
        return {"position": self._position, **self._fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            ValueError: It was taken from other data, or with another batch size or seed.
        """
        saved = {key: state_dict.get(key) for key in self._fingerprint()}
        if saved != self._fingerprint():
            raise ValueError(
                f"The checkpoint has other training data, {saved}, than this run, {self._fingerprint()}."
                " Use the checkpoint's settings to resume, or load only the weights to start a new run."
            )
        self._position = state_dict["position"]

    def _fingerprint(self) -> dict[str, int]:
        return {"num_sequences": len(self._sequences), "batch_size": self._batch_size, "seed": self._seed}

    def _shuffle(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(stable_hash(f"{self._seed}/{number}"))
        return torch.randperm(len(self._sequences), generator=generator)


class OrderedBatches:
    """The same batches of sequences in the same order at each iteration; the last one may be smaller.

    Args:
        sequences: Values of shape (sequences, length).
        batch_size: Sequences per batch.
    """

    def __init__(self, sequences: Tensor, batch_size: int) -> None:
        self._batches = torch.split(sequences, batch_size)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"input_ids": batch.long()} for batch in self._batches)


def order0_bits_per_byte(train_bytes: Tensor, val_bytes: Tensor) -> float:
    """Bits per byte of the simplest model there is: how often each byte occurs, whatever stands before it.

    The cross-entropy of ``val_bytes`` under the frequencies in ``train_bytes``, each count raised by 1 so that no byte
    is impossible. A language model that does not beat it has learned nothing about order.

    Args:
        train_bytes: uint8, shape (bytes,).
        val_bytes: uint8, shape (bytes,).
    """
    counts = torch.bincount(train_bytes.int(), minlength=NUM_BYTE_VALUES).double() + 1
    seen = torch.bincount(val_bytes.int(), minlength=NUM_BYTE_VALUES).double()
    return float(-(seen * torch.log2(counts / counts.sum())).sum() / seen.sum())


def _python_files(folder: Path) -> list[Path]:
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]  # os.walk does not enter the others
        found += [Path(parent, name) for name in files if name.endswith(".py")]
    if not found:
        raise ValueError(
            f"Got folder={str(folder)!r}, in which there is no *.py file (folders named"
            f" {', '.join(sorted(_SKIPPED_FOLDERS))} are skipped). Name a folder with Python sources, or leave folder"
            " out for Python's own standard library."
        )
    return found


def _cut(text: Tensor, length: int) -> Tensor:
    """Whole sequences of ``text``, shape (sequences, length)."""
    return text[: len(text) // length * length].view(-1, length)


def stable_hash(text: str) -> int:
    """63 bits that are the same in every process, unlike those of ``hash``."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"Got {name}={value}; it must be at least {least}.")
