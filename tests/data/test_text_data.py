"""Rows from files and from the hub, bad rows, tokens, caches, batches that can be resumed."""

from __future__ import annotations

import gzip
import importlib
import json
import linecache
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_hift.data import ClassificationDataModule, FileFormat
from lightning_hift.data.batches import OrderedExamples, ShuffledExamples
from lightning_hift.data.tables import FAULT, PLACE, read_files, read_hub, without_bad_rows
from tests.models import as_published
from tests.text_models import save_network, save_tokenizer

pytest.importorskip("datasets")

ROWS = [{"text": f"good film {i}", "label": "pos"} for i in range(6)]
ROWS += [{"text": f"bad film {i}", "label": "neg"} for i in range(6)]

OWN_MODULE = """
from lightning_hift.data import TextDataModule
from lightning_hift.data.text import TRUNCATED

class Own(TextDataModule):
    def encode(self, row, split):
        return [{{"input_ids": [{token}], TRUNCATED: False}}]
"""


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def write(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(path: Path, **options: Any) -> list[dict[str, Any]]:
    table = without_bad_rows(read_files([path], FileFormat(**options), path.parent / "cache"), "error")
    return [{name: value for name, value in row.items() if name != PLACE} for row in table]


@pytest.mark.parametrize(
    ("name", "text", "options", "expected"),
    [
        (
            "a.csv",
            'a,b\n1,"x, ""y"""\n2,"two\nlines"\n',
            {},
            [{"a": "1", "b": 'x, "y"'}, {"a": "2", "b": "two\nlines"}],
        ),
        ("a.csv", "1;x\n", {"columns": ["a", "b"], "delimiter": ";"}, [{"a": "1", "b": "x"}]),
        ("a.tsv", 'a\tb\n1\t"unbalanced\n2\ty\n', {}, [{"a": "1", "b": '"unbalanced'}, {"a": "2", "b": "y"}]),
        ("a.csv", f"a\n{'x' * 200_000}\n", {}, [{"a": "x" * 200_000}]),
        ("a.tsv.gz", "a\tb\n1\tx\n", {}, [{"a": "1", "b": "x"}]),
        ("a.jsonl", '{"a": 1}\n\n{"a": 2, "b": ["x"]}\n', {}, [{"a": 1, "b": None}, {"a": 2, "b": ["x"]}]),
        ("a.json", '{"data": {"rows": [{"a": 1.5}, {"a": 2}]}}', {"records": "data.rows"}, [{"a": 1.5}, {"a": 2.0}]),
        ("a.txt", "one\n\ntwo\n", {}, [{"text": "one"}, {"text": ""}, {"text": "two"}]),
        ("a.all", "3 who ?\n", {"kind": "txt", "line_pattern": r"(?P<n>\d) (?P<q>.*)"}, [{"n": "3", "q": "who ?"}]),
    ],
)
def test_formats(tmp_path: Path, name: str, text: str, options: dict[str, Any], expected: list[Any]) -> None:
    assert read(write(tmp_path / name, text), **options) == expected


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", "a\r\nx\r\n"), ("a.jsonl.gz", '{"a": "x"}\n'), ("a.json", '[{"a": "x"}]')]
)
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, name: str, text: str) -> None:
    assert read(write(tmp_path / name, "\ufeff" + text)) == [{"a": "x"}]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"a": [1, 2], "b": ["x", "y"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


@pytest.mark.parametrize(
    ("name", "text", "options", "fault"),
    [
        ("a.csv", "a,b\n1,2\n1,2,3\n", {}, r"a.csv:3: it has 3 fields, not 2 \(a, b\)"),
        ("a.csv", 'a,b\n1,"two\nlines"\nx\n', {}, r"a.csv:4: it has 1 fields"),
        ("a.csv", 'a,b\n1,2\n3,"four\n5,six\n', {}, r"a.csv:3: up to line 4: unexpected end of data; a quote inside"),
        ("a.csv", 'a,b\n1,2\n3,"x"y"\n', {}, r"a.csv:3: up to line 3: ',' expected after '\"'; a quote inside"),
        ("a.jsonl", '{"a": 1}\n{"a": 1,}\n', {}, r"a.jsonl:2: column 9: "),
        ("a.jsonl", '{"a": 1}\n[1]\n', {}, r"a.jsonl:2: it is a list, not an object"),
        ("a.jsonl", '{"a": 1}\n{"a": "x"}\n', {}, r"a.jsonl:2: column 'a' holds a str"),
        ("a.txt", "1 x\noh\n", {"line_pattern": r"(?P<n>\d) (?P<t>.*)"}, r"a.txt:2: line_pattern does not match 'oh'"),
    ],
)
def test_bad_rows_are_named_or_skipped(
    tmp_path: Path, name: str, text: str, options: dict[str, Any], fault: str
) -> None:
    path = write(tmp_path / name, text)
    for _ in range(2):  # read, and from the cache
        table = read_files([path], FileFormat(**options), tmp_path / "cache")
        with pytest.raises(ValueError, match=f"1 of 2 rows cannot be used:\n  .*{fault}"):
            without_bad_rows(table, "error")
    with pytest.warns(UserWarning, match=f"1 of 2 rows cannot be used and are left out:\n  .*{fault}"):
        assert len(without_bad_rows(table, "skip")) == 1


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("a.xml", "", {}, r"does not end in one of csv, tsv, txt, jsonl, json, parquet, .* kind in file_format"),
        ("a.csv", "", {}, "is empty: it has no header"),
        ("a.json", '{"x": []}', {}, "holds a dict, not a list of rows. Say under which key"),
        ("a.json", '{"x": []}', {"records": "y"}, "Got 'y' in records, but .* has no such key there; it has x"),
        ("a.json", "[1,", {}, r"a.json:1: column \d+: .* It is no JSON"),
        ("a.txt", "x", {"line_pattern": ".*"}, "needs named groups"),
        ("a.csv", "a,b,a\n1,2,3\n", {}, "a.csv:1: the column 'a' is there twice. Rename"),
        ("a.parquet", "a", {}, "a.parquet is no parquet file: "),
        ("a.jsonl", '{"a": "x"}\n{"a": "é"}\n', {"encoding": "ascii"}, "a.jsonl:2: it is not in ascii .* encoding in"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / name, text), **options)


