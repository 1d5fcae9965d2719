"""The picture of ``LayerUpdates``: layer unit against sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_MOST_COLUMNS = 400
_MOST_DECADES = 5
_NEVER = "#d55e00"  # vermilion of Okabe and Ito (2008), which colour-blind eyes tell from all of cividis
_UNREACHED = "#e6e6e6"


def plot_layer_updates(rows: Sequence[Mapping[str, Any]], units: Sequence[str], path: str | Path) -> None:
    """Draw rows of ``LayerUpdates`` as a heat map, on a logarithmic scale, the input at the bottom.

    Args:
        rows: With ``sweep``, ``unit`` and ``relative``.
        units: All units from the input upwards, also those without rows.
        path: File to write, whose name ends in .png, .pdf or .svg.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError("Got no rows to draw; no step was measured.")
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    sweeps, table = _table(rows, units)
    positive = [value for line in table for value in line if value > 0]  # NaN is not
    low, high = (min(positive), max(positive)) if positive else (1e-4, 1e-3)
    low = max(low, high * 10**-_MOST_DECADES)  # the last step of a schedule that ends at 0 should not flatten the rest
    if high < 10 * low:  # differences within a decade should not look like much
        middle = math.sqrt(low * high)
        low, high = middle / math.sqrt(10), middle * math.sqrt(10)

    row_height = min(0.34, max(0.14, 4.2 / len(units)))
    figure = Figure(figsize=(9.0, 1.6 + row_height * len(units)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=_UNREACHED)
    colours = colormaps["cividis"].with_extremes(under=_NEVER)
    mesh = axes.imshow(
        _masked(table, low),
        norm=LogNorm(low, high),
        cmap=colours,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(-0.5, len(sweeps) - 0.5, -0.5, len(units) - 0.5),
    )
    _label(axes, sweeps, units, table, row_height)
    figure.colorbar(mesh, ax=axes, label="|update| / |weight| per step", pad=0.02, aspect=30)
    flat = [value for line in table for value in line]
    patches = [Patch(color=_NEVER, label="stepped, did not move")] if 0.0 in flat else []
    patches += [Patch(color=_UNREACHED, label="no step")] if any(map(math.isnan, flat)) else []
    if patches:
        figure.legend(handles=patches, loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _masked(table: Sequence[Sequence[float]], low: float) -> Any:
    """Without NaN; ``low`` where something has moved less, and zeros, of which there is no logarithm, below it."""
    import numpy

    values = numpy.array(table)
    return numpy.ma.masked_invalid(numpy.where(values == 0, low / 2, numpy.maximum(values, low)))


def _table(rows: Sequence[Mapping[str, Any]], units: Sequence[str]) -> tuple[list[int], list[list[float]]]:
    """First sweep of each column, and mean values by unit and column; NaN where there are none."""
    measured = sorted({row["sweep"] for row in rows})
    per_column = math.ceil(len(measured) / _MOST_COLUMNS)
    column_of = {sweep: i // per_column for i, sweep in enumerate(measured)}
    cells: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        cells.setdefault((row["unit"], column_of[row["sweep"]]), []).append(row["relative"])
    columns = range(max(column_of.values()) + 1)
    table = [
        [sum(found) / len(found) if (found := cells.get((unit, i))) else math.nan for i in columns] for unit in units
    ]
    return measured[::per_column], table


def _label(
    axes: Any, sweeps: Sequence[int], units: Sequence[str], table: Sequence[Sequence[float]], row_height: float
) -> None:
    axes.set_title("How far each layer moved", loc="left", fontsize=11)
    axes.set_xlabel("sweep")
    shown = range(0, len(sweeps), math.ceil(len(sweeps) / 10))
    axes.set_xticks(shown, [sweeps[i] for i in shown])
    axes.set_ylabel("layer unit, input at the bottom")
    moved = [any(value > 0 for value in line) for line in table]
    names = [name if there else f"{name}: never moved" for name, there in zip(_short(units), moved, strict=True)]
    axes.set_yticks(range(len(units)), names, fontsize=min(9.0, 60 * row_height))
    for text, there in zip(axes.get_yticklabels(), moved, strict=True):
        text.set_color("black" if there else _NEVER)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)


def _short(units: Sequence[str]) -> list[str]:
    """The last parts of the names, as many as tell them apart."""
    for parts in range(2, 12):
        names = [".".join(unit.split(".")[-parts:]) for unit in units]
        if len(set(names)) == len(set(units)):
            break
    return names
