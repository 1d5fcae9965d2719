"""Plain-text tables and byte counts, as shown at the start of fit and on the command line."""

from __future__ import annotations

from collections.abc import Sequence

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns padded to their widest cell; a column of numbers to the right, one of words to the left."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    right = _columns_of_numbers(len(header), cells)

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(list(header)), rule, *map(line, cells)])


def format_markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The same as a table of Markdown, with numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    right = _columns_of_numbers(len(header), cells)
    rule = ["---:" if is_number else "---" for is_number in right]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(header), rule, *cells])


def _columns_of_numbers(width: int, cells: Sequence[Sequence[str]]) -> list[bool]:
    return [
        bool(cells) and all(row[i].lstrip("+-")[:1].isdigit() or row[i] in ("", "-", "all") for row in cells)
        for i in range(width)
    ]


def format_bytes(count: float) -> str:
    """``count`` in the largest binary unit that leaves at least 1: ``"1.50 GiB"``."""
    for unit in _UNITS:
        if abs(count) < 1024 or unit == _UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
