"""What all data sets of texts have in common: where rows come from, tokens, caches, batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_hift.data.bad_rows import OnBadRow
from lightning_hift.data.batches import NO_LABEL, OrderedExamples, ShuffledExamples
from lightning_hift.data.encoding import encode_table, fingerprint, lengths_of, source_of
from lightning_hift.data.tables import PLACE, FileFormat, read_files, read_hub, without_bad_rows
from lightning_hift.data.tokenizer import fingerprint_of, load_tokenizer

Split = Literal["train", "validation", "test", "predict"]

TRUNCATED = "__truncated__"
"""Column of encoded examples: whether tokens were cut off."""

_STAGES: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


class TextDataModule(pl.LightningDataModule):
    """Base class of data modules of texts, from local files or the Hugging Face hub.

    A subclass writes ``encode`` (a row becomes examples) and ``encoding_options`` (what ``encode`` depends on), and
    ``collate`` if examples hold more than tokens. Encoded examples are cached on disk and stay there; training batches
    hold examples of similar length, and can be resumed in mid-epoch.

    Args:
        dataset: Name of a data set on the hub, or a local folder that ``datasets`` can load.
        config_name: Configuration of ``dataset``, such as ``"sst2"`` of ``"nyu-mll/glue"``.
        splits: Which split of ``dataset`` is ``train``, ``validation``, ``test`` and ``predict``, with slices as in
            ``"train[:80%]"``; default: those of the same name. Where some are named, a fit only
            validates on a named ``validation``.
        files: Instead of ``dataset``: local files by ``train``, ``validation``, ``test`` and ``predict``; one path or a
            list. csv, tsv, jsonl, json, parquet, txt and conll, also with .gz behind.
        file_format: How the files are written.
        validation_fraction: Share of the training rows that is held out, where there are no validation rows.
        max_train_rows: Use only so many training rows, drawn by ``seed``.
        max_val_rows: Use only the first so many rows for validation.
        tokenizer: Name on the hub or local folder; default: the ``model`` of the module that is trained.
        max_length: Most tokens per sequence; longer ones are cut, and counted in a warning. Default: what the model
            allows, at most 512.
        batch_size: Rows per training batch.
        eval_batch_size: Rows per batch otherwise; default: ``batch_size``.
        bucket_by_length: Put examples of similar length into one batch, so that little is padded.
        on_bad_row: ``"error"`` names all rows that cannot be used, ``"skip"`` leaves them out and counts them.
        cache_dir: Folder of what was read and encoded; default: that of ``datasets``.
        revision: Branch, tag or commit of ``dataset``.
        seed: Of the order of training batches, and of what is drawn.

    Raises:
        ValueError: An argument is out of range. In ``setup``: rows cannot be used, a split is empty, a column is
            missing, or ``max_length`` is more than the model allows.
        FileNotFoundError: In ``setup``: a file does not exist.
        OSError: In ``setup``: a data set or tokenizer is not to be had.
    """

    columns_needed: ClassVar[tuple[str, ...]] = ()
    """Attributes that name columns which each row must have, or lists of columns."""

    target_columns: ClassVar[tuple[str, ...]] = ()
    """Likewise, but rows to predict need none."""

    def __init__(
        self,
        dataset: str | None = None,
        config_name: str | None = None,
        splits: dict[str, str] | None = None,
        files: dict[str, str | list[str]] | None = None,
        file_format: FileFormat | None = None,
        validation_fraction: float | None = None,
        max_train_rows: int | None = None,
        max_val_rows: int | None = None,
        tokenizer: str | None = None,
        max_length: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        bucket_by_length: bool = True,
        on_bad_row: OnBadRow = "error",
        cache_dir: str | None = None,
        revision: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (dataset is None) == (files is None):
            raise ValueError(f"Got dataset={dataset!r} and files={files!r}; give one of them.")
        for name in (*(splits or ()), *(files or ())):
            if name not in get_args(Split):
                raise ValueError(f"Got the split {name!r}; there are {', '.join(get_args(Split))}.")
        counts = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "max_length": max_length}
        for name, value in {**counts, "max_train_rows": max_train_rows, "max_val_rows": max_val_rows}.items():
            if value is not None and value < 1:
                raise ValueError(f"Got {name}={value}; it must be at least 1.")
        if validation_fraction is not None and not 0 < validation_fraction < 1:
            raise ValueError(f"Got validation_fraction={validation_fraction}; it must lie between 0 and 1.")
        if on_bad_row not in get_args(OnBadRow):
            raise ValueError(f"Got on_bad_row={on_bad_row!r}; it must be 'error' or 'skip'.")
        self.dataset = dataset
        self.config_name = config_name
        self.splits = splits or {}
        self.files = files
        self.file_format = file_format or FileFormat()
        self.validation_fraction = validation_fraction
        self.max_train_rows = max_train_rows
        self.max_val_rows = max_val_rows
        self.tokenizer_name = tokenizer
        self.given_max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.bucket_by_length = bucket_by_length
        self.on_bad_row: OnBadRow = on_bad_row
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.revision = revision
        self.seed = seed
        self.examples: dict[str, Any] = {}  # encoded, by split
        self._tables: dict[str, Any] = {}
        self._encoded_for: Any = None  # the module whose tokenizer and limits were asked for

    # --- for subclasses -----------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, row: Mapping[str, Any], split: Split) -> list[dict[str, Any]]:
        """Examples made from one row: mappings with ``input_ids``, a list of ints, and ``TRUNCATED``, a bool.

        Columns whose names begin with two underscores do not come into batches; ``count_cut`` may use them.

        Raises:
            BadRow: The row cannot be used.
        """
        raise NotImplementedError(f"{type(self).__name__} must define encode(row, split).")

    def encoding_options(self) -> dict[str, Any]:
        """Everything else that ``encode`` depends on; examples are encoded again if it changes."""
        return {}

    def rows(self, split: Split) -> Any:
        """A sequence of lists of examples, if batches are made of these; ``None``: they are made of examples."""
        return None

    def collate(self, examples: list[Any]) -> dict[str, Any]:
        """A batch: token lists are padded to the longest, on the right; numbers become tensors."""
        return {name: self.pad(name, [example[name] for example in examples]) for name in examples[0]}

    def count_cut(self, split: Split, examples: Any) -> None:
        """Warn of what was cut off; ``examples`` are all that were encoded."""
        cut = sum(map(bool, examples[TRUNCATED]))
        if cut:
            rank_zero_warn(
                f"{cut} of {len(examples)} {split} examples were longer than max_length={self.max_length} and were cut."
            )

    def data_fingerprint(self) -> dict[str, Any]:
        """What the training examples are, whatever file they came from: a saved place in them means nothing else."""
        return {
            "lengths": fingerprint(lengths_of(self.examples["train"])),
            "encoding": fingerprint(self._options("train")),
        }

    # --- tokens -------------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, with a padding token.

        Raises:
            ValueError: None was named, and the module has no ``model``; or it has no token to pad with.
            OSError: It is not to be had.
        """
        if self.tokenizer_name is not None:
            return load_tokenizer(self.tokenizer_name)
        source = getattr(self._module, "source", None)
        if source is None or source.model is None:
            raise ValueError(
                "Got no tokenizer, and no model to take it from. Name one: tokenizer is a name on the hub or a local"
                " folder."
            )
        return load_tokenizer(source.model, source.revision)

    @cached_property
    def max_length(self) -> int:
        """Most tokens per sequence.

        Raises:
            ValueError: More were asked for than the model allows.
        """
        limits = [self.tokenizer.model_max_length, getattr(self._module, "max_positions", None)]
        limit = min((n for n in limits if n is not None and n < 1e9), default=None)
        if self.given_max_length is None:
            return min(limit or 512, 512)
        if limit is not None and self.given_max_length > limit:
            raise ValueError(f"Got max_length={self.given_max_length}, but the model takes at most {limit} tokens.")
        return self.given_max_length

    @property
    def sequence_length(self) -> int | None:
        """The length to plan memory for, where it was said."""
        return self.given_max_length

    def pad(self, name: str, values: Sequence[Any]) -> Tensor:
        """One tensor for the values that examples have under ``name``; lists are padded to the longest.

        Labels are padded by -100, tokens by the padding token, anything else by 0.
        """
        if not isinstance(values[0], (list, tuple)):
            return torch.tensor(values)
        fill = {"input_ids": self.tokenizer.pad_token_id, "labels": NO_LABEL}.get(name, 0)
        width = max(map(len, values))
        return torch.tensor([[*value, *[fill] * (width - len(value))] for value in values])

    # --- rows and examples --------------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        self._forget_other_modules()
        for split in _STAGES[stage]:
            if split not in self.examples and (split == "train" or self._has(split)):
                self.examples[split] = self._encode(split)

    def table(self, split: Split) -> Any:
        """The rows of a split, a ``datasets.Dataset``, without bad ones.

        Raises:
            ValueError: There are bad rows that are not to be skipped, or no rows at all, or there is no such split.
        """
        if split not in self._tables:
            table = self._read(split)
            read = len(table)
            if read:
                self._check_columns(split, table)
                table = self.select(split, table)
            if len(table) == 0:
                advice = f" All of its {read} rows went to validation_fraction." if read else ""
                raise ValueError(
                    f"The split {split!r} is empty: {self._origin(split)}.{advice} It needs at least one row, or to be"
                    " left out."
                )
            self._tables[split] = table
        return self._tables[split]

    @override
    def train_dataloader(self) -> ShuffledExamples:
        self.setup("fit")
        rows, data = self.rows("train"), self.data_fingerprint()
        lengths = None
        if rows is not None:
            data = {**data, "packing": True}
        else:
            rows = self.examples["train"]
            lengths = lengths_of(rows) if self.bucket_by_length else None
        return ShuffledExamples(rows, lengths, self.batch_size, self.seed, self.collate, data, *self._processes)

    @override
    def val_dataloader(self) -> OrderedExamples | list[Any]:
        return self._ordered("validation") if self._has("validation") else []

    @override
    def test_dataloader(self) -> OrderedExamples:
        return self._ordered("test")

    @override
    def predict_dataloader(self) -> OrderedExamples:
        return self._ordered("predict")

    def _ordered(self, split: Split) -> OrderedExamples:
        if split not in self.examples:
            self.examples[split] = self._encode(split)
        rows = self.rows(split)
        examples = self.examples[split] if rows is None else rows
        return OrderedExamples(examples, self.eval_batch_size, self.collate, *self._processes)

    @property
    def _processes(self) -> tuple[int, int]:
        """The number of this one, and how many there are."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    @property
    def _module(self) -> Any:
        return None if self.trainer is None else self.trainer.lightning_module

    def _forget_other_modules(self) -> None:
        """Drop what followed from another module, such as its tokenizer and tokens by it."""
        if self._encoded_for is not None and self._module not in (None, self._encoded_for):
            self.examples.clear()
            for name in [name for name in vars(self) if isinstance(getattr(type(self), name, None), cached_property)]:
                delattr(self, name)
        self._encoded_for = self._module or self._encoded_for

    def _has(self, split: Split) -> bool:
        if split == "validation" and self.validation_fraction is not None:
            return True
        return split in self._named or (self.files is None and not self.splits)

    def _source(self, split: Split) -> Split:
        """The split whose rows are read for ``split``."""
        if split == "predict" and split not in self._named:
            return "test"
        return "train" if split == "validation" and self._is_held_out else split

    @property
    def _is_held_out(self) -> bool:
        """Whether validation rows are training rows."""
        return self.validation_fraction is not None and "validation" not in self._named

    @property
    def _named(self) -> Mapping[str, Any]:
        return self.files if self.files is not None else self.splits

    def _origin(self, split: Split) -> str:
        source = self._source(split)
        return (
            str(self.files[source]) if self.files is not None else f"{self.dataset} {self.splits.get(source, source)}"
        )

    def _read(self, split: Split) -> Any:
        source = self._source(split)
        if self.files is None:
            assert self.dataset is not None
            name = self.splits.get(source, source)
            return without_bad_rows(
                read_hub(self.dataset, self.config_name, name, self.revision, self.cache_dir), self.on_bad_row
            )
        if source not in self.files:
            raise ValueError(f"There is no split {split!r}; files has {', '.join(self.files)}. Name a file for it.")
        paths = self.files[source]
        listed = [Path(path) for path in ([paths] if isinstance(paths, str) else paths)]
        return without_bad_rows(read_files(listed, self.file_format, self.cache_dir), self.on_bad_row)

    def select(self, split: Split, table: Any) -> Any:
        """The rows of a split that are used, of a ``datasets.Dataset`` of all that were read for it."""
        if self._is_held_out and split in ("train", "validation"):
            order = torch.randperm(len(table), generator=torch.Generator().manual_seed(self.seed)).tolist()
            held_out = max(1, round(len(table) * (self.validation_fraction or 0)))
            table = table.select(sorted(order[:held_out] if split == "validation" else order[held_out:]))
        limit = {"train": self.max_train_rows, "validation": self.max_val_rows}.get(split)
        if limit is not None and limit < len(table):
            drawn = torch.randperm(len(table), generator=torch.Generator().manual_seed(self.seed))[:limit]
            table = table.select(sorted(drawn.tolist()) if split == "train" else range(limit))
        return table

    def _check_columns(self, split: Split, table: Any) -> None:
        there = [name for name in table.column_names if name != PLACE]
        targets = () if split == "predict" else self.target_columns
        for argument in (*self.columns_needed, *targets):
            given = getattr(self, argument)
            for wanted in given if isinstance(given, list) else [given]:
                if wanted is not None and wanted not in there:
                    raise ValueError(
                        f"Got {argument}={given!r}, but {self._origin(split)} has no such column. It has"
                        f" {', '.join(there)}."
                    )

    def _encode(self, split: Split) -> Any:
        table = self.table(split)
        source = source_of(type(self), TextDataModule)  # tokens of an encode that was changed since are no use
        key = fingerprint([table._fingerprint, self._options(split), source])
        encoded = encode_table(table, lambda row: self.encode(row, split), key, f"Encoding {split}")
        examples = without_bad_rows(encoded, self.on_bad_row)
        if len(examples) == 0:
            raise ValueError(f"No row of the split {split!r} can be used: {self._origin(split)}.")
        self.count_cut(split, examples)
        return examples.remove_columns([name for name in examples.column_names if name.startswith("__")])

    def _options(self, split: Split) -> dict[str, Any]:
        """What examples depend on, besides the rows."""
        return {
            "class": type(self).__qualname__,
            "tokenizer": fingerprint_of(self.tokenizer),
            "max_length": self.max_length,
            "split": split,
            **self.encoding_options(),
        }
