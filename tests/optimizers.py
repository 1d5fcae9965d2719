"""Every optimizer that the tests put under HiFT: how it is built, and for which model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.models import VOCABULARY, Net

SIZE = 64


class Matrices(nn.Module):
    """Embedding, three layers and head without a vector; the layers are just large enough for 8-bit state."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.head = nn.Linear(SIZE, VOCABULARY, bias=False)
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.blocks = nn.ModuleList([nn.Linear(SIZE, SIZE, bias=False) for _ in range(3)])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


class Case(NamedTuple):
    """One way to build an optimizer."""

    make: Callable[..., Optimizer]
    model: Callable[..., nn.Module] = Net
    scheduled: bool = True


def of_torch(name: str, **options: Any) -> Callable[..., Optimizer]:
    return lambda parameters: getattr(torch.optim, name)(parameters, **{"lr": 0.01, **options})


def of(module: str, name: str, **options: Any) -> Callable[..., Optimizer]:
    """From a package that may be absent. Schedule-free optimizers want to be told that training begins."""

    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        optimizer = getattr(pytest.importorskip(module), name)(parameters, **options)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    return make


def with_tensor_lr(name: str, **options: Any) -> Callable[..., Optimizer]:
    return lambda parameters: of_torch(name, lr=torch.tensor(0.01), **options)(parameters)


def variants(variant: str, **options: Any) -> dict[str, Case]:
    """All of ``torch.optim`` that has this variant and steps vectors too."""
    own = {
        "Adam": {"weight_decay": 0.1},
        "AdamW": {"amsgrad": True, "maximize": True},
        "SGD": {"momentum": 0.9, "nesterov": True},
        "Adagrad": {"lr_decay": 0.01},
        "Adadelta": {"lr": 1.0},
        "Adafactor": {"weight_decay": 0.01},
        "Adamax": {},
        "ASGD": {"t0": 1},
        "NAdam": {"decoupled_weight_decay": True},
        "RAdam": {"betas": (0.9, 0.95)},
        "RMSprop": {"centered": True, "momentum": 0.5},
        "Rprop": {},
    }
    without = {
        "fused": {"Adadelta", "Adafactor", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"},
        "capturable": {"SGD", "Adagrad", "Adafactor"},
    }
    names = own.keys() - without.get(variant, set())
    return {f"{name}_{variant}": Case(of_torch(name, **own[name], **options)) for name in own if name in names}


OF_TORCH = {
    **variants("loop", foreach=False),
    **variants("foreach", foreach=True),
    **variants("fused", fused=True),
    "SGD_plain": Case(of_torch("SGD")),
    "Muon": Case(of_torch("Muon"), Matrices),
    "AdamW_tensor_lr": Case(with_tensor_lr("AdamW", foreach=False)),
    "Adam_fused_tensor_lr": Case(with_tensor_lr("Adam", fused=True)),
}
OF_TRANSFORMERS = {
    "hf_Adafactor_relative": Case(of("transformers", "Adafactor", warmup_init=True), scheduled=False),
    "hf_Adafactor_fixed": Case(
        of("transformers", "Adafactor", lr=0.01, relative_step=False, scale_parameter=False, beta1=0.9)
    ),
    "hf_Adafactor_scaled": Case(of("transformers", "Adafactor", lr=0.01, relative_step=False, weight_decay=0.1)),
}
# Their step counts and running sums are options of the parameter group.
COUNTING = {
    "Prodigy": Case(of("prodigyopt", "Prodigy", d0=1e-3, use_bias_correction=True)),
    "Prodigy_slices": Case(of("prodigyopt", "Prodigy", d0=1e-3, slice_p=3, safeguard_warmup=True)),
    "ScheduleFree_AdamW": Case(of("schedulefree", "AdamWScheduleFree", lr=0.01, warmup_steps=3)),
    "ScheduleFree_SGD": Case(of("schedulefree", "SGDScheduleFree", lr=0.1, warmup_steps=3)),
    "ScheduleFree_RAdam": Case(of("schedulefree", "RAdamScheduleFree", lr=0.01)),
    "DAdapt_Adam": Case(of("dadaptation", "DAdaptAdam", d0=1e-3)),
    "DAdapt_SGD": Case(of("dadaptation", "DAdaptSGD", d0=1e-3)),
    "optimi_AdamW": Case(of("optimi", "AdamW", lr=0.01)),
    "optimi_Adan": Case(of("optimi", "Adan", lr=0.01, foreach=True)),
    "optimi_Ranger": Case(of("optimi", "Ranger", lr=0.01, k=2)),
    "po_AdaBelief": Case(of("pytorch_optimizer", "AdaBelief", lr=0.01)),
    "po_SOAP": Case(of("pytorch_optimizer", "SOAP", lr=0.01, precondition_frequency=2)),
}
PER_PARAMETER = {
    "Lion": Case(of("lion_pytorch", "Lion", lr=0.01, weight_decay=0.1)),
    "optimi_Lion": Case(of("optimi", "Lion", lr=0.01)),
}
QUANTIZED = {
    "torchao_AdamW8bit": Case(of("torchao.optim", "AdamW8bit", lr=0.01), Matrices),
    "torchao_AdamW4bit": Case(of("torchao.optim", "AdamW4bit", lr=0.01), Matrices),
    "bitsandbytes_AdamW8bit": Case(of("bitsandbytes.optim", "AdamW8bit", lr=0.01), Matrices),
    "bitsandbytes_Lion8bit": Case(of("bitsandbytes.optim", "Lion8bit", lr=0.01), Matrices),
}
OPTIMIZERS = OF_TORCH | OF_TRANSFORMERS | PER_PARAMETER | COUNTING | QUANTIZED
ON_A_GPU = variants("capturable", capturable=True) | variants("fused", fused=True) | COUNTING | QUANTIZED
