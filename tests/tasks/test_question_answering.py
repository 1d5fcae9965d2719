"""QuestionAnswering and its data: answers at the right tokens, long contexts, scores, training, bad rows."""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_hift.cli import main
from lightning_hift.data import FileFormat, QuestionAnsweringDataModule
from lightning_hift.tasks import QuestionAnswering
from lightning_hift.tasks.answer_spans import AnswerScores, best_spans
from lightning_hift.tasks.entities import EntityScores
from tests.models import as_published
from tests.processes import start_together
from tests.reference import squad_answers
from tests.tiny_tokenizers import byte_level, wordpiece

CONFIGS = Path(__file__).parents[2] / "configs"
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, **NO_DROPOUT}
PEOPLE, PLACES, OTHERS = ["anna", "bob", "carla"], ["paris", "rome", "oslo"], ["met", "in", "saw", "and", "left", "the"]
TEXT = " ".join([*PEOPLE, *PLACES, *OTHERS, "who", "where", "when"])
CONTEXT = "Anna met Bob in Oslo"
ROW = {
    "id": "q1",
    "question": "who met anna",
    "context": CONTEXT,
    "answers": {"text": ["Bob", "met Bob"], "answer_start": [9, 5]},
}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return wordpiece([TEXT], tmp_path / "tokenizer")


def data_of(tmp_path: Path, tokenizer: str, rows: list[dict[str, Any]], **options: Any) -> QuestionAnsweringDataModule:
    folder = tmp_path / f"rows_{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    files = {split: write_jsonl(folder / "rows.jsonl", rows) for split in ("train", "validation", "test", "predict")}
    return QuestionAnsweringDataModule(files=files, **{"tokenizer": tokenizer, "max_length": 32, **options})


def examples_of(data: QuestionAnsweringDataModule, split: str = "validation") -> list[dict[str, Any]]:
    data.setup({"train": "fit", "validation": "validate"}.get(split, split))
    found: list[dict[str, Any]] = data.examples[split].to_list()
    return found


def tokens_of(data: QuestionAnsweringDataModule, example: dict[str, Any]) -> list[str]:
    tokens: list[str] = data.tokenizer.convert_ids_to_tokens(example["input_ids"])
    return tokens


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", enable_model_summary=False, **{**quiet, **options})


# --- answers at tokens ------------------------------------------------------------------------------------------------


def test_an_answer_is_found_at_its_tokens(tmp_path: Path, tokenizer: str) -> None:
    data = data_of(tmp_path, tokenizer, [ROW])
    (example,) = examples_of(data)
    assert " ".join(tokens_of(data, example)) == "[CLS] who met anna [SEP] anna met bob in oslo [SEP]"
    assert (example["start_positions"], example["end_positions"]) == (7, 7)
    assert example["char_starts"] == [0, 0, 0, 0, 0, 0, 5, 9, 13, 16, 0]
    assert example["char_ends"] == [0, 0, 0, 0, 0, 4, 8, 12, 15, 20, 0]
    assert (example["text"], example["answers"], example["id"]) == (CONTEXT, ["Bob", "met Bob"], "q1")
    assert (example["question"], example["null_positions"]) == (0, 0)
    (trained,) = examples_of(data, "train")
    assert trained.keys() == {"input_ids", "token_type_ids", "attention_mask", "start_positions", "end_positions"}
    (asked,) = examples_of(data, "predict")
    assert not asked.keys() & {"start_positions", "end_positions", "answers"}


def test_a_long_context_is_spread_over_rows_that_overlap(tmp_path: Path, tokenizer: str) -> None:
    data = data_of(tmp_path, tokenizer, [ROW], max_length=9, stride=1)  # room for three tokens of the context
    first, second = examples_of(data)
    assert " ".join(tokens_of(data, first)) == "[CLS] who met anna [SEP] anna met bob [SEP]"
    assert " ".join(tokens_of(data, second)) == "[CLS] who met anna [SEP] bob in oslo [SEP]"
    assert (first["text"], second["text"]) == ("Anna met Bob", "Bob in Oslo")
    assert [example["start_positions"] for example in (first, second)] == [7, 5]  # "Bob" is in both
    assert (first["question"], second["question"]) == (0, 0)


