"""Files of results: one JSON object per line, which are only ever added to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def append_record(path: Path, record: Record) -> None:
    """Add a line to the file of records."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_records(path: Path) -> list[Record]:
    """All records of a file, which may not exist, in the order in which they were added."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
