"""Several processes as a user starts them: by Lightning's launcher, and by torchrun on two nodes."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import AutoModelForCausalLM

from lightning_hift import HiFTDDPStrategy, HiFTFSDPStrategy
from lightning_hift.__main__ import main
from tests.models import trainer
from tests.processes import Processes, free_port, succeeded
from tests.test_documents import blocks

ROOT = Path(__file__).parents[2]
SECONDS = 300
OPTIONS = {
    "trainer.max_steps": 8,
    "trainer.limit_val_batches": 1,
    "trainer.logger": "false",
    "trainer.enable_progress_bar": "false",
    "data.init_args.max_train_bytes": 20_000,
    "data.init_args.max_val_bytes": 4_000,
}


def with_configs(folder: Path) -> Path:
    """A new folder with the README's configurations in it."""
    folder.mkdir()
    for text in blocks("yaml"):
        (folder / text.splitlines()[0].removeprefix("# ")).write_text(text)
    return folder


def start(command: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    """A command in a new folder with the README's configurations in it."""
    with_configs(folder)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PYTHONPATH": str(ROOT), "PATH": path, "MASTER_PORT": str(free_port()), "PYTHONFAULTHANDLER": "1"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **own, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # what it starts is of its group, which ``printed_by`` ends as a whole
    )


def printed_by(process: subprocess.Popen[str]) -> str:
    """All that a command and what it starts print. Where it hangs, each of their threads says where."""
    try:
        return process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)
        pytest.fail(f"Nothing ended within {SECONDS} s. Printed:\n{process.communicate()[0]}")


def run_here(folder: Path, words: list[str]) -> str:
    """``lightning-hift`` in this process, which takes itself for one that a launcher has started; returns its log."""
    told = StringIO()
    logging.getLogger("lightning.pytorch").addHandler(logging.StreamHandler(told))
    os.chdir(folder)
    sys.argv = ["lightning-hift", *words]
    main()
    return told.getvalue()


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.rglob("*.ckpt")
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_nodes_and_one_node_with_two_devices_train_the_same(launched: bool, tmp_path: Path, two: Processes) -> None:
    options = [f"--{key}={value}" for key, value in OPTIONS.items()]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GPUS": "1"}
    script = ["bash", str(ROOT / "examples" / "two_nodes.sh"), "--config", "run.yaml", *options]
    nodes = [start(script, tmp_path / f"node_{rank}", NODE_RANK=str(rank), **place) for rank in (0, 1)]
    printed = [printed_by(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(printed)
    assert "first sweep done, all" in printed[0]
    assert not list((tmp_path / "node_1").rglob("*.ckpt"))

    # Its state is divided, which changes no weight. The other options are those of run.yaml.
    words = ["fit", "--config", "two_gpus.yaml", "--hift.steps_per_group=2", "--model.init_args.bytes_per_token=1"]
    if launched:
        one = start([sys.executable, "-m", "lightning_hift", *words, *options], tmp_path / "one_node")
        text = printed_by(one)
        assert one.returncode == 0, text
    else:
        text, _ = succeeded(two.run(run_here, with_configs(tmp_path / "one_node"), [*words, *options]))
    assert "first sweep done, all" in text
    found, expected = weights_in(tmp_path / "node_0"), weights_in(tmp_path / "one_node")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("strategy", [HiFTDDPStrategy, HiFTFSDPStrategy])
@pytest.mark.parametrize(("devices", "nodes"), [(4, 1), (1, 1), (2, 2)])
def test_other_devices_than_were_launched_are_refused(
    devices: int, nodes: int, strategy: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    asked = rf"devices={devices} and num_nodes={nodes}, which makes {devices * nodes} processes"
    with pytest.raises(MisconfigurationException, match=rf"Got {asked}, but torchrun has started 2\. Pass"):
        trainer(strategy=strategy(), devices=devices, num_nodes=nodes)
    trainer(strategy=strategy(), devices=2)


@pytest.mark.slow
def test_a_sharded_run_is_consolidated_exported_and_opened(
    tmp_path: Path, call: Callable[[list[str], Path], str]
) -> None:
    options = [f"--{key}={value}" for key, value in OPTIONS.items()]
    sharded = ["fit", "--config=two_gpus.yaml", "--trainer.strategy=hift_fsdp", "--trainer.precision=bf16-true"]
    sharded += ["--hift.steps_per_group=2"]
    run = start([sys.executable, "-m", "lightning_hift", *sharded, *options], tmp_path / "run")
    text = printed_by(run)
    assert run.returncode == 0, text
    assert "first sweep done, all" in text
    (folder,) = (tmp_path / "run").rglob("*.ckpt")
    for arguments in (
        ["consolidate", f"--checkpoint={folder}", "--output=one.ckpt"],
        ["export", "--checkpoint=one.ckpt", "--output=exported"],
    ):
        call(["lightning-hift", *arguments], tmp_path)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    assert {f"network.{name}" for name in network.state_dict()} == saved.keys()
    for name, value in network.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, saved[f"network.{name}"])