def test_rows_share_at_most_half_of_what_they_hold(tmp_path: Path, tokenizer: str) -> None:
    found = examples_of(data_of(tmp_path, tokenizer, [ROW], max_length=8, stride=128))
    assert [example["text"] for example in found] == ["Anna met", "met Bob", "Bob in", "in Oslo"]


def test_rows_without_the_answer_point_to_no_answer(tmp_path: Path, tokenizer: str) -> None:
    row = {**ROW, "answers": {"text": ["in Oslo"], "answer_start": [13]}}
    first, second = examples_of(data_of(tmp_path, tokenizer, [row], max_length=9, stride=1))
    assert (first["start_positions"], first["end_positions"]) == (0, 0)
    assert (second["start_positions"], second["end_positions"]) == (6, 7)
    assert [second["text"][a:b] for a, b in zip(second["char_starts"], second["char_ends"], strict=True)][5:8] == [
        *["Bob", "in", "Oslo"]
    ]


def test_answers_that_no_row_holds_are_counted(tmp_path: Path, tokenizer: str) -> None:
    row = {**ROW, "answers": {"text": ["met Bob in Oslo"], "answer_start": [5]}}
    data = data_of(tmp_path, tokenizer, [row, ROW], max_length=9, stride=1)
    with pytest.warns(UserWarning, match=r"^1 validation answers are cut .* Raise stride=1 or max_length=9"):
        found = examples_of(data)
    assert [example["start_positions"] for example in found] == [0, 0, 7, 5]


def test_part_of_a_token_can_be_the_answer(tmp_path: Path, tokenizer: str) -> None:
    row = {**ROW, "context": "annabob left", "answers": {"text": ["nabo"], "answer_start": [2]}}
    data = data_of(tmp_path, tokenizer, [row])
    (example,) = examples_of(data)
    tokens = tokens_of(data, example)
    assert tokens[example["start_positions"] : example["end_positions"] + 1] == ["anna", "##bob"]


def test_an_unanswerable_question_points_to_no_answer(tmp_path: Path, tokenizer: str) -> None:
    data = data_of(tmp_path, tokenizer, [ROW, {**ROW, "answers": {"text": [], "answer_start": []}}])
    _, example = examples_of(data)
    assert (example["start_positions"], example["end_positions"], example["answers"]) == (0, 0, [""])


@pytest.mark.parametrize("trim", [True, False])
def test_a_tokenizer_without_special_tokens(tmp_path: Path, trim: bool) -> None:
    folder = byte_level([TEXT, CONTEXT] * 3, tmp_path / "bytes", padding_side="left", truncation_side="right")
    saved = json.loads(Path(folder, "tokenizer.json").read_text())
    kind = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    Path(folder, "tokenizer.json").write_text(json.dumps({**saved, "post_processor": {**kind, "trim_offsets": trim}}))
    data = data_of(tmp_path, folder, [ROW])
    (example,) = examples_of(data)
    assert tokens_of(data, example)[example["start_positions"]] == "ĠBob"
    assert example["null_positions"] == 0
    spans = zip(example["char_starts"], example["char_ends"], strict=True)
    assert [example["text"][a:b].strip() for a, b in spans if b > a] == CONTEXT.split()


def test_the_padding_side_changes_no_position(tmp_path: Path, tokenizer: str) -> None:
    left = wordpiece([TEXT], tmp_path / "left", padding_side="left")
    rows = [ROW, {**ROW, "context": "Bob left"} | {"answers": {"text": ["Bob"], "answer_start": [0]}}]
    batches = [next(iter(data_of(tmp_path, name, rows).test_dataloader())) for name in (tokenizer, left)]
    for name, value in batches[0].items():
        assert torch.equal(value, batches[1][name]) if isinstance(value, Tensor) else value == batches[1][name]
    assert batches[0]["text"] == [CONTEXT, "Bob left"]
    assert batches[0]["attention_mask"].sum(1).tolist() == [11, 8]


# --- forms of answers -------------------------------------------------------------------------------------------------


def squad_file(path: Path, paragraphs: list[tuple[str, list[dict[str, Any]]]]) -> str:
    """Nested as SQuAD is; each context in an article of its own."""
    articles = [{"title": "t", "paragraphs": [{"context": text, "qas": questions}]} for text, questions in paragraphs]
    path.write_text(json.dumps({"version": "1.1", "data": articles}))
    return str(path)


