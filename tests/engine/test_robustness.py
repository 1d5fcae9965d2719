"""What users do beside the straight road: peeking, freezing, wrapping, copying, switching precision."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import lr_scheduler as schedulers

from lightning_hift import StateOffloader, SweepLR
from tests.lagging import LaggingDevice
from tests.models import (
    GROUPS,
    Automatic,
    Net,
    ResumableLoader,
    adamw,
    as_published,
    assert_same_weights,
    attach_published,
    loader,
    next_token_loss,
    tokens,
    trainer,
    weights,
)
from tests.reference.round_robin import train_round_robin


def reference(steps):
    net = Net()
    train_round_robin(net, GROUPS, adamw, [[batch] for batch in tokens(steps)], next_token_loss)
    return net


def lrs_of(make_scheduler, steps=13, frequency=1, make_optimizer=adamw, **options):
    """Learning rates of each parameter group at each step of a run with HiFT."""

    class Watch(Automatic):
        def on_train_batch_start(self, batch, batch_idx):
            seen.append([float(group["lr"]) for group in self.trainer.optimizers[0].param_groups])

        def configure_optimizers(self):
            optimizer = make_optimizer(self.parameters())
            scheduler = {"scheduler": make_scheduler(optimizer), "interval": "step", "frequency": frequency}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    seen = []
    run = trainer(callbacks=[as_published(**options)])
    run.fit(Watch(), loader(steps))
    return seen, run


# --- peeking, freezing, several losses --------------------------------------------------------------------------------


def test_reading_the_optimizers_state_loses_nothing():
    class Peeks(Automatic):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            with_state = [len(self.trainer.optimizers[0].state[p]) == 3 for p in self.parameters()]
            assert sum(with_state) == sum(len(group) for group in GROUPS[: batch_idx + 1])

    model = Peeks()
    run = trainer(strategy="hift")
    run.fit(model, loader(13))
    assert_same_weights(model, reference(13))
    assert len(run.optimizers[0].state_dict()["state"]) == len(list(model.parameters()))


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_start"])
def test_freezing_after_grouping_is_refused(hook):
    model = Automatic()
    setattr(model, hook, lambda: model.net.blocks[1].requires_grad_(False))
    with pytest.raises(RuntimeError, match=r"\['net.blocks.1.norm.weight'.*were frozen after HiFT"):
        trainer(callbacks=[as_published()]).fit(model, loader(3))


@pytest.mark.parametrize("hook", ["__init__", "configure_model", "setup"])
def test_freezing_before_grouping_is_honoured(hook):
    class Freezes(Automatic):
        def freeze(self, stage=None):
            self.net.blocks[1].requires_grad_(False)

    model = Freezes()
    model.freeze() if hook == "__init__" else setattr(model, hook, model.freeze)
    before = weights(model)
    trainer(strategy="hift").fit(model, loader(9))
    unchanged = {name for name, p in weights(model).items() if torch.equal(p, before[name])}
    assert unchanged == set(GROUPS[2])


class TwoHeads(Automatic):
    """Two losses; each reaches its own head only."""

    def __init__(self):
        super().__init__()
        self.net.other = nn.Linear(8, 17)
        self.net.features = lambda t: self.net.blocks[0](self.net.embedding(t))

    def losses(self, batch):
        features = self.net.features(batch[:, :-1])
        return [
            nn.functional.cross_entropy(head(features).flatten(0, 1), batch[:, 1:].flatten())
            for head in (self.net.head, self.net.other)
        ]


UNITS = ["net.embedding", "net.blocks.0", "net.head", "net.other"]


def test_accumulation_over_losses_that_reach_different_layers():
    class Alternates(TwoHeads):
        def training_step(self, batch, batch_idx):
            return self.losses(batch)[batch_idx % 2]

    model = Alternates()
    before = weights(model)
    callback = as_published(units=UNITS, frozen=["net.blocks.1", "net.blocks.2", "net.norm"])
    trainer(callbacks=[callback], accumulate_grad_batches=2).fit(model, loader(16))
    moved = {name.split(".")[0] for name, p in weights(model).items() if not torch.equal(p, before[name])}
    assert moved == {"embedding", "blocks", "head", "other"}


def test_two_backward_passes_by_hand():
    class TwoPasses(TwoHeads):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            first, second = self.losses(batch)
            self.manual_backward(first, retain_graph=True)
            self.manual_backward(second)
            self.optimizers().step()

    model = TwoPasses()
    before = weights(model)
    callback = as_published(units=UNITS, frozen=["net.blocks.1", "net.blocks.2", "net.norm"])
    trainer(callbacks=[callback]).fit(model, loader(4))
    moved = {name.split(".")[0] for name, p in weights(model).items() if not torch.equal(p, before[name])}
    assert moved == {"embedding", "blocks", "head", "other"}


@pytest.mark.filterwarnings("ignore:Found `dataloader_iter`", "ignore:You are using the `dataloader_iter`")
def test_training_step_with_an_iterator():
    class Iterates(Automatic):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return next_token_loss(self.net, batch)

    model = Iterates()
    trainer(strategy="hift").fit(model, loader(8))
    assert_same_weights(model, reference(8))


def test_optimizer_stepped_by_other_names_is_warned_about():
    class Sam(torch.optim.SGD):
        def second_step(self):
            for group in self.param_groups:
                for p in (p for p in group["params"] if p.grad is not None):
                    p.data.add_(p.grad, alpha=-group["lr"])

    class Module(Automatic):
        def __init__(self):
            super().__init__(lambda p: Sam(p, lr=0.1))
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(next_token_loss(self.net, batch))
            self.optimizers().second_step()

    with pytest.warns(UserWarning, match=r"100 backward passes without a step.*Only embedding has been trainable"):
        trainer(strategy="hift").fit(Module(), loader(101))


# --- unusual optimizers and parameters --------------------------------------------------------------------------------


def test_sparse_gradients():
    class Sparse(Automatic):
        def __init__(self):
            super().__init__(lambda p: torch.optim.SGD(p, lr=0.1))
            self.net.embedding.sparse = True

    model, twin = Sparse(), Net()
    trainer(strategy="hift").fit(model, loader(7))
    twin.embedding.sparse = True
    train_round_robin(twin, GROUPS, lambda p: torch.optim.SGD(p, lr=0.1), [[b] for b in tokens(7)], next_token_loss)
    assert_same_weights(model, twin)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_complex_and_empty_parameters():
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 0), nn.Linear(0, 2))
    engine = attach_published(model[:1], adamw(model[:1].parameters()))
    model[0](torch.ones(2, 4, dtype=torch.complex64)).abs().sum().backward()
    engine.optimizer.step()
    assert engine.first_sweep_report().complete

    net = Net()
    net.blocks[0].empty = nn.Parameter(torch.empty(0))
    engine = attach_published(net, adamw(net.parameters()))
    for batch in tokens(5):
        next_token_loss(net, batch).backward()
        engine.optimizer.step()
    assert engine.first_sweep_report().complete


def test_optimizer_that_wraps_another():
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer
            super().__init__([p for g in optimizer.param_groups for p in g["params"]], {})
            self.param_groups = optimizer.param_groups
            self.state = optimizer.state

        def step(self, closure=None):
            return self.optimizer.step(closure)

    model = Automatic(lambda p: Lookahead(torch.optim.SGD(p, lr=0.1)))
    twin = Net()
    trainer(strategy="hift").fit(model, loader(7))
    train_round_robin(twin, GROUPS, lambda p: torch.optim.SGD(p, lr=0.1), [[b] for b in tokens(7)], next_token_loss)
    assert_same_weights(model, twin)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_checkpoint_of_another_precision(precision, tmp_path):
    run = trainer(strategy="hift")
    run.fit(Automatic(), loader(6))
    run.save_checkpoint(tmp_path / "c.ckpt")
    other = trainer(strategy="hift", max_epochs=2, precision=precision)
    other.fit(Automatic(), loader(6), ckpt_path=tmp_path / "c.ckpt")
    assert other.global_step == 12
    states = other.optimizers[0].state_dict()["state"].values()
    stepped_in = torch.float32 if precision == "bf16-true" else torch.float64  # on the master weights
    assert {s["exp_avg"].dtype for s in states} == {stepped_in}


def test_moved_model_is_noticed():
    model = Net()
    offloader = StateOffloader("cpu")
    offloader.device = torch.device("cuda")
    with pytest.raises(RuntimeError, match="parameters are on cpu, but the optimizer state is kept for cuda"):
        attach_published(model, adamw(model.parameters()), make_offloader=lambda: offloader)


def test_close_restores_requires_grad_even_if_the_device_fails(monkeypatch):
    model = Net()
    engine = attach_published(model, adamw(model.parameters()))
    monkeypatch.setattr(StateOffloader, "release_all", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.close()
    assert all(p.requires_grad for p in model.parameters())


def test_loading_waits_for_saving_chunk_by_chunk_only(monkeypatch):
    waits = []

    def note(waiting, awaited):
        waits.append((waiting, awaited))
        return False

    monkeypatch.setattr("lightning_hift.offload.transfers._CHUNK", 64)
    offloader = StateOffloader("cpu", device_module=LaggingDevice(note), always_copy=True)
    a, b = nn.Parameter(torch.zeros(64)), nn.Parameter(torch.zeros(64))
    of_a, of_b = offloader.add([a]), offloader.add([b])
    offloader.put({p: {"m": torch.ones(64)} for p in (a, b)})
    offloader.give(of_a, offloader.take([of_a]))
    waits.clear()
    offloader.hold(of_b)
    assert waits.count(("load", "save")) == 4  # 256 bytes: each chunk for its own place, none for the whole
    assert ("save", "load") not in waits


def test_callback_can_be_copied_and_pickled_after_fit():
    callback = as_published(order="top2down")
    trainer(callbacks=[callback]).fit(Automatic(), loader(2))
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert twin.order == "top2down"
        assert twin.groups == []
    assert len(callback.groups) == 5


def test_a_single_pattern_may_be_a_string():
    model = Net()
    engine = attach_published(model, adamw(model.parameters()), frozen="embedding", always_active="head")
    assert [group.name for group in engine.groups] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [unit.name for unit in engine.always_active] == ["head"]


def test_no_optimizer():
    class Nothing(Automatic):
        def configure_optimizers(self):
            return None

    with (
        pytest.warns(UserWarning, match="returned `None`"),
        pytest.raises(Exception, match="configure_optimizers returned no optimizer"),
    ):
        trainer(strategy="hift").fit(Nothing(), loader(2))


@pytest.mark.parametrize("value", [1.5, "2", 0, True])
def test_group_size_is_a_whole_number(value):
    with pytest.raises(ValueError, match=f"Got group_size={value!r}; it must be a whole number"):
        as_published(group_size=value)


def test_compiled_and_plain_module_share_checkpoints():
    net = Net()
    engine = attach_published(net, adamw(net.parameters()))
    saved = engine.optimizer.state_dict()
    other = nn.ModuleDict({"_orig_mod": Net()})
    optimizer = adamw(other.parameters())
    resumed = attach_published(
        other, optimizer, units=["_orig_mod.embedding", "_orig_mod.blocks.*", ["_orig_mod.norm", "_orig_mod.head"]]
    )
    optimizer.load_state_dict(saved)
    assert resumed.step == 0


class Forgetful(torch.optim.SGD):
    """Loses its closure."""

    def step(self, closure=None):
        return super().step()


def test_a_closure_that_is_never_called():
    class Module(Automatic):
        def configure_optimizers(self):
            return Forgetful(self.parameters(), lr=0.1)

    for options in ({}, {"strategy": "hift"}):  # Lightning's own error, as without HiFT
        with pytest.raises(MisconfigurationException, match="The closure hasn't been executed"):
            trainer(**options).fit(Module(), loader(2))

    net = Net()
    engine = attach_published(net, Forgetful(net.parameters(), lr=0.1))
    engine.optimizer.step(lambda: None)
    assert engine.step == 0  # nothing was stepped
    next_token_loss(net, tokens(1)[0]).backward()
    with pytest.raises(RuntimeError, match=r"Forgetful\.step was given a closure and stepped without calling it"):
        engine.optimizer.step(lambda: None)


# --- schedulers -------------------------------------------------------------------------------------------------------


class GradualWarmup(schedulers.LRScheduler):
    """Warms up and then hands over to another scheduler on the same optimizer."""

    def __init__(self, optimizer, steps, after):
        self.steps, self.after = steps, after
        super().__init__(optimizer)

    def get_lr(self):
        if self.last_epoch >= self.steps:
            return self.after.get_last_lr()
        return [base * self.last_epoch / self.steps for base in self.base_lrs]

    def step(self, epoch=None):
        if self.last_epoch >= self.steps:
            self.after.step()
        super().step()


def test_scheduler_inside_a_scheduler_keeps_its_optimizer():
    def make(optimizer):
        return GradualWarmup(optimizer, 6, schedulers.CosineAnnealingLR(optimizer, T_max=20))

    lrs, run = lrs_of(make, steps=25)
    plain = adamw(Net().parameters())
    scheduler = make(plain)
    for _ in range(25):
        plain.step()
        scheduler.step()
    held = run.lr_scheduler_configs[0].scheduler
    assert held.after.optimizer is run.optimizers[0]
    assert held.after.last_epoch == scheduler.after.last_epoch
    assert run.optimizers[0].param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert 0 < lrs[0][0] < lrs[5][0]


def test_bound_methods_of_the_module_are_not_copied():
    class Module(Automatic):
        def lr_at(self, step):
            calls.append(self)
            return min(1.0, step / 9)

        def configure_optimizers(self):
            optimizer = adamw(self.parameters())
            scheduler = schedulers.LambdaLR(optimizer, self.lr_at)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    calls = []
    model = Module()
    run = trainer(callbacks=[as_published()])
    run.fit(model, loader(7))
    assert {id(module) for module in calls} == {id(model)}


def test_warmup_with_a_frequency():
    lrs, _ = lrs_of(lambda o: schedulers.LambdaLR(o, lambda s: min(1.0, s / 10)), steps=25, frequency=4)
    plain = [0.01 * min(1.0, step // 4 / 10) for step in range(25)]
    assert [lr for (lr,) in lrs] == pytest.approx(
        [sum(plain[i : i + 5]) / 5 for i in range(0, 25, 5) for _ in range(5)]
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda o: schedulers.CyclicLR(o, base_lr=0.0, max_lr=0.01, step_size_up=10, cycle_momentum=False),
        lambda o: schedulers.LinearLR(o, 1e-8, total_iters=10),
        lambda o: schedulers.SequentialLR(
            o, [schedulers.LinearLR(o, 1e-8, total_iters=10), schedulers.ConstantLR(o)], milestones=[10]
        ),
    ],
    ids=["cyclic", "linear", "sequential"],
)
def test_other_ways_to_start_at_nothing(make):
    lrs, _ = lrs_of(make)
    assert lrs[0][0] > 1e-3
    assert len({lr for (lr,) in lrs[:5]}) == 1
    assert lrs[0][0] < lrs[5][0]


def test_one_parameter_group_warms_up_and_another_does_not():
    def two_groups(parameters):
        parameters = list(parameters)
        return torch.optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.01)

    def half_warm(optimizer):
        return schedulers.LambdaLR(optimizer, [lambda step: min(1, step / 10), lambda step: 1.0])

    lrs, _ = lrs_of(half_warm, make_optimizer=two_groups)
    assert [lr for lr, _ in lrs[:10]] == pytest.approx([0.002] * 5 + [0.007] * 5)
    assert {lr for _, lr in lrs} == {0.01}


def test_scheduler_whose_step_takes_an_epoch():
    class Required:
        """timm's interface: the epoch must be given."""

        def __init__(self, optimizer):
            self.optimizer, self.epoch = optimizer, 0
            optimizer.param_groups[0]["lr"] = 0.0

        def step(self, epoch):
            self.epoch = epoch
            self.optimizer.param_groups[0]["lr"] = 0.01 * min(1.0, epoch / 10)

        def state_dict(self):
            return {"epoch": self.epoch}

        def load_state_dict(self, state):
            self.epoch = state["epoch"]

    class Module(Automatic):
        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step(epoch=self.global_step)

    model = Module(make_scheduler=Required)
    run = trainer(callbacks=[as_published()])
    with pytest.warns(UserWarning, match="kept their value"):
        run.fit(model, loader(13))
    assert run.lr_scheduler_configs[0].scheduler.epoch == 13
    assert model.lrs == [0.0] * 5 + [0.005] * 5 + [0.01] * 3


