"""Checkpoints through the Trainer: exact resume, exchange with plain Lightning, whole files whatever happens."""

import multiprocessing
import os
import random
import signal
import time
import tracemalloc
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_hift import HiFTStrategy, StreamingCheckpointIO, SweepSchedule
from lightning_hift.groups.fingerprint import make_fingerprint
from lightning_hift.groups.grouping import LayerGroup, LayerUnit
from tests.matrices import crossed
from tests.models import (
    Automatic,
    Manual,
    ResumableLoader,
    as_published,
    assert_same_weights,
    loader,
    tokens,
    trainer,
    weights,
)
from tests.plugin.test_trainer import LaggingStrategy

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}
WAYS_IN = {
    "strategy": lambda: {"strategy": HiFTStrategy(), "callbacks": [random_order()]},
    "callback": lambda: {"callbacks": [random_order()]},
    "lagging": lambda: {"strategy": LaggingStrategy(), "callbacks": [random_order()]},
}


def random_order():
    return as_published(order="random", reshuffle=True, seed=4)


def schedule(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 7) * 0.97**step)


def state_of(run):
    return [s for o in run.optimizers for s in o.state_dict()["state"].values()]


def assert_same_run(a, b):
    """Weights, optimizer state, learning rate."""
    assert_same_weights(a.lightning_module, b.lightning_module)
    for first, second in zip(state_of(a), state_of(b), strict=True):
        assert all(torch.equal(torch.as_tensor(first[k]), torch.as_tensor(second[k])) for k in first)
    assert a.optimizers[0].param_groups[0]["lr"] == b.optimizers[0].param_groups[0]["lr"]
    assert a.global_step == b.global_step


CASES = {
    "automatic-adamw-strategy": (Automatic, "adamw", "strategy"),
    "automatic-adamw-callback": (Automatic, "adamw", "callback"),
    "automatic-sgd_momentum-callback": (Automatic, "sgd_momentum", "callback"),
    "automatic-adagrad-strategy": (Automatic, "adagrad", "strategy"),
    "automatic-adagrad-lagging": (Automatic, "adagrad", "lagging"),
    "manual-adamw-lagging": (Manual, "adamw", "lagging"),
    "manual-sgd_momentum-strategy": (Manual, "sgd_momentum", "strategy"),
}


@pytest.mark.parametrize(("case", "cut", "saved_by"), crossed(CASES, [3, 5, 8], ["checkpoint_callback", "after_fit"]))
def test_resumed_in_the_middle_of_sweep_and_epoch(case, cut, saved_by, tmp_path):
    module, optimizer, way = CASES[case]

    def start(steps, **options):
        model = module(OPTIMIZERS[optimizer], schedule)
        way_in = WAYS_IN[way]()
        way_in["callbacks"] += options.pop("callbacks", [])
        return model, trainer(**way_in, max_epochs=-1, max_steps=steps, enable_checkpointing=True, **options)

    batches = tokens(9)  # epochs of 9 steps, sweeps of 5
    model, whole = start(13, callbacks=[ModelCheckpoint(tmp_path / "whole", save_top_k=0)])
    whole.fit(model, ResumableLoader(batches))

    model, first = start(cut, callbacks=[ModelCheckpoint(tmp_path, filename="cut", every_n_train_steps=cut)])
    first.fit(model, ResumableLoader(batches))
    path = tmp_path / "cut.ckpt"
    if saved_by == "after_fit":
        path = tmp_path / "after.ckpt"
        first.save_checkpoint(path)
        assert first.lr_scheduler_configs[0].scheduler.last_epoch == cut

    model, second = start(13, callbacks=[ModelCheckpoint(tmp_path / "second", save_top_k=0)])
    rest = ResumableLoader(batches)
    if saved_by == "after_fit":
        rest.load_state_dict({"next": cut})
    second.fit(model, rest, ckpt_path=path, weights_only=True)
    assert_same_run(whole, second)


