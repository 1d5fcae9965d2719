"""Rows of local files or of a data set on the Hugging Face hub, each with the place it came from."""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Literal

from lightning_hift.data.bad_rows import OnBadRow, settle

PLACE, FAULT = "__place__", "__fault__"
"""Columns of every table: ``file:line`` of the row, and why it cannot be used, or nothing."""

_LONGEST_FIELD = 2**31 - 1  # characters; 128 Ki by default, less than a document may have

_VERSION = 3  # of the reader; another one reads cached files again


@dataclass(frozen=True)
class FileFormat:
    """How local files are written.

    Args:
        kind: ``"csv"``, ``"tsv"``, ``"jsonl"``, ``"json"``, ``"parquet"``, ``"txt"`` or ``"conll"``; default: the end
            of the name. A conll file has one word per line and an empty line between sentences; its rows hold one list
            per column.
        columns: Names of the columns of csv and tsv files that have no header, and of conll files.
        delimiter: Between columns; default: comma in csv, tab in tsv, any white space in conll.
        quote: Around fields that contain a delimiter; default: ``"`` in csv, none in tsv.
        line_pattern: For txt files: a regular expression with named groups, which become columns. Default: one column,
            ``text``.
        records: For json files: the key under which the list of rows is found, with dots into nested ones. Where there
            are lists on the way, their lists of rows are joined, and each row takes over the plain values beside them:
            ``"data.paragraphs.qas"`` gives the questions of SQuAD, each with its ``context`` and ``title``.
        encoding: Of the files.
    """

    kind: Literal["csv", "tsv", "jsonl", "json", "parquet", "txt", "conll"] | None = None
    columns: Sequence[str] | None = None
    delimiter: str | None = None
    quote: str | None = None
    line_pattern: str | None = None
    records: str | None = None
    encoding: str = "utf-8"


def read_files(paths: Sequence[Path], file_format: FileFormat, cache: Path | None = None) -> Any:
    """Rows of local files as a ``datasets.Dataset``, read once and then cached until they change.

    Args:
        paths: Files whose names end in .csv, .tsv, .jsonl, .json, .parquet, .txt or .conll, perhaps with .gz behind.
        file_format: How they are written.
        cache: Folder for what was read; default: that of ``datasets``.

    Returns:
        All columns of the files, with ``PLACE`` and ``FAULT``; bad rows are in it.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A name ends in something else, a file has no header, or a whole file cannot be read.
    """
    _need_datasets()
    from datasets import Dataset
    from datasets.arrow_writer import SchemaInferenceError
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowInvalid

    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"Got the file {path}, which does not exist. Paths are relative to {Path.cwd()}.")
        if _kind_of(path, file_format) not in _READERS:
            raise ValueError(
                f"Got the file {path}, whose name does not end in one of {', '.join(_READERS)} (or that and gz). Say"
                " which of them it is: kind in file_format."
            )
    key = hashlib.sha256(repr((_VERSION, file_format)).encode())
    for path in paths:
        key.update(str(path).encode() + _digest(path))

    arguments: dict[str, Any] = {"paths": [str(path) for path in paths], "file_format": file_format}

    def load(features: Any = None) -> Any:
        where = None if cache is None else str(cache)
        name = key.hexdigest()[:16]
        return Dataset.from_generator(_rows, features, cache_dir=where, gen_kwargs=arguments, fingerprint=name)

    try:
        return load()
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, SchemaInferenceError):  # not a single row
            return Dataset.from_dict({PLACE: [], FAULT: []})
        if not isinstance(error.__cause__, (TypeError, ArrowInvalid)):
            raise error.__cause__ or error from error
    # In the first thousand rows, a column or its lists are empty, or its numbers are whole.
    return load(_features(_rows(**arguments)))


def read_hub(name: str, config_name: str | None, split: str, revision: str | None, cache: Path | None = None) -> Any:
    """Rows of a data set on the hub, or of a folder that ``datasets`` can load, with ``PLACE`` and ``FAULT``.

    Raises:
        OSError: There is no such data set in the cache, and the hub does not have it or cannot be reached.
        ValueError: It has no such configuration or split.
    """
    _need_datasets()
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        table = load_dataset(
            name, config_name, split=split, revision=revision, cache_dir=None if cache is None else str(cache)
        )
    except (ConnectionError, DatasetNotFoundError, FileNotFoundError) as error:
        raise OSError(
            f"Got dataset={name!r}, which is no local folder and not cached, and the hub gave nothing:"
            f" {str(error).splitlines()[0]} Without a network, name local files under files, or load it once where"
            " there is one and copy the cache."
        ) from error
    places = [f"{name} {split}:{i}" for i in range(len(table))]
    return table.add_column(PLACE, places).add_column(FAULT, [""] * len(table))


