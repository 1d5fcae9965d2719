"""TokenClassification and its data: tags at the right tokens, entities, training, and what cannot be used."""

from __future__ import annotations

import json
import random
import re
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from lightning.pytorch.callbacks import Callback

from lightning_hift.cli import main
from lightning_hift.data import FileFormat, TokenClassificationDataModule
from lightning_hift.tasks import TokenClassification
from lightning_hift.tasks.entities import EntityScores, entities_in, mark_entities
from tests.models import as_published
from tests.reference import conlleval
from tests.tiny_tokenizers import byte_level, wordpiece

CONFIGS = Path(__file__).parents[2] / "configs"
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, **NO_DROPOUT}
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
PEOPLE, PLACES, OTHERS = ["anna", "bob", "carla"], ["paris", "rome", "oslo"], ["met", "in", "saw", "and", "left"]


def sentence(draw: random.Random) -> tuple[list[str], list[str]]:
    """Words whose tags follow from them: a person of one or two words, and a place or two."""
    people, places = draw.sample(PEOPLE, draw.randint(1, 2)), draw.sample(PLACES, draw.randint(1, 2))
    words = [*people, draw.choice(OTHERS), *places, draw.choice(OTHERS)]
    tags = [*["B-PER", "I-PER"][: len(people)], "O", *["B-LOC", "I-LOC"][: len(places)], "O"]
    return words, tags


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_conll(path: Path, sentences: list[tuple[list[str], list[str]]]) -> str:
    blocks = ["\n".join(f"{w} X Y {t}" for w, t in zip(words, tags, strict=True)) for words, tags in sentences]
    path.write_text("-DOCSTART- -X- -X- O\n\n" + "\n\n".join(blocks) + "\n")
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return wordpiece([" ".join(PEOPLE + PLACES + OTHERS)] * 3, tmp_path / "tokenizer")


def data_of(
    tmp_path: Path, tokenizer: str, rows: list[dict[str, Any]], **options: Any
) -> TokenClassificationDataModule:
    files = {split: write_jsonl(tmp_path / "rows.jsonl", rows) for split in ("train", "validation", "test", "predict")}
    return TokenClassificationDataModule(files=files, tokenizer=tokenizer, **options)


def only_example(data: TokenClassificationDataModule, split: str = "train") -> dict[str, Any]:
    data.setup({"train": "fit"}.get(split, split))
    (example,) = data.examples[split].to_list()
    return example


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", enable_model_summary=False, **{**quiet, **options})


# --- labels of tokens -------------------------------------------------------------------------------------------------


def test_the_first_piece_of_each_word_has_its_tag(tmp_path: Path, tokenizer: str) -> None:
    row = {"words": ["anna", "annabob", "\u200e", "in", "oslo"], "tags": ["B-PER", "I-PER", "O", "O", "B-LOC"]}
    example = only_example(data_of(tmp_path, tokenizer, [row], label_names=TAGS))
    data = data_of(tmp_path, tokenizer, [row], label_names=TAGS)
    assert data.tokenizer.convert_ids_to_tokens(example["input_ids"]) == [
        *["[CLS]", "anna", "anna", "##bob", "in", "oslo", "[SEP]"]
    ]
    assert example["labels"] == [-100, 1, 2, -100, 0, 3, -100]
    assert example["word_numbers"] == [0, 1, 2, 0, 4, 5, 0]  # of the third word, the tokenizer makes nothing
    assert example["num_words"] == 5


def test_all_pieces_of_a_word_can_have_its_tag(tmp_path: Path, tokenizer: str) -> None:
    row = {"words": ["annabob", "in"], "tags": ["B-PER", "O"]}
    example = only_example(data_of(tmp_path, tokenizer, [row], label_names=TAGS, label_all_tokens=True))
    assert example["labels"] == [-100, 1, 1, 0, -100]
    assert example["word_numbers"] == [0, 1, 0, 2, 0]


@pytest.mark.parametrize("trim", [True, False])
def test_a_token_may_begin_with_the_space_before_its_word(tmp_path: Path, trim: bool) -> None:
    folder = byte_level(["anna met bob in oslo"] * 3, tmp_path / "bytes")
    saved = json.loads(Path(folder, "tokenizer.json").read_text())
    kind = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    Path(folder, "tokenizer.json").write_text(json.dumps({**saved, "post_processor": {**kind, "trim_offsets": trim}}))
    row = {"words": ["anna", "met", "x", "oslo"], "tags": ["B-PER", "O", "O", "B-LOC"]}
    data = data_of(tmp_path, folder, [row], label_names=TAGS)
    example = only_example(data)
    tokens = data.tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert tokens[:2] == ["anna", "Ġmet"]
    assert [number for number in example["word_numbers"] if number] == [1, 2, 3, 4]
    assert example["labels"][tokens.index("Ġoslo")] == 3
    assert sum(label >= 0 for label in example["labels"]) == 4