@pytest.mark.parametrize("way", ["strategy", "callback"])
@pytest.mark.parametrize("cut", [4, 9])
def test_a_resumed_run_draws_the_same_dropout(way, cut, tmp_path):
    def fit(steps, seed, path=None):
        model = Automatic()
        for block in model.net.blocks:
            block.register_forward_hook(lambda block, _, out: nn.functional.dropout(out, 0.3, block.training))
        way_in = WAYS_IN[way]()
        way_in["callbacks"].append(ModelCheckpoint(tmp_path, "cut", every_n_train_steps=steps))
        run = trainer(**way_in, max_steps=steps, max_epochs=-1, enable_checkpointing=True)
        torch.manual_seed(seed)
        run.fit(model, ResumableLoader(batches), ckpt_path=path, weights_only=path is not None)
        return run

    batches = tokens(9)
    whole = fit(13, seed=1)
    (tmp_path / "cut.ckpt").unlink()
    fit(cut, seed=1)
    assert_same_run(whole, fit(13, seed=2, path=tmp_path / "cut.ckpt"))


@pytest.mark.parametrize("way", ["strategy", "callback"])
@pytest.mark.parametrize("cut", [2, 4])
def test_resumed_at_the_end_of_an_accumulation_window(way, cut, tmp_path):
    def start(steps, callbacks=()):
        way_in = WAYS_IN[way]()
        way_in["callbacks"] += callbacks
        return trainer(
            **way_in, accumulate_grad_batches=3, max_steps=steps, max_epochs=-1, enable_checkpointing=bool(callbacks)
        )

    batches = tokens(11)  # windows of 3, 3, 3 and 2
    whole, first, second = start(9), start(cut, [ModelCheckpoint(tmp_path, "cut", every_n_train_steps=cut)]), start(9)
    whole.fit(Automatic(), ResumableLoader(batches))
    first.fit(Automatic(), ResumableLoader(batches))
    second.fit(Automatic(), ResumableLoader(batches), ckpt_path=tmp_path / "cut.ckpt")
    assert_same_run(whole, second)


def test_saved_by_a_callback_that_runs_before_ours(tmp_path):
    class Early(pl.Callback):
        def on_train_batch_end(self, run, model, outputs, batch, batch_idx):
            if batch_idx == 6:
                run.save_checkpoint(tmp_path / "early.ckpt")

    whole, second = (trainer(callbacks=[as_published()], max_epochs=1) for _ in range(2))
    batches = tokens(9)
    early = Early()
    whole = trainer(callbacks=[early, as_published()])
    whole.fit(Automatic(make_scheduler=schedule), ResumableLoader(batches))
    second.fit(Automatic(make_scheduler=schedule), ResumableLoader(batches), ckpt_path=tmp_path / "early.ckpt")
    assert_same_run(whole, second)


def test_hift_checkpoint_opens_in_plain_lightning_and_back(tmp_path):
    run = trainer(strategy="hift")
    model = Automatic(make_scheduler=schedule)
    run.fit(model, loader(8))
    run.save_checkpoint(tmp_path / "hift.ckpt")

    plain = trainer(max_epochs=2)
    plain_model = Automatic(make_scheduler=schedule)
    plain.fit(plain_model, loader(8), ckpt_path=tmp_path / "hift.ckpt")
    assert plain.global_step == 16
    steps = {int(s["step"]) for s in state_of(plain)}
    assert steps == {9, 10}  # one or two visits under HiFT, then 8 plain steps
    plain.save_checkpoint(tmp_path / "plain.ckpt")

    back = trainer(strategy="hift", max_epochs=3)
    back_model = Automatic(make_scheduler=schedule)
    back.fit(back_model, loader(8), ckpt_path=tmp_path / "plain.ckpt")
    assert back.global_step == 24
    assert {int(s["step"]) for s in state_of(back)} == {9 + 1, 10 + 2}


def test_checkpoint_holds_what_plain_adamw_saves(tmp_path):
    run, plain = trainer(callbacks=[as_published(group_size=99)]), trainer()
    for t in (run, plain):
        t.fit(Automatic(), loader(3))
        t.save_checkpoint(tmp_path / "c.ckpt")
        t.saved = torch.load(tmp_path / "c.ckpt", weights_only=True)["optimizer_states"][0]
    assert list(run.saved["state"]) == list(plain.saved["state"])
    for index, state in plain.saved["state"].items():
        assert state.keys() == run.saved["state"][index].keys()
        assert all(torch.equal(value, run.saved["state"][index][key]) for key, value in state.items())
    assert run.saved["param_groups"] == plain.saved["param_groups"]