def test_numbers_of_which_the_first_thousand_are_whole(tmp_path: Path) -> None:
    rows = [{"a": 1}] * 1100 + [{"a": 0.5}]
    assert read(write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))) == rows


def test_a_compressed_file_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"a\nx\n" * 1000)[:-20])
    with pytest.raises(ValueError, match=r"a.csv.gz cannot be read as csv: .* Write it anew"):
        read(path)


def test_a_long_field(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.csv", "a\n" + "x" * 200_000)) == [{"a": "x" * 200_000}]


def test_a_missing_file_and_an_unknown_data_set(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.csv, which does not exist. Paths are relative to"):
        read(tmp_path / "nowhere.csv")
    with pytest.raises(OSError, match=r"dataset='no/such', which is no local folder and not cached.*name local files"):
        read_hub("no/such", None, "train", None, tmp_path)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n')
    assert read(path) == [{"a": 1}]
    write(path, '{"a": 1}\n{"a": 2}\n')
    assert read(path) == [{"a": 1}, {"a": 2}]


# --- the data module --------------------------------------------------------------------------------------------------


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    return str(write(path, "".join(json.dumps(row) + "\n" for row in rows)))


def module(tmp_path: Path, rows: list[dict[str, Any]] | None = None, **options: Any) -> ClassificationDataModule:
    if not (tmp_path / "tokenizer").exists():
        save_tokenizer(tmp_path / "tokenizer")
    files = {"train": jsonl(tmp_path / "train.jsonl", ROWS if rows is None else rows)}
    defaults = {"files": files, "tokenizer": str(tmp_path / "tokenizer"), "cache_dir": str(tmp_path / "cache")}
    return ClassificationDataModule(**{**defaults, "batch_size": 5, **options})


def test_batches_hold_every_row_once_per_pass_in_another_order(tmp_path: Path) -> None:
    loader = module(tmp_path).train_dataloader()
    assert len(loader) == 3
    passes = [[tuple(ids.tolist()) for batch in loader for ids in batch["input_ids"]] for _ in range(2)]
    texts = [sorted(tuple(t for t in ids if t) for ids in found) for found in passes]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 12
    assert passes[0] != passes[1]


def test_a_batch(tmp_path: Path) -> None:
    rows = [{"a": "good film", "b": "yes", "y": "pos"}, {"a": "the bad film", "b": "no no", "y": "neg"}]
    data = module(tmp_path, rows, text="a", text_pair="b", label="y", batch_size=2, bucket_by_length=False)
    (batch,) = data.train_dataloader()
    assert data.label_names == ["neg", "pos"]
    first = batch["labels"].tolist().index(1)
    assert batch["input_ids"][first].tolist() == [2, 5, 9, 3, 21, 3, 0, 0]
    assert batch["attention_mask"][first].tolist() == [1] * 6 + [0] * 2
    assert batch["token_type_ids"][first].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]


def test_similar_lengths_share_a_batch() -> None:
    examples = [{"input_ids": [1] * n} for n in torch.randint(1, 100, (400,)).tolist()]

    def padding(lengths: list[int] | None) -> int:
        shuffled = ShuffledExamples(
            examples, lengths, 8, 0, lambda batch: {"n": [len(e["input_ids"]) for e in batch]}, {}
        )
        return sum(max(batch["n"]) * len(batch["n"]) - sum(batch["n"]) for batch in shuffled)

    assert padding([len(e["input_ids"]) for e in examples]) < 0.1 * padding(None)


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 7])
def test_training_batches_go_on_where_they_stopped(tmp_path: Path, stop: int) -> None:
    def stream(loader: Any, count: int) -> list[Any]:
        found: list[Any] = []
        while len(found) < count:
            for batch in loader:
                found.append(batch["input_ids"].tolist())
                if len(found) == count:
                    break
        return found

    whole = stream(module(tmp_path).train_dataloader(), 9)
    first = module(tmp_path).train_dataloader()
    begun = stream(first, stop)
    second = module(tmp_path).train_dataloader()
    second.load_state_dict(first.state_dict())
    assert begun + stream(second, 9 - stop) == whole


