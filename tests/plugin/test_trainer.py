"""HiFT in the Trainer: the ways in, and modules that were not written for it."""

import copy
import re
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_hift import BAdam, HiFTCallback, HiFTStrategy, StateOffloader, StreamingCheckpointIO
from lightning_hift.engine.optimizer_groups import find_groups
from tests.lagging import LaggingDevice
from tests.models import (
    GROUPS,
    WIDTH,
    Automatic,
    Block,
    Manual,
    Net,
    adamw,
    as_published,
    assert_same_weights,
    loader,
    next_token_loss,
    tokens,
    trainer,
    weights,
)
from tests.reference.round_robin import train_round_robin
from tests.reference.sweep_means import sweep_means


class LaggingStrategy(HiFTStrategy):
    """Copies that lag behind, on the CPU."""

    def make_offloader(self):
        return StateOffloader(
            "cpu", self.options.offload, self.options.prefetch, device_module=LaggingDevice(), always_copy=True
        )


WAYS_IN = {
    "strategy": lambda: {"strategy": "hift"},
    "callback": lambda: {"callbacks": [as_published()]},
    "both": lambda: {"strategy": HiFTStrategy(), "callbacks": [as_published()]},
    "lagging": lambda: {"strategy": LaggingStrategy()},
    "resident": lambda: {"strategy": HiFTStrategy(offload="none")},
    "late": lambda: {"strategy": HiFTStrategy(prefetch=False)},
}


def linear_decay(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 40)


def reference(steps, accumulate=1, clip_norm=None, make_optimizer=adamw, lr_at=None):
    net = Net()
    batches = tokens(steps)
    windows = [batches[i : i + accumulate] for i in range(0, steps, accumulate)]
    train_round_robin(
        net, GROUPS, make_optimizer, windows, next_token_loss, clip_norm=clip_norm, window_size=accumulate, lr_at=lr_at
    )
    return net


@pytest.mark.parametrize("module", [Automatic, Manual])
@pytest.mark.parametrize("way", WAYS_IN)
def test_all_ways_in_equal_the_reference(way, module):
    model = module(make_scheduler=linear_decay)
    trainer(**WAYS_IN[way]()).fit(model, loader(13))
    assert_same_weights(model, reference(13, lr_at=sweep_means(lambda step: 0.01 * (1 - step / 40), 5)))


@pytest.mark.parametrize("way", ["strategy", "callback", "lagging"])
@pytest.mark.parametrize("module", ["automatic", "manual"])
def test_accumulation_with_a_ragged_last_window_and_clipping(way, module):
    options = {"accumulate_grad_batches": 4, "gradient_clip_val": 0.05}
    if module == "automatic":
        model, run = Automatic(), trainer(**WAYS_IN[way](), **options)
    else:
        model, run = Manual(**options), trainer(**WAYS_IN[way]())
    run.fit(model, loader(22))
    assert run.global_step == 6
    assert_same_weights(model, reference(22, accumulate=4, clip_norm=0.05))


def test_clipping_by_value():
    automatic, manual = Automatic(), Manual(gradient_clip_val=0.001, gradient_clip_algorithm="value")
    trainer(strategy="hift", gradient_clip_val=0.001, gradient_clip_algorithm="value").fit(automatic, loader(7))
    trainer(strategy="hift").fit(manual, loader(7))
    assert_same_weights(automatic, manual)


def test_one_group_equals_plain_lightning():
    model, plain = Automatic(make_scheduler=linear_decay), Automatic(make_scheduler=linear_decay)
    trainer(callbacks=[as_published(group_size=100)]).fit(model, loader(9))
    trainer().fit(plain, loader(9))
    assert_same_weights(model, plain)


def test_module_without_callback_is_plain_lightning():
    manual, plain = Manual(make_scheduler=linear_decay), Automatic(make_scheduler=linear_decay)
    for model in (manual, plain):
        trainer().fit(model, loader(9))
    assert_same_weights(manual, plain)


# --- modules that know nothing of HiFT --------------------------------------------------------------------------------


