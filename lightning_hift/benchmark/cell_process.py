"""The process of one run: reads what to do from a file, does it, and writes what came of it beside it."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_hift.benchmark.kinds import Skipped, run_function
from lightning_hift.benchmark.passport import make_passport
from lightning_hift.benchmark.records import Record

MEASURED, SKIPPED, OUT_OF_MEMORY, TIMED_OUT, FAILED = "measured", "skipped", "out of memory", "timed out", "failed"
_MODULE = "lightning_hift.benchmark.cell_process"
_POLL_SECONDS = 1.0
_LONGEST = 400  # characters of a reason
_MISSING = ("No module named", "pip install", "needs a CUDA")


def write_request(
    folder: Path,
    kind: str,
    configs: Sequence[str],
    options: Mapping[str, Any],
    threads: int | None = None,
    device_memory: int | None = None,
) -> tuple[Path, list[str]]:
    """Describe a run in a file of ``folder``; returns where its outcome will be, and the command that makes it."""
    request = folder / "request.json"
    told = {"kind": kind, "configs": list(configs), "options": dict(options), "threads": threads}
    request.write_text(json.dumps({**told, "device_memory": device_memory, "parent": os.getpid()}))
    return request.with_suffix(".out"), [sys.executable, "-m", _MODULE, str(request)]


def main(request: Path) -> None:
    """Make the run that ``request`` describes, and write its outcome to ``request`` with the suffix ``.out``."""
    told = json.loads(request.read_text())
    threading.Thread(target=_end_with, args=(told["parent"],), daemon=True).start()
    if told["device_memory"] is not None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, told["device_memory"] / total))
    if told["threads"] is not None:
        torch.set_num_threads(told["threads"])
    outcome = run_cell(told["kind"], told["configs"], told["options"], request.parent)
    request.with_suffix(".out").write_text(json.dumps(outcome))


def _end_with(parent: int) -> None:
    """End this process, and all that it has started, when the benchmark is gone: nobody would take the outcome."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os.killpg(0, signal.SIGKILL)


def run_cell(kind: str, configs: Sequence[str], options: Mapping[str, Any], folder: Path) -> Record:
    """Make a run in this process; whatever goes wrong is its outcome."""
    return {**outcome_of(lambda: run_function(kind)(configs, options, folder)), "passport": make_passport()}


def outcome_of(measure: Callable[[], Mapping[str, Any]]) -> Record:
    """What ``measure`` returns, or why it did not: as ``status``, and ``measured`` or ``reason``."""
    try:
        return {"status": MEASURED, "measured": dict(measure())}
    except Skipped as reason:
        return {"status": SKIPPED, "reason": str(reason)}
    except ModuleNotFoundError as error:
        return {"status": SKIPPED, "reason": f"the package {error.name} is not installed"}
    except (torch.OutOfMemoryError, MemoryError) as error:
        return {"status": OUT_OF_MEMORY, "reason": shorten(str(error) or "of the host")}
    except Exception as error:  # a row, not the end
        return {"status": status_of(str(error)), "reason": shorten(f"{type(error).__name__}: {error}")}


def status_of(words: str) -> str:
    """What it means that a run has ended with these words: something is missing here, or it failed."""
    return SKIPPED if any(sign in words for sign in _MISSING) else FAILED


def shorten(text: str) -> str:
    """``text`` in one line of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


if __name__ == "__main__":
    main(Path(sys.argv[1]))
