"""The check of a GPU, in small: there are copies, page-locked memory and peaks."""

import json
from dataclasses import replace

import pytest

from lightning_hift.benchmark.gpu_check import __main__ as command
from lightning_hift.benchmark.gpu_check.report import write_report
from lightning_hift.benchmark.gpu_check.sizes import SMALL

pytestmark = pytest.mark.device


def test_gpu_check(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "SMALL", replace(SMALL, steps=8))
    words = ["run", "--device", "softgpu:0", "--small", "--output", str(tmp_path)]
    assert command.main(words) == 0
    stages = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in command.STAGES}
    for name, stage in stages.items():
        assert {cell["status"] for cell in stage["cells"].values()} == {"measured"}, name
        assert stage["passport"]["device"] == "softgpu"
    cells = {name: cell["measured"] for name, cell in stages["llama-2-7b"]["cells"].items()}
    first, hift, full = (cells[name] for name in ("hift, first sweep", "hift, 4x16", "full, 4x16"))
    assert first["page_lock"]["nbytes"] >= first["host_bytes"] > 0
    assert hift["peak_reserved"] >= hift["peak_allocated"] > hift["weight_bytes"] + hift["gradient_bytes"]
    assert full["state_bytes_device"] > hift["state_bytes_device"] > 0
    assert {"llama-2-7b_memory.png", "llama-3-8b_memory.png"} <= {path.name for path in write_report(tmp_path)}