def forms(module):
    """All return forms of ``configure_optimizers``."""
    optimizer = adamw(module.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    config = {"scheduler": scheduler, "interval": "epoch"}
    return {
        "optimizer": optimizer,
        "list": [optimizer],
        "two_lists": ([optimizer], [scheduler]),
        "two_lists_config": ([optimizer], [config]),
        "dict": {"optimizer": optimizer},
        "dict_scheduler": {"optimizer": optimizer, "lr_scheduler": scheduler},
        "dict_config": {"optimizer": optimizer, "lr_scheduler": config},
        "tuple_of_dicts": ({"optimizer": optimizer, "lr_scheduler": config},),
    }


@pytest.mark.parametrize("form", list(forms(nn.Linear(1, 1))))
def test_return_forms_of_configure_optimizers(form):
    class Module(Automatic):
        def configure_optimizers(self):
            return forms(self)[form]

    model = Module()
    run = trainer(strategy="hift")
    run.fit(model, loader(7))
    assert_same_weights(model, reference(7))


class GAN(pl.LightningModule):
    """Two optimizers with toggling, of different depth."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        loss = -self.critic(self.generator(batch)).mean()
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)

        self.toggle_optimizer(second)
        loss = self.critic(self.generator(batch).detach()).mean() - self.critic(batch).square().mean()
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        self.untoggle_optimizer(second)

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), lr=0.01) for net in (self.generator, self.critic)]


@pytest.mark.parametrize("way", ["strategy", "callback", "lagging"])
def test_gan_with_toggled_optimizers(way):
    batches = [torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    model, twin = GAN(), GAN()
    run = trainer(**WAYS_IN[way]())
    run.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))

    parts = [[twin.generator[i] for i in (0, 2, 4)], [twin.critic[i] for i in (0, 2)]]
    optimizers = [[torch.optim.Adam(layer.parameters(), lr=0.01) for layer in part] for part in parts]
    for step, batch in enumerate(batches):
        twin.zero_grad()
        (-twin.critic(twin.generator(batch)).mean()).backward()
        optimizers[0][step % 3].step()
        twin.zero_grad()
        (twin.critic(twin.generator(batch).detach()).mean() - twin.critic(batch).square().mean()).backward()
        optimizers[1][step % 2].step()
    assert_same_weights(model, twin)
    assert run.global_step == 16
    assert all(p.requires_grad for p in model.parameters())
    assert {"hift/group/0", "hift/group/1"} <= run.logged_metrics.keys()


def test_manual_module_that_steps_its_optimizer_twice_per_batch():
    class Twice(Automatic):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for _ in range(2):
                self.manual_backward(next_token_loss(self.net, batch))
                self.optimizers().step()

    model, twin = Twice(), Net()
    trainer(strategy=LaggingStrategy()).fit(model, loader(7))
    optimizers = [adamw([dict(twin.named_parameters())[n] for n in group]) for group in GROUPS]
    for step, batch in enumerate(tokens(7)):
        for _ in range(2):
            twin.zero_grad()
            next_token_loss(twin, batch).backward()
            optimizers[step % 5].step()
    assert_same_weights(model, twin)


@pytest.mark.parametrize("module", [Automatic, Manual])
def test_overflow_in_mixed_precision_skips_the_step_safely(module):
    class Overflowing(module):
        def backward(self, loss, *args, **kwargs):
            super().backward(loss, *args, **kwargs)
            if self.trainer.fit_loop.epoch_loop.batch_idx == 2:
                for p in self.parameters():
                    if p.grad is not None:
                        p.grad.view(-1)[0] = torch.inf

    class Watch(pl.Callback):
        def on_train_batch_start(self, run, model, batch, batch_idx):
            self.before = weights(model)

        def on_train_batch_end(self, run, model, outputs, batch, batch_idx):
            after = weights(model)
            changed.append({name for name in after if not torch.equal(after[name], self.before[name])})

    changed = []
    model = Overflowing()
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))
    run = trainer(plugins=[precision], callbacks=[as_published(), Watch()])
    with pytest.warns(UserWarning, match="6 were not stepped .gradients overflowed"):
        run.fit(model, loader(10))
    assert changed == [set(GROUPS[i % 5]) if i != 2 else set() for i in range(10)]
    assert precision.scaler.get_scale() == 32.0
    steps = [int(s["step"]) for s in run.optimizers[0].state_dict()["state"].values()]
    assert sorted(set(steps)) == [1, 2]


def test_training_step_that_returns_none_skips():
    class Skips(Automatic):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    model, start = Skips(), Net()
    with pytest.warns(UserWarning, match="returned `None`|received no gradient"):
        trainer(strategy="hift").fit(model, loader(5))
    after, before = weights(model), weights(start)
    assert {n for n in after if torch.equal(after[n], before[n])} == set(GROUPS[1])


def test_user_frozen_parameters_stay_frozen_and_requires_grad_is_restored():
    model = Automatic()
    for p in model.net.blocks[1].parameters():
        p.requires_grad_(False)
    before = weights(model)
    callback = as_published(frozen=["net.embedding"])
    trainer(callbacks=[callback]).fit(model, loader(8))
    after = weights(model)
    assert len(callback.groups) == 3
    fixed = {n for n in after if torch.equal(after[n], before[n])}
    assert fixed == {n for n in after if n.startswith(("blocks.1.", "embedding."))}
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.startswith("net.blocks.1.")
    }


class SavesWhatTrains(Automatic):
    """As users do to keep checkpoints of adapters small."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_save_checkpoint(self, checkpoint):
        trainable = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["trainable"] = {name: v for name, v in checkpoint["state_dict"].items() if name in trainable}

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 3:
            self.trainer.save_checkpoint(self.path)
        return loss


class CopiesTheModel(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.flags = {name: p.requires_grad for name, p in copy.deepcopy(pl_module.net).named_parameters()}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_what_is_saved_or_copied_has_the_flags_of_the_user(accumulate, tmp_path):
    def fit(module, *callbacks, **options):
        module.net.blocks[0].norm.requires_grad_(False)
        options |= {"strategy": "hift", "accumulate_grad_batches": accumulate}
        trainer(callbacks=[as_published(), *callbacks], **options).fit(module, loader(8))
        return module

    module, copies = SavesWhatTrains(tmp_path / "in_step.ckpt"), CopiesTheModel()
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    fit(module, copies, saves, enable_checkpointing=True)
    frozen = {"net.blocks.0.norm.weight", "net.blocks.0.norm.bias"}
    trainable = {name for name, _ in module.named_parameters()} - frozen
    assert {f"net.{name}" for name, flag in copies.flags.items() if flag} == trainable
    paths = list(tmp_path.glob("*.ckpt"))
    assert len(paths) > 2
    for path in paths:
        assert torch.load(path, weights_only=True)["trainable"].keys() == trainable
    # A checkpoint in the middle of a batch makes no gradients for what does not train.
    assert_same_weights(module, fit(Automatic()))


def test_requires_grad_is_restored_after_an_error():
    class Fails(Automatic):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    model = Fails()
    with pytest.raises(ZeroDivisionError):
        trainer(strategy="hift").fit(model, loader(8))
    assert all(p.requires_grad for p in model.parameters())


def test_second_fit():
    model, twin = Automatic(), Automatic()
    for m in (model, twin):
        for _ in range(2):
            trainer(strategy="hift").fit(m, loader(7))
    run = trainer(strategy="hift")
    run.fit(model, loader(7))
    run.fit_loop.epoch_progress.reset()
    run.fit_loop.max_epochs = 1
    run.fit(model, loader(7))
    for _ in range(2):
        trainer(strategy="hift").fit(twin, loader(7))
    assert_same_weights(model, twin)


@pytest.mark.parametrize("way", ["strategy", "callback"])
def test_second_fit_with_a_cached_optimizer_goes_on(way):
    class Caches(Automatic):
        def configure_optimizers(self):
            if not hasattr(self, "cached"):
                self.cached = adamw(self.parameters())
            return self.cached

    model = Caches()
    for part in (tokens(11)[:7], tokens(11)[7:]):
        run = trainer(**WAYS_IN[way]())
        run.fit(model, torch.utils.data.DataLoader(part, batch_size=None))
        assert len(model.cached.state) == 0
    assert_same_weights(model, reference(11))


def test_no_foreign_code_sees_optimizer_state(monkeypatch):
    seen = []

    def spy(optimizers, device):
        seen.extend(sum(len(state) for state in o.state.values()) for o in optimizers)

    monkeypatch.setattr("lightning.pytorch.strategies.strategy._optimizers_to_device", spy)
    monkeypatch.setattr(
        "lightning.pytorch.strategies.strategy._optimizer_to_device", lambda o, device: spy([o], device)
    )
    for way in ("strategy", "callback"):
        run = trainer(**WAYS_IN[way]())
        run.fit(Automatic(), loader(7))
    assert len(seen) >= 3
    assert set(seen) == {0}


def test_adagrad_allocates_its_state_before_the_model_moves(monkeypatch):
    class Module(Automatic):
        def configure_optimizers(self):
            order.append("optimizer")
            return torch.optim.Adagrad(self.parameters())

    order = []
    monkeypatch.setattr(HiFTStrategy, "model_to_device", lambda self: order.append("move"))
    trainer(strategy="hift").fit(Module(), loader(2))
    assert order == ["optimizer", "move"]


# --- callbacks of Lightning -------------------------------------------------------------------------------------------


def test_fast_dev_run():
    model = Automatic()
    run = trainer(strategy="hift", fast_dev_run=True)
    run.fit(model, loader(5), loader(2))
    assert run.global_step == 1


def test_barebones():
    model = Automatic()
    run = pl.Trainer(accelerator="cpu", barebones=True, max_epochs=1, strategy="hift", callbacks=[as_published()])
    run.fit(model, loader(7))
    assert_same_weights(model, reference(7))


def test_logged_values(tmp_path):
    model = Automatic()
    callback = as_published(order="top2down")
    monitor = LearningRateMonitor("step")
    run = trainer(
        callbacks=[monitor, callback], logger=CSVLogger(tmp_path), log_every_n_steps=1, gradient_clip_val=1e-3
    )
    norms = []

    class Norms(pl.Callback):
        def on_before_optimizer_step(self, run, model, optimizer):
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(grads).item())

    run.callbacks.append(Norms())
    run.fit(model, loader(7))
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    columns = rows[0].split(",")
    table = [dict(zip(columns, row.split(","), strict=True)) for row in rows[1:]]

    def column(name):
        return [float(row[name]) for row in table if row.get(name)]

    assert column("hift/group") == [4, 3, 2, 1, 0, 4, 3]
    assert column("hift/sweep") == [0, 0, 0, 0, 1, 1, 1]
    assert column("hift/grad_norm") == pytest.approx(norms)
    assert column("lr-AdamW") == [0.01] * 7
    total = sum(p.numel() for p in model.parameters())
    assert column("hift/state_bytes_host")[-1] == 8 * total + 4 * len(list(model.parameters()))
    assert 0 < column("hift/state_bytes_device")[-1] < 8 * total
    assert [group.numel for group in callback.groups] == [136, 296, 296, 296, 169]


def test_progress_bar_shows_sweep_and_group():
    class Metrics(pl.Callback):
        def on_train_batch_end(self, run, *args):
            shown.append({name: float(value) for name, value in run.progress_bar_metrics.items()})

    shown = []
    trainer(callbacks=[as_published(), Metrics()]).fit(Automatic(), loader(3))
    assert [s["hift/group"] for s in shown] == [0, 1, 2]
    assert all("hift/sweep" in s for s in shown)


def test_early_stopping_and_model_checkpoint(tmp_path):
    model = Automatic(make_optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True, save_top_k=2)
    run = trainer(
        max_epochs=9,
        enable_checkpointing=True,
        callbacks=[EarlyStopping("val_loss", patience=2), checkpoint, as_published()],
    )
    with pytest.warns(UserWarning, match="kept their value"):
        run.fit(model, loader(5), loader(2))
    assert run.current_epoch == 3
    assert (tmp_path / "last.ckpt").exists()
    assert isinstance(run.strategy.checkpoint_io, StreamingCheckpointIO)


@pytest.mark.parametrize("way", ["strategy", "callback"])
def test_learning_rate_finder(way):
    class Module(Automatic):
        def __init__(self):
            super().__init__()
            self.lr = 0.01

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    model = Module()
    options = WAYS_IN[way]()
    finder = LearningRateFinder(num_training_steps=20)
    run = trainer(**{**options, "callbacks": [*options.get("callbacks", []), finder]}, max_epochs=4)
    before = weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(model, loader(10))
    assert len(finder.optimal_lr.results["lr"]) >= 15
    assert run.global_step == 40
    assert run.optimizers[0].state_dict()["hift"]["step"] == 40
    assert all(p.requires_grad for p in model.parameters())
    after = weights(model)
    assert all(not torch.equal(after[n], before[n]) for n in after)


def test_ema_weight_averaging():
    model, plain = Automatic(), Automatic()
    run = trainer(callbacks=[as_published(), EMAWeightAveraging(decay=0.5)])
    run.fit(model, loader(7))
    trainer(callbacks=[as_published()]).fit(plain, loader(7))
    averaged = {n.removeprefix("net."): p.detach().clone() for n, p in Net().named_parameters()}
    net, twin = Net(), None
    optimizers = [adamw([dict(net.named_parameters())[n] for n in group]) for group in GROUPS]
    for step, batch in enumerate(tokens(7)):
        net.zero_grad()
        next_token_loss(net, batch).backward()
        optimizers[step % 5].step()
        for name, p in net.named_parameters():
            # The first update copies, later ones average.
            averaged[name] = p.detach().clone() if twin is None else averaged[name].lerp(p.detach(), 0.5)
        twin = net
    for name, p in weights(model).items():
        torch.testing.assert_close(p, averaged[name], rtol=1e-6, atol=1e-7)  # lerp is written differently there
    assert_same_weights(plain, net)


def test_stochastic_weight_averaging_replaces_the_scheduler():
    model = Automatic(make_scheduler=linear_decay)
    swa = StochasticWeightAveraging(swa_lrs=0.005, swa_epoch_start=2, annealing_epochs=2)
    run = trainer(callbacks=[as_published(), swa], max_epochs=5)
    run.fit(model, loader(5))
    assert run.current_epoch == 5
    assert type(run.lr_scheduler_configs[0].scheduler).__name__ != "LambdaLR"
    assert isinstance(run.lr_scheduler_configs[0].scheduler, torch.optim.swa_utils.SWALR)


def test_plateau_scheduler():
    def plateau(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)

    lrs = {}
    for module in (Automatic, Manual):
        model = module(make_scheduler=plateau, interval="epoch")
        run = trainer(callbacks=[as_published()], max_epochs=4, num_sanity_val_steps=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # manual optimization: Lightning says that it ignores 'monitor'
            run.fit(model, loader(5), loader(2))
        lrs[module] = run.optimizers[0].param_groups[0]["lr"]
    assert lrs[Automatic] == 0.01 / 16
    assert lrs[Manual] == lrs[Automatic]


def test_a_plateau_that_names_its_metric_waits_for_that():
    def plateau(optimizer):
        return ReduceLROnPlateau(optimizer, "no_such_metric")

    run = trainer(max_epochs=1, num_sanity_val_steps=0)
    with pytest.raises(ValueError, match=r"waits for lr_monitor='no_such_metric', .* there are \[.*'val_loss'"):
        run.fit(Manual(make_scheduler=plateau, interval="epoch"), loader(2), loader(2))


@pytest.mark.parametrize("option", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.5}])
def test_what_the_trainer_cannot_do_by_hand_is_the_modules_argument(option):
    ((name, value),) = option.items()
    with pytest.raises(MisconfigurationException, match=f"Give it to the module instead: Manual\\({name}={value}\\)"):
        trainer(max_steps=1, **option).fit(Manual(), loader(2))


