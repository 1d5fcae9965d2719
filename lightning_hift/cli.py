"""The command line: ``lightning-hift {fit,validate,test,predict,groups,plan} --config file.yaml``, and ``export``."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from typing_extensions import override

from lightning_hift.attach import find_groups
from lightning_hift.callback import HiFTCallback
from lightning_hift.memory import parse_bytes
from lightning_hift.planner.forecast import Setup
from lightning_hift.planner.plan import SUSTAINED_FLOPS, make_plan
from lightning_hift.planner.report import plot_plan, write_markdown
from lightning_hift.report import describe_groups
from lightning_hift.strategy import HiFTStrategy
from lightning_hift.tasks.export import export_checkpoint

_WITHOUT_A_RUN = ("groups", "plan")
_SIMPLE = ("offload", "offload_directory", "master_weights", "max_group_numel", "activation_budget")  # no classes
_FLAGS_OF_EXPORT = {
    "merge": "Work an adapter into the weights and write the whole model.",
    "overwrite": "Replace what an earlier export wrote to the folder.",
}


class HiFTTrainer(pl.Trainer):
    """A Trainer that can also show layer groups and memory. ``LightningCLI`` makes a subcommand of each such method."""

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
        callback = self._hift()
        with torch.device("meta"):
            model.configure_model()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        (found,) = find_groups(model, [optimizer], **callback.grouping)
        print(describe_groups(found.groups, found.always_active))

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
    ) -> None:
        """Print what a fit with this configuration will need, without a GPU, data or training.

        A network that ``configure_model`` builds is built without memory for its weights. Precision and strategy are
        those of the Trainer, the layer groups those of its ``HiFTCallback``.

        Args:
            model: The module to plan for.
            datamodule: Its ``batch_size`` and ``sequence_length``, if it has them, are the defaults.
            batch_size: Rows per micro-batch; without a data module that says it: 1.
            sequence_length: Tokens per row; without a data module that says it: 512.
            device_memory: Memory of the device, such as 24GiB. With it, what does not fit is answered by what does.
            host_memory: Memory of the host that is free, likewise.
            link: Speed of copies between host and device, each way.
            tflops: What the device sustains on this model, in 10^12 operations per second; default: 40 % of an A100.
            compare: Also plan full fine-tuning and other kinds of master weights. Takes several times as long.
            plot: File for a picture of the device memory by group.
            report: File for the plan in Markdown.

        Raises:
            ValueError: An argument is out of range, or the grouping does not fit the model.
            RuntimeError: A plot is asked for, but matplotlib is not installed.
        """
        with torch.device("meta"):
            model.configure_model()
        callback = self._hift()
        found = make_plan(
            model,
            Setup(
                precision=str(self.precision),
                group_size=callback.group_size,
                batch_size=_first_given(batch_size, getattr(datamodule, "batch_size", None), 1),
                sequence_length=_first_given(sequence_length, getattr(datamodule, "sequence_length", None), 512),
                **self._strategy_setup(),
            ),
            units=callback.units,
            frozen=callback.frozen,
            always_active=callback.always_active,
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

    def _hift(self) -> HiFTCallback:
        return next((c for c in self.callbacks if isinstance(c, HiFTCallback)), HiFTCallback())  # type: ignore[attr-defined]

    def _strategy_setup(self) -> dict[str, Any]:
        """Arguments of the strategy that a plan depends on; a strategy without them has the defaults of ``Setup``."""
        names = ("offload", "prefetch", "master_weights", "max_group_numel", "activation_budget")
        given = {name: getattr(self.strategy, name) for name in names if hasattr(self.strategy, name)}
        if given.get("activation_budget") is not None:
            given["activation_budget"] = parse_bytes(given["activation_budget"], "activation_budget")
        return given


def _bytes_per_second(link: str) -> int:
    try:
        return parse_bytes(link.removesuffix("/s"), "link")
    except ValueError as error:
        raise ValueError(f"Got link={link!r}; it must be a speed above 0, such as '25GB/s' or '12GiB/s'.") from error


def _first_given(*values: int | None) -> int:
    return next(value for value in values if value is not None)


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
        self._quieted: dict[logging.Logger, int] = {}
        try:
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
        finally:
            for logger, level in self._quieted.items():
                logger.setLevel(level)

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands and ours, with the arguments that are no options."""
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in _WITHOUT_A_RUN}}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``hift:``. A subclass that adds arguments of its own calls this one, too."""
        parser.usage = (
            "%(prog)s [--config FILE] [--help] [--KEY VALUE ...]"  # an error should not hide below all options
        )
        parser.add_lightning_class_args(HiFTCallback, "hift")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and try the values under ``hift:`` and those of a ``HiFTStrategy``."""
        if args is None:
            sys.argv[1:] = _with_underscores(sys.argv[1:])
        super().parse_arguments(parser, _with_underscores(args) if isinstance(args, list) else args)
        if self.config.get("subcommand") in _WITHOUT_A_RUN:
            self.config[self.config["subcommand"]]["seed_everything"] = False
            for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric")):
                self._quieted[logger] = logger.level
                logger.setLevel(logging.WARNING)  # devices and seeds are of no interest, nor is advertising
        config = self.config.get(self.config.get("subcommand") or "", self.config)
        _try(parser, "hift", HiFTCallback, config["hift"])
        strategy = config["trainer"]["strategy"]
        if getattr(strategy, "class_path", "").rpartition(".")[2] == HiFTStrategy.__name__:
            given = vars(strategy.init_args)
            simple = {key: given[key] for key in _SIMPLE if key in given}
            _try(parser, "trainer.strategy", HiFTStrategy, simple)

    @override
    def before_instantiate_classes(self) -> None:
        """For a subcommand that runs nothing, make a Trainer that needs no GPU and no logger."""
        super().before_instantiate_classes()
        if self.subcommand in _WITHOUT_A_RUN:
            options = self.config[self.subcommand]["trainer"]
            options["accelerator"], options["devices"], options["logger"] = "cpu", 1, False

    def groups(self, **kwargs: Any) -> None:
        """Run the subcommand ``groups``; what does not fit the model ends in a short message."""
        self._show("groups", **kwargs)

    def plan(self, **kwargs: Any) -> None:
        """Run the subcommand ``plan``; what cannot be planned ends in a short message."""
        self._show("plan", **kwargs)

    def _show(self, subcommand: str, **kwargs: Any) -> None:
        try:
            getattr(self.trainer, subcommand)(**kwargs)
        except (ValueError, RuntimeError, OSError) as error:
            self.parser.error(str(error))


