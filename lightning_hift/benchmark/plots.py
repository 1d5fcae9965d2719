"""The pictures of a report: memory by kind and by active group, quality against time, speed against memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple

KINDS = ("parameters", "gradients", "state", "residual")
# Okabe and Ito (2008), which colour-blind eyes tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999", "#f0e442")
_LABELS = {"state": "optimizer state", "residual": "activations and other"}
_MARKS = "osD^vP*Xh<>"
_MOST_MARKS = 40  # on one line


class _Style(NamedTuple):
    colour: str
    mark: str
    dashes: Literal["-", "--"]


def plot_memory(bars: Mapping[str, Mapping[str, float]], path: Path, title: str) -> None:
    """Stacked bars, one for each run.

    Args:
        bars: Bytes of each kind, by name of the run.
        path: File to write.
        title: Above the picture.
    """
    figure, axes = _figure(9.0, 1.5 + 0.42 * len(bars))
    names = list(bars)[::-1]
    left = [0.0] * len(names)
    unit, size = _unit(max(sum(parts[kind] for kind in KINDS) for parts in bars.values()))
    for kind, colour in zip(KINDS, _COLOURS, strict=False):
        widths = [bars[name][kind] / size for name in names]
        if not any(widths):
            continue
        axes.barh(names, widths, left=left, color=colour, label=_LABELS.get(kind, kind), height=0.68)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, total in enumerate(left):
        axes.annotate(
            f"{total:.3g}", (total, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_xlim(0, 1.1 * max(left))
    axes.set_xlabel(f"{unit} on the device")
    axes.set_title(title, loc="left", fontsize=11)
    figure.legend(ncols=len(KINDS), loc="outside lower center", frameon=False, fontsize=9)
    _save(figure, path)


def plot_curves(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[tuple[float, float]]]]], path: Path, x_label: str, title: str
) -> None:
    """Quality against time, one panel for each task: the mean over seeds, and each seed as a thin line.

    Args:
        panels: By name of the panel and of the line, one curve of (x, y) for each seed.
        path: File to write.
        x_label: What x is.
        title: Above the picture.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, _ = _figure(4.8 * columns + 0.4, 3.4 * rows + 0.9, axes=False)
    styles = _styles_of(name for lines in panels.values() for name in lines)
    for index, (panel, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        for name, curves in lines.items():
            colour, mark, dashes = styles[name]
            for curve in curves if len(curves) > 1 else ():
                axes.plot(*zip(*curve, strict=True), color=colour, linestyle=dashes, alpha=0.3, linewidth=0.8)
            points = _mean_curve(curves)
            marker = mark if len(points) <= _MOST_MARKS else None
            axes.plot(
                *zip(*points, strict=True), color=colour, linestyle=dashes, marker=marker, markersize=4, linewidth=1.6
            )
        axes.set_title(panel, loc="left", fontsize=10)
        axes.set_xlabel(x_label)
        axes.grid(alpha=0.25)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    _legend(figure, styles)
    _save(figure, path)


def plot_scatter(points: Mapping[str, tuple[float, float]], path: Path, title: str) -> None:
    """Speed against memory, both as multiples of the baseline: up and left is better.

    Args:
        points: (memory, speed) by name.
        path: File to write.
        title: Above the picture.
    """
    figure, axes = _figure(7.0, 5.0)
    for name, (colour, mark, _) in _styles_of(points).items():
        axes.scatter(*points[name], color=colour, marker=mark, s=70, label=name, zorder=3)
    axes.axhline(1, color="#999999", linewidth=0.8)
    axes.axvline(1, color="#999999", linewidth=0.8)
    axes.set_xlabel("memory on the device, against the baseline")
    axes.set_ylabel("steps per second, against the baseline")
    axes.set_xlim(0, 1.1 * max(1.0, *(x for x, _ in points.values())))
    axes.set_ylim(0, 1.1 * max(1.0, *(y for _, y in points.values())))
    axes.grid(alpha=0.25)
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def plot_groups(runs: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path, title: str) -> None:
    """Memory by active group, one panel for each run, the first group on top.

    Args:
        runs: Bytes of each kind, by name of the run and of the group.
        path: File to write.
        title: Above the picture.
    """
    lengths = [len(groups) for groups in runs.values()]
    figure, _ = _figure(9.0, sum(1.1 + 0.27 * length for length in lengths) + 0.7, axes=False)
    grid = figure.add_gridspec(len(runs), 1, height_ratios=[1.1 + 0.27 * length for length in lengths])
    unit, size = _unit(max(sum(parts[k] for k in KINDS) for groups in runs.values() for parts in groups.values()))
    for row, (run, groups) in enumerate(runs.items()):
        axes = figure.add_subplot(grid[row])
        left = [0.0] * len(groups)
        for kind, colour in zip(KINDS, _COLOURS, strict=False):
            widths = [parts[kind] / size for parts in groups.values()]
            label = _LABELS.get(kind, kind) if row == 0 else None
            axes.barh(
                [shorten_group(name) for name in groups], widths, left=left, color=colour, label=label, height=0.7
            )
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_title(run, loc="left", fontsize=10)
        axes.tick_params(axis="y", labelsize=8)
        axes.margins(y=0.02)
        axes.invert_yaxis()
    axes.set_xlabel(f"{unit} on the device")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.legend(ncols=len(KINDS), loc="outside lower center", frameon=False, fontsize=9)
    _save(figure, path)


def _figure(width: float, height: float, axes: bool = True) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot() if axes else None


def _save(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _styles_of(names: Iterable[str]) -> dict[str, _Style]:
    """By name, in the order of first appearance. Lines are dashed where colours come again."""
    return {
        name: _Style(_COLOURS[i % len(_COLOURS)], _MARKS[i % len(_MARKS)], "--" if i // len(_COLOURS) % 2 else "-")
        for i, name in enumerate(dict.fromkeys(names))
    }


def _legend(figure: Any, styles: Mapping[str, _Style]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=mark, linestyle=dashes, markersize=5, label=name)
        for name, (colour, mark, dashes) in styles.items()
    ]
    inches = 0.7 + 0.08 * max(map(len, styles))  # of an entry, at this size of letters
    columns = max(1, min(len(handles), int(figure.get_figwidth() / inches)))
    figure.legend(handles=handles, ncols=columns, loc="outside lower center", frameon=False, fontsize=9)


def _mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Point by point: runs that differ in the seed are validated at the same steps."""
    length = min(len(curve) for curve in curves)
    return [(mean(c[i][0] for c in curves), mean(c[i][1] for c in curves)) for i in range(length)]


def _unit(largest: float) -> tuple[str, int]:
    return next(((name, size) for name, size in (("GiB", 2**30), ("MiB", 2**20)) if largest >= size), ("KiB", 2**10))


def shorten_group(name: str, limit: int = 46) -> str:
    """``blocks.0 ... blocks.5`` as ``blocks.0 ... 5``, and the end of what is still too long."""
    first, _, last = name.partition(" ... ")
    folder = first.rpartition(".")[0]
    name = f"{first} ... {last.removeprefix(f'{folder}.')}" if last and folder else name
    return name if len(name) <= limit else f"... {name[-limit:]}"