# --- what the user sees -----------------------------------------------------------------------------------------------


def test_table_and_proof_are_shown(caplog):
    model = Automatic()
    model.net.norm.requires_grad_(False)
    with caplog.at_level("INFO"):
        trainer(strategy="hift").fit(model, loader(6))
    text = caplog.text
    assert "HiFT: bottom2up over 5 layer groups" in text
    assert "net.blocks.1" in text
    assert "Frozen: 16 parameters in 2 tensors (net.norm.weight, net.norm.bias)" in text
    assert "first sweep done, all 21 trainable parameters were updated" in text


@pytest.mark.parametrize("way", ["strategy", "callback"])
def test_model_summary_counts_everything_as_trainable(way, capsys):
    trainer(**WAYS_IN[way](), enable_model_summary=True).fit(Automatic(), loader(2))
    shown = capsys.readouterr()
    assert re.search(r"(1\.2 K +Trainable params|Trainable params: 1\.2 K)", shown.out + shown.err)


def test_groups_and_active_group_are_readable():
    callback = as_published(order="top2down")
    with pytest.raises(RuntimeError, match="before fit has begun"):
        _ = callback.active_group
    trainer(callbacks=[callback]).fit(Automatic(), loader(2))
    assert [group.index for group in callback.groups] == [0, 1, 2, 3, 4]
    assert callback.active_group.name == "net.blocks.2"


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 0}, "group_size=0"),
        ({"steps_per_group": 0}, "steps_per_group=0"),
        ({"order": "up2down"}, "'top2down'"),
        ({"order": "inside_out"}, "'bottom2up', 'top2down', 'random'"),
        ({"hold_lr": "sometimes"}, "'replay', 'once', 'off'"),
    ],
)
def test_bad_callback_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        as_published(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"offload": "cloud"}, "offload='cloud'"), ({"master_weights": "maybe"}, "master_weights='maybe'")],
)
def test_bad_strategy_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        HiFTStrategy(**options)