def test_checkpoint_of_another_grouping_is_refused(tmp_path):
    run = trainer(strategy="hift")
    run.fit(Automatic(), loader(3))
    run.save_checkpoint(tmp_path / "c.ckpt")
    other = trainer(callbacks=[as_published(group_size=2, order="top2down")])
    with pytest.raises(ValueError, match=r"group_size: 1 against 2; order: 'bottom2up' against 'top2down'"):
        other.fit(Automatic(), loader(3), ckpt_path=tmp_path / "c.ckpt")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([1, 1, 1], 1), ([2, 2, 1], 2), ([3], 3), ([1, 3, 3], "1 + 3 + 3"), ([1, 3], "1 + 3"), ([3, 1, 3], "3 + 1 + 3")],
)
def test_sizes_of_groups_tell_groupings_apart(sizes, expected):
    units = [LayerUnit(f"unit{i}", (), {f"p{i}": nn.Parameter(torch.ones(1))}) for i in range(sum(sizes))]
    groups = [LayerGroup(i, tuple(units[sum(sizes[:i]) : sum(sizes[: i + 1])])) for i in range(len(sizes))]
    assert make_fingerprint(SweepSchedule(len(groups)), groups, ())["group_size"] == expected


def test_validate_with_a_checkpoint(tmp_path):
    run = trainer(strategy="hift")
    model = Automatic()
    run.fit(model, loader(3), loader(1))
    run.save_checkpoint(tmp_path / "c.ckpt")
    expected = trainer().validate(model, loader(1), verbose=False)
    found = trainer(strategy="hift").validate(Automatic(), loader(1), ckpt_path=tmp_path / "c.ckpt", verbose=False)
    assert found == expected


def test_weights_only_checkpoint_loads_as_weights(tmp_path):
    run = trainer(strategy="hift")
    model = Automatic()
    run.fit(model, loader(3))
    run.save_checkpoint(tmp_path / "c.ckpt", weights_only=True)
    assert_same_weights(Automatic.load_from_checkpoint(tmp_path / "c.ckpt"), model)


# --- files ------------------------------------------------------------------------------------------------------------