def test_without_a_separator_a_token_may_hold_several_words(tmp_path: Path, tokenizer: str) -> None:
    row = {"words": ["an", "na", "in"], "tags": ["B-PER", "I-PER", "O"]}
    example = only_example(data_of(tmp_path, tokenizer, [row], label_names=TAGS, separator=""))
    assert example["word_numbers"] == [0, 1, 3, 0]  # [CLS] anna ##in [SEP]
    assert example["labels"] == [-100, 1, 0, -100]


def test_words_that_were_cut_off_are_counted(tmp_path: Path, tokenizer: str) -> None:
    rows = [{"words": ["anna", "in", "oslo", "and", "rome"], "tags": ["B-PER", "O", "B-LOC", "O", "B-LOC"]}] * 2
    data = data_of(tmp_path, tokenizer, rows, label_names=TAGS, max_length=5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.setup("validate")
    told = [str(warning.message) for warning in caught]
    assert any("2 of 2 validation examples were longer than max_length=5" in text for text in told)
    assert any("4 validation words were cut off with their tags" in text for text in told)
    assert data.examples["validation"][0]["labels"] == [-100, 1, 0, 3, -100]
    assert set(data.examples["validation"].column_names) >= {"labels", "word_numbers", "num_words"}
    assert not any(name.startswith("__") for name in data.examples["validation"].column_names)


def test_batches_are_padded(tmp_path: Path, tokenizer: str) -> None:
    rows = [{"words": ["anna"], "tags": ["B-PER"]}, {"words": ["in", "oslo", "and"], "tags": ["O", "B-LOC", "O"]}]
    (batch,) = data_of(tmp_path, tokenizer, rows, label_names=TAGS).test_dataloader()
    assert batch["labels"].tolist() == [[-100, 1, -100, -100, -100], [-100, 0, 3, 0, -100]]
    assert batch["word_numbers"].tolist() == [[0, 1, 0, 0, 0], [0, 1, 2, 3, 0]]
    assert batch["num_words"].tolist() == [1, 3]


# --- tags -------------------------------------------------------------------------------------------------------------


def test_names_are_those_found_in_training(tmp_path: Path, tokenizer: str) -> None:
    rows = [{"words": ["anna", "in"], "tags": ["NOUN", "ADP"]}, {"words": ["met"], "tags": ["VERB"]}]
    assert data_of(tmp_path, tokenizer, rows).label_names == ["ADP", "NOUN", "VERB"]


def test_tags_may_be_indices_whose_names_the_data_set_declares(tmp_path: Path, tokenizer: str) -> None:
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=TAGS))})
    (tmp_path / "hub").mkdir()
    Dataset.from_dict({"tokens": [["anna", "in"]], "ner_tags": [[1, 0]]}, features).to_parquet(
        tmp_path / "hub" / "train-00000-of-00001.parquet"
    )
    data = TokenClassificationDataModule(
        dataset=str(tmp_path / "hub"), splits={"train": "train"}, words="tokens", tags="ner_tags", tokenizer=tokenizer
    )
    assert data.label_names == TAGS
    assert only_example(data)["labels"] == [-100, 1, 0, -100]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": ["anna"], "tags": ["B-DOG"]}, r"rows.jsonl:2: column 'tags': got 'B-DOG'; it must be one of O, B-P"),
        ({"words": ["anna"], "tags": [5]}, r"column 'tags': got 5; it must be one of O"),
        ({"words": ["anna", "in"], "tags": ["O"]}, r"rows.jsonl:2: column 'tags': there are 1 tags for 2 words"),
        ({"words": [], "tags": []}, r"rows.jsonl:2: column 'words': there are no words"),
        ({"words": ["anna"]}, r"column 'tags': there are no tags"),
        ({"words": ["\u200e"], "tags": ["O"]}, r"column 'words': the tokenizer makes nothing of them"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, tokenizer: str, row: dict[str, Any], message: str) -> None:
    kind = int if any(isinstance(tag, int) for tag in row.get("tags", [])) else str
    good = {"words": ["anna", "in"], "tags": [kind("1") if kind is int else "O"] * 2}
    with pytest.raises(ValueError, match=message):
        data_of(tmp_path, tokenizer, [good, row], label_names=TAGS).setup("fit")
    skipping = data_of(tmp_path, tokenizer, [good, row], label_names=TAGS, on_bad_row="skip")
    with pytest.warns(UserWarning, match=r"1 of 2 rows cannot be used and are left out:\n.*" + message):
        skipping.setup("fit")
    assert len(skipping.examples["train"]) == 1


