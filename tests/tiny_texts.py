"""Tokenizers and networks small enough to be made in a test."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
"""Fields of a configuration that most decoders have."""


def word_tokenizer(words: Iterable[str], folder: Path | None = None, **options: Any) -> Any:
    """One token per word between spaces, in the order given; 0 is padding, 1 the end, 2 an unknown word.

    Args:
        words: The vocabulary.
        folder: Where to save it.
        options: Of ``PreTrainedTokenizerFast``; ``None`` takes a special token away.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", *words]))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", **options}
    given = {name: value for name, value in special.items() if value is not None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **given)
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def byte_tokenizer(texts: Sequence[str], folder: Path, vocab_size: int = 300, **options: Any) -> Any:
    """Byte-level BPE trained on texts and saved; ``<|endoftext|>`` ends and pads."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    inner = ByteLevelBPETokenizer()
    inner.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False)
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", **options}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner._tokenizer, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """A jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def quiet_trainer(**options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", enable_model_summary=False, **{**quiet, **options})


def adam(parameters: Any, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr)
