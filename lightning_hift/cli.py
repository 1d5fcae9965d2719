"""The command line: ``lightning-hift {fit,validate,test,predict,groups,plan} --config file.yaml``, and ``export``."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace, get_loader, set_loader
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from typing_extensions import override
from yaml import YAMLError  # type: ignore[import-untyped]

from lightning_hift.distributed.ddp_strategy import HiFTDDPStrategy
from lightning_hift.distributed.fsdp_strategy import HiFTFSDPStrategy
from lightning_hift.distributed.sharded_checkpoint import consolidate
from lightning_hift.plugin.callback import HiFTCallback
from lightning_hift.plugin.offloading import OffloadingStrategy
from lightning_hift.plugin.strategy import HiFTStrategy
from lightning_hift.plugin.trainable import TrainOnly
from lightning_hift.plugin.training_speed import TrainingSpeed
from lightning_hift.tasks.export import export_checkpoint
from lightning_hift.trainer import HiFTTrainer

_STRATEGIES = (HiFTStrategy, HiFTDDPStrategy, HiFTFSDPStrategy)
_WITHOUT_A_RUN = ("groups", "plan")
_TRAINER_DEFAULTS = {"strategy": "hift", "enable_model_summary": False}
_NOISE = ("💡 Tip: ", "TPU available: False")  # how Lightning's messages that say nothing about a run begin
_SIMPLE = ("offload", "offload_directory", "master_weights", "max_group_numel", "activation_budget")  # no classes
_OTHER_SUBCOMMANDS = (
    "And: export a checkpoint to a folder; consolidate a sharded checkpoint to a file. See export --help and"
    " consolidate --help."
)
_FLAGS_OF_EXPORT = {
    "merge": "Work an adapter into the weights and write the whole model.",
    "overwrite": "Replace what an earlier export wrote to the folder.",
}


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

    With ``plain: true`` it is a ``LightningCLI`` without either, for what HiFT is compared with.

    Use it in a script of your own, with your own classes::

        HiFTCLI(MyModule, MyDataModule)

    Args:
        model_class: See ``LightningCLI``; default: any class, named on the command line.
        datamodule_class: Likewise.
        save_config_callback: See ``LightningCLI``; default: saves to the folder of the logs, if there is one.
        save_config_kwargs: See ``LightningCLI``; here, a second run may overwrite the first one's file.
        trainer_class: A ``HiFTTrainer``, for the subcommand ``groups``.
        trainer_defaults: See ``LightningCLI``; a ``TrainingSpeed`` joins its callbacks. Without a word on it, there is
            no model summary, as the table of layer groups shows more.
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
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_noise)
        self._until_made = ExitStack()
        load_yaml = get_loader("yaml")
        set_loader("yaml", partial(_keep_hashes, load_yaml), (YAMLError,))
        try:
            super().__init__(
                model_class,
                datamodule_class,
                save_config_callback,
                {"overwrite": True, **(save_config_kwargs or {})},
                trainer_class,
                {**_TRAINER_DEFAULTS, **(trainer_defaults or {}), "callbacks": _with_speed(trainer_defaults)},
                args=args,
                **kwargs,
            )
        finally:
            set_loader("yaml", load_yaml, (YAMLError,))
            self._until_made.close()

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands and ours, with the arguments that are no options."""
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in _WITHOUT_A_RUN}}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``hift``, ``plain`` and ``train_only``. A subclass that adds arguments of its own calls this one, too."""
        parser.usage = (
            "%(prog)s [--config FILE] [--help] [--KEY VALUE ...]"  # an error should not hide below all options
        )
        parser.add_lightning_class_args(HiFTCallback, "hift")
        parser.add_argument(
            "--plain",
            type=bool,
            default=False,
            help="Train all that is trainable at every step, by Lightning alone: no HiFTCallback, and strategy auto.",
        )
        parser.add_argument(
            "--train_only",
            type=list[str] | None,
            default=None,
            help="Freeze all but these: patterns of parameter names, and names of layer units. See TrainOnly.",
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and try the values under ``hift:`` and those of a strategy of ours."""
        if args is None:
            sys.argv[1:] = _with_underscores(sys.argv[1:])
        super().parse_arguments(parser, _with_underscores(args) if isinstance(args, list) else args)
        if self.config.get("subcommand") in _WITHOUT_A_RUN:
            self.config[self.config["subcommand"]]["seed_everything"] = False
            self._until_made.enter_context(WarningsOnly())
        config = self.config.get(self.config.get("subcommand") or "", self.config)
        if config["plain"]:
            _make_plain(parser, self.config.get("subcommand"), config)
        _try(parser, "hift", _make_callback, vars(config["hift"]))
        if config["train_only"] is not None:
            _try(parser, "train_only", TrainOnly, {"patterns": config["train_only"]})
        strategy = config["trainer"]["strategy"]
        if (kind := _kind_of(strategy)) is not None and not isinstance(strategy, str):
            given = vars(strategy.init_args)
            simple = {key: given[key] for key in _SIMPLE if key in given}
            _try(parser, "trainer.strategy", kind, simple)

    @override
    def instantiate_classes(self) -> None:
        """Make the classes; what one of them refuses is said in its own words."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:  # jsonargparse lists types and values around it
                cause = cause.__cause__
            raise cause from None

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the Trainer, with the ``HiFTCallback`` of ``hift:`` unless it is to be a plain one."""
        if self._get(self.config, "plain"):
            self._parser(self.subcommand).callback_keys.remove("hift")
        trainer = super().instantiate_trainer(**kwargs)
        patterns = self._get(self.config, "train_only")
        if patterns is not None:  # no entry of trainer.callbacks, which another file may replace
            trainer.callbacks.insert(0, TrainOnly(patterns))  # type: ignore[attr-defined]
        return trainer

    @override
    def before_instantiate_classes(self) -> None:
        """For a subcommand that runs nothing, make a Trainer that needs no GPU and no logger."""
        super().before_instantiate_classes()
        if self.subcommand in _WITHOUT_A_RUN:
            options = self.config[self.subcommand]["trainer"]
            if self.subcommand == "plan":
                _plan_for_devices(self.config["plan"])
            options["accelerator"], options["devices"], options["num_nodes"], options["logger"] = "cpu", 1, 1, False

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


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NOISE)


