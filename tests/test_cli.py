"""The command line: hift: key, subcommands, short errors, and what is written where."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelSummary
from torch import Tensor, nn

from lightning_hift import HiFTCallback, HiFTStrategy
from lightning_hift.cli import HiFTCLI, HiFTTrainer, main
from tests.models import as_published


class Network(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(2, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(2)
        )
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Regression(pl.LightningModule):
    """A user's own module."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.width = width
        self.network: nn.Module | None = None

    def configure_model(self) -> None:
        if self.network is None:
            self.network = Network(self.width)

    def loss(self, batch: Tensor) -> Tensor:
        assert self.network is not None
        return (self.network(batch) - batch.sum(-1, keepdim=True)).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Points(pl.LightningDataModule):
    """Eight batches of random points, without a DataLoader's advice about workers."""

    def __init__(self, batch_size: int = 3) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return Batches(torch.randn(8, self.batch_size, 2))

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Batches:
    def __init__(self, batches: Tensor) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


# Lightning 2.6 calls jsonargparse by names that it calls old.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:[\s\S]*deprecated in v4"),
    pytest.mark.filterwarnings(r"ignore:[\s\S]*JsonargparseDeprecationWarning"),
]

CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "hift": {"group_size": 2, "order": "top2down", "always_active": ["head"]},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 3,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    },
    "model": {"class_path": "tests.test_cli.Regression"},
    "data": {"class_path": "tests.test_cli.Points"},
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a command writes, it writes here; and a command sees no arguments of pytest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-hift"])


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return str(path)


def run_cli(*args: str, model: Any = None, data: Any = None, **options: Any) -> HiFTCLI:
    return HiFTCLI(model, data, args=list(args), **options)


def callback_of(cli: HiFTCLI) -> HiFTCallback:
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, HiFTCallback)]  # type: ignore[attr-defined]
    return callback


def test_fit_shows_the_groups_without_advertising_or_a_second_summary(
    config: str, caplog: pytest.LogCaptureFixture
) -> None:
    del (changed := yaml.safe_load(Path(config).read_text()))["trainer"]["enable_model_summary"]
    Path(config).write_text(yaml.safe_dump(changed))
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    try:
        cli = run_cli("fit", "--config", config)
    finally:
        logger.removeHandler(caplog.handler)
    assert not any(isinstance(callback, ModelSummary) for callback in cli.trainer.callbacks)  # type: ignore[attr-defined]
    assert "HiFT: top2down over 2 layer groups" in caplog.text
    assert "GPU available" in caplog.text
    assert "Tip" not in caplog.text
    assert "TPU" not in caplog.text


