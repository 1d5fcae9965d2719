"""A plan as a picture: the device memory of each layer group."""

from __future__ import annotations

from pathlib import Path

from lightning_hift.planner.forecast import GroupPlan
from lightning_hift.planner.report import Plan
from lightning_hift.table import format_bytes

_OVERHEAD = "driver, CUDA context (assumed)"
# Colours that stay apart in print and for colour-blind eyes (Okabe and Ito, 2008).
_COLOURS = {
    _OVERHEAD: "#bbbbbb",
    "weights": "#0072b2",
    "gradients": "#e69f00",
    "state": "#009e73",
    "masters": "#cc79a7",
    "activations": "#56b4e9",
    "exchange": "#f0e442",
}


def plot_plan(plan: Plan, path: str | Path) -> None:
    """Draw the device memory of each group, stacked by kind, to a file whose name ends in .png, .pdf or .svg.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("A plot needs matplotlib: pip install lightning-hift[plot]") from error

    groups = plan.forecast.groups
    figure = Figure(figsize=(max(7.0, min(16.0, 3.5 + 0.22 * len(groups))), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bottom = [0.0] * len(groups)
    for kind, colour in _COLOURS.items():
        heights = [_gib(group, kind) for group in groups.values()]
        if any(heights):
            axes.bar(list(groups), heights, bottom=bottom, width=1.0, color=colour, label=kind, linewidth=0)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    steps = [(group.step + group.overhead) / 2**30 for group in groups.values()]
    left, right = [i - 0.5 for i in groups], [i + 0.5 for i in groups]
    axes.hlines(steps, left, right, color="black", linewidth=1.2, label="at the optimizer step")
    if plan.device_memory is not None:
        limit, label = plan.device_memory / 2**30, f"device: {format_bytes(plan.device_memory)}"
        axes.axhline(limit, color="#d55e00", linestyle="--", linewidth=1.5, label=label)
    setup = plan.forecast.setup
    axes.set_title(
        f"Device memory by active layer group: {plan.parameters / 1e9:.2f}B parameters, {setup.precision},"
        f" masters {setup.master_weights}, batch {setup.batch_size} x {setup.sequence_length}",
        fontsize=10,
        loc="left",
    )
    axes.set_xlabel("active layer group, from the input upwards")
    axes.set_ylabel("GiB")
    axes.margins(x=0.01, y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, reverse=True)
    figure.savefig(path, dpi=150)


def _gib(group: GroupPlan, kind: str) -> float:
    value = group.overhead if kind == _OVERHEAD else getattr(group, kind)
    return float(value or 0) / 2**30