def test_ddp_is_refused_in_fit():
    with pytest.raises(Exception, match="HiFTCallback does not work with DDPStrategy"):
        trainer(strategy="ddp", callbacks=[as_published()]).fit(Automatic(), loader(2))


def test_more_than_one_device():
    with pytest.raises(Exception, match=r"trains on one device, got 2. Use Trainer\(devices=1\)"):
        trainer(strategy="hift", devices=2)


def test_two_callbacks():
    class Other(HiFTCallback):
        pass

    with pytest.raises(MisconfigurationException, match="more than one HiFTCallback"):
        trainer(callbacks=[as_published(), Other()]).fit(Automatic(), loader(2))
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `HiFTCallback`"):
        trainer(callbacks=[as_published(), as_published()])


def test_optimizer_behind_the_back_of_lightning():
    class Raw(Automatic):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(next_token_loss(self.net, batch))
            self.optimizers(use_pl_optimizer=False).step()

    with pytest.raises(RuntimeError, match="stepped behind the back of the Trainer"):
        trainer(strategy="hift").fit(Raw(), loader(2))


def test_optimizer_that_was_not_configured():
    class Private(Automatic):
        def on_train_batch_end(self, *args):
            self.optimizers(use_pl_optimizer=False).step()

    with pytest.raises(RuntimeError, match="stepped behind the back of the Trainer"):
        trainer(strategy="hift").fit(Private(), loader(2))