def test_an_optimizer_keeps_its_own_defaults(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Not those of AdamW, which a task uses where none is named."""
    path = Path(config)
    model = {"class_path": "lightning_hift.tasks.CausalLM", "init_args": {"model_type": "gpt2"}}
    model["init_args"] |= {"optimizer": {"class_path": "torch.optim.Adagrad"}}  # type: ignore[operator]
    path.write_text(yaml.safe_dump({**CONFIG, "model": model}))
    with pytest.raises(SystemExit):
        run_cli("fit", "--config", config, "--print_config")
    chosen = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optimizer"]["init_args"]
    assert (chosen["lr"], chosen["eps"], chosen["weight_decay"]) == (1e-2, 1e-10, 0)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"model": {"class_path": "lightning_hift.tasks.CausalLM"}}, "^Got model=None and model_type=None; give one"),
        (
            {
                "data": {
                    "class_path": "lightning_hift.data.ClassificationDataModule",
                    "init_args": {"files": {"trian": "a.csv"}},
                }
            },
            r"^Got the split 'trian'; there are train, validation, test, predict\.$",
        ),
    ],
)
def test_what_a_class_refuses_is_said_in_its_words(config: str, part: dict[str, Any], message: str) -> None:
    Path(config).write_text(yaml.safe_dump({**CONFIG, **part}))
    with pytest.raises(ValueError, match=message):
        run_cli("fit", "--config", config)


def test_yaml_reaches_the_callback_and_the_strategy(config: str) -> None:
    cli = run_cli("fit", "--config", config, "--trainer.logger", "false", "--trainer.enable_checkpointing", "false")
    callback = callback_of(cli)
    assert (callback.group_size, callback.order, callback.always_active) == (2, "top2down", ["head"])
    assert isinstance(cli.trainer.strategy, HiFTStrategy)
    assert cli.trainer.global_step == 3
    assert [group.name for group in callback.groups] == ["embedding ... network.blocks.0", "network.blocks.1"]


def test_command_line_wins_over_yaml(config: str) -> None:
    cli = run_cli("fit", "--config", config, "--hift.group_size", "1", "--trainer.logger", "false")
    assert callback_of(cli).group_size == 1


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_other_subcommands_run(subcommand: str, config: str) -> None:
    cli = run_cli(subcommand, "--config", config, "--trainer.logger", "false")
    assert cli.trainer.state.finished
    assert callback_of(cli).engines == ()


def test_own_classes_and_defaults() -> None:
    cli = run_cli(
        "fit",
        "--model.width=8",
        "--data.batch_size=2",
        "--hift.order=random",
        model=Regression,
        data=Points,
        trainer_defaults={"accelerator": "cpu", "max_steps": 2, "logger": False, "enable_progress_bar": False},
        seed_everything_default=1,
    )
    assert cli.model.width == 8
    assert cli.datamodule.batch_size == 2
    assert callback_of(cli).order == "random"
    assert isinstance(cli.trainer.strategy, HiFTStrategy)


def test_another_strategy_can_be_chosen(config: str) -> None:
    cli = run_cli("fit", "--config", config, "--trainer.strategy", "auto", "--trainer.logger", "false")
    assert not isinstance(cli.trainer.strategy, HiFTStrategy)
    assert len(callback_of(cli).engines) == 1


def test_a_subclass_can_add_arguments(config: str) -> None:
    class OwnCLI(HiFTCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            super().add_arguments_to_parser(parser)
            parser.link_arguments("data.batch_size", "model.width")

    cli = OwnCLI(Regression, Points, args=["--data.batch_size=5"], run=False, seed_everything_default=0)
    assert cli.model.width == 5
    assert callback_of(cli).group_size == "balanced"


# --- plain ------------------------------------------------------------------------------------------------------------

QUIET = ("--trainer.logger", "false", "--trainer.enable_checkpointing", "false")


def test_plain_is_lightning_alone(config: str) -> None:
    without = {**CONFIG, "plain": True}
    del without["hift"]
    Path(config).write_text(yaml.safe_dump(without))
    cli = run_cli("fit", "--config", config, *QUIET)
    assert not any(isinstance(c, HiFTCallback) for c in cli.trainer.callbacks)  # type: ignore[attr-defined]
    assert type(cli.trainer.strategy).__name__ == "SingleDeviceStrategy"
    assert cli.trainer.global_step == 3


def test_plain_can_be_saved_and_run_again(config: str, tmp_path: Path) -> None:
    without = {key: value for key, value in CONFIG.items() if key != "hift"}
    Path(config).write_text(yaml.safe_dump({**without, "plain": True, "train_only": ["head"]}))
    run_cli("fit", "--config", config)
    saved = tmp_path / "lightning_logs" / "version_0" / "config.yaml"
    assert yaml.safe_load(saved.read_text())["trainer"]["strategy"] == "auto"
    cli = run_cli("validate", "--config", str(saved), *QUIET)
    assert not any(isinstance(c, HiFTCallback) for c in cli.trainer.callbacks)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("fit --plain=true", "got group_size=2, order='top2down', always_active=['head'] beside plain=true"),
        ("groups --plain=true", "groups shows layer groups, and plain=true trains without"),
        ("plan --plain=true", "plan shows layer groups, and plain=true trains without"),
        ("fit --plain=maybe", "plain"),
        ("fit --train_only=[]", "Got no patterns in TrainOnly"),
    ],
)
def test_what_does_not_go_with_plain_is_a_short_message(
    arguments: str, message: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    subcommand, *rest = arguments.split()
    with pytest.raises(SystemExit, match="2"):
        run_cli(subcommand, "--config", config, *rest)
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) <= 8


def test_plain_refuses_the_strategy_of_hift(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    without = {key: value for key, value in CONFIG.items() if key != "hift"}
    Path(config).write_text(yaml.safe_dump(without))
    strategy = ["--trainer.strategy", "lightning_hift.HiFTStrategy", "--trainer.strategy.offload", "none"]
    with pytest.raises(SystemExit, match="2"):
        run_cli("fit", "--config", config, "--plain=true", *strategy)
    assert "the strategy HiFTStrategy beside plain=true" in capsys.readouterr().err


def test_train_only_goes_with_hift_and_survives_other_callbacks(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ["--train_only=[head, embedding]", "--hift.always_active=null", "--hift.group_size=1"]
    more = "--trainer.callbacks=lightning.pytorch.callbacks.ModelSummary"
    cli = run_cli("fit", "--config", config, *only, more, *QUIET)
    assert [group.name for group in callback_of(cli).groups] == ["embedding", "head"]
    run_cli("groups", "--config", config, *only)
    assert "of 17 parameters" in capsys.readouterr().out


# --- groups -----------------------------------------------------------------------------------------------------------


def test_groups_prints_the_table_without_data(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = run_cli("groups", "--config", config)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["group", "units", "parameters", "bytes", "share", "depth", "lr"]
    assert lines[2].split()[:6] == ["0", "embedding", "...", "network.blocks.0", "52", "208"]
    assert lines[4].split()[:3] == ["all", "head", "5"]
    assert lines[5].startswith("At most 57 of 97 parameters train at once")
    assert all(p.is_meta and p.requires_grad for p in cli.model.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_groups_honours_units_and_frozen(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--hift.always_active", "null", "--hift.group_size", "1"]
    units = "[[network.embedding, network.head], 'network.blocks.*']"
    run_cli("groups", "--config", config, *options, "--hift.units", units)
    names = [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:5]]
    assert names == ["network.embedding", "network.blocks.0", "network.blocks.1"]
    run_cli("groups", "--config", config, *options, "--hift.frozen", "[network.embedding]")
    assert "of 85 parameters" in capsys.readouterr().out


def test_groups_needs_no_data_module(capsys: pytest.CaptureFixture[str]) -> None:
    run_cli("groups", "--model", "tests.test_cli.Regression", "--seed_everything", "0")
    assert "of 97 parameters" in capsys.readouterr().out


def test_groups_from_python(capsys: pytest.CaptureFixture[str]) -> None:
    HiFTTrainer(accelerator="cpu", callbacks=as_published(group_size=4), logger=False).groups(Regression())
    assert "At most 97 of 97 parameters" in capsys.readouterr().out


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("fit --hift.order=up", "'bottom2up', 'top2down', 'random'"),
        ("fit --hift.group_size=big", "Got group_size='big'; it must be a whole number of at least 1, or 'balanced'"),
        ("fit --hift.group_size=0", "Got group_size=0; it must be a whole number of at least 1"),
        ("fit --hift.reshuffle=true", "only order='random' can be shuffled again"),
        ("fit --hift.hold_lr=never", "'replay', 'once', 'off'"),
        ("fit --hift.sise=1", "hift.sise"),
        ("groups --hift.always_active=[tail]", "Pattern 'tail' matches no layer unit; the units are embedding"),
        ("train", "fit"),
    ],
)
def test_bad_values_end_in_a_short_message(
    arguments: str, message: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    subcommand, *rest = arguments.split()
    with pytest.raises(SystemExit) as stopped:
        run_cli(subcommand, "--config", config, *rest)
    shown = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in shown
    assert len(shown.splitlines()) <= 8


def test_a_bad_value_in_the_file_ends_in_a_short_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**CONFIG, "hift": {"order": "down2up"}}))
    with pytest.raises(SystemExit) as stopped:
        run_cli("fit", "--config", "bad.yaml")
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "The paper's name, used here, is 'bottom2up'" in message
    assert "'bottom2up', 'top2down', 'random'" in message


# --- files ------------------------------------------------------------------------------------------------------------


def test_runs_write_to_the_log_folder_only_and_can_be_repeated(config: str, tmp_path: Path) -> None:
    for _ in range(2):
        run_cli("fit", "--config", config)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.yaml", "lightning_logs"}
    saved = tmp_path / "lightning_logs" / "version_1" / "config.yaml"
    assert yaml.safe_load(saved.read_text())["hift"]["order"] == "top2down"
    run_cli("fit", "--config", str(saved), "--trainer.logger", "false", "--trainer.enable_checkpointing", "false")


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_a_log_folder_can_be_used_again(config: str) -> None:
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs", "--trainer.logger.version", "mine"]
    steps = [run_cli("validate", "--config", config, *logger).trainer.state.finished for _ in range(2)]
    assert steps == [True, True]


def test_without_a_logger_nothing_is_written(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("the user's own\n")
    run_cli("fit", "--config", config, "--trainer.logger", "false", "--trainer.enable_checkpointing", "false")
    assert {path.name for path in tmp_path.iterdir()} == {"mine.yaml", "config.yaml"}
    assert (tmp_path / "config.yaml").read_text() == "the user's own\n"


# --- entry points -----------------------------------------------------------------------------------------------------


def test_main_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["--help"], "groups"),
        (["fit", "--help"], "Literal['bottom2up', 'top2down',"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
        assert expected in capsys.readouterr().out


@pytest.mark.slow  # so do the tests of the quickstart and of launching
def test_module_runs_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lightning_hift", "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "{fit,validate,test,predict,groups,plan}" in done.stdout


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("offload", "disk", "offload_directory"),
        ("activation_budget", "lots", "activation_budget='lots'"),
        ("max_group_numel", "0", "Got max_group_numel=0; it must be at least 1"),
    ],
)
def test_a_bad_value_of_the_strategy_is_a_short_message(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    strategy = ["--trainer.strategy", "lightning_hift.HiFTStrategy", f"--trainer.strategy.{option}", value]
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *strategy, "--model", "lightning_hift.tasks.CausalLM", "--model.model_type", "llama"])
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert len(told.splitlines()) < 8


@pytest.mark.parametrize(
    ("option", "message"), [("--link=0GB/s", "Got link='0GB/s'; it must be a speed above 0"), ("--tflops=0", "above 0")]
)
def test_speeds_of_a_plan_are_above_zero(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", "lightning_hift.tasks.CausalLM", "--model.model_type", "llama"]
    with pytest.raises(SystemExit, match="2"):
        main(["plan", *model, '--model.model_config={"num_hidden_layers": 1}', option])
    assert message in capsys.readouterr().err
