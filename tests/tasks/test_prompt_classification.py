"""Classification as filling a blank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_hift.data import PromptDataModule
from lightning_hift.tasks import PromptClassification
from tests.models import as_published
from tests.text_models import SPECIAL, WORDS, save_network, save_tokenizer
from tests.tiny_texts import SMALL

pytest.importorskip("datasets")

HEADS = {"masked": "AutoModelForMaskedLM", "causal": "AutoModelForCausalLM"}
LABELS = {"neg": "awful", "pos": "great"}
IDS = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
MASKED = "{text} was {blank} film"
CAUSAL = "{text} was {blank}"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def prompts(tmp_path: Path, rows: list[dict[str, Any]] | None = None, **options: Any) -> PromptDataModule:
    if not (tmp_path / "tokenizer").exists():
        save_tokenizer(tmp_path / "tokenizer")
    many = [
        {"text": f"{mood} {noun}", "label": label}
        for label, mood in (("neg", "poor"), ("pos", "fine"))
        for noun in WORDS
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (rows or many)))
    defaults: dict[str, Any] = {
        "files": dict.fromkeys(("train", "validation", "test"), str(path)),
        "tokenizer": str(tmp_path / "tokenizer"),
        "cache_dir": str(tmp_path / "cache"),
        "template": MASKED,
        "verbalizer": LABELS,
        "batch_size": 4,
    }
    return PromptDataModule(**{**defaults, **options})


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", **{**quiet, "enable_model_summary": False, **options})


def test_the_blank_is_where_the_template_says(tmp_path: Path) -> None:
    data = prompts(tmp_path, [{"text": "the plot", "label": "pos"}])
    (batch,) = data.val_dataloader()
    words = ["[CLS]", "the", "plot", "was", "[MASK]", "film", "[SEP]"]
    assert batch["input_ids"].tolist() == [[IDS[word] for word in words]]
    assert batch["blank_position"].tolist() == [4]
    assert batch["labels"].tolist() == [1]
    assert data.word_ids == [IDS["awful"], IDS["great"]]


def test_a_causal_model_sees_what_comes_before(tmp_path: Path) -> None:
    task = PromptClassification(
        head="causal", model=str(save_network(tmp_path / "gpt2", "AutoModelForCausalLM", "gpt2"))
    )
    data = prompts(tmp_path, [{"text": "the plot", "label": "pos"}, {"text": "it", "label": "neg"}], template=CAUSAL)
    found = trainer().validate(task, data, verbose=False)[0]
    (batch,) = data.val_dataloader()
    assert batch["blank_position"].tolist() == [(ids != 0).sum() - 1 for ids in batch["input_ids"]]
    alone = [ids[ids != 0][None] for ids in batch["input_ids"]]
    with torch.no_grad():
        outputs = [task.eval()({"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}) for ids in alone]
    logits = [output.logits[0, -1] for output in outputs]
    pairs = torch.stack([row[data.word_ids] for row in logits])
    assert torch.allclose(task.scores(batch), pairs, atol=1e-6)
    assert found["val_loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(pairs, batch["labels"])), rel=1e-5
    )


@pytest.mark.parametrize("masked", [True, False])
def test_blanks_are_learnt(tmp_path: Path, masked: bool) -> None:
    pl.seed_everything(0)
    kind = ("AutoModelForMaskedLM", "bert") if masked else ("AutoModelForCausalLM", "gpt2")
    task = PromptClassification(
        head="masked" if masked else "causal",
        model=str(save_network(tmp_path / "network", *kind)),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    )
    data = prompts(tmp_path, template=MASKED if masked else CAUSAL)
    fitted = trainer(max_epochs=10, check_val_every_n_epoch=10, callbacks=as_published())
    fitted.fit(task, data)
    assert fitted.callback_metrics["val_accuracy"] == 1
    records = [record for batch in trainer().predict(task, data) for record in batch]  # type: ignore[union-attr]
    assert [record["label"] for record in records] == ["neg"] * len(WORDS) + ["pos"] * len(WORDS)


def test_the_blank_is_that_of_each_module_in_turn(tmp_path: Path) -> None:
    data = prompts(tmp_path, template=CAUSAL, max_length=16)
    positions = []
    for model_type, head in (("bert", "masked"), ("gpt2", "causal")):
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32} if head == "causal" else {}
        save_network(tmp_path / head, HEADS[head], model_type, **sizes)
        module = PromptClassification(model=str(tmp_path / head), head=head)
        trainer(max_steps=1).fit(module, data)
        row = data.examples["train"][0]
        positions.append(row["input_ids"][row["blank_position"]] == IDS["[MASK]"])
    assert positions == [True, False]


def test_a_text_with_a_blank_of_its_own(tmp_path: Path) -> None:
    rows = [{"text": "good [MASK] film", "label": "pos"}]
    with pytest.raises(ValueError, match=r"rows.jsonl:1: column 'text': got '\[MASK\]' in it, which is how the blank"):
        prompts(tmp_path, rows).setup("fit")


def test_the_blank_is_behind_the_tokens_of_a_prompt_adapter() -> None:
    pytest.importorskip("peft")
    adapter = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}
    module = PromptClassification(
        head="causal", word_ids=[4, 5], model_type="llama", model_config=SMALL, adapter=adapter
    )
    module.configure_model()
    batch = {"input_ids": torch.tensor([[6, 7, 8]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with torch.no_grad():
        logits = module.eval()(batch).logits
        scores = module.scores({**batch, "blank_position": torch.tensor([2])})
    assert logits.shape[1] == 6
    torch.testing.assert_close(scores, logits[:, -1, [4, 5]], rtol=0, atol=0)


def test_texts_give_way_and_the_blank_stays(tmp_path: Path) -> None:
    rows = [{"text": "the plot " * 10, "other": "it", "label": "pos"}]
    data = prompts(tmp_path, rows, template="{other} was {blank} {text}", max_length=8)
    with pytest.warns(UserWarning, match="1 of 1 validation examples were longer"):
        (batch,) = data.val_dataloader()
    words = ["[CLS]", "it", "was", "[MASK]", "the", "plot", "the", "[SEP]"]
    assert batch["input_ids"].tolist() == [[IDS[word] for word in words]]


def test_shots_per_class(tmp_path: Path) -> None:
    def drawn(seed: int) -> list[dict[str, Any]]:
        return list(prompts(tmp_path, shots_per_class=3, seed=seed).table("train"))

    assert [row["label"] for row in drawn(0)] == ["neg"] * 3 + ["pos"] * 3
    assert drawn(0) == drawn(0) != drawn(1)
    with pytest.raises(ValueError, match=r"shots_per_class=30, but of these there are fewer rows: \{.*22"):
        prompts(tmp_path, shots_per_class=30).table("train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{text} was"}, r"needs at least one column in braces and \{blank\} exactly once"),
        ({"template": "it was {blank}"}, "needs at least one column"),
        ({"template": "{sentence} {blank}"}, "columns=.*'sentence'.* has no such column. It has text, label"),
        ({"verbalizer": {"neg": "bad"}}, "needs a word of its own for each of at least two labels"),
        ({"verbalizer": {"neg": "bad", "pos": "bad"}}, "needs a word of its own"),
        ({"verbalizer": {"neg": "bad", "pos": "the great"}}, r"'the great' for label 'pos', which is 2 tokens"),
        ({"verbalizer": {"neg": "bad", "pos": "splendid"}}, r"'splendid' for label 'pos'.* or unknown"),
        ({"max_length": 3}, "template='.*' alone exceeds"),
    ],
)
def test_bad_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompts(tmp_path, **options).train_dataloader()


def test_a_blank_in_the_middle_is_no_use_to_a_causal_model(tmp_path: Path) -> None:
    task = PromptClassification(
        head="causal", model=str(save_network(tmp_path / "gpt2", "AutoModelForCausalLM", "gpt2"))
    )
    with pytest.raises(ValueError, match=r"sees only what comes before: end it with \{blank\}"):
        trainer().validate(task, prompts(tmp_path))
    with pytest.raises(ValueError, match="Got no word_ids, and no data module that knows them"):
        PromptClassification(model="x")._words()