NESTED = FileFormat(kind="json", records="data.paragraphs.qas")


def test_all_forms_of_answers_mean_the_same(tmp_path: Path, tokenizer: str) -> None:
    as_list = [{"text": "Bob", "answer_start": 9}, {"text": "met Bob", "answer_start": 5}]
    flat = {**ROW, "answers": ["Bob", "met Bob"], "starts": [9, 5]}
    question = {"id": "q1", "question": ROW["question"], "answers": as_list}
    nested = squad_file(tmp_path / "nested.json", [(CONTEXT, [question]), ("Bob left", [{**question, "id": "q2"}])])
    found = [
        examples_of(data)[0]
        for data in (
            data_of(tmp_path, tokenizer, [ROW]),
            data_of(tmp_path, tokenizer, [{**ROW, "answers": as_list}]),
            data_of(tmp_path, tokenizer, [flat], answer_start="starts"),
            QuestionAnsweringDataModule(
                files={"validation": nested}, file_format=NESTED, tokenizer=tokenizer, max_length=32, on_bad_row="skip"
            ),
        )
    ]
    assert found[1:] == found[:1] * 3


def test_columns_of_a_csv_file(tmp_path: Path, tokenizer: str) -> None:
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "context", "answer_text", "answer_start"])
        writer.writerow(["who met anna", CONTEXT, "Bob", 9])
        writer.writerow(["when", CONTEXT, "", ""])
    data = QuestionAnsweringDataModule(
        files={"validation": str(tmp_path / "rows.csv")},
        identifier=None,
        answers="answer_text",
        answer_start="answer_start",
        tokenizer=tokenizer,
        max_length=32,
    )
    first, second = examples_of(data)
    assert (first["start_positions"], first["answers"], first["id"]) == (7, ["Bob"], "0")
    assert (second["start_positions"], second["answers"], second["id"]) == (0, [""], "1")


def test_nested_files_give_flat_rows(tmp_path: Path, tokenizer: str) -> None:
    questions = [{"id": name, "question": "who", "answers": []} for name in ("a", "b", "c")]
    path = squad_file(tmp_path / "nested.json", [("Bob left", questions[:2]), ("Anna left", questions[2:])])
    table = QuestionAnsweringDataModule(files={"train": path}, file_format=NESTED, tokenizer=tokenizer).table("train")
    assert table["context"][:] == ["Bob left", "Bob left", "Anna left"]
    assert table["title"][:] == ["t"] * 3
    assert table["id"][:] == ["a", "b", "c"]
    assert "version" not in table.column_names


def test_answers_may_begin_late_in_a_file(tmp_path: Path, tokenizer: str) -> None:
    rows = [{**ROW, "answers": []}] * 1001 + [{**ROW, "answers": [{"text": "Bob", "answer_start": 9}]}]
    table = data_of(tmp_path, tokenizer, rows).table("train")
    assert [len(answers) for answers in table["answers"][998:]] == [0, 0, 0, 1]
    assert table[1001]["answers"] == [{"text": "Bob", "answer_start": 9}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"data": [{"title": "t"}]},
            "Got 'paragraphs' in records, but .*nested.json has no such key there; it has tit",
        ),
        ({"data": [3]}, "Got 'paragraphs' in records, but .* it has a int"),
        ({"data": [{"paragraphs": [{"qas": {}}]}]}, "nested.json holds a dict, not a list of rows"),
    ],
)
def test_other_nested_files_are_refused(tmp_path: Path, tokenizer: str, content: Any, message: str) -> None:
    (tmp_path / "nested.json").write_text(json.dumps(content))
    files = {"train": str(tmp_path / "nested.json")}
    with pytest.raises(ValueError, match=message):
        QuestionAnsweringDataModule(files=files, file_format=NESTED, tokenizer=tokenizer).setup("fit")


