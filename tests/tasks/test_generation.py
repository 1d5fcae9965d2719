"""ConditionalGeneration and GenerationDataModule: labels, what is cut, references, what is generated, and configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_hift import HiFTStrategy
from lightning_hift.data import GenerationDataModule
from lightning_hift.tasks import ConditionalGeneration
from lightning_hift.tasks.text_metrics import ExactMatch, Rouge
from tests.models import as_published
from tests.processes import start_together
from tests.tiny_texts import SMALL, adam, quiet_trainer, word_tokenizer, write_rows

LETTERS = list("abcdefghij")
# ids: 0 <pad>, 1 </s>, 2 <unk>, 3 >, 4 do, a..j = 5..14
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
OPT = {"vocab_size": 40, "hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16, "num_hidden_layers": 2}
OPT |= {"num_attention_heads": 2, "max_position_embeddings": 64}
WIDE = {"initializer_range": 0.3}  # so that texts depend on prompts even without training


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    word_tokenizer([">", "do", *LETTERS], tmp_path / "tokenizer")
    return tmp_path


def rows_of(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"source": source, "target": target} for source, target in pairs]


def data_of(folder: Path, rows: list[dict[str, Any]], **options: Any) -> GenerationDataModule:
    path = write_rows(folder / "rows.jsonl", rows)
    defaults = {
        "files": {"train": path, "validation": path, "test": path},
        "tokenizer": str(folder / "tokenizer"),
        "cache_dir": str(folder / "cache"),
        "template": "do {source}",
        "separator": " > ",
        "max_length": 16,
        "batch_size": 4,
    }
    return GenerationDataModule(**{**defaults, **options})


def module_of(model_type: str = "llama", model_config: dict[str, Any] | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    defaults = {"generation": {"max_new_tokens": 5}, "optimizer": adam}
    config = SMALL if model_config is None else model_config
    return ConditionalGeneration(model_type=model_type, model_config=config, **{**defaults, **options})


# --- examples ---------------------------------------------------------------------------------------------------------


def test_labels_of_one_sequence_by_hand(folder: Path) -> None:
    data = data_of(folder, rows_of(("a b", "c d"), ("a", "c")), bucket_by_length=False, group_references=False)
    batch = data.collate(list(data.train_dataloader()._examples))
    assert batch["input_ids"].tolist() == [[4, 5, 6, 3, 7, 8, 1], [4, 5, 3, 7, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100] * 4 + [7, 8, 1], [-100] * 3 + [7, 1, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 5 + [0] * 2]
    assert "prompts" not in batch
    (batch,) = data.val_dataloader()
    assert batch["prompts"]["input_ids"].tolist() == [[4, 5, 6, 3], [0, 4, 5, 3]]
    assert batch["prompts"]["attention_mask"].tolist() == [[1] * 4, [0] + [1] * 3]
    assert (batch["sources"], batch["references"]) == (["do a b", "do a"], [["c d"], ["c"]])
    (batch,) = data.predict_dataloader()
    assert batch.keys() == {"prompts", "sources", "references"}


def test_labels_of_a_pair_by_hand(folder: Path) -> None:
    data = data_of(folder, rows_of(("a b", "c d"), ("a", "c")), encoder_decoder=True)
    (batch,) = data.val_dataloader()
    assert batch["input_ids"].tolist() == [[4, 5, 6], [4, 5, 0]]
    assert batch["labels"].tolist() == [[7, 8, 1], [7, 1, -100]]
    assert batch["prompts"]["input_ids"].tolist() == [[4, 5, 6], [4, 5, 0]]
    assert batch["prompts"]["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_a_text_begins_as_the_tokenizer_begins_it(folder: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer([">", "do", *LETTERS])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A </s>", special_tokens=[
        ("<unk>", 2), ("</s>", 1),
    ])  # fmt: skip
    tokenizer.save_pretrained(folder / "begun")
    data = data_of(folder, rows_of(("a", "b")), tokenizer=str(folder / "begun"))
    data.setup("fit")
    assert data.examples["train"][0]["input_ids"] == [2, 4, 5, 3, 6, 1]
    pair = data_of(folder, rows_of(("a", "b")), tokenizer=str(folder / "begun"), encoder_decoder=True)
    pair.setup("fit")
    assert (pair.examples["train"][0]["input_ids"], pair.examples["train"][0]["labels"]) == ([2, 4, 5, 1], [2, 6, 1])


@pytest.mark.parametrize(("side", "kept"), [("right", [4, 5]), ("left", [8, 9])])
def test_the_source_is_cut_first(folder: Path, side: str, kept: list[int]) -> None:
    word_tokenizer([">", "do", *LETTERS], folder / side, truncation_side=side)
    data = data_of(folder, rows_of(("a b c d e", "f g"), ("a", "f")), max_length=6, tokenizer=str(folder / side))
    with pytest.warns(UserWarning, match=r"Of 2 train examples, 1 sources and 0 targets were cut"):
        data.train_dataloader()
    first, second = data.examples["train"]
    assert first["input_ids"] == [*kept, 3, 10, 11, 1]
    assert second["input_ids"] == [4, 5, 3, 10, 1]


def test_targets_that_are_longer_than_max_length_are_counted(folder: Path) -> None:
    data = data_of(folder, rows_of(("a b", "c d e f g h"), ("a", "f")), max_length=6)
    with pytest.warns(UserWarning, match=r"1 sources and 1 targets were cut, .*max_length=6"):
        data.train_dataloader()
    assert data.examples["train"][0]["input_ids"] == [3, 7, 8, 9, 10, 11]
    pair = data_of(folder, rows_of(("a b c d e f", "c d e f g h"), ("a", "f")), max_length=4, encoder_decoder=True)
    with pytest.warns(UserWarning, match=r"1 sources and 1 targets were cut"):
        pair.train_dataloader()
    assert pair.examples["train"][0]["input_ids"] == [4, 5, 6, 7]
    assert pair.examples["train"][0]["labels"] == [7, 8, 9, 10]


def test_prompts_leave_room_for_what_is_generated(folder: Path) -> None:
    data = data_of(folder, rows_of(("a b c d e f", "a")), max_length=10)
    trainer = quiet_trainer()
    with pytest.warns(UserWarning, match="Of 1 validation examples, 1 sources"):
        trainer.validate(module_of(), data, verbose=False)
    (batch,) = data.val_dataloader()
    assert batch["prompts"]["input_ids"].tolist() == [[4, 5, 6, 7, 3]]
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7, 8, 9, 10, 3, 5, 1]]
    tight = data_of(folder, rows_of(("a", "a")), max_length=6)
    with pytest.raises(ValueError, match=r"Got max_length=6, of which 1 tokens .* and 5 are to be generated"):
        quiet_trainer().validate(module_of(), tight, verbose=False)


def test_rows_of_one_source_share_what_is_generated(folder: Path) -> None:
    rows = rows_of(("a", "x1"), ("b", "y1"), ("a", "x2"), ("c", "z1"), ("b", "y2"))
    data = data_of(folder, rows, batch_size=8)
    (batch,) = data.val_dataloader()
    assert batch["sources"] == ["do a", "do b", "do c"]
    assert batch["references"] == [["x1", "x2"], ["y1", "y2"], ["z1"]]
    assert len(batch["labels"]) == 5
    assert len(next(iter(data.predict_dataloader()))["sources"]) == 5
    (apart,) = data_of(folder, rows, batch_size=8, group_references=False).val_dataloader()
    assert apart["references"] == [["x1"], ["y1"], ["x2"], ["z1"], ["y2"]]


def test_columns_of_numbers_and_braces(folder: Path) -> None:
    rows = [{"year": 5, "name": "a", "target": "b"}]
    data = data_of(folder, rows, template="{{x}} {name} {year} {name}")
    assert data.source(rows[0]) == "{x} a 5 a"
    assert data.template_columns == ["name", "year"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (rows_of(("a", ""), ("a", "b")), r"rows\.jsonl:1: column 'target': there is no text"),
        (rows_of((" ", "b"), ("a", "b")), r"rows\.jsonl:1: column 'source': there is no text"),
        ([{"source": None, "target": "b"}, *rows_of(("a", "b"))], r"rows\.jsonl:1: column 'source': there is no text"),
    ],
)
def test_rows_that_cannot_be_used(folder: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data_of(folder, rows).setup("fit")
    data = data_of(folder, rows, on_bad_row="skip")
    with pytest.warns(UserWarning, match="1 of 2 rows cannot be used"):
        data.setup("fit")
    (batch,) = data.val_dataloader()
    assert (batch["sources"], batch["references"]) == (["do a"], [["b"]])


def test_bad_templates_columns_and_tokenizers_are_refused(folder: Path) -> None:
    rows = rows_of(("a", "b"))
    with pytest.raises(
        ValueError, match=r"Got template='\{mr\}', but .*rows\.jsonl has no column 'mr'. It has source, "
    ):
        data_of(folder, rows, template="{mr}").setup("fit")
    with pytest.raises(ValueError, match=r"Got target='ref', but .* has no such column"):
        data_of(folder, rows, target="ref").setup("fit")
    for template in ("no column", "{}", "{source.x}", "{source!r}", "{source:>5}"):
        with pytest.raises(ValueError, match="it needs names of columns in braces"):
            data_of(folder, rows, template=template)
    with pytest.raises(ValueError, match="in which a brace is not closed"):
        data_of(folder, rows, template="{source")
    word_tokenizer(LETTERS, folder / "endless", eos_token=None)
    with pytest.raises(ValueError, match="Got a tokenizer without an end-of-sequence token"):
        data_of(folder, rows, tokenizer=str(folder / "endless")).setup("fit")
    word_tokenizer(LETTERS, folder / "unpadded", eos_token=None, pad_token=None)
    with pytest.raises(ValueError, match="which has no padding token"):
        data_of(folder, rows, tokenizer=str(folder / "unpadded")).setup("fit")


# --- losses and texts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "config"), [("llama", SMALL), ("t5", T5)])
def test_validation_loss_is_the_mean_over_tokens_of_targets(
    folder: Path, model_type: str, config: dict[str, Any]
) -> None:
    rows = rows_of(("a", "b"), ("a b", "c d e f"), ("c", "d e"))
    data, module = data_of(folder, rows, eval_batch_size=2), module_of(model_type, config, generate_every=0)
    logged = quiet_trainer().validate(module, data, verbose=False)[0]["val_loss"]
    module.eval()
    total, count = 0.0, 0
    for example in data.examples["validation"]:
        ids, labels = (torch.tensor([example[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            total += float(module.network(input_ids=ids, labels=labels).loss) * int((labels != -100).sum())
        count += int((labels != -100).sum())
    assert count == 10
    assert logged == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("model_type", "config"), [("llama", SMALL | WIDE), ("gpt2", GPT2 | WIDE), ("opt", OPT | {"init_std": 0.3})]
)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_texts_are_those_of_the_pipeline_one_by_one(
    folder: Path, model_type: str, config: dict[str, Any], num_beams: int
) -> None:
    from transformers import pipeline

    sources = ["a", "b c d e f g", "h i", "j a c e g"]
    data = data_of(folder, rows_of(*((source, "a") for source in sources)))
    options = {"max_new_tokens": 6, "num_beams": num_beams}
    module = module_of(model_type, config | {"vocab_size": 15}, generation=options)
    (records,) = quiet_trainer().predict(module, data)
    write = pipeline("text-generation", model=module.network.eval(), tokenizer=data.tokenizer)
    expected = [
        write(f"do {source} >", return_full_text=False, do_sample=False, use_cache=False, eos_token_id=1, **options)[0]
        for source in sources
    ]
    assert [record["source"] for record in records] == [f"do {source}" for source in sources]
    assert [record["prediction"] for record in records] == [text["generated_text"].strip() for text in expected]
    assert len({record["prediction"] for record in records}) > 2


def test_texts_of_an_encoder_decoder_are_those_one_by_one(folder: Path) -> None:
    sources = ["a", "b c d e f g", "h i", "j a c e g"]
    data, module = data_of(folder, rows_of(*((source, "a") for source in sources))), module_of("t5", T5)
    (records,) = quiet_trainer().predict(module, data)
    for source, record in zip(sources, records, strict=True):
        ids = data.tokenizer(f"do {source}", return_tensors="pt")["input_ids"]
        tokens = module.network.eval().generate(input_ids=ids, max_new_tokens=5, eos_token_id=1, pad_token_id=0)
        assert record["prediction"] == data.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()


def test_the_head_follows_the_configuration_or_the_argument() -> None:
    assert module_of("t5", T5).head == "AutoModelForSeq2SeqLM"
    assert module_of().head == "AutoModelForCausalLM"
    assert module_of("bart", {}).head == "AutoModelForSeq2SeqLM"
    assert module_of("bart", {}, encoder_decoder=False).head == "AutoModelForCausalLM"
    with pytest.raises(ValueError, match="which is no model for sequence-to-sequence language modelling"):
        module_of(encoder_decoder=True).configure_model()
    with pytest.raises(ValueError, match="Did you mean 'llama'"):
        module_of("lama").configure_model()


LORA = {"peft_type": "LORA", "r": 8, "target_modules": "all-linear"}
MAPPING = [(a, f"{LETTERS[(i + 3) % 10]} {a}") for i, a in enumerate(LETTERS)]


@pytest.mark.parametrize(
    ("model_type", "config", "options", "steps"),
    [
        ("llama", SMALL | {"initializer_range": 0.1}, {}, 240),
        # Without a schedule, rounding decides what its last steps come to.
        pytest.param(
            *("t5", T5 | {"dropout_rate": 0.0, "initializer_factor": 0.3, "num_layers": 1}),
            *({"lr_scheduler": "linear"}, 500),
            marks=pytest.mark.slow,
        ),
        ("llama", SMALL | {"initializer_range": 0.1}, {"adapter": LORA}, 40),
    ],
    ids=["decoder", "encoder-decoder", "adapter"],
)  # fmt: skip
def test_a_tiny_network_learns_a_mapping_by_hift(
    folder: Path, model_type: str, config: dict[str, Any], options: dict[str, Any], steps: int
) -> None:
    data = data_of(folder, rows_of(*MAPPING), batch_size=10)
    module = module_of(model_type, config, **options)
    before = quiet_trainer().validate(module, data, verbose=False)[0]
    has_adapter = "adapter" in options
    active = [] if has_adapter else ["embedding", "head"]
    trainer = quiet_trainer(max_steps=steps, check_val_every_n_epoch=1000, callbacks=as_published(always_active=active))
    trainer.fit(module, data)
    after = quiet_trainer().validate(module, data, verbose=False)[0]
    assert before["val_exact_match"] < 0.3
    if has_adapter:  # low-rank adapters of random weights only get near
        assert after["val_loss"] < 0.9 * before["val_loss"]
        return
    assert after["val_exact_match"] >= 0.9
    assert after["val_rouge1"] >= 0.95
    assert after.keys() == {f"val_{name}" for name in ("loss", "bleu", "rouge1", "rouge2", "rougeL", "exact_match")}


def test_generation_goes_with_an_activation_budget(folder: Path) -> None:
    data = data_of(folder, rows_of(*MAPPING), batch_size=5)
    module = module_of(generate_every=1)
    strategy = HiFTStrategy(activation_budget=60_000)
    trainer = quiet_trainer(max_steps=6, strategy=strategy, val_check_interval=1)
    trainer.fit(module, data)
    assert module.network.config.use_cache is False
    assert "val_bleu" in trainer.callback_metrics
    alone = quiet_trainer().validate(module, data, verbose=False)[0]
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(alone["val_loss"], rel=1e-6)


def test_a_resumed_run_generates_when_a_whole_one_would(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[int] = []
    monkeypatch.setattr(ConditionalGeneration, "generate", lambda self, _: epochs.append(self.current_epoch) or ["a"])
    data = data_of(folder, rows_of(MAPPING[0]))
    first = quiet_trainer(max_epochs=2, num_sanity_val_steps=0)
    first.fit(module_of(generate_every=3), data)
    first.save_checkpoint(folder / "first.ckpt")
    second = quiet_trainer(max_epochs=6, num_sanity_val_steps=0)
    second.fit(module_of(generate_every=3), data, ckpt_path=folder / "first.ckpt", weights_only=True)
    assert epochs == [2, 5]


def test_what_is_generated_is_limited(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = ConditionalGeneration.generate

    def count(self: Any, prompts: Any) -> list[str]:
        calls.append(len(prompts["input_ids"]))
        return real(self, prompts)

    monkeypatch.setattr(ConditionalGeneration, "generate", count)
    data = data_of(folder, rows_of(*MAPPING), batch_size=4)
    quiet_trainer().validate(module_of(max_generated=6), data, verbose=False)
    assert calls == [4, 2]
    calls.clear()
    fit = {"max_epochs": 4, "num_sanity_val_steps": 1, "limit_val_batches": 1, "limit_train_batches": 1}
    quiet_trainer(**fit).fit(module_of(generate_every=2), data)
    assert calls == [4, 4, 4]  # one before training, then in every second epoch
    calls.clear()
    never = quiet_trainer(**fit)
    never.fit(module_of(generate_every=0), data)
    assert calls == []
    assert "val_bleu" not in never.callback_metrics
    assert "val_loss" in never.callback_metrics
    quiet_trainer(limit_test_batches=1).test(module_of(generate_every=0), data, verbose=False)
    assert calls == [4]


def test_plain_batches_and_a_tokenizer_by_name(folder: Path) -> None:
    batch = {"input_ids": torch.tensor([[4, 5, 3], [4, 6, 3]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    module = module_of(tokenizer=str(folder / "tokenizer"))
    (records,) = quiet_trainer().predict(module, DataLoader([batch], batch_size=None))
    assert [record["source"] for record in records] == ["do a >", "do b >"]
    with pytest.raises(ValueError, match="Got no tokenizer to make texts of tokens"):
        quiet_trainer().predict(module_of(), DataLoader([batch], batch_size=None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generate_every": -1}, "Got generate_every=-1; it must be 0"),
        ({"max_generated": 0}, "Got max_generated=0; it must be at least 1"),
        ({"generation": {"num_beam": 2}}, "Got 'num_beam' in generation, .* Did you mean 'num_beams'"),
        ({"generation": {"max_new_tokens": 0}}, "Got max_new_tokens=0 in generation; it must be a whole number"),
        ({"generation": {"num_return_sequences": 2}}, "Got num_return_sequences=2 in generation; one text"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module_of(**options)


# --- metrics ----------------------------------------------------------------------------------------------------------

PREDICTIONS = ["the cat sat", "a dog", " x "]
REFERENCES = [["the cat sat down", "a cat"], ["the dog"], ["y", "x"]]


def test_metrics_by_hand() -> None:
    rouge, exact = Rouge(), ExactMatch()
    for i in range(3):
        rouge.update(PREDICTIONS[i : i + 1], REFERENCES[i : i + 1])
        exact.update(PREDICTIONS[i : i + 1], REFERENCES[i : i + 1])
    found = {name: float(value) for name, value in rouge.compute().items()}
    # Precision and recall: 3/3 and 3/4; 1/2 and 1/2; 1 and 1. For pairs of words: 2/2 and 2/3; 0; there are none.
    assert found["rouge1"] == pytest.approx((6 / 7 + 1 / 2 + 1) / 3)
    assert found["rouge2"] == pytest.approx(4 / 5 / 3)
    assert found["rougeL"] == found["rouge1"]
    assert float(exact.compute()) == pytest.approx(1 / 3)


def _gather(rank: int, folder: str) -> None:
    from torchmetrics import MetricCollection
    from torchmetrics.text import SacreBLEUScore

    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    metrics = MetricCollection({"bleu": SacreBLEUScore(n_gram=1), "rouge": Rouge(), "exact_match": ExactMatch()})
    share = slice(0, 2) if rank == 0 else slice(2, 3)
    metrics.update(PREDICTIONS[share], REFERENCES[share])
    torch.save(metrics.compute(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_metrics_are_gathered_from_processes_with_unequal_shares(tmp_path: Path) -> None:
    from torchmetrics.text import SacreBLEUScore

    start_together(_gather, (str(tmp_path),), 2)
    whole = {**Rouge()(PREDICTIONS, REFERENCES), "exact_match": ExactMatch()(PREDICTIONS, REFERENCES)}
    whole["bleu"] = SacreBLEUScore(n_gram=1)(PREDICTIONS, REFERENCES)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert {k: float(v) for k, v in found.items()} == pytest.approx({k: float(v) for k, v in whole.items()})
    assert 0 < float(whole["bleu"]) < 1
