"""Classification as filling a blank: a template around the texts, and a word for each label."""

from __future__ import annotations

import string
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from typing_extensions import override

from lightning_hift.data.bad_rows import BadRow
from lightning_hift.data.classification import ClassificationDataModule, text_in
from lightning_hift.data.text import TRUNCATED, Split

BLANK = "blank"


class PromptDataModule(ClassificationDataModule):
    """Rows of texts and a label, as a text with a blank in which one word per label may stand.

    With a masked language model the blank is its mask token, anywhere in the template; with a causal one it is what
    comes next, so it must end the template. A batch holds what the tokenizer gives, ``blank_position``, shape (batch,),
    the index whose logits speak of the blank, and ``labels``, shape (batch,).

    Args:
        template: Text with columns in braces and ``{blank}``, such as ``"{sentence} It was {blank}."``.
        verbalizer: The word for each label, such as ``{negative: terrible, positive: great}``, in the order of the
            labels' indices. Each must be one token.
        kwargs: See ``ClassificationDataModule``; ``label_names`` are the verbalizer's.

    Raises:
        ValueError: See ``ClassificationDataModule``; or the template has no one blank or no column, or a word is more
            than one token.
    """

    columns_needed = ("columns",)

    def __init__(self, *, template: str, verbalizer: dict[str, str], label: str = "label", **kwargs: Any) -> None:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        self.columns = [name for name in dict.fromkeys(fields) if name != BLANK]
        if fields.count(BLANK) != 1 or not self.columns:
            raise ValueError(
                f"Got template={template!r}; it needs at least one column in braces and {{{BLANK}}} exactly once."
            )
        if len(verbalizer) < 2 or len(set(verbalizer.values())) < len(verbalizer):
            raise ValueError(
                f"Got verbalizer={verbalizer}; it needs a word of its own for each of at least two labels."
            )
        super().__init__(text=self.columns[0], label=label, label_names=list(verbalizer), **kwargs)
        self.template = template
        self.verbalizer = verbalizer

    @cached_property
    def is_masked(self) -> bool:
        """Whether the module that is trained fills blanks by a mask token; without a module, whether there is one."""
        is_causal = getattr(self._module, "is_causal", None)
        return self.tokenizer.mask_token is not None if is_causal is None else not is_causal

    @cached_property
    def word_ids(self) -> list[int]:
        """The token of each label's word, in the order of the labels' indices.

        Raises:
            ValueError: A word is not one token, or two words are the same one.
        """
        found = [self._word_id(label, word) for label, word in self.verbalizer.items()]
        if len(set(found)) < len(found):
            raise ValueError(f"Got verbalizer={self.verbalizer}, in which two words are the same token. Choose others.")
        return found

    @override
    def setup(self, stage: str) -> None:
        self._forget_other_modules()
        if self.is_masked and self.tokenizer.mask_token is None:
            raise ValueError("Got a tokenizer without a mask token for a masked language model. Use the model's own.")
        if not self.is_masked and not self.template.rstrip().endswith(f"{{{BLANK}}}"):
            raise ValueError(
                f"Got template={self.template!r} for a causal language model, which sees only what comes before: end it"
                f" with {{{BLANK}}}."
            )
        assert self.word_ids
        super().setup(stage)

    @override
    def encoding_options(self) -> dict[str, Any]:
        return {"template": self.template, "verbalizer": self.verbalizer, "label": self.label, "mask": self.is_masked}

    @override
    def encode(self, row: Mapping[str, Any], split: Split) -> list[dict[str, Any]]:
        texts = {column: text_in(row, column) for column in self.columns}
        for column, text in texts.items():
            if self.is_masked and self.tokenizer.mask_token in text:
                raise BadRow(column, f"got {self.tokenizer.mask_token!r} in it, which is how the blank is written")
        encoded = self._render(texts)
        is_long = len(encoded["input_ids"]) > self.max_length
        while (excess := len(encoded["input_ids"]) - self.max_length) > 0:
            # The longest text gives way, never the template with its blank.
            longest = max(texts, key=lambda column: len(texts[column]))
            texts[longest] = self._without_last_tokens(texts[longest], excess)
            encoded = self._render(texts)
        position = len(encoded["input_ids"]) - 1
        if self.is_masked:
            position = encoded["input_ids"].index(self.tokenizer.mask_token_id)
        example = {**encoded, "blank_position": position, TRUNCATED: is_long}
        if split != "predict":
            example["labels"] = self.read_label(row)
        return [example]

    def _render(self, texts: Mapping[str, str]) -> dict[str, Any]:
        blank = self.tokenizer.mask_token if self.is_masked else ""
        encoded = dict(self.tokenizer(self.template.format(**texts, **{BLANK: blank}).rstrip()))
        if not self.is_masked and encoded["input_ids"][-1] == self.tokenizer.eos_token_id:
            return {name: values[:-1] for name, values in encoded.items()}
        return encoded

    def _without_last_tokens(self, text: str, count: int) -> str:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= count and len(ids) <= 1:
            raise ValueError(
                f"Got max_length={self.max_length}, which template={self.template!r} alone exceeds. Choose a shorter"
                " template."
            )
        shortened: str = self.tokenizer.decode(ids[: max(1, len(ids) - count)])
        return shortened if len(shortened) < len(text) else text[: len(text) // 2]

    def _word_id(self, label: str, word: str) -> int:
        # Where a space belongs to the token, the word in a text is another token than the word alone.
        tried = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f" {word}", word)]
        for ids in tried:
            if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id:
                return int(ids[0])
        pieces = self.tokenizer.convert_ids_to_tokens(tried[0])
        raise ValueError(
            f"Got the word {word!r} for label {label!r}, which is {len(pieces)} tokens, {pieces}, or unknown. Choose a"
            " word that is one token of this tokenizer."
        )
