"""Random models and batches, made on the device: on the host, 7B weights would take minutes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_hift.benchmark.gpu_check.sizes import Fields, Shape


def build_network(fields: Fields, device: torch.device, dtype: torch.dtype, seed: int, attention: str = "sdpa") -> Any:
    """A ``LlamaForCausalLM`` in training mode, with random weights of ``dtype``.

    Args:
        fields: Its configuration.
        device: Where its weights are made.
        dtype: Of the weights.
        seed: Of the weights, which are the same on the same device.
        attention: ``"sdpa"``, or ``"eager"``, which is made of deterministic operations only.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **fields, bos_token_id=0, eos_token_id=0, use_cache=False, attn_implementation=attention, dtype=dtype
    )
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)


def set_checkpointing(network: Any, on: bool) -> None:
    """Recompute the activations of each block in the backward pass, or do not."""
    if on:
        enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    else:
        disable = getattr(network, "activation_checkpointing_disable", None) or network.gradient_checkpointing_disable
        disable()


def random_tokens(fields: Fields, shape: Shape, count: int, device: torch.device, seed: int) -> list[Tensor]:
    """``count`` batches of shape (rows, length), int64, which are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(fields["vocab_size"], tuple(shape), generator=generator).to(device) for _ in range(count)]


def next_token_loss(network: Any, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each token after the ones before it, shape ()."""
    loss: Tensor = network(input_ids=tokens, labels=tokens).loss
    return loss