def _need_datasets() -> None:
    if find_spec("datasets") is None:
        raise RuntimeError(
            "Data of tasks needs datasets, which is not installed. Run: pip install lightning-hift[tasks]"
        )


def without_bad_rows(table: Any, on_bad_row: OnBadRow) -> Any:
    """``table`` without its bad rows and without the column that marks them.

    Raises:
        ValueError: There are bad rows, and they are not to be skipped.
    """
    faults = table[FAULT]
    bad = [i for i, fault in enumerate(faults) if fault]
    if bad:
        settle([f"{table[i][PLACE]}: {table[i][FAULT]}" for i in bad], len(table), on_bad_row)
        is_bad = set(bad)
        table = table.select([i for i in range(len(table)) if i not in is_bad])
    return table.remove_columns(FAULT)


# --- one reader per format --------------------------------------------------------------------------------------------


def _rows(paths: list[str], file_format: FileFormat) -> Iterator[dict[str, Any]]:
    """All rows of all files with the same columns in the same order, as Arrow wants them."""

    def read() -> Iterator[tuple[Path, Row]]:
        return ((path, row) for path in map(Path, paths) for row in _read_file(path, file_format))

    kinds: dict[str, type | None] = {}
    for _, (_, row, _) in read():
        for column, value in row.items():
            kinds[column] = kinds.get(column) or _kind(value)
    for path, (line, row, fault) in read():
        for column, value in row.items():
            kind = _kind(value)
            if kind not in (None, kinds[column]) and not fault:
                fault = f"column {column!r} holds a {type(value).__name__}, where rows before it hold another type"
        values = dict.fromkeys(kinds) if fault else {column: row.get(column) for column in kinds}
        yield {**values, PLACE: f"{path}:{line}", FAULT: fault}


def _features(rows: Iterator[dict[str, Any]]) -> Any:
    """The types of all rows together, where ``datasets`` would take them from the first thousand."""
    import pyarrow
    from datasets import Features

    schema = pyarrow.schema([])
    while chunk := list(itertools.islice(rows, 1000)):
        found = pyarrow.Table.from_pylist(chunk).schema
        schema = pyarrow.unify_schemas([schema, found], promote_options="permissive")
    return Features.from_arrow_schema(schema)


def _kind(value: Any) -> type | None:
    """What a column has one of: all numbers are of one kind."""
    return None if value is None else float if isinstance(value, (bool, int, float)) else type(value)


Row = tuple[int, Mapping[str, Any], str]
"""Line, counted from 1, columns, and the fault or nothing."""


def _read_file(path: Path, file_format: FileFormat) -> Iterator[Row]:
    kind = _kind_of(path, file_format)
    try:
        yield from _READERS[kind](path, file_format)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}:{_undecodable_line(path, file_format.encoding)}: it is not in {file_format.encoding}"
            f" ({error.reason}). Say in which encoding the file is: encoding in file_format, such as latin-1 or utf-16."
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error, csv.Error) as error:
        raise ValueError(
            f"{path} cannot be read as {kind}: {error}. Write it anew, or mend kind in file_format."
        ) from error


