"""Instructions or conversations with answers to learn."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_hift.data.bad_rows import BadRow
from lightning_hift.data.batches import NO_LABEL
from lightning_hift.data.chat import ANSWER_ROLE, PLAIN_INPUT, ChatEncoder, read_messages
from lightning_hift.data.classification import text_in
from lightning_hift.data.encoding import lengths_of
from lightning_hift.data.packing import Contamination, PackedExamples, first_fit_decreasing, join_documents
from lightning_hift.data.pretraining import check_contamination
from lightning_hift.data.text import TRUNCATED, Split, TextDataModule

ANSWER_CUT = "__answer_cut__"
"""Column of encoded examples: whether a part of an answer was cut off."""


class InstructionDataModule(TextDataModule):
    """Rows of an instruction, perhaps an input, and an output; or rows of conversations. Only answers are learned.

    For ``CausalLM``. A batch is a mapping of ``input_ids``, ``labels`` (-100 for all but answers) and
    ``attention_mask``, shape (batch, length); in packed rows ``position_ids`` in its place. Validation and test rows
    are not packed, which changes nothing but their padding.

    Args:
        messages: Column of conversations, lists of mappings with ``role`` and ``content``, or ``from`` and ``value``.
            Default: rows have the columns below.
        instruction: Column of the instruction.
        input: Column of the input, which may be empty; ``None``: there is none.
        output: Column of the answer.
        system: Put before each conversation that has no system message.
        chat_template: In Jinja, or a file of it whose name ends in .jinja. Default: that of the tokenizer; if it has
            none, headings and plain text.
        packing: Put several conversations into each training row of ``max_length`` tokens; ``batch_size`` counts rows.
        contamination: ``"refuse"``: conversations in a row do not see each other, and a network that does not heed
            that is refused. ``"allow"``: they see those before them.
        kwargs: See ``TextDataModule``.

    Raises:
        ValueError: See ``TextDataModule`` and ``ChatEncoder``.
    """

    columns_needed = ("messages", "instruction", "input", "output")

    def __init__(
        self,
        *,
        messages: str | None = None,
        instruction: str = "instruction",
        input: str | None = "input",
        output: str = "output",
        system: str | None = None,
        chat_template: str | None = None,
        packing: bool = False,
        contamination: Contamination = "refuse",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_contamination(contamination)
        self.messages = messages
        self.instruction = instruction if messages is None else None
        self.input = input if messages is None else None
        self.output = output if messages is None else None
        self.system = system
        self.chat_template = chat_template
        self.packing = packing
        self.contamination: Contamination = contamination

    @cached_property
    def chat(self) -> ChatEncoder:
        """Makes tokens of conversations."""
        return ChatEncoder(self.tokenizer, self.chat_template)

    @override
    def encoding_options(self) -> dict[str, Any]:
        return {
            "columns": [self.messages, self.instruction, self.input, self.output],
            "system": self.system,
            "template": self.chat.template,
        }

    @override
    def encode(self, row: Mapping[str, Any], split: Split) -> list[dict[str, Any]]:
        tokens, is_answer = self.chat.encode(self.conversation(row))
        if not any(is_answer):
            raise BadRow(self.messages, "the chat template shows no answer")
        if not any(is_answer[1 : self.max_length]):
            raise BadRow(
                self.messages,
                f"the answer begins after {is_answer.index(True)} tokens, so that max_length={self.max_length} leaves"
                " nothing of it",
            )
        labels = [token if learned else NO_LABEL for token, learned in zip(tokens, is_answer, strict=True)]
        return [
            {
                "input_ids": tokens[: self.max_length],
                "labels": labels[: self.max_length],
                TRUNCATED: len(tokens) > self.max_length,
                ANSWER_CUT: any(is_answer[self.max_length :]),
            }
        ]

    def conversation(self, row: Mapping[str, Any]) -> list[dict[str, str]]:
        """The messages of a row.

        Raises:
            BadRow: There is no answer, or something is no text.
        """
        if self.messages is not None:
            found = read_messages(self.messages, row[self.messages])
        else:
            assert self.instruction is not None
            assert self.output is not None
            question = text_in(row, self.instruction)
            if self.input is not None and row[self.input] not in (None, ""):
                question += (PLAIN_INPUT if self.chat.is_plain else "\n\n") + text_in(row, self.input)
            found = [
                {"role": "user", "content": question},
                {"role": ANSWER_ROLE, "content": text_in(row, self.output)},
            ]
        if self.system is not None and found[0]["role"] != "system":
            return [{"role": "system", "content": self.system}, *found]
        return found

    @override
    def collate(self, examples: list[Any]) -> dict[str, Any]:
        if isinstance(examples[0], list):
            return join_documents(examples, self.tokenizer.pad_token_id, self.contamination)
        masks = [[1] * len(example["input_ids"]) for example in examples]
        return {**super().collate(examples), "attention_mask": self.pad("attention_mask", masks)}

    @override
    def rows(self, split: Split) -> PackedExamples | None:
        if not self.packing or split != "train":
            return None
        examples = self.examples["train"]
        return PackedExamples(examples, first_fit_decreasing(lengths_of(examples), self.max_length, self.seed))

    @override
    def count_cut(self, split: Split, examples: Any) -> None:
        cut = sum(examples[TRUNCATED])
        if cut:
            rank_zero_warn(
                f"{cut} of {len(examples)} {split} conversations were longer than max_length={self.max_length} and were"
                f" cut; of {sum(examples[ANSWER_CUT])}, an answer is not whole."
            )
