"""The command line: ``lightning-hift {fit,validate,test,predict,groups} --config file.yaml``."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from typing_extensions import override

from lightning_hift.attach import attach_engines
from lightning_hift.callback import HiFTCallback, describe_groups
from lightning_hift.offload import StateOffloader


class HiFTTrainer(pl.Trainer):
    """A Trainer that can also show the layer groups. ``LightningCLI`` makes a subcommand of each such method."""

    def groups(self, model: pl.LightningModule, datamodule: pl.LightningDataModule | None = None) -> None:
        """Print the layer groups of the model with their sizes, without data or training.

        A network that ``configure_model`` builds is built without memory for its weights, so the largest models fit.
        All trainable parameters are taken to be in one optimizer.

        Args:
            model: The module to look at; ``units``, ``frozen``, ``always_active`` and ``group_size`` are those of the
                Trainer's ``HiFTCallback``.
            datamodule: Not used.

        Raises:
            ValueError: The grouping does not fit the model.
        """
        callback = next((c for c in self.callbacks if isinstance(c, HiFTCallback)), HiFTCallback())  # type: ignore[attr-defined]
        with torch.device("meta"):
            model.configure_model()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        (engine,) = attach_engines(
            model,
            [optimizer],
            group_size=callback.group_size,
            units=callback.units,
            frozen=callback.frozen,
            always_active=callback.always_active,
            make_offloader=lambda: StateOffloader("cpu"),
            advance_on_step=False,  # nothing is to be frozen or stepped
        )
        print(describe_groups(engine.groups, engine.always_active))
        engine.close()


class SaveConfigToLogDir(SaveConfigCallback):
    """Saves the configuration beside the logs of the run; without a logger it saves nothing.

    Lightning's own would then write to the working folder, where ``config.yaml`` may be the user's.
    """

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class HiFTCLI(LightningCLI):
    """``LightningCLI`` with the ``HiFTCallback``'s arguments under ``hift:``, and ``strategy: hift`` by default.

    Use it in a script of your own, with your own classes::

        HiFTCLI(MyModule, MyDataModule)

    Args:
        model_class: See ``LightningCLI``; default: any class, named on the command line.
        datamodule_class: Likewise.
        save_config_callback: See ``LightningCLI``; default: saves to the folder of the logs, if there is one.
        save_config_kwargs: See ``LightningCLI``; here, a second run may overwrite the first one's file.
        trainer_class: A ``HiFTTrainer``, for the subcommand ``groups``.
        trainer_defaults: See ``LightningCLI``.
        args: Arguments instead of those of the process.
        kwargs: Everything else that ``LightningCLI`` takes.
    """

    def __init__(
        self,
        model_class: Any = None,
        datamodule_class: Any = None,
        save_config_callback: type[SaveConfigCallback] | None = SaveConfigToLogDir,
        save_config_kwargs: dict[str, Any] | None = None,
        trainer_class: type[HiFTTrainer] = HiFTTrainer,
        trainer_defaults: dict[str, Any] | None = None,
        args: ArgsType = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model_class,
            datamodule_class,
            save_config_callback,
            {"overwrite": True, **(save_config_kwargs or {})},
            trainer_class,
            {"strategy": "hift", **(trainer_defaults or {})},
            args=args,
            **kwargs,
        )

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands and ``groups``, with the arguments that are no options."""
        return {**LightningCLI.subcommands(), "groups": {"model", "datamodule"}}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``hift:``. A subclass that adds arguments of its own calls this one, too."""
        parser.usage = (
            "%(prog)s [--config FILE] [--help] [--KEY VALUE ...]"  # an error should not hide below all options
        )
        parser.add_lightning_class_args(HiFTCallback, "hift")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and try the values under ``hift:``, so that a bad one ends in a short message like any other."""
        super().parse_arguments(parser, args)
        config = self.config.get(self.config.get("subcommand") or "", self.config)
        try:
            HiFTCallback(**config["hift"])
        except ValueError as error:
            parser.error(f'Parser key "hift": {error}')

    def groups(self, **kwargs: Any) -> None:
        """Run the subcommand ``groups``; what does not fit the model ends in a short message."""
        try:
            self.trainer.groups(**kwargs)  # type: ignore[attr-defined]
        except ValueError as error:
            self.parser.error(str(error))


def main(args: ArgsType = None) -> None:
    """Entry point of ``lightning-hift`` and ``python -m lightning_hift``.

    Args:
        args: Arguments instead of those of the process.
    """
    HiFTCLI(args=args)
