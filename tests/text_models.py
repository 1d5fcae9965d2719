"""A tokenizer and networks small enough for a test, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_TEXT = "good bad fine poor film plot actor the a is was and it great awful no yes maybe red blue one two"
WORDS = _TEXT.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def save_tokenizer(folder: Path, words: list[str] = WORDS, **options: Any) -> Path:
    """A tokenizer of whole words, with the special tokens of BERT."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        **{**special, "mask_token": "[MASK]", "model_max_length": 32, **options},
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(folder)
    return folder


def save_network(folder: Path, auto_class: str = "AutoModel", model_type: str = "bert", **fields: Any) -> Path:
    """A network with random weights beside a tokenizer of its own."""
    import transformers

    save_tokenizer(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.AutoConfig.for_model(
        model_type, **{"vocab_size": len(SPECIAL) + len(WORDS), "max_position_embeddings": 32, **sizes, **fields}
    )
    getattr(transformers, auto_class).from_config(config).save_pretrained(folder)
    return folder
