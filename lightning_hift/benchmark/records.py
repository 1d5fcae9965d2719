"""Files of results: one JSON object per line, which are only ever added to."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Record = dict[str, Any]


def append_record(path: Path, record: Record) -> None:
    """Add a line to the file of records, as a whole or not at all.

    Raises:
        OSError: It cannot be written; what was there still is.
    """
    rest = (json.dumps(record) + "\n").encode()
    with path.open("ab", buffering=0) as file, _only_writer(file):
        size, is_whole = _end_of_lines(path)
        file.truncate(size)  # whoever was stopped in the middle of a line has left a part of it
        rest = rest if is_whole else b"\n" + rest
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(size)
            raise OSError(
                error.errno,
                f"{error.strerror}. A record was not added to {path}, which is as it was. Make room and start again:"
                " what is recorded is not repeated",
            ) from error


def read_records(path: Path) -> list[Record]:
    """All records of a file, which may not exist, in the order in which they were added.

    Raises:
        ValueError: A line, other than a last one that was cut off, is no record.
    """
    if not path.exists():
        return []
    *lines, rest = path.read_text().split("\n")
    if _is_record(rest):  # an editor has taken the end of the line away
        lines.append(rest)
    elif rest:
        warnings.warn(f"{path}: the last line was cut off when it was written, and is left out.", stacklevel=2)
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}, is no record: {line[:80]!r}. Remove it, or name another file.")
        found.append(record)
    return found


def merge_records(path: Path, others: Iterable[Path]) -> int:
    """Add what other files have and this one has not.

    Returns:
        How many records were added.

    Raises:
        FileNotFoundError: One of the others does not exist.
    """
    known = {json.dumps(record, sort_keys=True) for record in read_records(path)}
    added = 0
    for other in others:
        if not other.exists():
            raise FileNotFoundError(f"There is no file {other} to merge.")
        for record in read_records(other):
            text = json.dumps(record, sort_keys=True)
            if text not in known:
                known.add(text)
                append_record(path, record)
                added += 1
    return added


def _end_of_lines(path: Path) -> tuple[int, bool]:
    """Bytes of all records, and whether the last one has the end of its line."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    return (len(content), False) if _is_record(content[end:]) else (end, True)


def _is_record(text: str | bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


@contextmanager
def _only_writer(file: IO[bytes]) -> Iterator[None]:
    """Keep other processes from writing meanwhile, where the system knows how to."""
    if fcntl is None:
        yield
        return
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
