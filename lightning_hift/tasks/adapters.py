"""Adapters of the peft library on top of a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def add_adapter(network: nn.Module, adapter: Mapping[str, Any], task_type: str | None) -> nn.Module:
    """Freeze a network and put trainable adapters on it.

    Args:
        network: A network of transformers.
        adapter: ``peft_type``, such as ``"LORA"``, ``"ADALORA"``, ``"IA3"``, ``"PREFIX_TUNING"``, ``"PROMPT_TUNING"``
            or ``"P_TUNING"``, and the arguments of peft's configuration of that name.
        task_type: peft's word for the task; with it, peft trains the head, too, where the task's head is new.

    Raises:
        ValueError: There is no ``peft_type``, peft does not know it, or it has no such argument.
        RuntimeError: peft is not installed.
    """
    try:
        from peft import PeftType, get_peft_config, get_peft_model
    except ImportError as error:
        raise RuntimeError(
            "Got an adapter, but peft is not installed. Run: pip install lightning-hift[peft]"
        ) from error
    known = [kind.name for kind in PeftType]
    if adapter.get("peft_type") not in known:
        raise ValueError(
            f"Got peft_type={adapter.get('peft_type')!r} in adapter; it must be one of {', '.join(known)}."
        )
    try:
        config = get_peft_config({"task_type": task_type, **adapter})
    except TypeError as error:
        raise ValueError(f"Got adapter={dict(adapter)!r}, which peft does not take: {error}.") from error
    adapted: nn.Module = get_peft_model(network, config)
    return adapted


def of_own_tokens(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Logits of the tokens of a batch, without those of a prompt that prompt and P-tuning put before them.

    Args:
        logits: Shape (batch, prompt + length, ...).
        input_ids: Shape (batch, length).
    """
    return logits[:, logits.shape[1] - input_ids.shape[1] :]
