"""Tokenizers of the transformers library."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_info


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """A tokenizer that can pad.

    Args:
        name: Name on the Hugging Face hub, or a local folder.
        revision: Branch, tag or commit on the hub.

    Raises:
        OSError: It is neither a folder nor cached, and the hub does not have it or cannot be reached.
        ValueError: It has no token to pad with.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise OSError(
            f"Got tokenizer={name!r}, which is no local folder with a tokenizer, and the hub gave nothing:"
            f" {str(error).strip().splitlines()[0]} Without a network, download it where there is one (hf download"
            f" {name} --local-dir FOLDER) and give the folder."
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"Got tokenizer={name!r}, which has no padding token and no end-of-sequence token in its place. Set"
                " pad_token in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
        rank_zero_info(f"Tokenizer {name!r} has no padding token; padding is by {tokenizer.eos_token!r} and masked.")
    return tokenizer


def need_offsets(tokenizer: Any) -> Any:
    """``tokenizer``, if it knows which characters a token stands for.

    Raises:
        ValueError: It does not.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"Got a {type(tokenizer).__name__}, which does not say which characters a token stands for. Use a fast"
            " tokenizer: a folder with tokenizer.json."
        )
    return tokenizer


def fingerprint_of(tokenizer: Any) -> str:
    """The same for tokenizers that do the same, in any process."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        state = {**json.loads(fast.to_str()), "truncation": None, "padding": None}  # left by the last call
        inner = json.dumps(state, sort_keys=True)
    else:
        inner = repr(sorted(tokenizer.get_vocab().items()))
    outside = (tokenizer.special_tokens_map, tokenizer.chat_template, tokenizer.truncation_side)
    described = (type(tokenizer).__name__, inner, *outside, tokenizer.model_input_names)
    return hashlib.sha256(repr(described).encode()).hexdigest()