def test_another_data_set_does_not_resume(tmp_path: Path) -> None:
    state = module(tmp_path).train_dataloader().state_dict()
    with pytest.raises(
        ValueError, match=r"has other training data, .*'batch_size': 5.* than this run, .*'batch_size': 4"
    ):
        module(tmp_path, batch_size=4).train_dataloader().load_state_dict(state)
    with pytest.raises(ValueError, match="other training data"):
        module(tmp_path, [*ROWS[:11], {"text": "new", "label": "neg"}]).train_dataloader().load_state_dict(state)


def test_tokens_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module(tmp_path).train_dataloader()
    calls: list[Any] = []
    encode = ClassificationDataModule.encode
    monkeypatch.setattr(ClassificationDataModule, "encode", lambda *args: calls.append(1) or encode(*args))
    module(tmp_path).train_dataloader()
    assert not calls
    module(tmp_path, max_length=8).train_dataloader()
    assert len(calls) == 12


@pytest.mark.filterwarnings("ignore:.*were cut")
@pytest.mark.parametrize(
    ("option", "value"), [("truncation_side", "left"), ("model_input_names", ["input_ids", "attention_mask"])]
)
def test_a_changed_tokenizer_encodes_again(tmp_path: Path, option: str, value: Any) -> None:
    rows = [{"text": "good good good bad", "label": "pos"}]
    batches = []
    for _ in range(2):
        data = module(tmp_path, rows, max_length=4)
        batches += list(data.train_dataloader())
        path = tmp_path / "tokenizer" / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), option: value}))
    good, bad = (data.tokenizer.convert_tokens_to_ids(word) for word in ("good", "bad"))
    assert batches[0]["input_ids"].tolist() == [[2, good, good, 3]]
    assert batches[1]["input_ids"].tolist() == [[2, good, bad if option == "truncation_side" else good, 3]]
    assert ("token_type_ids" in batches[1]) == (option == "truncation_side")


def test_a_changed_encode_encodes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    seen = []
    for token in (5, 6):
        write(tmp_path / "my_data.py", OWN_MODULE.format(token=token))
        linecache.checkcache()
        monkeypatch.delitem(sys.modules, "my_data", raising=False)
        options = {"files": {"train": jsonl(tmp_path / "a.jsonl", ROWS)}, "tokenizer": str(tmp_path / "tokenizer")}
        save_tokenizer(tmp_path / "tokenizer")
        data = importlib.import_module("my_data").Own(**options, cache_dir=str(tmp_path / "cache"))
        data.setup("fit")
        seen.append(data.examples["train"]["input_ids"][0])
    assert seen == [[5], [6]]


def test_held_out_rows_are_not_trained_on(tmp_path: Path) -> None:
    data = module(tmp_path, validation_fraction=0.25)
    train, held_out = data.table("train")["text"], data.table("validation")["text"]
    assert len(held_out) == 3
    assert sorted([*train, *held_out]) == sorted(row["text"] for row in ROWS)
    assert sum(len(batch["labels"]) for batch in data.val_dataloader()) == 3


