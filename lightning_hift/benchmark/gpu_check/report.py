"""Tables and pictures of what a check has written. Needs no GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_hift.benchmark.cell_process import MEASURED, OUT_OF_MEMORY
from lightning_hift.benchmark.gpu_check.sizes import LARGE
from lightning_hift.benchmark.gpu_check.stage import NOT_MEASURED, is_right
from lightning_hift.benchmark.gpu_check.training import ATTACH, FREED, PROFILE
from lightning_hift.benchmark.plots import plot_curves, plot_memory
from lightning_hift.benchmark.records import Record
from lightning_hift.benchmark.report import number_text, size_text
from lightning_hift.table import format_markdown

_TITLES = {"correctness": "Correctness", "copies": "Copies", "llama-2-7b": "Llama-2-7B", "llama-3-8b": "Llama-3-8B"}
_OTHERS = (ATTACH, PROFILE, FREED)  # cells that are no rows of the table of speed
_SMALL = (
    "**Tiny models (`--small`)**: this proves that the program runs, and that results are right for them. None of its"
    " times and sizes says anything about the models that the headings name."
)
_CORRECTNESS_NOTE = (
    'Each run against the same one with `offload="none"`: weights, optimizer state, masters and position. Where that'
    " one is repeated, a difference says that the device does not give the same result twice."
)
_SPEED_NOTE = (
    "HiFT: bfloat16, masters as remainders, state on the host, prefetch; over one sweep. Full: all parameters in"
    " bfloat16 without masters, state on the device. Both with the fused AdamW. Step times are those of the compute"
    " stream after a warm-up; waiting is the part of them that a step waits for state. Over full: tokens per second"
    " over those of full fine-tuning with the same batch and the same checkpointing."
)


def write_report(folder: Path) -> list[Path]:
    """Write ``report.md``, and pictures if matplotlib is installed, into ``folder``.

    Returns:
        The files.

    Raises:
        FileNotFoundError: A check has written nothing there.
    """
    stages = read_stages(folder)
    pictures = _draw(stages, folder) if find_spec("matplotlib") else {}
    parts = ["# GPU check", *_head(stages)]
    for name, title in _TITLES.items():
        parts.append(f"## {title}")
        parts += _SECTIONS.get(name, _model)(stages[name]["cells"]) if name in stages else [_sentence(NOT_MEASURED)]
        parts += [f"![{path.stem}]({path.name})" for path in pictures.get(name, [])]
    parts += ["## Measured on", *_passports(stages)]
    target = folder / "report.md"
    target.write_text("\n\n".join(parts) + "\n")
    return [target, *(path for paths in pictures.values() for path in paths)]


def read_stages(folder: Path) -> dict[str, Any]:
    """The content of each stage's file, by the stage's name, in the order of the check.

    Raises:
        FileNotFoundError: There is none.
    """
    paths = {name: folder / f"{name}.json" for name in _TITLES}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    if not found:
        raise FileNotFoundError(
            f"Got the folder {folder}, which has none of {', '.join(path.name for path in paths.values())}. Name the"
            " folder that `run --output` has written to."
        )
    return found


def _head(stages: Mapping[str, Any]) -> Iterator[str]:
    cells = stages.get("correctness", {}).get("cells", {})
    measured = [cell for cell in cells.values() if cell["status"] == MEASURED]
    equal = sum(cell["measured"]["equal"] for cell in measured)
    wrong = len(measured) - equal
    if wrong:
        verdict = f"**WRONG: {wrong} of {len(measured)} runs do not end as the run with resident state does.**"
    elif cells and is_right(list(cells.values())):
        verdict = f"**Right: all {equal} runs end as the run with resident state does, bit for bit.**"
    else:
        verdict = f"**Not known to be right: {equal} of {len(cells) or 'all'} runs were compared, and came out equal.**"
    yield verdict
    failed = [f"{name}: {cell}" for name, stage in stages.items() for cell in _with_status(stage, "failed")]
    if failed:
        yield f"Failed: {'; '.join(failed)}."
    if any(stage["passport"]["small"] for stage in stages.values()):
        yield _SMALL


def _with_status(stage: Mapping[str, Any], status: str) -> list[str]:
    return [name for name, cell in stage["cells"].items() if cell["status"] == status]


def _outcome(cell: Record) -> str:
    """Why a cell has no numbers."""
    status = "does not fit" if cell["status"] == OUT_OF_MEMORY else str(cell["status"])
    reason = "" if cell["status"] == OUT_OF_MEMORY else cell.get("reason", "")
    return f"{status}: {reason}" if reason else status


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


# --- one section for each stage ---------------------------------------------------------------------------------------


def _correctness(cells: Mapping[str, Record]) -> Iterator[str]:
    lines = []
    for name, cell in cells.items():
        found = cell.get("measured")
        if found is None:
            lines.append([name, "-", "-", "-", "-", _outcome(cell)])
            continue
        where = f" ({', '.join(found['first_differing'])})" if found["first_differing"] else ""
        loss = " to ".join(f"{loss:.3f}" for loss in found["losses"])
        result = "equal" if found["equal"] else "NOT EQUAL"
        lines.append([name, found["steps"], f"{found['compared']:,}", f"{found['differing']:,}{where}", loss, result])
    yield _CORRECTNESS_NOTE
    yield format_markdown(["run", "steps", "elements", "differ", "loss", "result"], lines)


def _copies(cells: Mapping[str, Record]) -> Iterator[str]:
    lines = [
        [name, f"{cell['measured']['bytes_per_second'] / 1e9:.1f} GB/s" if "measured" in cell else _outcome(cell)]
        for name, cell in cells.items()
    ]
    yield format_markdown(["page-locked memory", "bandwidth"], lines)


def _model(cells: Mapping[str, Record]) -> Iterator[str]:
    yield _speed_table(cells)
    yield _SPEED_NOTE
    yield "### Host memory"
    yield _host_memory(cells)
    if PROFILE in cells:
        yield "### Profile"
        yield from _profile(cells[PROFILE])


def _speed_table(cells: Mapping[str, Record]) -> str:
    lines = []
    for name, cell in cells.items():
        if name in _OTHERS:
            continue
        found: Mapping[str, Any] = cell.get("measured", {})
        lines.append(
            [
                name,
                *(size_text(found.get(key)) for key in ("peak_allocated", "peak_reserved", "state_bytes_device")),
                *(number_text(found.get(key), ".1f") for key in ("step_ms_median", "step_ms_mean")),
                _waiting(found),
                number_text(found.get("tokens_per_second"), ",.0f"),
                number_text(_speed_over_full(name, cells), ".2f"),
                MEASURED if found else _outcome(cell),
            ]
        )
    header = ["run", "peak allocated", "peak reserved", "state on the device", "median ms", "mean ms"]
    return format_markdown([*header, "waiting ms, mean (most)", "tokens/s", "over full", "result"], lines)


def _waiting(found: Mapping[str, Any]) -> str:
    exposed = found.get("exposed_ms")
    return f"{found['exposed_ms_mean']:.1f} ({max(exposed):.1f})" if exposed else "-"


def _speed_over_full(name: str, cells: Mapping[str, Record]) -> float | None:
    both = [cells.get(each, {}).get("measured", {}) for each in (name, name.replace("hift", "full", 1))]
    speeds = [each.get("tokens_per_second") for each in both]
    return speeds[0] / speeds[1] if name.startswith("hift") and all(speeds) else None


def _host_memory(cells: Mapping[str, Record]) -> str:
    attach = cells[ATTACH]
    if "measured" not in attach:
        return _sentence(_outcome(attach))
    found, freed = attach["measured"], cells[FREED].get("measured", {})
    locked = found["page_lock"]
    rate = f", {locked['nbytes'] / locked['seconds'] / 1e9:.1f} GB/s" if locked["seconds"] else ""
    lines = [
        ["parameters", f"{found['parameters']:,}"],
        ["layer groups", found["groups"]],
        ["state and masters on the host", size_text(found["host_bytes"])],
        ["process before, resident", size_text(found["before"]["resident"])],
        ["process after the first sweep, resident", size_text(found["after"]["resident"])],
        ["process after the engine is closed, resident", size_text(freed.get("after", {}).get("resident"))],
        ["building the model", f"{found['build_seconds']:.1f} s"],
        ["attaching the engine", f"{found['attach_seconds']:.1f} s"],
        ["first sweep", f"{found['first_sweep_seconds']:.1f} s"],
        [
            "page-locking within these two",
            f"{locked['seconds']:.1f} s for {size_text(locked['nbytes'])} in {locked['calls']} calls{rate}",
        ],
    ]
    return format_markdown(["what", "measured"], lines)


def _profile(cell: Record) -> Iterator[str]:
    if "measured" not in cell:
        yield _sentence(_outcome(cell))
        return
    found = cell["measured"]
    rows, length = found["shape"]
    yield (
        f"{found['steps']} of the sweep's {found['of']} steps, evenly spread, with {rows}x{length}, checkpointed:"
        f" {found['wall_ms'] / found['steps']:.1f} ms each under the profiler. Milliseconds are sums over them; the"
        " device's time of a range is that of what was started inside."
    )
    ranges = [[f"`{e['name']}`", e["calls"], f"{e['host_ms']:.1f}", f"{e['device_ms']:.1f}"] for e in found["ranges"]]
    yield format_markdown(["range", "calls", "host ms", "device ms"], ranges)
    kernels = [[f"`{each['name']}`", each["calls"], f"{each['ms']:.1f}"] for each in found["kernels"]]
    yield format_markdown(["kernel" if found["on_gpu"] else "operator of the host", "calls", "ms"], kernels)


_PASSPORT = (
    *("device", "kind", "device_bytes", "driver", "cuda", "cores", "host_bytes_available", "versions", "commit"),
    *("environment", "seed", "budget_seconds", "started"),
)
_SECTIONS = {"correctness": _correctness, "copies": _copies}


def _passports(stages: Mapping[str, Any]) -> Iterator[str]:
    """A table for each machine and program that stages were measured with."""
    alike: dict[str, list[str]] = {}
    for name, stage in stages.items():
        alike.setdefault(format_markdown(["what", "value"], _passport_lines(stage["passport"])), []).append(name)
    for table, names in alike.items():
        if len(alike) > 1:
            yield f"{', '.join(_TITLES[name] for name in names)}:"
        yield table
    warm_up = {_TITLES[name]: stage["passport"]["config"].get("warm_up_steps") for name, stage in stages.items()}
    yield "Warm-up steps: " + ", ".join(f"{title} {steps}" for title, steps in warm_up.items() if steps is not None)


def _passport_lines(passport: Mapping[str, Any]) -> list[list[str]]:
    lines = []
    for key in _PASSPORT:
        value = passport[key]
        if "bytes" in key and value is not None:
            value = size_text(value)
        elif isinstance(value, Mapping):
            value = ", ".join(f"{name} {each}" for name, each in value.items())
        lines.append([key.replace("_", " "), "-" if value is None else str(value)])
    return lines


# --- pictures ---------------------------------------------------------------------------------------------------------


def _draw(stages: Mapping[str, Any], folder: Path) -> dict[str, list[Path]]:
    """Pictures by stage: milliseconds by layer group, and memory at the peak."""
    drawn: dict[str, list[Path]] = {}
    for name in LARGE.models:
        cells = stages.get(name, {}).get("cells", {})
        runs = {n: c["measured"] for n, c in cells.items() if n not in _OTHERS and c["status"] == MEASURED}
        title = f"{_TITLES[name]}{' (tiny)' if runs and stages[name]['passport']['small'] else ''}"
        if runs:
            path = folder / f"{name}_steps.png"
            panels = _panels(runs)
            plot_curves(panels, path, "layer group, from the input upwards", f"{title}: milliseconds of a step")
            drawn[name] = [path]
        if any(found["peak_allocated"] for found in runs.values()):
            path = folder / f"{name}_memory.png"
            plot_memory({n: _parts(found) for n, found in runs.items()}, path, f"{title}: memory allocated at the peak")
            drawn[name].append(path)
    return drawn


def _panels(runs: Mapping[str, Any]) -> dict[str, dict[str, list[list[tuple[float, float]]]]]:
    """A panel for each shape, a line for each run: HiFT by group, full fine-tuning as its median."""
    panels: dict[str, dict[str, list[list[tuple[float, float]]]]] = {}
    most = max(found["steps"] for name, found in runs.items())
    for name, found in runs.items():
        method, shape, *rest = name.split(", ")
        if method == "hift":
            points = sorted((float(group.split(":")[0]), ms) for group, ms in found["step_ms"])
        else:
            points = [(0.0, found["step_ms_median"]), (most - 1.0, found["step_ms_median"])]
        panels.setdefault(shape, {})[", ".join([method, *rest])] = [points]
    return panels


def _parts(found: Mapping[str, Any]) -> dict[str, float]:
    """The peak, as stacked bars have it."""
    parts = {"parameters": found["weight_bytes"], "gradients": found["gradient_bytes"]}
    parts["state"] = found["state_bytes_device"]
    return {**parts, "residual": max(0, found["peak_allocated"] - sum(parts.values()))}