def test_an_answer_elsewhere_is_taken_from_its_only_place(tmp_path: Path, tokenizer: str) -> None:
    moved = {**ROW, "answers": {"text": ["Bob"], "answer_start": [11]}}
    data = data_of(tmp_path, tokenizer, [moved, ROW])
    with pytest.warns(UserWarning, match=r"^1 validation answers do not start where they are said to"):
        found = examples_of(data)
    assert [example["start_positions"] for example in found] == [7, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"answers": {"text": ["Rome"], "answer_start": [9]}},
            "got 'Rome' at 9, but the context has 'Bob ' there, and",
        ),
        ({"answers": {"text": ["n"], "answer_start": [0]}}, "got 'n' at 0, .* and 'n' is in it 3 times"),
        ({"answers": {"text": ["Bob"], "answer_start": [-15]}, "context": "Bob Bob"}, "'Bob' at -15, .* in it 2 times"),
        ({"answers": {"text": ["Bob", "x"], "answer_start": [9]}}, "got the texts .* each text needs a start"),
        (
            {"answers": {"text": [""], "answer_start": [0]}},
            "got the answer ''; if there is no answer, the list must be",
        ),
        ({"answers": None}, "column 'answers': got None; answers are a mapping of the lists text and answer_start"),
        ({"context": " "}, "column 'context': there is no text|got ' ', which is no text"),
        ({"question": ""}, "column 'question': there is no text"),
        ({"context": "\u200e"}, "column 'context': the tokenizer makes nothing of it"),
        (
            {"question": "who met anna in oslo and rome " * 5},
            "column 'question': it has 35 tokens, which leaves nothing of max_length=32 for the context",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    tmp_path: Path, tokenizer: str, change: dict[str, Any], message: str
) -> None:
    rows = [ROW, {**ROW, **change}]
    with pytest.raises(ValueError, match=r"1 of 2 rows cannot be used:\n.*rows.jsonl:2: .*" + message):
        data_of(tmp_path, tokenizer, rows).setup("fit")
    skipping = data_of(tmp_path, tokenizer, rows, on_bad_row="skip")
    with pytest.warns(UserWarning, match=r"1 of 2 rows cannot be used and are left out"):
        skipping.setup("fit")
    assert len(skipping.examples["train"]) == 1


def test_a_start_that_is_no_number_is_refused(tmp_path: Path, tokenizer: str) -> None:
    row = {**ROW, "answers": "Bob", "start": "nine"}
    with pytest.raises(ValueError, match="column 'start': got the start 'nine', which is no number"):
        data_of(tmp_path, tokenizer, [row], answer_start="start").setup("fit")


def test_arguments_out_of_range_are_refused(tmp_path: Path, tokenizer: str) -> None:
    with pytest.raises(ValueError, match="Got stride=-1; it must be at least 0"):
        data_of(tmp_path, tokenizer, [ROW], stride=-1)
    with pytest.raises(ValueError, match="Got max_answer_length=0; it must be at least 1"):
        tiny(max_answer_length=0)
    with pytest.raises(ValueError, match="Got n_best=0; it must be at least 1"):
        tiny(n_best=0)
    with pytest.raises(ValueError, match=r"Got identifier='key', but .*rows.jsonl has no such column. It has id"):
        data_of(tmp_path, tokenizer, [ROW], identifier="key").setup("fit")


# --- spans and scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 3, 50])
def test_best_spans_are_those_of_a_search(max_tokens: int) -> None:
    torch.manual_seed(0)
    starts, ends, allowed = torch.randn(4, 9), torch.randn(4, 9), torch.rand(4, 9) < 0.7
    found = best_spans(starts, ends, allowed, 4, max_tokens)
    for row in range(4):
        pairs = [
            (i, j) for i in range(9) for j in range(i, min(i + max_tokens, 9)) if allowed[row, i] & allowed[row, j]
        ]
        best = sorted(pairs, key=lambda pair: -float(starts[row, pair[0]] + ends[row, pair[1]]))[:4]
        there = [*zip(found.first[row].tolist(), found.last[row].tolist(), strict=True)]
        assert there[: len(best)] == best
        assert torch.isinf(found.scores[row]).tolist() == [i >= len(best) for i in range(4)]