def test_long_texts_are_cut_and_counted(tmp_path: Path) -> None:
    rows = [{"text": "good " * 40, "label": "pos"}, {"text": "bad", "label": "neg"}]
    with pytest.warns(UserWarning, match="1 of 2 train examples were longer than max_length=6 and were cut"):
        (batch,) = module(tmp_path, rows, max_length=6).train_dataloader()
    assert batch["input_ids"].shape == (2, 6)
    with pytest.raises(ValueError, match="max_length=33, but the model takes at most 32 tokens"):
        module(tmp_path, rows, max_length=33).train_dataloader()


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"text": " ", "label": "pos"}, "train.jsonl:13: column 'text': got ' ', which is no text"),
        ({"text": "", "label": "pos"}, "train.jsonl:13: column 'text': there is no text"),
        ({"text": "good", "label": "odd"}, "train.jsonl:13: column 'label': got 'odd'; it must be one of neg, pos"),
        ({"text": "good"}, "train.jsonl:13: column 'label': there is no label"),
    ],
)
def test_rows_that_cannot_be_encoded(tmp_path: Path, row: dict[str, Any], fault: str) -> None:
    rows = [*ROWS, row]
    with pytest.raises(ValueError, match=f"1 of 13 rows cannot be used:\n  .*{fault}"):
        module(tmp_path, rows, label_names=["neg", "pos"]).train_dataloader()
    data = module(tmp_path, rows, label_names=["neg", "pos"], on_bad_row="skip")
    with pytest.warns(UserWarning, match="left out"):
        loader = data.train_dataloader()
    assert sum(len(batch["labels"]) for batch in loader) == 12


@pytest.mark.parametrize("first", ["odd", "pos"])
def test_batches_of_bad_rows_only(tmp_path: Path, first: str) -> None:
    """``datasets`` encodes a thousand rows at a time, and wants the same columns each time."""
    rows = [
        {"text": "good", "label": label} for label in (first, "pos" if first == "odd" else "odd") for _ in "x" * 1100
    ]
    names = ["neg", "pos"]
    with pytest.raises(ValueError, match=r"1100 of 2200 rows cannot be used:\n.*got 'odd'; it must be one of neg, pos"):
        module(tmp_path, rows, label_names=names).setup("fit")
    data = module(tmp_path, rows, label_names=names, on_bad_row="skip")
    with pytest.warns(UserWarning, match="1100 of 2200 rows cannot be used and are left out"):
        data.setup("fit")
    assert data.examples["train"]["labels"][:] == [1] * 1100


def test_a_number_that_is_no_name_among_numbers(tmp_path: Path) -> None:
    stars = [{"text": "good film", "label": star} for star in ("1", "2", "3")]
    files = {"validation": jsonl(tmp_path / "v.jsonl", [*stars, {"text": "bad film", "label": "0"}])}
    data = module(tmp_path, stars, files={"train": jsonl(tmp_path / "t.jsonl", stars), **files})
    with pytest.raises(ValueError, match=r"v.jsonl:4: column 'label': got '0'; it must be one of 1, 2, 3"):
        data.setup("fit")


@pytest.mark.parametrize("names", [["pos", "neg"], ["neg", "pos"], ["good", "bad"]])
def test_indices_of_names_that_the_data_set_declares(tmp_path: Path, names: list[str]) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "neg"])})
    (tmp_path / "hub").mkdir()
    rows = {"text": ["good film", "bad film"], "label": [0, 1]}
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "hub" / "train.parquet"))
    hub = {"dataset": str(tmp_path / "hub"), "splits": {"train": "train"}, "files": None}
    data = module(tmp_path, label_names=names, **hub)
    if names == ["neg", "pos"]:
        with pytest.raises(ValueError, match="Got the labels neg, pos, but the data set's are indices of pos, neg"):
            data.setup("fit")
    else:
        data.setup("fit")
        assert data.examples["train"]["labels"][:] == [0, 1]


