"""InstructionDataModule: templates, loss on answers only, what is cut, bad conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hift.data import InstructionDataModule
from lightning_hift.data.chat import ChatEncoder
from lightning_hift.tasks import CausalLM
from tests.models import as_published
from tests.tiny_texts import SMALL, adam, byte_tokenizer, quiet_trainer, word_tokenizer, write_rows

LETTERS = list("abcdefgh")
MARKED = (
    "{% for m in messages %}<{{ m.role }}> "
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s> {% endgeneration %}"
    "{% else %}{{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CHAT = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e f"},
]
# ids: 0 <pad>, 1 </s>, 2 <unk>, 3 <system>, 4 <user>, 5 <assistant>, a..h = 6..13
IDS = [4, 6, 7, 5, 8, 1, 4, 9, 5, 10, 11, 1]
LABELS = [-100, -100, -100, -100, 8, 1, -100, -100, -100, 10, 11, 1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    word_tokenizer(["<system>", "<user>", "<assistant>", *LETTERS], tmp_path / "tokenizer")
    return tmp_path


def data_of(folder: Path, rows: list[dict[str, Any]], **options: Any) -> InstructionDataModule:
    defaults = {
        "files": {"train": write_rows(folder / "rows.jsonl", rows)},
        "tokenizer": str(folder / "tokenizer"),
        "cache_dir": str(folder / "cache"),
        "messages": "messages",
        "chat_template": MARKED,
        "max_length": 32,
        "batch_size": 4,
    }
    return InstructionDataModule(**{**defaults, **options})


def examples(data: InstructionDataModule) -> list[dict[str, Any]]:
    data.setup("fit")
    return list(data.examples["train"])


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_labels_of_a_conversation_by_hand(folder: Path, template: str) -> None:
    (example,) = examples(data_of(folder, [{"messages": CHAT}], chat_template=template))
    assert example["input_ids"] == IDS
    assert example["labels"] == LABELS


def test_answers_are_those_of_transformers_where_the_template_marks_them(folder: Path) -> None:
    texts = ["Why is the sky blue?", " Because\nof light.", "Ünd jetzt? ", "日本語 is fine."]
    tokenizer = byte_tokenizer(texts, folder / "bytes")
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts, strict=True)]
    expected = tokenizer.apply_chat_template(
        messages, chat_template=MARKED, return_assistant_tokens_mask=True, return_dict=True
    )
    for template in (MARKED, UNMARKED):
        tokens, is_answer = ChatEncoder(tokenizer, template).encode(messages)
        assert tokens == expected["input_ids"]
        assert [int(a) for a in is_answer] == expected["assistant_masks"]


def test_sharegpt_conversations_and_a_system_message(folder: Path) -> None:
    names = {"user": "human", "assistant": "gpt"}
    rows = [{"messages": [{"from": names[m["role"]], "value": m["content"]} for m in CHAT]}]
    (example,) = examples(data_of(folder, rows, system="h"))
    assert example["input_ids"] == [3, 13, *IDS]
    assert example["labels"] == [-100, -100, *LABELS]


def test_the_tokenizers_own_template_is_used(folder: Path) -> None:
    tokenizer = word_tokenizer(["<system>", "<user>", "<assistant>", *LETTERS])
    tokenizer.chat_template = UNMARKED
    tokenizer.save_pretrained(folder / "chatty")
    options = {"tokenizer": str(folder / "chatty"), "chat_template": None}
    (example,) = examples(data_of(folder, [{"messages": CHAT}], **options))
    assert (example["input_ids"], example["labels"]) == (IDS, LABELS)
    rows = [{"instruction": "a", "input": "b", "output": "c"}]
    (example,) = examples(data_of(folder, rows, messages=None, **options))
    assert example["input_ids"] == [4, 6, 7, 5, 8, 1]


def test_a_template_from_a_file(folder: Path) -> None:
    (folder / "chat.jinja").write_text(MARKED)
    (example,) = examples(data_of(folder, [{"messages": CHAT}], chat_template=str(folder / "chat.jinja")))
    assert example["labels"] == LABELS
    with pytest.raises(FileNotFoundError, match=r"Got chat_template='no\.jinja', which does not exist"):
        data_of(folder, [{"messages": CHAT}], chat_template="no.jinja").setup("fit")


def test_rows_of_instructions_in_plain_text(folder: Path) -> None:
    rows = [
        {"task": "Name a colour.", "context": "", "answer": "Blue."},
        {"task": "Add.", "context": "1 2", "answer": "3"},
    ]
    texts = [
        "### Instruction:\nName a colour.\n\n### Response:\nBlue.<|endoftext|>",
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3<|endoftext|>",
    ]
    tokenizer = byte_tokenizer(texts, folder / "bytes")
    columns = {"messages": None, "instruction": "task", "input": "context", "output": "answer"}
    options = {**columns, "tokenizer": str(folder / "bytes"), "chat_template": None, "max_length": 512}
    data = data_of(folder, rows, **options)
    found = examples(data)
    assert [tokenizer.decode(example["input_ids"]) for example in found] == texts
    learned = [[t for t in example["labels"] if t != -100] for example in found]
    assert [tokenizer.decode(tokens) for tokens in learned] == ["Blue.<|endoftext|>", "3<|endoftext|>"]
    batch = next(iter(data.train_dataloader()))
    assert batch.keys() == {"input_ids", "labels", "attention_mask"}
    assert torch.equal(batch["attention_mask"].sum(-1).sort()[0], torch.tensor(sorted(map(len, learned_ids(found)))))


def learned_ids(found: list[dict[str, Any]]) -> list[list[int]]:
    return [example["input_ids"] for example in found]


def test_a_text_begins_as_the_tokenizer_begins_it(folder: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(["a b c"], folder / "begun", bos_token="<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokens, is_answer = ChatEncoder(tokenizer).encode(CHAT)
    assert (tokens[0], is_answer[0]) == (0, False)
    assert tokens.count(0) == 3  # the beginning, and the ends of two answers


def test_answers_cut_off_are_counted(folder: Path) -> None:
    short, long = CHAT[:2], [*CHAT[:3], {"role": "assistant", "content": "e f g h a b c"}]
    rows = [{"messages": short}, {"messages": long}, {"messages": [*CHAT, {"role": "user", "content": "a b c"}]}]
    data = data_of(folder, rows, max_length=12)
    with pytest.warns(UserWarning, match=r"2 of 3 train conversations were longer .* of 1, an answer is not whole"):
        found = examples(data)
    assert [len(example["input_ids"]) for example in found] == [6, 12, 12]
    assert found[1]["labels"] == [*LABELS[:11], 12]


def bad(messages: Any) -> list[dict[str, Any]]:
    return [{"messages": messages}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "a"}], r"rows.jsonl:1: column 'messages': there is no answer: roles are user"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}],
            r"message 2 is .* must have a role",
        ),
        ([{"role": "user"}, {"role": "assistant", "content": "a"}], r"message 1 is .* must have a role and content"),
        ([], r"got \[\]; it must be a list of messages"),
        ([{"role": "user", "content": "a b c d e f"}, CHAT[1]], r"the answer begins after 8 tokens, .*max_length=6"),
    ],
)
def test_conversations_that_cannot_be_used(folder: Path, messages: Any, message: str) -> None:
    rows = [*bad(messages), *bad(CHAT[:2])]
    with pytest.raises(ValueError, match=message):
        examples(data_of(folder, rows, max_length=6))
    with pytest.warns(UserWarning, match="1 of 2 rows cannot be used and are left out"):
        assert len(examples(data_of(folder, rows, max_length=6, on_bad_row="skip"))) == 1


def test_what_a_template_refuses_is_a_bad_row(folder: Path) -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('a user comes first') }}{% endif %}" + UNMARKED
    rows = bad([{"role": "system", "content": "h"}, *CHAT])
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: the chat template refuses .* a user comes first"):
        examples(data_of(folder, rows, chat_template=strict))
    with pytest.raises(ValueError, match="the conversation begins with an answer"):
        examples(data_of(folder, bad(CHAT[1:]), chat_template=UNMARKED))


def test_a_template_that_rewrites_what_came_before_is_refused(folder: Path) -> None:
    rewriting = "{{ messages | length }} " + UNMARKED
    with pytest.raises(ValueError, match=r"writes the beginning of a conversation in another way .*\{% generation %\}"):
        examples(data_of(folder, bad(CHAT), chat_template=rewriting))


def test_bad_templates_tokenizers_and_columns_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="Got a chat template that is no Jinja"):
        examples(data_of(folder, bad(CHAT), chat_template="{% for %}"))
    word_tokenizer(LETTERS, folder / "endless", eos_token=None)
    with pytest.raises(ValueError, match="without chat template and without an end-of-sequence token"):
        examples(data_of(folder, bad(CHAT), tokenizer=str(folder / "endless"), chat_template=None))
    word_tokenizer(LETTERS, folder / "unpadded", eos_token=None, pad_token=None)
    with pytest.raises(ValueError, match="which has no padding token"):
        examples(data_of(folder, bad(CHAT), tokenizer=str(folder / "unpadded")))
    with pytest.raises(
        ValueError, match=r"Got messages='chats', but .*rows\.jsonl has no such column. It has messages"
    ):
        examples(data_of(folder, bad(CHAT), messages="chats"))
    with pytest.raises(ValueError, match="Got instruction='instruction', but"):
        examples(data_of(folder, bad(CHAT), messages=None))


@pytest.mark.parametrize("packing", [False, True])
def test_a_tiny_network_learns_answers(folder: Path, packing: bool) -> None:
    """Each letter is answered by the next one."""
    pairs = [(a, LETTERS[(i + 1) % 8]) for i, a in enumerate(LETTERS)]
    rows = [{"instruction": a, "input": "", "output": b} for a, b in pairs * 8]
    files = {split: write_rows(folder / f"{split}.jsonl", rows) for split in ("train", "validation")}
    data = data_of(folder, [], messages=None, files=files, packing=packing, batch_size=16 if not packing else 3)
    torch.manual_seed(0)
    module = CausalLM(model_type="llama", model_config={**SMALL, "initializer_range": 0.1}, optimizer=adam)
    hift = as_published(always_active=["embedding", "head"])
    trainer = quiet_trainer(max_steps=80, callbacks=hift, num_sanity_val_steps=0, check_val_every_n_epoch=10)
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    assert float(trainer.callback_metrics["val_loss"]) < 0.1
