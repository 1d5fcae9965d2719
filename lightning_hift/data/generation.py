"""Texts to be generated from others: meaning to text, text to SQL, translation, summaries."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from string import Formatter
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_hift.data.bad_rows import BadRow
from lightning_hift.data.classification import text_in
from lightning_hift.data.prompts import TARGET_CUT, PairEncoder, PromptEncoder
from lightning_hift.data.tables import PLACE
from lightning_hift.data.text import TRUNCATED, Split, TextDataModule

_REFERENCES = "__references__"


class GenerationDataModule(TextDataModule):
    """Rows of a source, written by a template from any columns, and a target.

    For ``ConditionalGeneration``. A batch is a mapping of ``input_ids``, ``attention_mask`` and ``labels``. For a
    network that only decodes, ``input_ids`` hold source, separator, target and the end-of-sequence token, and labels
    are -100 up to the target; for one that encodes, too, they hold the source, and labels the target. Outside of
    training there are also ``prompts``, a mapping of ``input_ids`` and ``attention_mask`` to generate from, padded on
    the left for a network that only decodes; ``sources``, their texts; ``references``, for each a list of texts.

    What is longer than ``max_length`` loses the end of its source first (its start, if the tokenizer's
    ``truncation_side`` is "left"), and then the end of its target; both are counted in a warning.

    Args:
        template: What the network reads, with columns in braces, such as ``"{schema}\\nQuestion: {question}"``.
        target: Column of what it has to write; rows to predict need none.
        separator: Between source and target, never cut; for a network that only decodes.
        group_references: In validation and test, generate once for rows with the same source, and compare with all of
            their targets. Losses are those of all rows either way.
        encoder_decoder: Whether the network has an encoder; default: as the module says, or else ``False``.
        kwargs: See ``TextDataModule``.

    Raises:
        ValueError: See ``TextDataModule``; ``template`` names no column. In ``setup``: it names one that is not there;
            the tokenizer has no end-of-sequence token; ``max_length`` leaves no room.
    """

    target_columns = ("target",)

    def __init__(
        self,
        *,
        template: str,
        target: str = "target",
        separator: str = "\n",
        group_references: bool = True,
        encoder_decoder: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.template = template
        self.target = target
        self.separator = separator
        self.group_references = group_references
        self.encoder_decoder = encoder_decoder
        self.template_columns = _columns_in(template)

    @cached_property
    def has_encoder(self) -> bool:
        """Whether the network has an encoder of its own."""
        if self.encoder_decoder is not None:
            return self.encoder_decoder
        return bool(getattr(self._module, "has_encoder", False))

    @cached_property
    def encoder(self) -> PromptEncoder | PairEncoder:
        """Makes tokens of sources and targets."""
        if self.has_encoder:
            return PairEncoder(self.tokenizer, self.max_length)
        room = getattr(self._module, "max_new_tokens", 1)
        return PromptEncoder(self.tokenizer, self.separator, self.max_length, room)

    @override
    def encoding_options(self) -> dict[str, Any]:
        return {
            "template": self.template,
            "target": self.target,
            "group_references": self.group_references,
            **self.encoder.options,
        }

    @override
    def encode(self, row: Mapping[str, Any], split: Split) -> list[dict[str, Any]]:
        source = self.source(row)
        example: dict[str, Any] = {TRUNCATED: False, TARGET_CUT: False}
        if split != "predict":
            example = self.encoder.example(source, text_in(row, self.target))
        if split != "train":
            prompt, is_cut = self.encoder.prompt(source)
            references = row.get(_REFERENCES, [])
            example |= {"prompt_ids": prompt, "source": source, "references": references}
            example[TRUNCATED] |= is_cut
        return [example]

    def source(self, row: Mapping[str, Any]) -> str:
        """What the network reads.

        Raises:
            BadRow: A column has no value, or all are empty.
        """
        values = {column: row[column] for column in self.template_columns}
        for column, value in values.items():
            if value is None:
                raise BadRow(column, "there is no text")
        if not any(str(value).strip() for value in values.values()):
            raise BadRow(", ".join(values), "there is no text")
        return self.template.format(**values)

    @override
    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        if "labels" in examples[0]:
            batch = {name: self.pad(name, [example[name] for example in examples]) for name in ("input_ids", "labels")}
            masks = [[1] * len(example["input_ids"]) for example in examples]
            batch["attention_mask"] = self.pad("attention_mask", masks)
        if "prompt_ids" in examples[0]:
            asked = [example for example in examples if example["references"] or "labels" not in example]
            if asked:
                batch["prompts"] = self.encoder.prompts([example["prompt_ids"] for example in asked])
                batch["sources"] = [example["source"] for example in asked]
                batch["references"] = [example["references"] for example in asked]
        return batch

    @override
    def select(self, split: Split, table: Any) -> Any:
        there = [name for name in table.column_names if name != PLACE]
        missing = [column for column in self.template_columns if column not in there]
        if missing:
            raise ValueError(
                f"Got template={self.template!r}, but {self._origin(split)} has no column {missing[0]!r}. It has"
                f" {', '.join(there)}. A brace that is no column is written twice."
            )
        table = super().select(split, table)
        if split not in ("validation", "test") or self.target not in there or len(table) == 0:
            return table
        return self._with_references(table)

    def _with_references(self, table: Any) -> Any:
        """All rows, first those to generate for, each with the targets of all rows with the same source."""
        targets = table[self.target]
        references: list[list[str]] = [[] for _ in targets]
        first: dict[Any, int] = {}
        for i, source in enumerate(zip(*(table[column] for column in self.template_columns), strict=True)):
            if isinstance(targets[i], str) and targets[i].strip():
                asked = first.setdefault(source if self.group_references else i, i)
                references[asked].append(targets[i])
        order = sorted(range(len(targets)), key=lambda i: not references[i])
        return table.add_column(_REFERENCES, references).select(order)

    @override
    def count_cut(self, split: Split, examples: Any) -> None:
        sources, targets = sum(examples[TRUNCATED]), sum(examples[TARGET_CUT])
        if sources or targets:
            advice = " An answer that is cut off does not teach where to end." if targets else ""
            rank_zero_warn(
                f"Of {len(examples)} {split} examples, {sources} sources and {targets} targets were cut, as they were"
                f" longer than max_length={self.max_length} allows.{advice}"
            )


def _columns_in(template: str) -> list[str]:
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"Got template={template!r}, in which a brace is not closed: {error}.") from error
    names = [name for _, name, _, _ in parts if name is not None]
    simple = all(name.isidentifier() and not form and not kind for _, name, form, kind in parts if name is not None)
    if not names or not simple:
        raise ValueError(
            f"Got template={template!r}; it needs names of columns in braces, such as '{{mr}}', and nothing else in"
            " them. Other braces are written twice."
        )
    return list(dict.fromkeys(names))