def test_save_replaces_the_file_in_one_go(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "c.ckpt"
    io = StreamingCheckpointIO()
    io.save_checkpoint({"value": torch.ones(3)}, path)
    assert io.load_checkpoint(path)["value"].tolist() == [1, 1, 1]

    def full(*args):
        args[1].write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_hift.plugin.checkpoint_io.torch.save", full)
    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({"value": torch.zeros(3)}, path)
    assert io.load_checkpoint(path)["value"].tolist() == [1, 1, 1]
    assert os.listdir(path.parent) == ["c.ckpt"]


def test_saving_adds_no_copy_in_memory(tmp_path):
    checkpoint = {"state": [torch.zeros(250_000) for _ in range(8)]}
    streamed = peak_of(lambda: StreamingCheckpointIO().save_checkpoint(checkpoint, tmp_path / "a.ckpt"))
    buffered = peak_of(lambda: TorchCheckpointIO().save_checkpoint(checkpoint, tmp_path / "b.ckpt"))
    assert (tmp_path / "a.ckpt").stat().st_size > 8_000_000
    assert buffered > 8_000_000
    assert streamed < 500_000


def peak_of(action):
    """Peak of memory that Python allocates during ``action``, in bytes."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kept", [0, 10, 1000, 0.5, 0.99])
def test_truncated_file(tmp_path, kept):
    path = tmp_path / "c.ckpt"
    run = trainer(strategy="hift")
    run.fit(Automatic(), loader(2))
    run.save_checkpoint(path)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(RuntimeError, match=r"c.ckpt \([\d,]+ bytes\) is truncated or damaged"):
        trainer(callbacks=[as_published()]).fit(Automatic(), loader(2), ckpt_path=path)


def test_damaged_file(tmp_path):
    (tmp_path / "c.ckpt").write_text("hello" * 100)
    with pytest.raises(RuntimeError, match=r"c.ckpt \(500 bytes\) is truncated or damaged"):
        trainer(strategy="hift").fit(Automatic(), loader(2), ckpt_path=tmp_path / "c.ckpt")


@pytest.mark.parametrize("hold_lr", ["replay", "once", "off"])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_resumed_with_each_way_to_hold_the_learning_rate(hold_lr, tensor_lr, tmp_path):
    def start(steps, callbacks=()):
        lr = torch.tensor(0.02) if tensor_lr else 0.02
        model = Automatic(lambda p: torch.optim.AdamW(p, lr=lr), schedule)
        callbacks = [as_published(hold_lr=hold_lr), *callbacks]
        return model, trainer(
            callbacks=callbacks, max_epochs=-1, max_steps=steps, enable_checkpointing=len(callbacks) > 1
        )

    batches = tokens(9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "hold_lr='once' takes one scheduler step per sweep")
        model, whole = start(22)
        whole.fit(model, ResumableLoader(batches))
        model, first = start(13, [ModelCheckpoint(tmp_path, "cut", every_n_train_steps=13)])
        first.fit(model, ResumableLoader(batches))
        model, second = start(22)
        second.fit(model, ResumableLoader(batches), ckpt_path=tmp_path / "cut.ckpt")
    assert isinstance(second.optimizers[0].param_groups[0]["lr"], torch.Tensor) == tensor_lr
    saved = torch.load(tmp_path / "cut.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"][0]["lr"]
    assert isinstance(saved, torch.Tensor) == tensor_lr
    assert_same_run(whole, second)
    assert whole.lightning_module.lrs[13:] == second.lightning_module.lrs


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        trainer(strategy="hift").fit(Automatic(), loader(2), ckpt_path=tmp_path / "nowhere.ckpt")


def test_a_users_own_checkpoint_io_is_left_alone():
    class Own(StreamingCheckpointIO):
        pass

    run = trainer(callbacks=[as_published()], plugins=[Own()])
    run.fit(Automatic(), loader(2))
    assert type(run.strategy.checkpoint_io) is Own


# --- kill -9 ----------------------------------------------------------------------------------------------------------

KILLS = 20
TOTAL_STEPS = 40


class Wide(Automatic):
    """State large enough for saving to take a good part of the time."""

    def __init__(self):
        super().__init__(make_scheduler=schedule)
        self.net.blocks[0].wide = nn.Linear(8, 20_000)
        self.net.blocks[0].register_forward_hook(lambda m, args, out: out + m.wide(out).mean())


def train_until_done(folder: Path) -> None:
    torch.set_num_threads(1)
    checkpoint = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=2, monitor="step", mode="max")
    newest = max(folder.glob("*.ckpt"), key=lambda p: int(p.stem.split("=")[1]), default=None)
    run = trainer(
        strategy="hift",
        callbacks=[checkpoint],
        max_steps=TOTAL_STEPS,
        max_epochs=-1,
        enable_checkpointing=True,
    )
    run.fit(Wide(), ResumableLoader(tokens(11)), ckpt_path=newest)
    torch.save([weights(run.lightning_module), state_of(run)], folder / "done.pt")


def in_a_process(folder: Path, timeout: float = 60.0) -> int | None:
    """Exit code, or ``None`` if the process was killed after ``timeout`` seconds."""
    folder.mkdir(exist_ok=True)
    # A server that has imported everything, and run nothing, forks a process in no time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.plugin.test_resume"])
    process = context.Process(target=train_until_done, args=(folder,))
    process.start()
    process.join(timeout)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return None if process.exitcode == -signal.SIGKILL else process.exitcode


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path):
    assert in_a_process(tmp_path / "first") == 0
    begin = time.monotonic()
    assert in_a_process(tmp_path / "whole") == 0
    duration = time.monotonic() - begin
    expected = torch.load(tmp_path / "whole" / "done.pt")

    moments = random.Random(7)
    killed = resumed = 0
    for kill in range(KILLS):
        folder = tmp_path / str(kill)
        code = in_a_process(folder, timeout=duration * moments.uniform(0.1, 1.0))
        killed += code is None
        resumed += bool(list(folder.glob("*.ckpt")))
        assert code == 0 or in_a_process(folder) == 0
        found_weights, found_state = torch.load(folder / "done.pt")
        assert_same_weights(found_weights, expected[0])
        for a, b in zip(found_state, expected[1], strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)
    assert killed >= KILLS // 2
    assert resumed >= KILLS // 2
