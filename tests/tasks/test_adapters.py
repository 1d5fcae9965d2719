"""HiFT over adapters of the peft library, by layer."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_hift import HiFTCallback, HiFTStrategy, find_layer_units
from lightning_hift.data import ClassificationDataModule
from lightning_hift.tasks import SequenceClassification
from lightning_hift.tasks.adapters import add_adapter
from tests.models import as_published, language_model
from tests.text_models import save_network

pytest.importorskip("peft")
pytest.importorskip("datasets")

ADAPTERS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 2},
    "DORA": {"peft_type": "LORA", "r": 2, "use_dora": True},
    "ADALORA": {"init_r": 3, "target_r": 1, "tinit": 4, "tfinal": 4, "deltaT": 1, "total_step": 16},
    "IA3": {},
    "PREFIX_TUNING": {"num_virtual_tokens": 2},
    "PROMPT_TUNING": {"num_virtual_tokens": 2},
    "P_TUNING": {"num_virtual_tokens": 2, "encoder_hidden_size": 8},
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# peft 0.21 does not find the cache that networks of these have.
NO_CACHE = tuple(map(int, version("transformers").split(".")[:2])) >= (5, 24)
CACHELESS = pytest.mark.xfail(NO_CACHE, raises=ValueError, reason="peft refuses every network", strict=True)
KINDS = [pytest.param(kind, marks=CACHELESS if kind == "PREFIX_TUNING" else ()) for kind in ADAPTERS]
BY_LAYER = ("LORA", "DORA", "ADALORA", "IA3")


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClassificationDataModule:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "rows.jsonl"
    texts = [
        {"text": f"the film {word}", "label": label} for label, word in enumerate(("good", "bad")) for _ in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return ClassificationDataModule(files={"train": str(path)}, cache_dir=str(tmp_path / "cache"), batch_size=4)


def fit(
    tmp_path: Path, rows: Any, kind: str, ckpt_path: str | None = None, **options: Any
) -> tuple[SequenceClassification, pl.Trainer, HiFTCallback]:
    pl.seed_everything(0)
    callback = as_published()
    # A prefix goes into the cache of a decoder.
    fields = {"model_type": "llama", "pad_token_id": 0} if kind == "PREFIX_TUNING" else NO_DROPOUT
    task = SequenceClassification(
        model=str(save_network(tmp_path / "network", **fields)),
        labels=2,
        adapter={"peft_type": kind, **ADAPTERS[kind]},
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu", enable_model_summary=False, **{"max_steps": 16, "callbacks": [callback], **quiet, **options}
    )
    trainer.fit(task, rows, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return task, trainer, callback


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_and_the_head_train_and_have_state(tmp_path: Path, rows: Any, kind: str) -> None:
    task, trainer, callback = fit(tmp_path, rows, kind, strategy=HiFTStrategy())
    trainable = {name for name, p in task.named_parameters() if p.requires_grad}
    state = trainer.optimizers[0].state_dict()["state"]
    assert len(state) == len(trainable)
    held = {name for group in callback.groups for name in group.parameters}
    assert held == trainable
    names = [group.name for group in callback.groups]
    # The prompt encoder is most of so small a model, and an MLP, so each of its layers is a group.
    assert len(names) == (3 if kind in BY_LAYER else 5 if kind == "P_TUNING" else 2), names

    untouched = SequenceClassification(model=str(tmp_path / "network"), labels=2)
    untouched.configure_model()
    base = {p.data_ptr(): p for p in task.parameters() if not p.requires_grad}.values()
    original = [p for name, p in untouched.named_parameters() if "classifier" not in name and "score" not in name]
    assert all(any(a.shape == b.shape and torch.equal(a, b) for b in base) for a in original)


@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_weight_moves(tmp_path: Path, rows: Any, kind: str) -> None:
    before, _, _ = fit(tmp_path, rows, kind, max_steps=0)
    after, _, _ = fit(tmp_path, rows, kind)
    pairs = zip(before.named_parameters(), after.named_parameters(), strict=True)
    moved = {name: not torch.equal(a, b) for (name, a), (_, b) in pairs if b.requires_grad}
    assert all(moved.values()), [name for name, value in moved.items() if not value]


def test_adalora_gives_up_ranks(tmp_path: Path, rows: Any) -> None:
    task, _, _ = fit(tmp_path, rows, "ADALORA")
    values = [p for name, p in task.named_parameters() if "lora_E" in name]
    kept = sum(int((p != 0).sum()) for p in values)
    pattern = task.network.peft_config["default"].rank_pattern  # type: ignore[union-attr, index]
    assert kept == sum(map(sum, pattern.values())) < sum(p.numel() for p in values)
    assert kept <= len(values)  # target_r is 1


def test_adalora_resumes_with_its_ranks(tmp_path: Path, rows: Any) -> None:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 9:
                trainer.save_checkpoint(tmp_path / "nine.ckpt")

    whole, _, _ = fit(tmp_path, rows, "ADALORA", callbacks=[as_published(), Save()])
    resumed, _, _ = fit(tmp_path, rows, "ADALORA", ckpt_path=str(tmp_path / "nine.ckpt"))
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_adalora_needs_a_whole_sweep(tmp_path: Path, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADAPTERS, "ADALORA", {"init_r": 3, "target_r": 1, "tinit": 0, "tfinal": 1, "total_step": 2})
    with pytest.raises(ValueError, match=r"not all layer groups had a turn by then. Train longer, or raise group_size"):
        fit(tmp_path, rows, "ADALORA")


def test_adalora_is_told_the_length_of_the_run(tmp_path: Path, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADAPTERS, "ADALORA", {"init_r": 3, "target_r": 1, "tinit": 4, "tfinal": 4})
    task, _, _ = fit(tmp_path, rows, "ADALORA", max_steps=13)
    assert task.network.peft_config["default"].total_step == 13  # type: ignore[union-attr, index]


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({}, "Got peft_type=None in adapter; it must be one of .*LORA"),
        ({"peft_type": "LORE"}, "Got peft_type='LORE' in adapter"),
        ({"peft_type": "LORA", "rank": 3}, "which peft does not take: .*rank"),
    ],
)
def test_bad_adapters(adapter: dict[str, Any], message: str) -> None:
    network = language_model("gpt2", {"vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2})
    with pytest.raises(ValueError, match=message):
        add_adapter(network, adapter, "CAUSAL_LM")


def test_norm_tuning_keeps_its_blocks() -> None:
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3}
    network = language_model("llama", {**sizes, "num_attention_heads": 2, "num_key_value_heads": 2})
    for module in network.modules():
        if "Norm" not in type(module).__name__:
            for p in module.parameters(recurse=False):
                p.requires_grad_(False)
    assert [unit.name for unit in find_layer_units(network)] == [*(f"model.layers.{i}" for i in range(3)), "head"]