def test_unused_branch_is_named():
    class Unused(Automatic):
        def __init__(self):
            super().__init__()
            self.net.spare = nn.ModuleList([Block()])

    with (
        pytest.warns(UserWarning, match=r"\(net.spare.0\) got no gradient in its turn"),
        pytest.raises(RuntimeError, match=r"\(net.spare.0\) has never had a gradient.*frozen=\[...\]"),
    ):
        trainer(strategy="hift").fit(Unused(), loader(14))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_explained():
    class Reentrant(Automatic):
        def __init__(self):
            super().__init__()
            block = self.net.blocks[1]
            inner = block.forward
            block.forward = lambda x: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=True)

    run = trainer(callbacks=[as_published(frozen=["net.embedding"])])
    with pytest.raises(
        RuntimeError, match=r"Got activation checkpointing with use_reentrant=True.*pass use_reentrant=False"
    ):
        run.fit(Reentrant(), loader(9))


def test_non_reentrant_checkpointing_changes_nothing():
    class Checkpointed(Automatic):
        def __init__(self):
            super().__init__()
            for block in self.net.blocks:
                inner = block.forward
                block.forward = lambda x, inner=inner: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)

    model = Checkpointed()
    trainer(strategy="hift").fit(model, loader(8))
    assert_same_weights(model, reference(8))