def test_text_instead_of_words_is_refused(tmp_path: Path, tokenizer: str) -> None:
    with pytest.raises(ValueError, match=r"got 'anna in', which is no list of words"):
        data_of(tmp_path, tokenizer, [{"words": "anna in", "tags": ["O"]}], label_names=TAGS).setup("fit")


def test_a_limit_that_leaves_no_word_is_refused(tmp_path: Path, tokenizer: str) -> None:
    with pytest.raises(ValueError, match="max_length=2 leaves none of its words"):
        data_of(tmp_path, tokenizer, [{"words": ["anna"], "tags": ["O"]}], label_names=TAGS, max_length=2).setup("fit")


def test_a_tokenizer_without_offsets_is_refused(tmp_path: Path, tokenizer: str) -> None:
    data = data_of(tmp_path, tokenizer, [{"words": ["anna"], "tags": ["O"]}], label_names=TAGS)

    class Slow:
        is_fast = False

    data.__dict__["tokenizer"] = Slow()
    with pytest.raises(ValueError, match=r"Got a Slow, which does not say which characters .* Use a fast tokenizer"):
        data.encode({"words": ["anna"], "tags": ["O"]}, "train")


# --- CoNLL files ------------------------------------------------------------------------------------------------------


def read_conll(tmp_path: Path, text: str, **options: Any) -> TokenClassificationDataModule:
    (tmp_path / "eng.train").write_text(text)
    file_format = FileFormat(**{"kind": "conll", "columns": ["words", "tags"], **options})
    return TokenClassificationDataModule(
        files={"train": str(tmp_path / "eng.train")}, file_format=file_format, label_names=TAGS
    )


def test_conll_files_give_lists(tmp_path: Path) -> None:
    text = "-DOCSTART- O\n\nanna B-PER\nmet\tO\n\n\n-DOCSTART- O\n\nparis B-LOC"
    table = read_conll(tmp_path, text).table("train")
    assert table["words"][:] == [["anna", "met"], ["paris"]]
    assert table["tags"][:] == [["B-PER", "O"], ["B-LOC"]]
    assert [place.rpartition(":")[2] for place in table["__place__"]] == ["3", "9"]


def test_a_delimiter_keeps_spaces_in_words(tmp_path: Path) -> None:
    table = read_conll(tmp_path, "new york\tB-LOC\n\tO\r\n", delimiter="\t").table("train")
    assert table["words"][:] == [["new york", ""]]
    assert table["tags"][:] == [["B-LOC", "O"]]


def test_lines_of_another_width_are_named(tmp_path: Path) -> None:
    text = "anna B-PER\nmet in O\nbob\n\nparis B-LOC\n"
    with pytest.raises(ValueError, match=r"1 of 2 rows .*\n.*eng.train:2: it has 3 fields, not 2 \(words, tags\)"):
        read_conll(tmp_path, text).table("train")


def test_conll_files_need_names_of_columns(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eng.train does not name its columns. Give them: columns in file_format"):
        read_conll(tmp_path, "anna B-PER\n", columns=None).table("train")


# --- entities ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O B-PER", [("PER", 0, 1), ("PER", 3, 3)]),
        ("B-PER B-PER I-LOC", [("PER", 0, 0), ("PER", 1, 1), ("LOC", 2, 2)]),
        ("I-PER I-PER B-PER", [("PER", 0, 1), ("PER", 2, 2)]),  # IOB1
        ("B-PER E-PER S-PER I-PER", [("PER", 0, 1), ("PER", 2, 2), ("PER", 3, 3)]),
        ("B-PER L-PER U-PER O", [("PER", 0, 1), ("PER", 2, 2)]),
        ("B I O I", [("", 0, 1), ("", 3, 3)]),
        ("O O", []),
    ],
)
def test_entities_of_known_tags(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert entities_in(tags.split()) == expected
    assert conlleval.entities(tags.split()) == expected


def test_entities_are_those_of_conlleval() -> None:
    draw = random.Random(0)
    choices = ["O", *(f"{letter}-{kind}" for letter in "BIESLU" for kind in ("PER", "LOC-X"))]
    for _ in range(3000):
        tags = draw.choices(choices, k=draw.randint(0, 9))
        assert entities_in(tags) == conlleval.entities(tags)


def test_scores_are_those_of_conlleval_over_batches_and_padding() -> None:
    draw = random.Random(1)
    metric = EntityScores(TAGS)
    predicted, true = [], []
    for _ in range(20):
        lengths = [draw.randint(1, 8) for _ in range(4)]
        answers = torch.full((4, 8), -100)
        guesses = torch.randint(len(TAGS), (4, 8))
        for i, length in enumerate(lengths):
            answers[i, torch.randperm(8)[:length].sort().values] = torch.randint(len(TAGS), (length,))
            words = answers[i] >= 0
            agreeing = words & (torch.rand(8) < 0.7)
            guesses[i, agreeing] = answers[i, agreeing]
            predicted.append([TAGS[k] for k in guesses[i, words].tolist()])
            true.append([TAGS[k] for k in answers[i, words].tolist()])
        metric.update(guesses, answers)
    expected = conlleval.scores(predicted, true)
    assert 0.2 < expected["f1"] < 0.9
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(expected)


def test_scores_without_entities_are_zero() -> None:
    metric = EntityScores(TAGS)
    metric.update(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))
    assert {float(value) for value in metric.compute().values()} == {0.0}


