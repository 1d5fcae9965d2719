"""Small models and data shared by the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_hift import HiFTCallback, HiFTEngine, HiFTModule, HiFTStrategy
from lightning_hift.engine.options import PUBLISHED
from lightning_hift.tasks.network import NetworkSource, build_network

VOCABULARY, WIDTH = 17, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Embedding, three blocks, final norm and head: five layer units."""

    def __init__(self, seed: int = 0, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


IN_BLOCK = ("norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight", "down.bias")
GROUPS = [
    ["embedding.weight"],
    *[[f"blocks.{i}.{name}" for name in IN_BLOCK] for i in range(3)],
    ["norm.weight", "norm.bias", "head.weight", "head.bias"],
]


def tokens(count: int, batch_size: int = 4, seed: int = 1) -> list[Tensor]:
    """``count`` batches of token rows, shape (batch_size, 6)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (batch_size, 6), generator=generator) for _ in range(count)]


def next_token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


class Rows(Dataset[Tensor]):
    """The batches of ``tokens``, row by row."""

    def __init__(self, batches: list[Tensor]) -> None:
        self._rows = torch.cat(batches)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tensor:
        return self._rows[index]


class ResumableLoader:
    """Batches in a fixed order, with the position of the next one as its state."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches
        self._next = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):  # type: ignore[no-untyped-def]
        start = self._next % len(self.batches)  # the Trainer does not exhaust a loader whose length it knows
        for i in range(start, len(self.batches)):
            self._next = i + 1
            yield self.batches[i]

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["next"]


def loader(count: int, batch_size: int = 4) -> DataLoader[Tensor]:
    return DataLoader(Rows(tokens(count, batch_size)), batch_size=batch_size)


def adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


class Automatic(pl.LightningModule):
    """``Net`` under automatic optimization, with any optimizer and scheduler."""

    def __init__(
        self,
        make_optimizer: Callable[[Any], Optimizer] = adamw,
        make_scheduler: Callable[[Optimizer], Any] | None = None,
        interval: str = "step",
    ) -> None:
        super().__init__()
        self.net = Net()
        self.make_optimizer = make_optimizer
        self.make_scheduler = make_scheduler
        self.interval = interval
        self.lrs: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.lrs.append(float(self.trainer.optimizers[0].param_groups[0]["lr"]))
        loss = next_token_loss(self.net, batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", next_token_loss(self.net, batch))

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": self.make_scheduler(optimizer),
                "interval": self.interval,
                "monitor": "val_loss",
            },
        }


class Manual(HiFTModule):
    """``Net`` under manual optimization."""

    def __init__(
        self,
        make_optimizer: Callable[[Any], Optimizer] = adamw,
        make_scheduler: Callable[[Optimizer], Any] | None = None,
        interval: str = "step",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.net = Net()
        self.make_optimizer = make_optimizer
        self.make_scheduler = make_scheduler
        self.interval = interval

    def training_loss(self, batch: Tensor, batch_idx: int) -> Tensor:
        return next_token_loss(self.net, batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", next_token_loss(self.net, batch))

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": self.interval},
        }


def published(options: dict[str, Any]) -> dict[str, Any]:
    """The paper's settings in the place of the defaults, with ``options``; with another policy, groups of 1."""
    return {**(PUBLISHED if options.get("policy") is None else {"group_size": 1}), **options}


def as_published(**options: Any) -> HiFTCallback:
    """The callback with the paper's settings; ``hold_lr`` apart."""
    return HiFTCallback(**published(options))


def attach_published(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> HiFTEngine:
    """An engine with the paper's settings."""
    return HiFTEngine.attach(model, optimizer, **published(options))


def trainer(**options: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU. With HiFT's strategy and no callback of its own, HiFT is as published."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    callbacks = options.get("callbacks") or []
    by_strategy = options.get("strategy") == "hift" or isinstance(options.get("strategy"), HiFTStrategy)
    if by_strategy and not any(isinstance(callback, HiFTCallback) for callback in callbacks):
        options["callbacks"] = [*callbacks, as_published()]
    return pl.Trainer(**{**quiet, **options})


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters, without the ``net.`` prefix of the LightningModules above."""
    return {name.removeprefix("net."): p.detach().clone() for name, p in module.named_parameters()}


def assert_same_weights(a: nn.Module | dict[str, Tensor], b: nn.Module | dict[str, Tensor]) -> None:
    """Bit for bit."""
    first = weights(a) if isinstance(a, nn.Module) else a
    second = weights(b) if isinstance(b, nn.Module) else b
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"weights differ: {different}"


def language_model(model_type: str, model_config: dict[str, Any]) -> nn.Module:
    """A causal language model with random weights."""
    return build_network(NetworkSource(model_type=model_type, model_config=model_config), "AutoModelForCausalLM")
