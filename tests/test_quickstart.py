"""configs/quickstart.yaml and the comparison that it runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import PolynomialLR

from lightning_hift.benchmark import FullFineTuningComparison
from lightning_hift.benchmark.comparison import _FullRun, _StretchedLR
from lightning_hift.data import PythonSourceDataModule
from lightning_hift.tasks import CausalLM
from tests.models import as_published

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
TINY = {
    "vocab_size": 256,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}


def test_quickstart_runs_and_prints_the_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_hift", "fit", "--config", str(QUICKSTART)]
    small = {
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 2,
        "trainer.limit_val_batches": 2,
        "data.init_args.max_train_bytes": 20_000,
        "data.init_args.max_val_bytes": 4_000,
    }
    options = [f"--{key}={value}" for key, value in small.items()]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path, env=one_thread)
    assert done.returncode == 0, done.stderr
    for shown in ("hift/sweep", "hift/group", "val_bits_per_byte"):
        assert shown[:12] in done.stdout
    table = done.stdout[done.stdout.rindex("full fine-tuning\n") :]
    assert re.search(r"^parameters that train at once +8\d,\d{3} +24\d,\d{3}$", table, re.MULTILINE)
    assert re.search(r"^optimizer steps +4 +\d+$", table, re.MULTILINE)
    assert re.search(r"^val_bits_per_byte +\d\.\d+ +\d\.\d+$", table, re.MULTILINE)
    assert re.search(r"\(order 0\) needs 4\.\d+ bits per byte", table)
    assert {path.name for path in tmp_path.iterdir()} == {"lightning_logs"}


def test_quickstart_schedule_ends_with_the_run() -> None:
    config = yaml.safe_load(QUICKSTART.read_text())
    total = config["model"]["init_args"]["lr_scheduler"]["init_args"]["total_steps"]
    assert total == config["trainer"]["max_steps"]


# --- the comparison ---------------------------------------------------------------------------------------------------


class RecordingLM(CausalLM):
    """Notes the weights that each run starts from, the batches, and the learning rates."""

    seen: list[dict[str, Any]]

    def on_train_start(self) -> None:
        weights = {name: value.clone() for name, value in self.state_dict().items()}
        type(self).seen.append({"weights": weights, "batches": [], "rates": []})

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        type(self).seen[-1]["batches"].append(batch["input_ids"].clone())
        type(self).seen[-1]["rates"].append(self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]


@pytest.fixture
def data(tmp_path: Path) -> PythonSourceDataModule:
    for number in range(10):
        (tmp_path / f"file_{number}.py").write_text("for i in range(10):\n    print(i)\n" * 20)
    return PythonSourceDataModule(sequence_length=16, batch_size=4, folder=str(tmp_path), val_fraction=0.3)


def module(**options: Any) -> RecordingLM:
    torch.manual_seed(0)
    RecordingLM.seen = []
    return RecordingLM(model_type="llama", model_config=TINY, bytes_per_token=1, **options)


def trainer(comparison: FullFineTuningComparison, steps: int, *callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=5,
        callbacks=[*callbacks, comparison],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def numbers_of(table: str, row: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(row)]
    return re.split(r" {2,}", line)[1:]


def test_comparison_is_fair_and_counts_right(data: PythonSourceDataModule, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = FullFineTuningComparison(lr_factor=0.25)
    fitted = trainer(comparison, 20, as_published())
    model = module(
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        lr_scheduler=lambda optimizer: PolynomialLR(optimizer, 20),
    )
    fitted.fit(model, data)
    hift, full = RecordingLM.seen
    table = capsys.readouterr().out

    assert hift["weights"].keys() == full["weights"].keys()
    assert all(torch.equal(hift["weights"][name], full["weights"][name]) for name in hift["weights"])
    assert all(torch.equal(a, b) for a, b in zip(hift["batches"], full["batches"], strict=False))
    assert full["rates"][0] == pytest.approx(0.25 * hift["rates"][0])
    assert full["rates"][-1] < 0.5 * full["rates"][0]
    assert all(p.requires_grad for p in model.parameters())
    assert model.trainer is fitted

    total = sum(p.numel() for p in model.parameters())
    largest = max(group.numel for group in fitted.callbacks[0].groups)  # type: ignore[attr-defined]
    assert numbers_of(table, "parameters that train at once") == [f"{largest:,}", f"{total:,}"]
    assert numbers_of(table, "optimizer steps") == ["20", str(len(full["batches"]))]
    num_tensors = len(list(model.parameters()))
    assert numbers_of(table, "optimizer state")[1] == f"{(8 * total + 4 * num_tensors) / 1024:.2f} KiB"
    hift_seconds, full_seconds = map(float, numbers_of(table, "seconds of training"))
    assert full_seconds >= hift_seconds - 0.1  # rounded to 0.1; it ends with the first step past the limit
    judge = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (metrics,) = judge.validate(model, data, verbose=False)
    assert numbers_of(table, "val_loss")[0] == f"{metrics['val_loss']:.4f}"


def test_comparison_works_without_a_scheduler(data: PythonSourceDataModule, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(FullFineTuningComparison(lr_factor=0.5), 6, as_published()).fit(module(), data)
    assert [run["rates"][-1] for run in RecordingLM.seen] == [pytest.approx(1e-3), pytest.approx(5e-4)]
    assert "val_bits_per_byte" in capsys.readouterr().out


def test_stretched_schedule_keeps_pace_with_the_clock() -> None:
    class Clock(_FullRun):
        share = 0.0

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    clock = Clock(1.0, [100], 0.5)
    schedule = _StretchedLR(PolynomialLR(optimizer, 100), 100, clock)
    rates = [optimizer.param_groups[0]["lr"]]
    optimizer.step()
    for share in (0.1, 0.1, 0.5, 1.0):
        clock.share = share
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 0.45, 0.45, 0.25, 0.0])


def test_comparison_refuses_what_it_cannot_compare(data: PythonSourceDataModule, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Got lr_factor=0; it must be above 0"):
        FullFineTuningComparison(lr_factor=0)
    with pytest.raises(MisconfigurationException, match="no HiFT run to compare with"):
        trainer(FullFineTuningComparison(), 2).fit(module(), data)
    model = module()
    fitted = trainer(FullFineTuningComparison(), 2, as_published())
    fitted.fit(model, data)
    fitted.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(MisconfigurationException, match="goes on from step 2"):
        trainer(FullFineTuningComparison(), 4, as_published()).fit(model, data, ckpt_path=str(tmp_path / "run.ckpt"))