def test_numbers_to_predict(tmp_path: Path) -> None:
    rows = [{"text": "good", "label": 1.5}, {"text": "bad", "label": -2}]
    (batch,) = module(tmp_path, rows, regression=True, batch_size=2).train_dataloader()
    assert sorted(batch["labels"].tolist()) == [-2.0, 1.5]
    with pytest.raises(ValueError, match="column 'label': got 'pos', which is no number"):
        module(tmp_path, regression=True).train_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "sentence"}, r"Got text='sentence', but .*train.jsonl has no such column. It has text, label"),
        ({"label": "y"}, r"Got label='y', but .*train.jsonl has no such column. It has text, label"),
        ({"dataset": "glue"}, "give one of them"),
        ({"files": None}, "give one of them"),
        ({"files": {"dev": "x"}}, "Got the split 'dev'; there are train, validation, test, predict"),
        ({"batch_size": 0}, "Got batch_size=0; it must be at least 1"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0; it must lie between 0 and 1"),
        ({"on_bad_row": "warn"}, "on_bad_row='warn'; it must be 'error' or 'skip'"),
        ({"regression": True, "label_names": ["a"]}, "with regression=True, which has none"),
        ({"tokenizer": None}, "Got no tokenizer, and no model to take it from"),
    ],
)
def test_bad_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(tmp_path, **options).train_dataloader()


@pytest.mark.parametrize(("split", "source"), [("predict", "test"), ("validation", "train")])
def test_a_split_that_is_read_for_another_is_named(tmp_path: Path, split: Any, source: str) -> None:
    files = {name: jsonl(tmp_path / f"{name}.jsonl", ROWS) for name in ("train", "test")}
    data = module(tmp_path, files=files, text="sentence", validation_fraction=0.5)
    with pytest.raises(ValueError, match=f"Got text='sentence', but .*{source}.jsonl has no such column"):
        data.table(split)


def test_an_empty_split(tmp_path: Path) -> None:
    files = {"train": str(write(tmp_path / "empty.csv", "text,label\n"))}
    with pytest.raises(ValueError, match=r"The split 'train' is empty: .*empty.csv"):
        module(tmp_path, files=files).train_dataloader()
    files = {"train": str(write(tmp_path / "one.csv", "text,label\na,b\n"))}
    with pytest.raises(ValueError, match=r"'train' is empty: .*one.csv. All of its 1 rows went to validation_fraction"):
        module(tmp_path, files=files, validation_fraction=0.5).train_dataloader()
    with pytest.raises(ValueError, match="There is no split 'test'; files has train"):
        module(tmp_path).test_dataloader()


def test_tokenizers_without_padding(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "eos", pad_token=None, eos_token="[SEP]")
    loader = module(
        tmp_path, [*ROWS, {"text": "one", "label": "pos"}], tokenizer=str(tmp_path / "eos")
    ).train_dataloader()
    padded = [row for batch in loader for row in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert all((ids[mask == 0] == 3).all() for ids, mask in padded)
    assert any((mask == 0).any() for _, mask in padded)
    save_tokenizer(tmp_path / "none", pad_token=None)
    with pytest.raises(ValueError, match="no padding token and no end-of-sequence token"):
        module(tmp_path, tokenizer=str(tmp_path / "none")).train_dataloader()
    with pytest.raises(OSError, match=r"tokenizer='no/such', which is no local folder.*hf download no/such"):
        module(tmp_path, tokenizer="no/such").train_dataloader()


def test_ordered_batches_end_with_a_smaller_one() -> None:
    batches = list(OrderedExamples(list(range(5)), 2, lambda batch: {"n": batch}))
    assert [batch["n"] for batch in batches] == [[0, 1], [2, 3], [4]]
    assert FAULT != PLACE


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fit_resumes_in_mid_epoch(tmp_path: Path, accumulate: int) -> None:
    from lightning_hift.tasks import SequenceClassification

    folder = save_network(tmp_path / "bert")

    def fit(steps: int, checkpoint: Path | None = None) -> tuple[pl.Trainer, Any]:
        pl.seed_everything(1)
        task = SequenceClassification(
            model=str(folder),
            model_config={"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
            lr_scheduler="linear",
            accumulate_grad_batches=accumulate,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        )
        data = module(tmp_path, batch_size=2, tokenizer=None)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=3, callbacks=as_published(), default_root_dir=tmp_path, **quiet
        )
        if checkpoint is None and steps:
            trainer.callbacks.append(StopAt(steps, tmp_path / "mid.ckpt"))
        trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return trainer, task

    class StopAt(pl.Callback):
        def __init__(self, step: int, path: Path) -> None:
            self.step, self.path = step, path

        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == self.step and not trainer.should_stop:
                trainer.save_checkpoint(self.path)
                trainer.should_stop = True

    _, whole = fit(0)
    fit(4)
    resumed_trainer, resumed = fit(0, tmp_path / "mid.ckpt")
    assert resumed_trainer.global_step == 18 // accumulate
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