def _undecodable_line(path: Path, encoding: str) -> int:
    """The first line that is not in ``encoding``, from 1; 0 if each is, taken by itself."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for line, text in enumerate(file, 1):
            try:
                text.decode(encoding)
            except UnicodeDecodeError:
                return line
    return 0


def _read_separated(path: Path, file_format: FileFormat) -> Iterator[Row]:
    is_csv = _kind_of(path, file_format) == "csv"
    quote = file_format.quote if file_format.quote is not None else ('"' if is_csv else None)
    csv.field_size_limit(_LONGEST_FIELD)
    with _open(path, file_format) as file:
        reader = csv.reader(
            file,
            delimiter=file_format.delimiter or ("," if is_csv else "\t"),
            quotechar=quote or None,
            quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE,
            strict=True,  # or all that follows a quote that is not closed would be one field
        )
        columns = list(file_format.columns) if file_format.columns is not None else next(reader, None)
        if columns is None:
            raise ValueError(f"{path} is empty: it has no header. Give columns if it needs none.")
        twice = [name for name in columns if name and columns.count(name) > 1]
        if twice:
            raise ValueError(f"{path}:1: the column {twice[0]!r} is there twice. Rename one of them.")
        for line, fields, fault in _fields(reader):
            if len(fields) != len(columns):
                fault = fault or f"it has {len(fields)} fields, not {len(columns)} ({', '.join(columns)})"
                fields = (fields + [""] * len(columns))[: len(columns)]
            yield line, dict(zip(columns, fields, strict=True)), fault


def _fields(reader: Any) -> Iterator[tuple[int, list[str], str]]:
    """Line, fields and fault of each record that a ``csv.reader`` finds."""
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, [], f"up to line {reader.line_num}: {error}; a quote inside quotes is written twice"
            continue
        if fields:
            yield line, fields, ""


def _read_lines(path: Path, file_format: FileFormat) -> Iterator[Row]:
    pattern = re.compile(file_format.line_pattern or "(?P<text>.*)")
    if not pattern.groupindex:
        raise ValueError(f"Got line_pattern={file_format.line_pattern!r}; it needs named groups, like '(?P<text>.*)'.")
    with _open(path, file_format) as file:
        for line, text in enumerate((line.rstrip("\r\n") for line in file), 1):
            match = pattern.fullmatch(text)
            if match is None:
                yield line, dict.fromkeys(pattern.groupindex, ""), f"line_pattern does not match {text[:60]!r}"
            elif text.strip() or file_format.line_pattern is None:
                yield line, match.groupdict(), ""


def _read_json_lines(path: Path, file_format: FileFormat) -> Iterator[Row]:
    with _open(path, file_format) as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
                fault = "" if isinstance(row, dict) else f"it is a {type(row).__name__}, not an object"
            except json.JSONDecodeError as error:
                row, fault = {}, f"column {error.colno}: {error.msg}"
            yield line, row if isinstance(row, dict) else {}, fault


def _read_json(path: Path, file_format: FileFormat) -> Iterator[Row]:
    with _open(path, file_format) as file:
        try:
            found = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: column {error.colno}: {error.msg}. It is no JSON.") from error
    keys = file_format.records.split(".") if file_format.records else []
    for number, row in enumerate(_find_rows(found, keys, path), 1):
        is_object = isinstance(row, dict)
        yield number, row if is_object else {}, "" if is_object else f"it is a {type(row).__name__}, not an object"


def _find_rows(found: Any, keys: list[str], path: Path) -> Iterator[Any]:
    if keys and isinstance(found, list):
        for item in found:
            pairs = item.items() if isinstance(item, dict) else ()
            beside = {key: value for key, value in pairs if not isinstance(value, (dict, list))}
            for row in _find_rows(item, keys, path):
                yield {**beside, **row} if isinstance(row, dict) else row
    elif keys:
        if not isinstance(found, dict) or keys[0] not in found:
            known = ", ".join(found) if isinstance(found, dict) else f"a {type(found).__name__}"
            raise ValueError(f"Got {keys[0]!r} in records, but {path} has no such key there; it has {known}.")
        yield from _find_rows(found[keys[0]], keys[1:], path)
    elif isinstance(found, list):
        yield from found
    else:
        raise ValueError(
            f"{path} holds a {type(found).__name__}, not a list of rows. Say under which key the list is: records."
        )


def _read_conll(path: Path, file_format: FileFormat) -> Iterator[Row]:
    columns = list(file_format.columns or ())
    if not columns:
        raise ValueError(f"{path} does not name its columns. Give them: columns in file_format, like [words, tags].")
    with _open(path, file_format) as file:
        start, words, fault = 0, list[list[str]](), ""
        for line, text in enumerate(itertools.chain(file, [""]), 1):
            if text.strip() and not text.startswith("-DOCSTART-"):
                fields = text.rstrip("\r\n").split(file_format.delimiter)
                if not fault:
                    start = start or line
                    words.append(fields)
                    if len(fields) != len(columns):
                        start, fault = line, f"it has {len(fields)} fields, not {len(columns)} ({', '.join(columns)})"
            elif words:
                lists = map(list, zip(*words, strict=True)) if not fault else ([] for _ in columns)
                yield start, dict(zip(columns, lists, strict=True)), fault
                start, words, fault = 0, [], ""


def _read_parquet(path: Path, file_format: FileFormat) -> Iterator[Row]:
    from pyarrow import ArrowInvalid, parquet

    number = 0
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is no parquet file: {error}. Write it anew, or mend kind in file_format.") from error
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield number, row, ""


_READERS = {
    "csv": _read_separated,
    "tsv": _read_separated,
    "txt": _read_lines,
    "jsonl": _read_json_lines,
    "json": _read_json,
    "parquet": _read_parquet,
    "conll": _read_conll,
}


def _open(path: Path, file_format: FileFormat) -> IO[str]:
    # Spreadsheets put a byte order mark before UTF-8, which would become part of the first column's name.
    encoding = "utf-8-sig" if codecs.lookup(file_format.encoding).name == "utf-8" else file_format.encoding
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding=encoding, newline="")
    return path.open(encoding=encoding, newline="")


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.digest()


def _kind_of(path: Path, file_format: FileFormat) -> str:
    return file_format.kind or (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower().removeprefix(".")
