"""The Trainer of the command line, whose methods are its subcommands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.utilities.types import _PREDICT_OUTPUT
from typing_extensions import override

from lightning_hift.engine.lr_scale import lr_scales
from lightning_hift.engine.optimizer_groups import find_groups
from lightning_hift.groups.report import describe_groups
from lightning_hift.planner.memory import parse_bytes
from lightning_hift.planner.plan import SUSTAINED_FLOPS, make_plan
from lightning_hift.planner.plot import plot_plan
from lightning_hift.planner.report import Plan, write_markdown
from lightning_hift.planner.setup import Setup
from lightning_hift.plugin.callback import HiFTCallback, find_callback
from lightning_hift.plugin.predictions import PredictionWriter
from lightning_hift.plugin.strategy import HiFTStrategy
from lightning_hift.plugin.trainable import TrainOnly


class HiFTTrainer(pl.Trainer):
    """A Trainer that can also show layer groups and memory, and writes predictions to a file.

    ``LightningCLI`` makes a subcommand of each such method.
    """

    def groups(self, model: pl.LightningModule, datamodule: pl.LightningDataModule | None = None) -> None:
        """Print the layer groups of the model with their sizes, without data or training.

        A network that ``configure_model`` builds is built without memory for its weights, so the largest models fit.
        All trainable parameters are taken to be in one optimizer.

        Args:
            model: The module to look at; how groups are formed is as the Trainer's ``HiFTCallback`` says.
            datamodule: Not used.

        Raises:
            ValueError: The grouping does not fit the model.
        """
        callback = self._hift()
        self._build(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        (found,) = find_groups(model, [optimizer], callback.grouping)
        policy = callback.policy.bound_to(found.groups)
        scales = lr_scales(callback.options.scale, policy, len(found.groups))
        print(describe_groups(found.groups, found.always_active, policy.most_groups, scales))

    def plan(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        batch_size: int | None = None,
        sequence_length: int | None = None,
        device_memory: str | None = None,
        host_memory: str | None = None,
        link: str = "25GB/s",
        tflops: float = SUSTAINED_FLOPS / 1e12,
        compare: bool = True,
        plot: str | None = None,
        report: str | None = None,
        strategy: str | None = None,
        devices: int | None = None,
        hosts: int | None = None,
        partition_state: bool | None = None,
    ) -> None:
        """Print what a fit with this configuration will need, without a GPU, data or training.

        A network that ``configure_model`` builds is built without memory for its weights. Precision and strategy are
        those of the Trainer, the layer groups those of its ``HiFTCallback``.

        Args:
            model: The module to plan for.
            datamodule: Its ``batch_size`` and ``sequence_length``, if it has them, are the defaults.
            batch_size: Rows per micro-batch; without a data module that says it: 1.
            sequence_length: Tokens per row; without a data module that says it: 512.
            device_memory: Memory of each device, such as 24GiB. With it, what does not fit is answered by what does.
            host_memory: Memory of each host that is free, likewise.
            link: Speed of copies between host and device, each way.
            tflops: What the device sustains on this model, in 10^12 operations per second; default: 40 % of an A100.
            compare: Also plan full fine-tuning and other kinds of master weights. Takes several times as long.
            plot: File for a picture of the device memory by group.
            report: File for the plan in Markdown.
            strategy: How several devices share the run, hift_ddp or hift_fsdp; default: as the Trainer's, or hift_ddp.
            devices: In all, on all hosts; default: those of the Trainer, or 1 where it takes what it finds.
            hosts: With as many devices each; default: the Trainer's num_nodes, or 1 beside devices.
            partition_state: With hift_ddp, share the optimizer state among the devices; default: as the strategy does.

        Raises:
            ValueError: An argument is out of range, or the grouping does not fit the model.
            RuntimeError: A plot is asked for, but matplotlib is not installed.
        """
        found = self.make_plan(
            model,
            datamodule,
            _given(
                batch_size=batch_size,
                sequence_length=sequence_length,
                strategy=strategy,
                devices=devices,
                hosts=hosts,
                partition_state=partition_state,
            ),
            device_memory=parse_bytes(device_memory, "device_memory") if device_memory else None,
            host_memory=parse_bytes(host_memory, "host_memory") if host_memory else None,
            link=_bytes_per_second(link),
            sustained_flops=tflops * 1e12,
            compare=compare,
        )
        print(found)
        if plot:
            plot_plan(found, plot)
        if report:
            write_markdown(found, report)

    def make_plan(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        setup: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Plan:
        """What ``plan`` prints; see there.

        Args:
            model: The module to plan for.
            datamodule: See ``plan``.
            setup: Fields of ``Setup`` that are not to be those of the Trainer and the data module. For several devices
                ``strategy`` is that of the Trainer, or ``"hift_ddp"`` if that is for one.
            options: Everything else that ``lightning_hift.planner.plan.make_plan`` takes.
        """
        self._build(model)
        callback = self._hift()
        sizes = {name: getattr(datamodule, name, None) for name in ("batch_size", "sequence_length")}
        own = {"precision": str(self.precision), "group_size": callback.turns.group_size, **_given(**sizes)}
        return make_plan(
            model,
            Setup(**{**own, **self._strategy_setup(), **self._devices_setup(setup or {}), **(setup or {})}),
            policy=callback.policy,
            units=callback.options.units,
            frozen=callback.options.frozen,
            always_active=callback.options.always_active,
            **options,
        )

    @override
    def predict(
        self,
        model: pl.LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: pl.LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: _PATH | None = None,
        weights_only: bool | None = None,
        predictions: str | None = "predictions.jsonl",
    ) -> _PREDICT_OUTPUT | None:
        """Predict, and write one JSON record per input to a file, in the order of the inputs.

        Args:
            model: See ``Trainer.predict``.
            dataloaders: Likewise.
            datamodule: Likewise.
            return_predictions: Keep them in memory, too, and return them; default: only if no file is written.
            ckpt_path: Checkpoint with the weights to predict with.
            weights_only: See ``Trainer.predict``.
            predictions: File to write, in the place of one that is there; ``null`` writes none. A ``PredictionWriter``
                among the Trainer's callbacks takes precedence.
        """
        callbacks: list[Any] = self.callbacks  # type: ignore[attr-defined]
        writers = [callback for callback in callbacks if isinstance(callback, PredictionWriter)]
        added = [PredictionWriter(predictions)] if predictions and not writers else []
        if return_predictions is None:
            return_predictions = not (added or writers)
        callbacks += added
        try:
            return super().predict(model, dataloaders, datamodule, return_predictions, ckpt_path, weights_only)
        finally:
            for writer in added:
                callbacks.remove(writer)

    def _build(self, model: pl.LightningModule) -> None:
        """Build the network without memory for its weights, and freeze what a fit would."""
        with torch.device("meta"):
            model.configure_model()
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, TrainOnly):
                callback.freeze(model)

    def _hift(self) -> HiFTCallback:
        return find_callback(self) or HiFTCallback()

    def _strategy_setup(self) -> dict[str, Any]:
        """Arguments of the strategy that a plan depends on; a strategy without them has the defaults of ``Setup``."""
        options = getattr(self.strategy, "options", None)
        names = ("offload", "prefetch", "master_weights", "max_group_numel")
        given = {name: getattr(options, name) for name in names} if options is not None else {}
        for name in ("activation_budget", "partition_state"):
            if hasattr(self.strategy, name):
                given[name] = getattr(self.strategy, name)
        if given.get("activation_budget") is not None:
            given["activation_budget"] = parse_bytes(given["activation_budget"], "activation_budget")
        return given

    def _devices_setup(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the Trainer, and its strategy, as far as it makes a difference."""
        found = {"devices": self.num_devices * self.num_nodes, "hosts": self.num_nodes}
        name = str(getattr(self.strategy, "strategy_name", type(self.strategy).__name__))
        if given.get("devices", found["devices"]) > 1:
            return {**found, "strategy": "hift_ddp" if name == HiFTStrategy.strategy_name else name}
        return {**found, "strategy": name} if getattr(self.strategy, "partition_state", False) else found


def _bytes_per_second(link: str) -> int:
    try:
        return parse_bytes(link.removesuffix("/s"), "link")
    except ValueError as error:
        raise ValueError(f"Got link={link!r}; it must be a speed above 0, such as '25GB/s' or '12GiB/s'.") from error


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