def made_up_rows(draw: random.Random) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Rows of forty questions with random scores, in random order, and the right answers."""
    words = ["the", "cat", "sat", "on", "a", "mat", "in", "oslo"]
    rows, true = [], {}
    for question in range(40):
        true[str(question)] = [""]
        for _ in range(draw.randint(1, 3)):
            piece = draw.sample(words, 5)
            if draw.random() < 0.6:
                true[str(question)] = [" ".join(piece[i : i + draw.randint(1, 3)]) for i in range(draw.randint(1, 3))]
            ends = [sum(len(word) + 1 for word in piece[: i + 1]) - 1 for i in range(5)]
            spans = [(0, 0), *((end - len(word), end) for word, end in zip(piece, ends, strict=True)), (0, 0)]
            scores = {name: [draw.gauss(0, 1) for _ in spans] for name in ("starts", "ends")}
            rows.append({"question": question, "text": " ".join(piece), "spans": spans, "null": 0, **scores})
    draw.shuffle(rows)
    return rows, true


def fill(metric: AnswerScores, rows: list[dict[str, Any]], true: dict[str, list[str]], batch_size: int) -> None:
    for i in range(0, len(rows), batch_size):
        batch = rows[i : i + batch_size]
        starts, ends = (torch.tensor([row[name] for row in batch], dtype=torch.float64) for name in ("starts", "ends"))
        allowed = torch.tensor([[b > a for a, b in row["spans"]] for row in batch])
        spans = best_spans(starts, ends, allowed, 1, 2)
        pieces = [
            row["text"][row["spans"][first][0] : row["spans"][last][1]]
            for row, (first,), (last,) in zip(batch, spans.first.tolist(), spans.last.tolist(), strict=True)
        ]
        metric.update(
            torch.tensor([row["question"] for row in batch]),
            spans.scores[:, 0],
            starts[:, 0] + ends[:, 0],
            pieces,
            [true[str(row["question"])] for row in batch],
        )


@pytest.mark.parametrize("null_threshold", [None, 0.0, -1.5])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_scores_are_those_of_a_plain_search(null_threshold: float | None, batch_size: int) -> None:
    rows, true = made_up_rows(random.Random(3))
    answers = {
        name: squad_answers.answer([row for row in rows if row["question"] == int(name)], 2, null_threshold)
        for name in true
    }
    expected = squad_answers.scores(answers, true)
    assert 0 < expected["exact_match"] < expected["f1"] < 1
    metric = AnswerScores(null_threshold)
    fill(metric, rows, true, batch_size)
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(expected)
    fill(metric, rows[:5], true, batch_size)  # rows that come twice count once
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(expected)


def score_in_process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows, true = made_up_rows(random.Random(3))
    answers, entities = AnswerScores(0.0), EntityScores(["O", "B-X"])
    fill(answers, rows[rank::2], true, 4)
    entities.update(torch.tensor([[1, 1, 1]]), torch.tensor([[1, rank, 0]]))
    found = {name: float(value) for metric in (answers, entities) for name, value in metric.compute().items()}
    Path(folder, f"{rank}.json").write_text(json.dumps({**found, "answers_f1": float(answers.compute()["f1"])}))
    dist.destroy_process_group()


def test_scores_of_processes_are_gathered(tmp_path: Path) -> None:
    start_together(score_in_process, (str(tmp_path),), 2)
    rows, true = made_up_rows(random.Random(3))
    metric = AnswerScores(0.0)
    fill(metric, rows, true, 100)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["exact_match"] == pytest.approx(float(metric.compute()["exact_match"]))
        assert found["answers_f1"] == pytest.approx(float(metric.compute()["f1"]))
        assert (found["precision"], found["recall"]) == (pytest.approx(3 / 6), 1.0)


# --- the task ---------------------------------------------------------------------------------------------------------


def tiny(**options: Any) -> QuestionAnswering:
    torch.manual_seed(0)
    # Weights far apart, as those of so small a network would else take long to leave each other.
    config = {"max_position_embeddings": 64, "initializer_range": 0.2, **TINY}
    return QuestionAnswering(**{"model_type": "bert", "model_config": config, "optimizer": adam, **options})


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=5e-3)


def toy_rows(number: int, seed: int) -> list[dict[str, Any]]:
    """Who, where, or when, which nothing answers, in texts with one person and one place."""
    draw = random.Random(seed)
    rows = []
    for i in range(number):
        words = [draw.choice(OTHERS) for _ in range(draw.randint(4, 12))]
        person, place = draw.choice(PEOPLE), draw.choice(PLACES)
        words.insert(draw.randint(0, len(words)), person)
        words.insert(draw.randint(0, len(words)), place)
        question = draw.choice(["who", "where", "when"])
        context = " ".join(words)
        answers = [{"text": word, "answer_start": context.index(word)} for word in (person, place)]
        found = {"who": answers[:1], "where": answers[1:], "when": []}[question]
        rows.append({"id": f"q{i}", "question": question, "context": context, "answers": found})
    return rows


def toy(tmp_path: Path, tokenizer: str, **options: Any) -> QuestionAnsweringDataModule:
    files = {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "validation.jsonl")}
    if not Path(files["train"]).exists():  # resuming wants the same files
        write_jsonl(tmp_path / "train.jsonl", toy_rows(200, 0))
        write_jsonl(tmp_path / "validation.jsonl", toy_rows(40, 1))
    return QuestionAnsweringDataModule(
        files={**files, "test": files["validation"]},
        **{"tokenizer": tokenizer, "batch_size": 16, "max_length": 14, "stride": 4, **options},
    )


def test_hift_learns_to_answer(tmp_path: Path, tokenizer: str) -> None:
    module, data = tiny(null_threshold=0.0), toy(tmp_path, tokenizer)
    before = trainer().validate(module, data, verbose=False)[0]
    assert len(data.examples["validation"]) > 40  # most contexts are spread over several rows
    trainer(max_epochs=12, callbacks=as_published(), num_sanity_val_steps=0).fit(module, data)
    after = trainer().validate(module, data, verbose=False)[0]
    assert set(after) == {"val_loss", "val_exact_match", "val_f1"}
    assert before["val_f1"] < 0.5
    assert after["val_f1"] > 0.95
    assert after["val_loss"] < 0.2 * before["val_loss"]

    records = [record for batch in trainer().predict(module, data) or [] for record in batch]
    rows = toy_rows(40, 1)
    assert [record["id"] for record in records] == [row["id"] for row in rows]
    true = {row["id"]: [answer["text"] for answer in row["answers"]] or [""] for row in rows}
    scores = squad_answers.scores({record["id"]: record["answer"] for record in records}, true)
    assert scores["f1"] == pytest.approx(after["val_f1"])
    assert scores["exact_match"] == pytest.approx(after["val_exact_match"])
    assert all((record["score"] > 0) == bool(record["answer"]) for record in records)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_how_rows_are_batched_changes_no_score(tmp_path: Path, tokenizer: str, batch_size: int) -> None:
    module = tiny(max_answer_length=3, null_threshold=0.0)
    expected = trainer().validate(module, toy(tmp_path, tokenizer), verbose=False)[0]
    found = trainer().validate(module, toy(tmp_path, tokenizer, eval_batch_size=batch_size), verbose=False)[0]
    assert found == pytest.approx(expected, rel=1e-4)


def test_predictions_are_those_of_a_plain_search(tmp_path: Path, tokenizer: str) -> None:
    module, data = tiny(max_answer_length=3, n_best=3), toy(tmp_path, tokenizer, eval_batch_size=7)
    records = [record for batch in trainer().predict(module, data) or [] for record in batch]
    rows: dict[str, list[dict[str, Any]]] = {}
    for batch in data.predict_dataloader():
        with torch.no_grad():
            output = module.eval().network(**{k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")})  # type: ignore[misc]
        for i, name in enumerate(batch["id"]):
            spans = [*zip(batch["char_starts"][i].tolist(), batch["char_ends"][i].tolist(), strict=True)]
            scores = {"starts": output.start_logits[i].tolist(), "ends": output.end_logits[i].tolist()}
            rows.setdefault(name, []).append({"text": batch["text"][i], "spans": spans, "null": 0, **scores})
    assert len(records) == len(rows) == 40
    for record in records:
        assert record["answer"] == squad_answers.answer(rows[record["id"]], 3, None)
        ranked = [record["score"], *(other["score"] for other in record["others"])]
        assert ranked == sorted(ranked, reverse=True)
        assert len({record["answer"], *(other["answer"] for other in record["others"])}) == len(ranked) <= 3
    assert max(len(record["others"]) for record in records) == 2


def test_a_threshold_decides_what_has_no_answer(tmp_path: Path, tokenizer: str) -> None:
    data = toy(tmp_path, tokenizer)
    for threshold, expected in ((-1000.0, True), (1000.0, False)):
        records = trainer().predict(tiny(null_threshold=threshold), data) or []
        assert {record["answer"] == "" for batch in records for record in batch} == {expected}


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("roberta", {**TINY, "max_position_embeddings": 40, "type_vocab_size": 1}),
        ("distilbert", {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 40}),
        ("gpt2", {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32}),
    ],
)
def test_other_architectures_work(tmp_path: Path, tokenizer: str, model_type: str, config: dict[str, Any]) -> None:
    if model_type == "gpt2":
        tokenizer = byte_level([TEXT], tmp_path / "bytes")
    module = tiny(model_type=model_type, model_config=config)
    fitted = trainer(max_steps=4, callbacks=as_published(), num_sanity_val_steps=0)
    fitted.fit(module, toy(tmp_path, tokenizer, max_length=32))
    assert fitted.logged_metrics["train_loss"] > 0
    assert len((trainer().predict(module, toy(tmp_path, tokenizer, max_length=32)) or [[]])[0]) == 16


def test_without_answers_only_the_loss_is_logged() -> None:
    batch = {"input_ids": torch.randint(20, (2, 8)), "start_positions": torch.tensor([1, 2])}
    loader = torch.utils.data.DataLoader([{**batch, "end_positions": torch.tensor([2, 3])}], batch_size=None)
    module = tiny(model_type="bert", model_config={**TINY, "vocab_size": 20})
    (logged,) = trainer().validate(module, loader, verbose=False)
    assert list(logged) == ["val_loss"]


def test_module_works_without_the_data_module() -> None:
    module = tiny(model_config={**TINY, "vocab_size": 20})
    module.configure_model()
    module.eval()
    batch = {"input_ids": torch.arange(8).view(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    first, last = torch.tensor([1, 2]), torch.tensor([1, 3])
    with torch.no_grad():
        output = module(batch)
        loss = module.loss({**batch, "start_positions": first, "end_positions": last})
    losses = [
        torch.nn.functional.cross_entropy(output.start_logits, first),
        torch.nn.functional.cross_entropy(output.end_logits, last),
    ]
    assert float(loss) == pytest.approx(float(sum(losses)) / 2, rel=1e-5)


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
    def fit(steps: int, ckpt_path: str | None = None) -> tuple[pl.Trainer, QuestionAnswering, Batches]:
        module, batches = tiny(), Batches()
        fitted = trainer(max_steps=steps, callbacks=[as_published(), batches], num_sanity_val_steps=0)
        fitted.fit(module, toy(tmp_path, tokenizer), ckpt_path=ckpt_path)
        return fitted, module, batches

    _, through, all_batches = fit(40)
    stopped, _, first = fit(9)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    _, resumed, second = fit(40, str(tmp_path / "stopped.ckpt"))
    assert first.seen + second.seen == all_batches.seen
    for name, value in through.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_task_file_runs(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertConfig, BertModel

    size = len(json.loads(Path(tokenizer, "tokenizer.json").read_text())["model"]["vocab"])
    config = BertConfig(vocab_size=size, max_position_embeddings=384, **TINY)
    BertModel(config, add_pooling_layer=False).save_pretrained(tokenizer)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        squad_file(tmp_path / "data" / name, [(row["context"], [row]) for row in toy_rows(12, 0)])
    task = CONFIGS / "task" / "squad.yaml"
    assert re.match(rf"# lightning-hift fit -c configs/task/{task.name} ", task.read_text())
    small = ["--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    for command in ("fit", "test", "predict"):
        arguments = ["lightning-hift", command, "-c", str(task), f"--model.init_args.model={tokenizer}", *small]
        monkeypatch.setattr("sys.argv", arguments)
        main()
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt"))

    (tmp_path / "hub").mkdir()
    Dataset.from_list([ROW] * 4).to_parquet(tmp_path / "hub" / "validation-00000-of-00001.parquet")
    source = ["--data.init_args.files=null", "--data.init_args.splits={test: validation}"]
    monkeypatch.setattr("sys.argv", [*arguments, *source, f"--data.init_args.dataset={tmp_path / 'hub'}"])
    main()