def _try(parser: LightningArgumentParser, key: str, make: Callable[..., Any], arguments: Any) -> None:
    """Make what ``key`` describes, so that a bad value ends in a short message like any other."""
    try:
        make(**arguments)
    except ValueError as error:
        parser.error(f'Parser key "{key}": {error}')


def _with_underscores(args: Sequence[str]) -> list[str]:
    """Options of ``plan`` as Python spells them: ``--batch-size`` becomes ``--batch_size``."""
    known = {f"--{name.replace('_', '-')}" for name in inspect.signature(HiFTTrainer.plan).parameters}

    def spelled(arg: str) -> str:
        name, *value = arg.split("=", 1)
        return "=".join([name[:2] + name[2:].replace("-", "_"), *value]) if name in known else arg

    return [spelled(arg) for arg in args]


def main(args: ArgsType = None) -> None:
    """Entry point of ``lightning-hift`` and ``python -m lightning_hift``.

    Args:
        args: Arguments instead of those of the process.
    """
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list) and given[:1] == ["export"]:
        _export(given[1:])
    else:
        HiFTCLI(args=args, parser_kwargs={"epilog": "And: export a checkpoint to a folder; see export --help."})


def _export(args: list[str]) -> None:
    """Run the subcommand ``export``, which needs no Trainer, model or data."""
    parser = LightningArgumentParser(prog="lightning-hift export", description="")
    parser.add_function_arguments(export_checkpoint, skip=set(_FLAGS_OF_EXPORT))
    for name, told in _FLAGS_OF_EXPORT.items():
        parser.add_argument(f"--{name}", action="store_true", help=told)
    options = parser.parse_args(args)
    try:
        print(f"Written to {export_checkpoint(**options)}")
    except (ValueError, RuntimeError, OSError) as error:
        parser.error(str(error))
