"""LitGPT's script for full fine-tuning with the patch in ``examples/litgpt``, where LitGPT is installed."""

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

litgpt = pytest.importorskip("litgpt")
pytest.importorskip("requests", reason="LitGPT's command line needs it")

pytestmark = pytest.mark.slow

PATCH = Path(__file__).parents[2] / "examples" / "litgpt" / "full_hift.patch"
SCRIPT = Path(litgpt.__path__[0]) / "finetune" / "full.py"
WORDS = ["[UNK]", "</s>", *["one", "two", "three", "four", "five", "add", "and", "is", "the", "sum", "of"]]
UNITS = ["transformer.wte", "transformer.h.0", "transformer.h.1", "lm_head"]
ONE_BY_ONE = ["--hift.group_size=1", "--hift.steps_per_group=1", "--hift.always_active=[]"]


def test_the_patch_is_short():
    changed = [line for line in PATCH.read_text().splitlines() if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert 0 < len(changed) <= 10


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint with random weights, a tokenizer of words, sums as instructions, and the script with the patch."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import save_config
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    if shutil.which("patch") is None:
        pytest.skip("needs the command patch")
    (tmp_path / "tiny").mkdir()
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tiny" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (tmp_path / "tiny" / "tokenizer_config.json").write_text(json.dumps(settings))
    config = Config(name="tiny", block_size=64, n_layer=2, n_head=2, n_embd=16, vocab_size=13, padding_multiple=8)
    save_config(config, tmp_path / "tiny")
    torch.manual_seed(0)
    torch.save(GPT(config).state_dict(), tmp_path / "tiny" / "lit_model.pth")
    pairs = [(a, b) for a in WORDS[2:7] for b in WORDS[2:7]]
    rows = [{"instruction": f"add {a} and {b}", "output": f"the sum of {a} and {b}"} for a, b in pairs]
    (tmp_path / "sums.json").write_text(json.dumps(rows))
    shutil.copy(SCRIPT, tmp_path / "full.py")
    subprocess.run(["patch", "--fuzz=0", tmp_path / "full.py", PATCH], check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finetune(script, out_dir, monkeypatch, *options):
    """The losses that the script logs, of each micro-batch."""
    from litgpt.utils import CLI

    spec = importlib.util.spec_from_file_location("full_of_litgpt", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = (
        f"tiny --out_dir={out_dir} --data=JSON --data.json_path=sums.json --data.val_split_fraction=0.2"
        " --data.num_workers=0 --train.max_steps=10 --train.lr_warmup_steps=2 --train.global_batch_size=4"
        " --train.micro_batch_size=2 --train.save_interval=1 --eval.interval=4 --eval.max_new_tokens=5"
    )
    monkeypatch.setattr(sys, "argv", ["full.py", *words.split(), *options])
    monkeypatch.setitem(sys.modules, spec.name, module)
    CLI(module.setup)
    last = max((Path(out_dir) / "logs" / "csv").iterdir())
    return [row["loss"] for row in csv.DictReader((last / "metrics.csv").open()) if row["loss"]]


def load(out_dir, step):
    return torch.load(Path(out_dir) / f"step-{step:06d}" / "lit_model.pth", weights_only=False)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_all_units_at_once_are_the_script_as_it_was(precision, folder, monkeypatch):
    everything = ["--hift.group_size=4", "--hift.steps_per_group=1", "--hift.always_active=[]"]
    plain = finetune(SCRIPT, "plain", monkeypatch, f"--precision={precision}")
    hift = finetune("full.py", "hift", monkeypatch, f"--precision={precision}", *everything)
    assert len(plain) == 20
    assert hift == plain
    first, second = load("plain", 10)["model"], load("hift", 10)["model"]
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_groups_train_in_turn(precision, folder, monkeypatch):
    losses = finetune("full.py", "hift", monkeypatch, f"--precision={precision}", *ONE_BY_ONE)
    assert float(losses[-1]) < float(losses[0])
    states = [load("hift", step)["model"] for step in range(1, 11)]
    for step in range(1, 10):
        changed = {name for name, w in states[step].items() if not torch.equal(w, states[step - 1][name])}
        active = UNITS[step % 4]
        others = {name for name in changed if not name.startswith((active, "transformer.ln_f"))}
        assert changed, step
        assert not others, step
        assert active == "lm_head" or not any(name.startswith("transformer.ln_f") for name in changed)
    assert bool(load("hift", 10)["optimizer"]["hift"]["masters"]) == (precision == "bf16-true")


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_resumes_in_mid_sweep(precision, folder, monkeypatch):
    options = [f"--precision={precision}", *ONE_BY_ONE]
    whole = finetune("full.py", "whole", monkeypatch, *options)
    rest = finetune("full.py", "rest", monkeypatch, *options, "--resume=whole/step-000003/lit_model.pth")
    # The script means losses over its last micro-batches, of which it had none when it resumed.
    assert rest[1:] == whole[7:]
    first, second = load("whole", 10)["model"], load("rest", 10)["model"]
    assert all(torch.equal(first[name], second[name]) for name in first)
