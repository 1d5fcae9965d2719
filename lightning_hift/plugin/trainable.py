"""Training a part of a network and freezing the rest, as BitFit and linear probing do."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import wraps
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn
from typing_extensions import override

from lightning_hift.groups.grouping import find_layer_units


class TrainOnly(Callback):
    """Freezes all but some parameters of any LightningModule for the length of ``fit``.

    It does so right before the optimizer is built, so networks of ``configure_model`` are covered, and what is frozen
    never has gradients or optimizer state. HiFT then takes turns over what is left.

    Args:
        patterns: What trains: parameters whose full name matches a pattern, where ``*`` stands for any characters
            (``"*.bias"``), and layer units by their name (``"head"``, ``"embedding"``).

    Raises:
        ValueError: There are no patterns. In ``fit``: a pattern matches nothing.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self.patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        if not self.patterns:
            raise ValueError("Got no patterns in TrainOnly, so nothing would train. Give some, such as ['head'].")
        self._frozen: list[nn.Parameter] = []
        self._replaced: dict[str, Any] | None = None

    def freeze(self, module: nn.Module) -> None:
        """Freeze what no pattern matches.

        Args:
            module: With its network built.

        Raises:
            ValueError: A pattern matches neither a trainable parameter nor a layer unit.
        """
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        chosen = {id(p) for pattern in self.patterns for p in _matched(module, trainable, pattern)}
        for p in trainable.values():
            if id(p) not in chosen:
                p.requires_grad_(False)
                p.grad = None
                self._frozen.append(p)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._restore(pl_module)
        configure = pl_module.configure_optimizers

        # No hook runs between configure_model and configure_optimizers.
        @wraps(configure)
        def freeze_and_configure() -> Any:
            self.freeze(pl_module)
            return configure()

        own = vars(pl_module)
        self._replaced = {"configure_optimizers": configure} if "configure_optimizers" in own else {}
        own["configure_optimizers"] = freeze_and_configure

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore(pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore(pl_module)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_frozen": [], "_replaced": None}  # a copy is a callback for another run

    def _restore(self, pl_module: pl.LightningModule) -> None:
        for p in self._frozen:
            p.requires_grad_(True)
        self._frozen = []
        if self._replaced is not None:
            vars(pl_module).pop("configure_optimizers")
            vars(pl_module).update(self._replaced)
            self._replaced = None


def _matched(module: nn.Module, trainable: dict[str, nn.Parameter], pattern: str) -> list[nn.Parameter]:
    hits = [p for name, p in trainable.items() if fnmatchcase(name, pattern)]
    if hits:
        return hits
    units = {unit.name: list(unit.parameters.values()) for unit in find_layer_units(module)}
    if pattern not in units:
        names = list(trainable)
        shown = ", ".join(names if len(names) < 7 else [*names[:3], "...", *names[-2:]])
        raise ValueError(
            f"Got the pattern {pattern!r} in TrainOnly, which matches no trainable parameter of"
            f" {type(module).__name__} and is none of its layer units {', '.join(units)}. Parameters are named {shown}."
        )
    return units[pattern]
