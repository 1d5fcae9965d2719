"""Tiny tokenizers, made on the spot from a few texts and saved as folders."""

from __future__ import annotations

import string
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def wordpiece(texts: Iterable[str], folder: Path, **options: object) -> str:
    """The texts' words in lower case, also as parts of others, and letters; with [CLS] and [SEP].

    Like BERT's, it drops control characters.
    """
    words = sorted({word for text in texts for word in text.lower().split()} | set(string.ascii_lowercase))
    pieces = [*SPECIAL, *words, *(f"##{word}" for word in words)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return _save(tokenizer, folder, cls_token="[CLS]", sep_token="[SEP]", model_input_names=names, **options)


def byte_level(texts: Iterable[str], folder: Path, **options: object) -> str:
    """Byte-level BPE without special tokens around a text; a token begins with the space before its word."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL[:2],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _save(tokenizer, folder, model_input_names=["input_ids", "attention_mask"], **options)


def _save(tokenizer: Tokenizer, folder: Path, **options: object) -> str:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", **options)
    wrapped.save_pretrained(folder)
    return str(folder)