def test_attributes_of_a_held_scheduler_can_be_set():
    optimizer = adamw((model := Net()).parameters())
    held = SweepLR(schedulers.CosineAnnealingLR(optimizer, T_max=100), attach_published(model, optimizer))
    held.T_max = 10
    assert held.state_dict()["T_max"] == 10


def test_schedule_after_an_excursion_to_plain_lightning(tmp_path):
    def make(optimizer):
        return schedulers.CosineAnnealingLR(optimizer, T_max=40)

    def fit(strategy, epochs, saved):
        run = trainer(**strategy, max_epochs=epochs)
        path = tmp_path / saved if saved else None
        run.fit(Automatic(make_scheduler=make), ResumableLoader(tokens(8)), ckpt_path=path)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return run

    plain_optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    plain = make(plain_optimizer)
    expected = []
    for _ in range(24):
        plain_optimizer.step()
        plain.step()
        expected.append(plain_optimizer.param_groups[0]["lr"])

    fit({"strategy": "hift"}, 1, None)
    second = fit({}, 2, "1.ckpt")
    assert second.lr_scheduler_configs[0].scheduler.last_epoch == 16
    assert second.optimizers[0].param_groups[0]["lr"] == expected[15]
    third = fit({"strategy": "hift"}, 3, "2.ckpt")
    # A checkpoint of plain Lightning knows no sweep, so one begins with step 16.
    assert third.lightning_module.lrs[0] == pytest.approx(sum(expected[15:20]) / 5)
    assert third.lr_scheduler_configs[0].scheduler.last_epoch == 24
    assert third.optimizers[0].param_groups[0]["lr"] == expected[23]


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_of_an_optimizer_hold_its_state(copied, closed):
    model = Net()
    engine = attach_published(model, adamw(model.parameters()))
    for batch in tokens(7):
        next_token_loss(model, batch).backward()
        engine.optimizer.step()
    if closed:
        engine.close()
    expected = engine.optimizer.state_dict()["state"]
    found = copied(engine.optimizer).state_dict()
    assert "hift" not in found
    assert found["state"].keys() == expected.keys()
    for i, values in expected.items():
        assert all(torch.equal(value, found["state"][i][key]) for key, value in values.items())
