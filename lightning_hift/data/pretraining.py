"""Plain texts for a causal language model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

from typing_extensions import override

from lightning_hift.data.bad_rows import BadRow
from lightning_hift.data.packing import Contamination, TokenBlocks, join_documents
from lightning_hift.data.tables import PLACE
from lightning_hift.data.text import TRUNCATED, Split, TextDataModule


class PretrainingDataModule(TextDataModule):
    """Documents as a stream of tokens, each with the end-of-sequence token behind, cut into blocks of equal length.

    Documents stay in the order of the data set, so that a block holds as few pieces as can be; training shuffles the
    blocks. No token is left out: the last block is shorter. A document that a block's end cuts goes on in the next
    block without what came before. Empty rows are passed over. A batch is a mapping of ``input_ids``, ``labels`` and,
    in packed rows, ``position_ids`` that begin anew with each document, shape (batch, sequence_length).

    Args:
        text: Column of the text; of txt files, ``"text"``.
        document: ``"row"``, or ``"file"`` if the rows (of a txt file, the lines) of a file are one document. For local
            files with rows of text alone.
        sequence_length: Tokens per block.
        packing: Blocks of several documents. Without it, each block is of one document, and short ones are padded.
        contamination: ``"refuse"``: documents in a row do not see each other, and a network that does not heed that is
            refused. ``"allow"``: they do, as in plain concatenation; for any network.
        kwargs: See ``TextDataModule``.

    Raises:
        ValueError: See ``TextDataModule``; ``sequence_length`` is below 2; in ``setup``: the tokenizer has no
            end-of-sequence token.
    """

    columns_needed = ("text",)

    def __init__(
        self,
        *,
        text: str = "text",
        document: Literal["row", "file"] = "row",
        sequence_length: int = 1024,
        packing: bool = True,
        contamination: Contamination = "refuse",
        **kwargs: Any,
    ) -> None:
        super().__init__(max_length=sequence_length, **kwargs)
        if sequence_length < 2:
            raise ValueError(f"Got sequence_length={sequence_length}; it must be at least 2, to predict something.")
        if document not in get_args(Literal["row", "file"]):
            raise ValueError(f"Got document={document!r}; it must be 'row' or 'file'.")
        if document == "file" and self.files is None:
            raise ValueError("Got document='file' for a data set of the hub, whose rows are in no file. Use 'row'.")
        check_contamination(contamination)
        self.text = text
        self.document = document
        self.packing = packing
        self.contamination: Contamination = contamination

    @override
    def encoding_options(self) -> dict[str, Any]:
        return {"column": self.text, "pieces": None if self.packing else self.max_length}

    @override
    def encode(self, row: Mapping[str, Any], split: Split) -> list[dict[str, Any]]:
        text = row[self.text]
        if not isinstance(text, str):
            raise BadRow(self.text, "there is no text" if text is None else f"got {text!r}, which is no text")
        if not text.strip():
            return []
        tokens = with_end(self.tokenizer, self.tokenizer(text, verbose=False)["input_ids"])
        length = len(tokens) if self.packing else self.max_length
        pieces = [tokens[start : start + length] for start in range(0, len(tokens), length)]
        return [{"input_ids": piece, TRUNCATED: False} for piece in pieces if len(piece) > 1]

    @override
    def collate(self, examples: list[Any]) -> dict[str, Any]:
        if self.packing:
            return join_documents(examples, self.tokenizer.pad_token_id, self.contamination)
        batch = join_documents([[example] for example in examples], self.tokenizer.pad_token_id, "allow")
        lengths = [[1] * len(example["input_ids"]) for example in examples]
        return {**batch, "attention_mask": self.pad("attention_mask", lengths)}

    @override
    def rows(self, split: Split) -> TokenBlocks | None:
        return self.blocks(split) if self.packing else None

    def blocks(self, split: Split) -> TokenBlocks:
        """The documents of a split, packed."""
        return TokenBlocks(self.examples[split], self.max_length)

    @override
    def _read(self, split: Split) -> Any:
        table = super()._read(split)
        if self.document == "row" or self.text not in table.column_names:
            return table
        key = hashlib.sha256(f"{table._fingerprint}/{self.text}/file".encode()).hexdigest()[:16]
        return table.map(
            self._join_rows, batched=True, batch_size=None, remove_columns=table.column_names, new_fingerprint=key
        )

    def _join_rows(self, rows: Mapping[str, list[Any]]) -> dict[str, list[str]]:
        texts: dict[str, list[str]] = {}
        for text, place in zip(rows[self.text], rows[PLACE], strict=True):
            texts.setdefault(place.rpartition(":")[0], []).append(text or "")
        return {self.text: ["\n".join(lines) for lines in texts.values()], PLACE: [f"{file}:1" for file in texts]}


def with_end(tokenizer: Any, tokens: list[int]) -> list[int]:
    """Tokens with the end-of-sequence token behind, once.

    Raises:
        ValueError: The tokenizer has none.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            "Got a tokenizer without an end-of-sequence token, which tells a model where a text ends. Set eos_token in"
            " its tokenizer_config.json."
        )
    return tokens if tokens and tokens[-1] == end else [*tokens, end]


def check_contamination(contamination: str) -> None:
    """Raise a ``ValueError`` if it is no such word."""
    if contamination not in get_args(Contamination):
        raise ValueError(f"Got contamination={contamination!r}; it must be 'refuse' or 'allow'.")
