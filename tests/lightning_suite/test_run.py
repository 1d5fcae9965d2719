"""The runner, on tests that stand for Lightning's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

class Two(BoringModel):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())

def fit(model, tmp_path):
    trainer = Trainer(default_root_dir=tmp_path, max_steps=2, logger=False, enable_checkpointing=False)
    trainer.fit(model)
    return trainer

def test_passes(tmp_path):
    assert fit(BoringModel(), tmp_path).global_step == 2

def test_is_refused(tmp_path):
    fit(Two(), tmp_path)

def test_sees_a_difference(tmp_path):
    assert "hift" not in str(fit(BoringModel(), tmp_path).callbacks)

def test_fails_without_hift():
    assert False

def test_ddp_is_left_out():
    assert False
"""


@pytest.mark.slow
def test_a_table_of_what_came_of_it(tmp_path):
    root = Path(__file__).parents[2]
    for name, text in {
        "checkout/tests/tests_pytorch/core/test_some.py": TESTS,
        "checkout/pyproject.toml": "",
        "checkout/src/version.info": "9.9.9\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "tests.lightning_suite.run", "report.md", "plain", "strategy", "rotate"],
        cwd=tmp_path,
        env={**os.environ, "LIGHTNING_TESTS": "checkout", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    report = (tmp_path / "report.md").read_text()
    assert done.returncode == 1, done.stderr  # as one is not explained
    assert "The tests of Lightning 9.9.9 that pass without HiFT" in report
    # Tests, in which HiFT trains, in several groups, that pass, and by class; LBFGS is refused before it trains.
    assert "| strategy | 3 | 2 | 0 | 1 | 1 | 1 | 0 | 0 | 33.3% |" in report
    assert "| rotate | 2 | 2 | 2 | 1 | 1 | 0 | 0 | 0 | 50.0% |" in report
    assert "| core | 1 of 3 | 1 of 2 |" in report
    assert "| b | LBFGS, which steps on all parameters at once | 1 | 0 |" in report
    assert "- rotate: tests_pytorch/core/test_some.py::test_sees_a_difference" in report