@pytest.mark.parametrize(
    ("names", "expected"),
    [(TAGS, True), (["B", "I", "O"], True), (["NOUN", "VERB"], False), (["O", "X"], False), (["LABEL_0", "O"], False)],
)
def test_which_tags_mark_entities(names: list[str], expected: bool) -> None:
    assert mark_entities(names) is expected


# --- the task ---------------------------------------------------------------------------------------------------------


def tiny(**options: Any) -> TokenClassification:
    torch.manual_seed(0)
    config = {"max_position_embeddings": 32, **TINY}
    return TokenClassification(**{"model_type": "bert", "model_config": config, "optimizer": adam, **options})


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=5e-3)


def toy(tmp_path: Path, tokenizer: str, **options: Any) -> TokenClassificationDataModule:
    draw = random.Random(0)
    files = {"train": str(tmp_path / "eng.train"), "validation": str(tmp_path / "eng.testa")}
    if not Path(files["train"]).exists():  # resuming wants the same files
        write_conll(tmp_path / "eng.train", [sentence(draw) for _ in range(120)])
        write_conll(tmp_path / "eng.testa", [sentence(draw) for _ in range(30)])
    return TokenClassificationDataModule(
        files={**files, "test": files["validation"]},
        file_format=FileFormat(kind="conll", columns=["word", "pos", "chunk", "entity"]),
        **{"words": "word", "tags": "entity", "tokenizer": tokenizer, "batch_size": 8, **options},
    )


def test_hift_learns_to_find_entities(tmp_path: Path, tokenizer: str) -> None:
    module, data = tiny(), toy(tmp_path, tokenizer)
    before = trainer().validate(module, data, verbose=False)[0]
    trainer(max_epochs=16, callbacks=as_published(), num_sanity_val_steps=0).fit(module, data)
    after = trainer().validate(module, data, verbose=False)[0]
    assert set(after) == {f"val_{name}" for name in ("loss", "accuracy", "precision", "recall", "f1")}
    assert before["val_f1"] < 0.5
    assert after["val_f1"] > 0.95
    assert after["val_loss"] < 0.2 * before["val_loss"]

    records = [record for batch in trainer().predict(module, data) or [] for record in batch]
    true = data.table("test")
    scores = conlleval.scores([record["tags"] for record in records], true["entity"][:])
    assert scores["f1"] == pytest.approx(after["val_f1"])
    assert module.network.config.id2label[0] == data.label_names[0]  # type: ignore[union-attr, index]


def test_plain_tags_have_an_accuracy_only(tmp_path: Path, tokenizer: str) -> None:
    rows = [{"words": ["anna", "met", "bob"], "tags": ["NOUN", "VERB", "NOUN"]}] * 4
    found = trainer().validate(tiny(), data_of(tmp_path, tokenizer, rows), verbose=False)[0]
    assert set(found) == {"val_loss", "val_accuracy"}


