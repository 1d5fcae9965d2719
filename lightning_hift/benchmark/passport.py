"""What a number was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lightning_hift.planner.memory import available_host_memory

_PACKAGES = ("torch", "lightning", "transformers", "torchao", "lightning-hift")


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter, as far as they are installed."""
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_bytes() -> int | None:
    """Memory of the CUDA device; ``None``: there is none."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def make_passport() -> dict[str, object]:
    """Device, driver, host memory, versions and commit; with ``None`` for what cannot be found out."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "device_bytes": device_bytes(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "host_bytes_available": available_host_memory(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "commit": _output("git", "describe", "--always", "--dirty"),
    }


def _processor() -> str:
    """``"CPU"`` with its name, as far as the system knows one, and the number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU, {names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.strip() or None) if done.returncode == 0 else None
