"""A batch for a model that has only been described, and the loss of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_hift.activations.chunked_loss import chunked_loss

ComputeLoss = Callable[[Any, int, int], Tensor]
"""Maps a model without memory, the batch size and the sequence length to a loss, on the device "cpu"."""


def find_loss(model: nn.Module) -> ComputeLoss | None:
    """How to compute a batch that is made up: for a model of transformers inside, or with an ``example_input_array``.

    Returns:
        ``None`` if ``model`` is neither.
    """
    chunk_tokens = getattr(model, "loss_chunk_tokens", None)
    for path, module in model.named_modules():
        if hasattr(getattr(module, "config", None), "vocab_size"):
            accepted = inspect.signature(module.forward).parameters
            if "input_ids" in accepted:
                return lambda copy, batch, length, path=path: _language_model_loss(  # type: ignore[misc]
                    copy.get_submodule(path), batch, length, "labels" in accepted, chunk_tokens
                )
    example = getattr(model, "example_input_array", None)
    return None if example is None else lambda copy, batch, length: _example_loss(copy, example, batch)


def _language_model_loss(
    network: Any, batch: int, length: int, labelled: bool, chunk_tokens: int | None = None
) -> Tensor:
    tokens = torch.zeros(batch, length, dtype=torch.long, device="cpu")
    if not labelled:
        with _one_sequence_per_row():
            return _mean(network(input_ids=tokens))
    labels = tokens
    if chunk_tokens is not None:
        with _one_sequence_per_row():
            return chunked_loss(network, {"input_ids": tokens}, labels, chunk_tokens)
    if "SequenceClassification" in type(network).__name__:
        labels = torch.zeros(batch, dtype=torch.long if network.config.num_labels > 1 else torch.float, device="cpu")
    with _one_sequence_per_row():
        loss: Tensor = network(input_ids=tokens, labels=labels).loss
    return loss


@contextmanager
def _one_sequence_per_row() -> Iterator[None]:
    """Without values transformers cannot see that no row packs several sequences, and would make a mask for them.

    Attention with such a mask, of length x length, is not what a batch without padding runs.
    """
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    ask_values = getattr(masking_utils, name, None)
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, ask_values)


def _example_loss(model: nn.Module, example: Any, batch: int) -> Tensor:
    def of_this_batch(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        return torch.zeros(batch, *value.shape[1:], dtype=value.dtype, device="cpu")

    inputs = tree_map(of_this_batch, example)
    if isinstance(inputs, Mapping):
        return _mean(model(**inputs))
    return _mean(model(*inputs) if isinstance(inputs, tuple) else model(inputs))


def _mean(output: Any) -> Tensor:
    values = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    return torch.stack([t.float().mean() for t in values]).sum()
