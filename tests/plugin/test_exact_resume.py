"""A run that resumes is the one that was never interrupted, wherever its checkpoint was written."""

import random
import warnings
from datetime import timedelta

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_hift.data.batches import ShuffledExamples
from lightning_hift.engine.random_state import RandomState
from tests.matrices import crossed
from tests.models import Automatic, Manual, ResumableLoader, adamw, as_published, assert_same_weights, tokens, trainer

BATCHES = tokens(7)
ROWS = [row for batch in BATCHES for row in batch]


class Noisy(Dataset):
    """Rows, of which each of three sources of random numbers changes one token."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        row = ROWS[index].clone()
        row[0], row[1], row[2] = random.randrange(10), np.random.randint(10), torch.randint(10, ())
        return row


class SteppingBack(ResumableLoader):
    def step_back(self):
        self._next -= 1


class Stream(IterableDataset):
    def __iter__(self):
        return (Noisy()[i] for i in torch.randperm(len(ROWS)).tolist())


class Interrupted(Exception):
    pass


LOADERS = {
    "shuffled": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True),
    "ordered": lambda: DataLoader(ROWS, batch_size=4),
    "own generator": lambda: DataLoader(
        Noisy(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "two workers": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=2),
    "persistent workers": lambda: DataLoader(ROWS, batch_size=4, shuffle=True, num_workers=2, persistent_workers=True),
    "no length": lambda: DataLoader(Stream(), batch_size=4),
    "two loaders": lambda: {
        "a": DataLoader(Noisy(), batch_size=4, shuffle=True),
        "b": DataLoader(ROWS[:-3], batch_size=4, shuffle=True),
    },
    "own loader": lambda: ShuffledExamples(ROWS, None, 4, 3, torch.stack, {}),
    "with a state": lambda: SteppingBack(BATCHES),
}


class Drawing(Automatic):
    """Draws from everything in training and in validation; notes its batches."""

    def __init__(self, scheduler=None, dies_in_validation_at=None):
        super().__init__(adamw)
        self.seen, self.scheduler, self.dies_at = [], scheduler, dies_in_validation_at

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return optimizer if self.scheduler is None else ([optimizer], [self.scheduler(optimizer)])

    def training_step(self, batch, batch_idx):
        batch = batch["a"] * (batch["b"].sum() % 2) if isinstance(batch, dict) else batch
        self.seen.append((batch_idx, batch.tolist()))
        noise = (torch.rand(()), np.random.rand(), random.random(), np.random.randn(), random.gauss(0, 1))
        return super().training_step(batch, batch_idx) * (1 + 0.1 * sum(noise))

    def validation_step(self, batch, batch_idx):
        if batch_idx == 1 and self.global_step == self.dies_at:
            raise Interrupted
        self.log("val_loss", torch.rand(()) + self.global_step)  # a plateau of which a scheduler tires


def save_in(hook, step, path):
    class Save(pl.Callback):
        pass

    def save(self, run, *args, **kwargs):
        if run.global_step == step and not run.sanity_checking and not path.exists():
            run.save_checkpoint(path)

    setattr(Save, hook, save)
    return Save()


def die_in(hook, step):
    class Die(pl.Callback):
        pass

    def die(self, run, *args, **kwargs):
        if run.global_step == step:
            raise Interrupted

    setattr(Die, hook, die)
    return Die()


def kept(folder, **options):
    return ModelCheckpoint(folder, "c", save_top_k=-1, **options)


# What writes checkpoints, and how the run is set up. Epochs have 7 steps, sweeps 5, and the run 21.
MOMENTS = {
    "steps within an epoch": lambda d: ([kept(d, every_n_train_steps=5)], {}),
    "steps that end an epoch": lambda d: ([kept(d, every_n_train_steps=7)], {}),
    "steps before a validation": lambda d: ([kept(d, every_n_train_steps=3)], {"val_check_interval": 3}),
    "validation within an epoch": lambda d: ([kept(d, save_on_train_epoch_end=False)], {"val_check_interval": 3}),
    "validation at the end": lambda d: ([kept(d, save_on_train_epoch_end=False)], {}),
    "end of an epoch": lambda d: ([kept(d, save_on_train_epoch_end=True)], {}),
    "a metric": lambda d: ([kept(d, monitor="val_loss", mode="max", save_last=True)], {}),
    "time": lambda d: ([kept(d, train_time_interval=timedelta(milliseconds=1))], {}),
    "steps of a run in steps": lambda d: ([kept(d, every_n_train_steps=7)], {"max_steps": 17, "max_epochs": -1}),
    "epochs of a run in steps": lambda d: ([kept(d)], {"max_steps": 17, "max_epochs": -1}),
    "before the first batch": lambda d: ([save_in("on_train_start", 0, d / "c.ckpt")], {}),
    **{
        f"{hook} after step {step}": lambda d, hook=hook, step=step: ([save_in(hook, step, d / "c.ckpt")], {})
        for step in (5, 7)
        for hook in ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")
    },
    **{
        f"{hook} at the end": lambda d, hook=hook: ([save_in(hook, 7, d / "c.ckpt")], {})
        for hook in ("on_validation_start", "on_validation_epoch_end", "on_train_epoch_end", "on_train_epoch_start")
    },
    **{
        f"exception in {hook} after step {step}": lambda d, hook=hook, step=step: (
            [die_in(hook, step), OnExceptionCheckpoint(d, "c")],
            {},
        )
        for step in (5, 7)
        for hook in ("on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end")
    },
    "exception in a validation within an epoch": lambda d: (
        [OnExceptionCheckpoint(d, "c")],
        {"val_check_interval": 5, "dies_in_validation_at": 5},
    ),
    "exception in validation at the end": lambda d: (
        [OnExceptionCheckpoint(d, "c")],
        {"dies_in_validation_at": 7},
    ),
}


def plateau(optimizer):
    return {
        "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5),
        "monitor": "val_loss",
    }


def warm_up(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 7) * 0.97**step)


SCHEDULERS = [plateau, warm_up, None]


def seed_all(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def fit(loader, scheduler=None, callbacks=(), path=None, dies_in_validation_at=None, strategy="auto", **options):
    model = Drawing(scheduler, dies_in_validation_at)
    seed_all(1 if path is None else 2)
    run = trainer(
        strategy=strategy,
        callbacks=[as_published(), *callbacks],
        enable_checkpointing=any(isinstance(each, pl.callbacks.Checkpoint) for each in callbacks),
        num_sanity_val_steps=1,
        **{"max_epochs": 3, **options},
    )
    validation = DataLoader(ROWS[:12], batch_size=4)
    try:
        run.fit(model, LOADERS[loader](), validation, ckpt_path=path, weights_only=None if path is None else True)
    except Interrupted:
        assert path is None
    return run, model


def assert_goes_on(whole, rest):
    """``rest``, a run that resumed, is the end of ``whole``: batches, weights, optimizer state, learning rate."""
    (run, model), (resumed, again) = whole, rest
    assert 0 < len(again.seen) < len(model.seen) or run.global_step == len(again.seen)
    assert again.seen == model.seen[-len(again.seen) :]
    assert_same_weights(model, again)
    first, second = (each.optimizers[0].state_dict() for each in (run, resumed))
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    assert first["param_groups"] == second["param_groups"]
    assert resumed.global_step == run.global_step


@pytest.mark.parametrize(("moment", "loader"), crossed(MOMENTS, LOADERS))
def test_from_any_moment(moment, loader, tmp_path):
    scheduler = SCHEDULERS[(list(MOMENTS).index(moment) // len(LOADERS) + list(LOADERS).index(loader)) % 3]
    folders = [tmp_path / "whole", tmp_path / "part"]
    (callbacks, options), (writers, _) = (MOMENTS[moment](folder) for folder in folders)
    undisturbed = {name: value for name, value in options.items() if name != "dies_in_validation_at"}
    harmless = [each for each in callbacks if isinstance(each, ModelCheckpoint)]
    whole = fit(loader, scheduler, harmless, **undisturbed)
    fit(loader, scheduler, writers, **options)
    paths = sorted(folders[1].glob("*.ckpt"))
    assert paths
    for path in paths:
        if torch.load(path, weights_only=True)["global_step"] < whole[0].global_step:
            assert_goes_on(whole, fit(loader, scheduler, path=path, **undisturbed))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("first", [{"max_steps": 9, "max_epochs": -1}, {"max_epochs": 1}])
def test_a_finished_run_is_made_longer(first, loader, tmp_path):
    """Saved after it, where Lightning counts an epoch as done that was not."""
    total = {"max_steps": 17, "max_epochs": -1} if "max_steps" in first else {"max_epochs": 3}
    run, _ = fit(loader, **first)
    run.save_checkpoint(tmp_path / "c.ckpt")
    assert_goes_on(fit(loader, **total), fit(loader, path=tmp_path / "c.ckpt", **total))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_resumed_run_is_interrupted_again(loader, tmp_path):
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    whole = fit(loader)
    fit(loader, callbacks=[save_in("on_train_batch_end", 3, first)])
    fit(loader, path=first, callbacks=[save_in("on_train_batch_end", 5, second)])
    assert_goes_on(whole, fit(loader, path=second))


def test_a_run_after_one_that_died_is_not_taken_for_its_end(tmp_path):
    """In the same Trainer."""
    die = die_in("on_train_epoch_end", 7)
    run, _ = fit("shuffled", plateau, [die])
    position = run.fit_loop.epoch_loop.position
    assert position().ends_epoch
    run.callbacks.remove(die)
    run.callbacks.append(save_in("on_train_batch_end", 10, tmp_path / "c.ckpt"))
    run.fit_loop.max_epochs = 5
    run.fit(Drawing(plateau), LOADERS["shuffled"](), DataLoader(ROWS[:12], batch_size=4))
    assert not torch.load(tmp_path / "c.ckpt", weights_only=True)["callbacks"]["HiFTCallback"]["position"]["ends_epoch"]


@pytest.mark.parametrize("strategy", ["auto", "hift"])
@pytest.mark.parametrize("every", [5, 7])
def test_strategy_and_callback_alone(strategy, every, tmp_path):
    def writes(folder):
        return [kept(folder, every_n_train_steps=every)]

    whole = fit("shuffled", callbacks=writes(tmp_path / "whole"), strategy=strategy)
    fit("shuffled", callbacks=writes(tmp_path / "part"), strategy=strategy, max_epochs=2)
    for path in (tmp_path / "part").glob("*.ckpt"):
        assert_goes_on(whole, fit("shuffled", path=path, strategy=strategy))


def test_nothing_is_said_where_all_goes_on(tmp_path):
    fit("shuffled", callbacks=[save_in("on_train_batch_end", 5, tmp_path / "c.ckpt")])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit("shuffled", path=tmp_path / "c.ckpt")
    assert not [each for each in caught if "resum" in str(each.message)]


def test_plain_lightning_opens_it(tmp_path):
    fit("shuffled", callbacks=[save_in("on_train_batch_end", 5, tmp_path / "c.ckpt")])
    run = trainer(max_epochs=3)
    run.fit(Drawing(), LOADERS["shuffled"](), ckpt_path=tmp_path / "c.ckpt", weights_only=True)
    assert run.global_step == 21


# --- what no checkpoint of Lightning holds is said once ---------------------------------------------------------------


def resumed_with_a_word(words, loader, hook, tmp_path, model=Automatic, **options):
    def run(callbacks, path=None):
        each = trainer(callbacks=[as_published(), *callbacks], max_epochs=2, **options)
        each.fit(model(), loader(), ckpt_path=path)

    run([save_in(hook, 4, tmp_path / "c.ckpt")])
    with pytest.warns(UserWarning, match=words) as caught:
        run([], tmp_path / "c.ckpt")
    assert sum(words in str(each.message) for each in caught) == 1


def test_within_an_accumulation_window(tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, run, model, outputs, batch, batch_idx):
            if batch_idx == 3 and not (tmp_path / "c.ckpt").exists():
                run.save_checkpoint(tmp_path / "c.ckpt")

    def run(*callbacks, path=None):
        each = trainer(callbacks=[as_published(), *callbacks], max_epochs=1, accumulate_grad_batches=3)
        each.fit(Automatic(), LOADERS["ordered"](), ckpt_path=path)

    run(Save())
    with pytest.warns(UserWarning, match="written between the micro-batches of an optimizer step"):
        run(path=tmp_path / "c.ckpt")


def test_after_the_step_of_a_batch_that_is_not_over(tmp_path):
    class SavesItself(Manual):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.global_step == 4 and not (tmp_path / "c.ckpt").exists():
                self.trainer.save_checkpoint(tmp_path / "c.ckpt")
            return loss

    words = "after the optimizer step of a batch that was not over"
    resumed_with_a_word(words, LOADERS["ordered"], "on_fit_end", tmp_path, SavesItself)


def test_a_loader_that_counts_the_batch_under_way(tmp_path):
    resumed_with_a_word(
        "ResumableLoader counts as trained on", lambda: ResumableLoader(BATCHES), "on_before_backward", tmp_path
    )


@pytest.mark.parametrize("second", [ResumableLoader(BATCHES), DataLoader(ROWS[:8], batch_size=4)])
def test_loaders_of_which_some_have_a_state_or_start_over(second, tmp_path):
    class First(Automatic):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    def loaders():
        return {"a": DataLoader(ROWS, batch_size=4), "b": second}

    resumed_with_a_word("its data does not go on where it was", loaders, "on_train_batch_end", tmp_path, First)


# --- random numbers ---------------------------------------------------------------------------------------------------


def draw():
    numbers = torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]
    return numbers, np.random.randn(), random.gauss(0, 1)


@pytest.mark.parametrize("odd", [False, True], ids=["", "with a second number in store"])
def test_random_state_survives_a_file_of_tensors(odd, tmp_path):
    seed_all(3)
    if odd:
        np.random.randn(), random.gauss(0, 1)
    generator = torch.Generator().manual_seed(4)
    state = RandomState.capture([generator])
    expected = draw(), torch.rand(2, generator=generator).tolist()
    torch.save(state.state_dict(), tmp_path / "s.pt")
    seed_all(9)
    RandomState.from_state_dict(torch.load(tmp_path / "s.pt", weights_only=True)).restore([generator])
    assert (draw(), torch.rand(2, generator=generator).tolist()) == expected


def test_capturing_changes_nothing():
    seed_all(3)
    expected = draw()
    seed_all(3)
    RandomState.capture()
    assert draw() == expected


def test_what_was_captured_is_what_numpy_says_after_any_draw():
    for draw_one in (np.random.rand, np.random.randn, np.random.randn, np.random.randint, list) * 2:
        draw_one(*([3] if draw_one is np.random.randint else []))
        found, expected = RandomState.capture().numpy, np.random.get_state()
        assert [found[0], *found[1], *found[2:]] == [expected[0], *expected[1], *expected[2:]]


def test_another_bit_generator_is_left_alone():
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        state = RandomState.capture().state_dict()
        drawn = np.random.rand()
        RandomState.from_state_dict(state).restore()
        assert "numpy" not in state
        assert np.random.rand() != drawn
    finally:
        np.random.set_bit_generator(before)