class WarningsOnly:
    """Keeps Lightning's words on devices and seeds, and its advertising, from where nothing is run."""

    def __enter__(self) -> None:
        self._levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
        for name in self._levels:
            logging.getLogger(name).setLevel(logging.WARNING)

    def __exit__(self, *error: object) -> None:
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)


def _try(parser: LightningArgumentParser, key: str, make: Callable[..., Any], arguments: Any) -> None:
    """Make what ``key`` describes, so that a bad value ends in a short message like any other."""
    try:
        make(**arguments)
    except ValueError as error:
        parser.error(f'Parser key "{key}": {error}')


def _make_plain(parser: LightningArgumentParser, subcommand: str | None, config: Any) -> None:
    """Take HiFT out of a configuration with ``plain: true``; what asks for it at the same time is an error."""
    defaults = {name: p.default for name, p in inspect.signature(HiFTCallback).parameters.items()}
    given = [f"{name}={value!r}" for name, value in vars(config["hift"]).items() if value != defaults[name]]
    if subcommand in _WITHOUT_A_RUN:
        parser.error(f"{subcommand} shows layer groups, and plain=true trains without. Leave plain out for it.")
    if given:
        parser.error(
            f'Parser key "hift": got {", ".join(given)} beside plain=true, which trains without HiFT. Drop one.'
        )
    strategy = config["trainer"]["strategy"]
    if strategy == HiFTStrategy.strategy_name:  # the default
        config["trainer"]["strategy"] = "auto"
    elif (kind := _kind_of(strategy)) is not None:
        parser.error(f"Got the strategy {kind.__name__} beside plain=true, which trains without HiFT. Drop one.")


def _kind_of(strategy: Any) -> type[OffloadingStrategy] | None:
    """Which of ours is meant by a name or a class path, if any."""
    name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", "").rpartition(".")[2]
    return next((kind for kind in _STRATEGIES if name in (kind.strategy_name, kind.__name__)), None)


def _plan_for_devices(options: Any) -> None:
    """Have ``plan`` take devices and strategy from the configuration of a Trainer that will be made for one CPU."""
    trainer = options["trainer"]
    per_host, strategy = _device_count(trainer["devices"]), trainer["strategy"]
    name = strategy if isinstance(strategy, str) else getattr(_kind_of(strategy), "strategy_name", None)
    if options["strategy"] is None and (
        name == HiFTFSDPStrategy.strategy_name or (options["devices"] is None and per_host > 1)
    ):
        options["strategy"] = name
    if options["devices"] is None:
        options["hosts"] = trainer["num_nodes"] if options["hosts"] is None else options["hosts"]
        options["devices"] = per_host * options["hosts"]


def _device_count(devices: Any) -> int:
    """How many on a host are meant by a Trainer's ``devices``; 1 if it is for the host to say."""
    if isinstance(devices, str):
        devices = devices.split(",") if "," in devices else int(devices) if devices.isdigit() else 1
    return len(devices) if isinstance(devices, list) else max(1, devices)


def _make_callback(policy: Any, **arguments: Any) -> HiFTCallback:
    """The callback, with a policy that is described in plain values; others are left to jsonargparse."""
    if not isinstance(policy, Namespace):
        return HiFTCallback(policy=policy, **arguments)
    values = vars(policy.init_args) if "init_args" in policy else {}
    if any(isinstance(value, Namespace) for value in values.values()):
        return HiFTCallback(**arguments)
    module, _, name = policy["class_path"].rpartition(".")
    return HiFTCallback(policy=getattr(import_module(module), name)(**values), **arguments)


def _keep_hashes(load_yaml: Callable[[str], Any], text: str) -> Any:
    """YAML's value, but a string such as ``#2 String``, a column's name, is itself rather than a comment on nothing.

    jsonargparse reads the strings of a file as YAML a second time, without their quotes.
    """
    value = load_yaml(text)
    return text if value is None and text.lstrip().startswith("#") else value


def _with_speed(trainer_defaults: dict[str, Any] | None) -> list[Any]:
    given = (trainer_defaults or {}).get("callbacks") or []
    return [*(given if isinstance(given, list) else [given]), TrainingSpeed()]


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
    elif isinstance(given, list) and given[:1] == ["consolidate"]:
        _consolidate(given[1:])
    else:
        HiFTCLI(args=args, parser_kwargs={"epilog": _OTHER_SUBCOMMANDS})


def _consolidate(args: list[str]) -> None:
    """Run the subcommand ``consolidate``."""
    parser = LightningArgumentParser(prog="lightning-hift consolidate", description="")
    parser.add_function_arguments(consolidate, as_positional=False)
    options = parser.parse_args(args)
    try:
        consolidate(**options)
        print(f"Written to {options.output}")
    except (ValueError, RuntimeError, OSError) as error:
        parser.error(str(error))


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