def test_what_is_measured_is_the_same_however_pieces_are_labelled_and_batched(tmp_path: Path, tokenizer: str) -> None:
    rows = [{"words": ["annabob", "in", "romeoslo"], "tags": ["B-PER", "O", "B-LOC"]}] * 3
    rows += [{"words": ["met", "bob"], "tags": ["O", "B-PER"]}] * 2
    module = tiny(labels=TAGS)
    results = [
        trainer().validate(module, data_of(tmp_path, tokenizer, rows, label_names=TAGS, **options), verbose=False)[0]
        for options in ({}, {"label_all_tokens": True}, {"eval_batch_size": 2}, {"eval_batch_size": 1})
    ]
    for name in ("val_f1", "val_precision", "val_recall", "val_accuracy"):
        assert len({round(result[name], 6) for result in results}) == 1
    assert results[2]["val_loss"] == pytest.approx(results[0]["val_loss"], rel=1e-5)  # a mean over words, not batches
    assert results[3]["val_loss"] == pytest.approx(results[0]["val_loss"], rel=1e-5)


def test_words_without_a_tag_are_none_in_predictions(tmp_path: Path, tokenizer: str) -> None:
    rows = [{"words": ["anna", "\u200e", "in", "oslo"]}, {"words": ["met"]}]
    data = data_of(tmp_path, tokenizer, rows, label_names=TAGS, max_length=4)
    with pytest.warns(UserWarning, match="1 predict words were cut off"):
        (records,) = trainer().predict(tiny(), data) or []
    assert [[tag is None for tag in record["tags"]] for record in records] == [[False, True, False, True], [False]]
    assert set(records[1]["tags"]) <= set(TAGS)


def test_module_works_without_the_data_module() -> None:
    module = tiny(labels=3, model_config={**TINY, "vocab_size": 20})
    module.configure_model()
    batch = {"input_ids": torch.arange(8).view(2, 4), "attention_mask": torch.tensor([[1] * 4, [1] * 2 + [0] * 2])}
    labels = torch.tensor([[0, 1, -100, 2], [1, 2, -100, -100]])
    with torch.no_grad():
        logits = module(batch).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        assert float(module.loss({**batch, "labels": labels})) == pytest.approx(float(expected), rel=1e-5)
        records = module.predict_step({**batch, "labels": labels}, 0)
    assert [len(record["tags"]) for record in records] == [4, 2]


def test_one_tag_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Got labels=\['O'\]; there must be at least two"):
        tiny(labels=["O"])


def test_a_model_without_the_head_is_refused() -> None:
    with pytest.raises(ValueError, match="Got model_type='t5gemma3', which is no model for token classification"):
        tiny(model_type="t5gemma3", model_config={}, labels=2).configure_model()


@pytest.mark.parametrize(
    "adapter",
    [
        {"peft_type": "LORA", "target_modules": ["query", "value"]},
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4},  # which puts tokens before those of the batch
    ],
    ids=lambda adapter: adapter["peft_type"],
)
def test_adapters_work(tmp_path: Path, tokenizer: str, adapter: dict[str, Any]) -> None:
    module, data = tiny(adapter=adapter), toy(tmp_path, tokenizer)
    fitted = trainer(max_steps=6, callbacks=as_published(), limit_val_batches=2)
    fitted.fit(module, data)
    assert 0 < fitted.logged_metrics["train_loss"] < 10
    assert len((trainer(limit_predict_batches=1).predict(module, data) or [[]])[0]) == data.batch_size


class Batches(Callback):
    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch["input_ids"].flatten().tolist())


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, tokenizer: str) -> None:
    def fit(steps: int, ckpt_path: str | None = None) -> tuple[pl.Trainer, TokenClassification, Batches]:
        module, batches = tiny(), Batches()
        fitted = trainer(max_steps=steps, callbacks=[as_published(), batches], num_sanity_val_steps=0)
        fitted.fit(module, toy(tmp_path, tokenizer), ckpt_path=ckpt_path)
        return fitted, module, batches

    _, through, all_batches = fit(22)
    stopped, _, first = fit(9)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    _, resumed, second = fit(22, str(tmp_path / "stopped.ckpt"))
    assert first.seen + second.seen == all_batches.seen
    for name, value in through.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_task_file_runs(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(vocab_size=300, max_position_embeddings=32, **TINY)).save_pretrained(tokenizer)
    draw = random.Random(0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("eng.train", "eng.testa", "eng.testb"):
        write_conll(tmp_path / "data" / name, [sentence(draw) for _ in range(12)])
    task = CONFIGS / "task" / "ner_conll.yaml"
    assert re.match(rf"# lightning-hift fit -c configs/task/{task.name} ", task.read_text())
    small = ["--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    for command in ("fit", "test", "predict"):
        monkeypatch.setattr(
            "sys.argv", ["lightning-hift", command, "-c", str(task), f"--model.init_args.model={tokenizer}", *small]
        )
        main()
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt"))
