"""Tiny networks, data and Trainers of transformers."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from lightning_hift import HiFTTrainerMixin

VOCABULARY = 32
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
_ROPE = {**_SIZES, "intermediate_size": 24, "num_key_value_heads": 1, "attention_dropout": 0.1}
_T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}


def network(name: str = "llama", **more: Any) -> nn.Module:
    """With random weights and some dropout."""
    auto, model_type, fields = {
        "llama": ("AutoModelForCausalLM", "llama", _ROPE),
        "tied": ("AutoModelForCausalLM", "llama", {**_ROPE, "tie_word_embeddings": True}),
        "classifier": ("AutoModelForSequenceClassification", "bert", {**_SIZES, "intermediate_size": 24}),
        "seq2seq": ("AutoModelForSeq2SeqLM", "t5", {**_T5, "decoder_start_token_id": 0}),
    }[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**fields, "initializer_range": 0.2, **more})
    return getattr(transformers, auto).from_config(config)


def rows(name: str = "llama", count: int = 22) -> list[dict[str, Any]]:
    """Of an odd number of micro-batches of 2, each of another length."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(1, VOCABULARY, (6,), generator=generator) for _ in range(count)]
    return [{"input_ids": t, "labels": int(t[0]) % 2 if name == "classifier" else t} for t in tokens]


def arguments(folder: Any, **more: Any) -> TrainingArguments:
    """Of 12 steps on a CPU, each of two micro-batches but the last one of an epoch."""
    given = {
        "max_steps": 12,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "max_grad_norm": 0.05,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **{**given, **more})


ONE_BY_ONE = {"group_size": 1, "steps_per_group": 1, "always_active": [], "hold_lr": "replay"}
ALL_AT_ONCE = {"group_size": 100, "steps_per_group": 1, "always_active": []}


def hift(options: dict[str, Any], base: type[Trainer] = Trainer) -> type[Trainer]:
    """``base`` under HiFT."""

    class Mixed(HiFTTrainerMixin, base):  # type: ignore[misc, valid-type]
        pass

    Mixed.hift = options
    return Mixed


class Recorder(Trainer):
    """Keeps what each micro-batch was, and its loss."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.batches = [*getattr(self, "batches", []), (copy.deepcopy(inputs), num_items_in_batch)]
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses = [*getattr(self, "losses", []), float(loss)]
        return loss


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(found: Any, expected: Any) -> None:
    """To the bit, tensors and what holds them."""
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_same(found[name], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def logged(trainer: Trainer, *names: str) -> list[list[Any]]:
    return [[entry[name] for name in names] for entry in trainer.state.log_history if "learning_rate" in entry]
