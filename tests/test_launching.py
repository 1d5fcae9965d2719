"""Several processes as a user starts them: by Lightning's launcher, and by torchrun on two nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import AutoModelForCausalLM

from lightning_hift import HiFTDDPStrategy, HiFTFSDPStrategy
from tests.models import trainer
from tests.processes import free_port
from tests.test_documents import blocks

ROOT = Path(__file__).parents[1]
SECONDS = 600
OPTIONS = {
    "trainer.max_steps": 8,
    "trainer.limit_val_batches": 1,
    "trainer.logger": "false",
    "trainer.enable_progress_bar": "false",
    "data.init_args.max_train_bytes": 20_000,
    "data.init_args.max_val_bytes": 4_000,
}


def start(command: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    """A command in a new folder with the README's configurations in it."""
    folder.mkdir()
    for text in blocks("yaml"):
        (folder / text.splitlines()[0].removeprefix("# ")).write_text(text)
    own = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **own, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.rglob("*.ckpt")
    return torch.load(path, weights_only=True)["state_dict"]


def test_two_nodes_and_one_node_with_two_devices_train_the_same(tmp_path: Path) -> None:
    options = [f"--{key}={value}" for key, value in OPTIONS.items()]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GPUS": "1"}
    script = ["bash", str(ROOT / "examples" / "two_nodes.sh"), "--config", "run.yaml", *options]
    nodes = [start(script, tmp_path / f"node_{rank}", NODE_RANK=str(rank), **place) for rank in (0, 1)]
    printed = [node.communicate(timeout=SECONDS)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(printed)
    assert "first sweep done, all" in printed[0]
    assert not list((tmp_path / "node_1").rglob("*.ckpt"))

    # Its state is divided, which changes no weight. The other options are those of run.yaml.
    command = [sys.executable, "-m", "lightning_hift", "fit", "--config", "two_gpus.yaml", "--hift.steps_per_group=2"]
    one = start([*command, "--model.init_args.bytes_per_token=1", *options], tmp_path / "one_node")
    text, _ = one.communicate(timeout=SECONDS)
    assert one.returncode == 0, text
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


def test_a_sharded_run_is_consolidated_exported_and_opened(tmp_path: Path) -> None:
    options = [f"--{key}={value}" for key, value in OPTIONS.items()]
    command = [sys.executable, "-m", "lightning_hift"]
    sharded = ["fit", "--config=two_gpus.yaml", "--trainer.strategy=hift_fsdp", "--trainer.precision=bf16-true"]
    sharded += ["--hift.steps_per_group=2"]
    run = start([*command, *sharded, *options], tmp_path / "run")
    text, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 0, text
    assert "first sweep done, all" in text
    (folder,) = (tmp_path / "run").rglob("*.ckpt")
    for arguments in (
        ["consolidate", f"--checkpoint={folder}", "--output=one.ckpt"],
        ["export", "--checkpoint=one.ckpt", "--output=exported"],
    ):
        subprocess.run([*command, *arguments], cwd=tmp_path, check=True, timeout=SECONDS)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    assert {f"network.{name}" for name in network.state_dict()} == saved.keys()
    for name, value in network.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, saved[f"network.{name}"])