def test_deepcopy_of_the_module_after_fit():
    model = Automatic()
    trainer(strategy="hift").fit(model, loader(3))
    assert_same_weights(copy.deepcopy(model), model)


# --- defaults ---------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """An embedding as large as all three blocks, and a small head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(24 * 3, WIDTH)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh()) for _ in range(3)])
        self.head = nn.Linear(2 * WIDTH, 2)


def test_the_strategy_alone_has_the_defaults_of_the_callback():
    ends = []
    for way_in in ({"strategy": "hift"}, {"callbacks": [HiFTCallback()]}):
        model = Automatic()
        run = pl.Trainer(accelerator="cpu", max_steps=9, max_epochs=-1, logger=False, barebones=True, **way_in)
        run.fit(model, loader(9))
        ends.append(model)
    assert_same_weights(*ends)


def test_defaults_are_hifts_own_and_those_of_a_policy():
    def of(callback):
        return callback.group_size, callback.lr_scale, callback.policy.steps_per_sweep

    assert of(HiFTCallback()) == ("balanced", "auto", 4)
    assert of(HiFTCallback(policy="BAdam")) == (1, 1.0, 50)
    assert HiFTCallback().policy.order == "bottom2up"
    assert HiFTCallback(policy="LISA", group_size="balanced", lr_scale="auto").lr_scale == "auto"


