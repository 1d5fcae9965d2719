"""What a run was, in words and numbers that go into a checkpoint and a model card."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from numbers import Number
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hift.groups.schedule import SweepSchedule
from lightning_hift.plugin.callback import find_callback
from lightning_hift.plugin.trainable import TrainOnly
from lightning_hift.tasks.network import NetworkSource

Facts = dict[str, dict[str, str]]
"""Rows by their names, in sections."""

_DATA = ("dataset", "config_name", "revision", "splits", "batch_size", "max_length", "max_train_rows", "seed")


class TrainedModule(Protocol):
    """What is asked of a module to describe or export it; a ``TransformerModule`` has it all."""

    _trainer: Any
    source: NetworkSource
    adapter: dict[str, Any] | None
    network: nn.Module | None
    accumulate_grad_batches: int
    gradient_clip_val: float | None
    gradient_clip_algorithm: Any
    lr_scheduler: Any
    warmup: float

    @property
    def head(self) -> str:
        """The auto class of transformers."""

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        """Content of the tokenizer's files by their names."""


def run_facts(module: TrainedModule) -> Facts:
    """Facts about the run in which a module is trained; without a Trainer, only about the network.

    Returns:
        Strings only, so that a checkpoint can be loaded with ``weights_only``.
    """
    facts = {"Model": _model(module)}
    trainer = module._trainer
    if trainer is not None:
        facts |= {
            "Data": _data(getattr(trainer, "datamodule", None)),
            "Method": _method(module, trainer),
            "Training": _training(module, trainer),
            "Metrics, last values": {
                name: f"{float(value):.6g}"
                for name, value in sorted(trainer.callback_metrics.items())
                if not name.startswith("hift/")
            },
        }
    packages = ("lightning-hift", "lightning", "torch", "transformers")
    facts["Versions"] = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return {section: rows for section, rows in facts.items() if rows}


def _model(module: TrainedModule) -> dict[str, str]:
    source = module.source
    start = "random weights" if source.model is None or source.random_weights else "pre-trained weights"
    rows = {"base model": source.model or f"{source.model_type}, from its configuration alone", "started from": start}
    if source.revision is not None:
        rows["revision"] = source.revision
    if module.adapter is not None:
        rows["adapter"] = ", ".join(f"{key}={value}" for key, value in module.adapter.items())
    if module.network is not None:
        rows["parameters"] = f"{sum(p.numel() for p in module.network.parameters()):,}"
    return {**rows, "task": type(module).__name__, "head": module.head}


def _data(datamodule: Any) -> dict[str, str]:
    if datamodule is None:
        return {}
    given = {name: getattr(datamodule, name, None) for name in _DATA}
    files = getattr(datamodule, "files", None) or {}
    if isinstance(files, Mapping):  # names only: a card is for others
        listed = {split: [paths] if isinstance(paths, str) else paths for split, paths in files.items()}
        given["files"] = {split: [Path(path).name for path in paths] for split, paths in listed.items()}
    return {"data module": type(datamodule).__name__} | {
        name.replace("_", " "): _spelled(value) for name, value in given.items() if value not in (None, {}, [])
    }


def _method(module: TrainedModule, trainer: Any) -> dict[str, str]:
    callback = find_callback(trainer)
    trained = "adapter" if module.adapter is not None else "all parameters"
    only = [pattern for each in trainer.callbacks if isinstance(each, TrainOnly) for pattern in each.patterns]
    if only:
        trained += f" that match {', '.join(only)}"
    if callback is None:
        return {"method": f"all layers at once, {trained}"}
    if isinstance(callback.policy, SweepSchedule):
        rows = {
            "method": f"HiFT (arXiv 2401.15207): one layer group at a time, {trained}",
            "order": callback.policy.order + (", drawn anew each sweep" if callback.policy.reshuffle else ""),
            "steps per group": str(callback.steps_per_group) + (" for each unit" if callback.policy.per_unit else ""),
        }
    else:
        rows = {"method": f"{callback.policy.name}: some layer groups at a time, {trained}"}
    rows["layer units per group"] = str(callback.group_size)
    rows["learning rate within a sweep"] = callback.hold_lr
    if frozen := callback.options.frozen:
        rows["frozen"] = frozen if isinstance(frozen, str) else ", ".join(frozen)
    for engine in callback.engines:
        if engine.always_active:
            rows["always active"] = ", ".join(unit.name for unit in engine.always_active)
        if set(engine.lr_scales) != {1.0}:
            rows["learning rate of the groups"] = ", ".join(f"x {scale:.3g}" for scale in engine.lr_scales)
        rows["layer groups"] = f"{len(engine.groups)}: {_some(group.name for group in engine.groups)}"
        rows["sweeps"] = str(engine.sweep)
        rows["master weights"] = engine.master_weights
    return rows


def _training(module: TrainedModule, trainer: Any) -> dict[str, str]:
    rows = {
        "epochs": str(trainer.current_epoch),
        "optimizer steps": str(trainer.global_step),
        "precision": str(trainer.precision),
        "strategy": type(trainer.strategy).__name__,
        "micro-batches per step": str(module.accumulate_grad_batches),
    }
    if module.gradient_clip_val is not None:
        rows["gradient clipping"] = f"{module.gradient_clip_val:g} by {module.gradient_clip_algorithm}"
    for optimizer in trainer.optimizers:
        rows["optimizer"] = _optimizer(optimizer)
        group = optimizer.param_groups[0]
        rows["learning rate"] = f"{float(group.get('initial_lr', group['lr'])):g}, at the end {float(group['lr']):g}"
    for config in trainer.lr_scheduler_configs:
        rows["schedule"] = config.scheduler.__class__.__name__
    if isinstance(module.lr_scheduler, str):
        rows["schedule"] = f"{module.lr_scheduler}, warm-up {module.warmup:g} of the steps"
    return rows


def _optimizer(optimizer: Optimizer) -> str:
    inner = getattr(optimizer, "optimizer", optimizer)  # Lightning's wrapper has it
    options = [
        f"{name}={_spelled(value)}"
        for name, value in getattr(inner, "defaults", {}).items()  # one that offloads has none
        if name != "lr" and not isinstance(value, bool) and isinstance(value, (Number, Tensor, tuple))
    ]
    return f"{type(inner).__name__} ({', '.join(options)})" if options else type(inner).__name__


def _spelled(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_spelled(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_spelled, value))
    return f"{float(value):g}" if isinstance(value, (float, torch.Tensor)) else str(value)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed if len(listed) < 7 else [*listed[:3], "...", *listed[-2:]])
