"""Adapters of the peft library on top of a network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

_SUMS = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # attributes of peft's allocator: importance by name of weight
_WITH_A_NEW_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def add_adapter(network: nn.Module, adapter: Mapping[str, Any], task_type: str | None) -> nn.Module:
    """Freeze a network and put trainable adapters on it.

    Args:
        network: A network of transformers.
        adapter: ``peft_type``, such as ``"LORA"``, ``"ADALORA"``, ``"IA3"``, ``"PREFIX_TUNING"``, ``"PROMPT_TUNING"``
            or ``"P_TUNING"``, and the arguments of peft's configuration of that name. With
            ``target_modules="all-linear"`` the whole head is trained where the task's head is new.
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
        config = get_peft_config({"task_type": task_type, **_new_head(network, adapter, task_type), **adapter})
    except TypeError as error:
        raise ValueError(f"Got adapter={dict(adapter)!r}, which peft does not take: {error}.") from error
    adapted: nn.Module = get_peft_model(network, config)
    return adapted


def _new_head(network: nn.Module, adapter: Mapping[str, Any], task_type: str | None) -> dict[str, Any]:
    """For ``"all-linear"``: train a new head as a whole. peft knows that of few tasks, and few names of heads."""
    if adapter.get("target_modules") != "all-linear" or task_type not in _WITH_A_NEW_HEAD:
        return {}
    body = getattr(network, "base_model_prefix", "")
    apart = [
        (name, part) for name, part in network.named_children() if name != body and any(True for _ in part.parameters())
    ]
    # Few networks, such as T5 for questions, have their blocks beside the head.
    head = [name for name, part in apart if hasattr(network, body) or isinstance(part, nn.Linear)]
    return {"modules_to_save": head, "exclude_modules": rf"({'|'.join(map(re.escape, head))})(\..*)?"}


class RankAllocation:
    """Lets AdaLoRA spread its ranks where, at each step, only one layer group has gradients.

    Importance is updated for the weights that have a gradient, before their step; ranks are masked after it, as soon as
    each adapter's importance is known. (peft's own ``update_and_allocate`` wants all gradients at once.)

    Args:
        network: What ``add_adapter`` returned for ``"ADALORA"``.
    """

    def __init__(self, network: Any) -> None:
        self._tuner = network.base_model
        self._allocator = network.base_model.rankallocator
        self._was_loaded = False  # perhaps to another device than that of the weights
        self._update_importance = self._allocator.update_ipt
        self._allocator.update_ipt = lambda model: None

    def note_gradients(self) -> None:
        """Update the importance of the weights that are about to be stepped."""
        if self._was_loaded:
            self._move_to_weights()
        self._update_importance(_WithGradients(self._tuner.model))

    def allocate(self, step: int) -> None:
        """Mask what is least important, if it is time for that.

        Args:
            step: Optimizer steps that were made.
        """
        adapter = self._allocator.adapter_name
        names = [n for n, _ in self._tuner.model.named_parameters() if "lora_" in n and adapter in n]
        is_known = self._allocator.exp_avg_ipt.keys() >= set(names)
        config = self._tuner.peft_config[adapter]
        if is_known or config.rank_pattern:
            self._tuner.update_and_allocate(step)
        elif step >= config.total_step - config.tfinal:
            raise ValueError(
                f"Got total_step={config.total_step} and tfinal={config.tfinal} in adapter, so AdaLoRA settles its"
                f" ranks after {step} steps, but not all layer groups had a turn by then. Train longer, or raise"
                " group_size."
            )

    def state_dict(self) -> dict[str, Any]:
        """Importance by name of weight, and the ranks that were chosen."""
        config = self._tuner.peft_config[self._allocator.adapter_name]
        sums = {name: dict(getattr(self._allocator, name)) for name in _SUMS}
        return {**sums, "rank_pattern": dict(config.rank_pattern or {})}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        for name in _SUMS:
            setattr(self._allocator, name, dict(state_dict[name]))
        self._was_loaded = True
        self._tuner.peft_config[self._allocator.adapter_name].rank_pattern = dict(state_dict["rank_pattern"]) or None

    def _move_to_weights(self) -> None:
        devices = {name: p.device for name, p in self._tuner.model.named_parameters()}
        for sums in (getattr(self._allocator, name) for name in _SUMS):
            sums.update({name: value.to(devices[name]) for name, value in sums.items() if name in devices})
        self._was_loaded = False


class _WithGradients:
    """A model of which only the weights with a gradient are seen."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self._model.named_parameters() if p.grad is not None)


def of_own_tokens(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Logits of the tokens of a batch, without those of a prompt that prompt and P-tuning put before them.

    Args:
        logits: Shape (batch, prompt + length, ...).
        input_ids: Shape (batch, length).
    """
    return logits[:, logits.shape[1] - input_ids.shape[1] :]