def test_a_small_head_trains_at_every_step_and_no_other():
    def always_active(model, **options):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        (found,) = find_groups(model, [optimizer], HiFTCallback(**options).grouping)
        return [unit.name for unit in found.always_active], len(found.groups)

    small, large = Encoder(), Net()
    assert always_active(small) == (["head"], 2)
    assert always_active(small, always_active=[]) == ([], 2)
    assert always_active(small, always_active=["embedding"]) == (["embedding"], 4)
    assert always_active(small, policy="BAdam") == ([], 5)
    assert always_active(large) == ([], 5)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(torch.cat(tokens(6)))


def test_a_run_that_is_too_short_for_all_groups_is_warned_about():
    def fit(data, model=None, **options):
        trainer(**{"max_epochs": 1, **options}).fit(model or Automatic(), data)

    words = r"about 3 optimizer steps, too few for {} to come by all 5 .*: 4 of them will not train \("
    with pytest.warns(UserWarning, match=words.format("HiFT")):
        fit(loader(3), callbacks=[HiFTCallback(group_size=1, steps_per_group=4)])
    with pytest.warns(UserWarning, match=words.format("HiFT")):
        fit(loader(9), Manual(accumulate_grad_batches=3), callbacks=[HiFTCallback(group_size=1, steps_per_group=4)])
    with pytest.warns(UserWarning, match=words.format("BAdam")):
        fit(loader(3), callbacks=[HiFTCallback(policy=BAdam(steps_per_block=3))])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="This run has about")
        fit(loader(5), callbacks=[HiFTCallback(steps_per_group=1)])
        fit(loader(3), callbacks=[HiFTCallback()], fast_dev_run=True)
        fit(torch.utils.data.DataLoader(Endless(), batch_size=4), callbacks=[HiFTCallback()])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_fused_optimizers_can_be_clipped(precision):
    """Lightning refuses that in mixed precision, where they would undo the scaling of gradients by themselves."""

    def run(**options):
        model = Automatic(lambda p: torch.optim.AdamW(p, lr=0.01, fused=True))
        trainer(strategy="hift", precision=precision, callbacks=[as_published()], **options).fit(model, loader(7))
        return model

    assert_same_weights(run(), run(gradient_clip_val=1e6))
    assert not torch.equal(run().net.head.weight, run(gradient_clip_val=1e-6).net.head.weight)
