"""Predictions as JSON lines: one record per input, in the order of the inputs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override


class PredictionWriter(Callback):
    """Writes what ``predict_step`` returns to a file, batch by batch, so that nothing piles up in memory.

    ``predict_step`` may return a list of records (mappings, one per input), a mapping of columns, or a tensor whose
    first dimension is the batch; what is no mapping is written as ``{"prediction": ...}``. The file appears under its
    name once it is complete, in the place of one that was there; a run that fails leaves the old one.

    Args:
        path: File to write. JSON has no NaN and no infinities; they become ``null``.

    Raises:
        MisconfigurationException: In ``predict``: there are several processes, each of which has a part of the inputs.
        TypeError: In ``predict``: a record holds something that JSON has no word for.
        ValueError: In ``predict``: columns differ in length.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.num_records = 0
        self._file: TextIO | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "predict" and trainer.world_size > 1:
            raise MisconfigurationException(
                f"PredictionWriter keeps the order of the inputs in one process, but there are {trainer.world_size}."
                " Predict with devices=1."
            )

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.num_records = 0
        self._file = self._part.open("w", encoding="utf-8")

    @override
    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self._file is not None
        for record in _records(outputs):
            json.dump(_plain(record), self._file, ensure_ascii=False)
            self._file.write("\n")
            self.num_records += 1

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None
        self._part.replace(self.path)
        rank_zero_info(f"{self.num_records} predictions written to {self.path}")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._part.unlink(missing_ok=True)

    @property
    def _part(self) -> Path:
        return self.path.with_name(f".{self.path.name}.part")


def _records(outputs: Any) -> Iterator[Mapping[str, Any]]:
    if outputs is None:
        return
    if isinstance(outputs, Mapping):
        columns = {name: _plain(column) for name, column in outputs.items()}
        lengths = {name: len(column) if isinstance(column, list) else None for name, column in columns.items()}
        if None in lengths.values() or len(set(lengths.values())) > 1:
            raise ValueError(
                f"predict_step returned columns of lengths {lengths}; each needs one value per input. Return a list of"
                " records, one per input, if there is more to say."
            )
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))
        return
    rows = outputs if isinstance(outputs, (list, tuple)) else _plain(outputs)
    for row in rows if isinstance(rows, (list, tuple)) else [rows]:
        yield row if isinstance(row, Mapping) else {"prediction": row}


def _plain(value: Any) -> Any:
    """What ``json`` can write."""
    if hasattr(value, "tolist"):  # tensors and arrays
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    raise TypeError(
        f"predict_step returned a {type(value).__name__}, which JSON has no word for. Return numbers, strings, tensors,"
        " lists and mappings of them."
    )
