"""Batches in which the active group gets no gradient, in a Trainer."""

import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lightning_hift import HiFTCallback, HiFTStrategy
from tests.engine.test_missed_turns import MISSED, TWO_HEADS, UNITS, Dropping, TwoHeads
from tests.models import (
    GROUPS,
    Automatic,
    Manual,
    Net,
    adamw,
    as_published,
    assert_same_weights,
    attach_published,
    loader,
    next_token_loss,
    tokens,
    trainer,
)
from tests.reference.round_robin import train_round_robin

pytestmark = pytest.mark.filterwarnings(f"ignore:.*{MISSED}", "ignore:.*some of the 23 trainable parameters")


def with_net(kind, net):
    module = kind()
    module.net = net
    return module


def reference(net, steps, groups=GROUPS, window=1):
    batches = tokens(steps)
    windows = [batches[i : i + window] for i in range(0, steps, window)]
    train_round_robin(net, groups, adamw, windows, next_token_loss)
    return net


@pytest.mark.parametrize("kind", [Automatic, Manual])
@pytest.mark.parametrize("way", [{"callbacks": [as_published()]}, {"strategy": "hift"}], ids=["callback", "strategy"])
def test_layer_dropout(kind, way):
    module = with_net(kind, Dropping())
    run = trainer(**way)
    run.fit(module, loader(37))
    assert_same_weights(module, reference(Dropping(), 37))
    assert run.global_step == 37
    assert run.callbacks[0].engines[0].missed_turns.count > 5


def test_accumulation():
    module = with_net(Automatic, Dropping())
    trainer(strategy="hift", accumulate_grad_batches=3).fit(module, loader(60))
    assert_same_weights(module, reference(Dropping(), 60, window=3))


@pytest.mark.parametrize("in_vain", [False, True])
def test_a_loss_that_depends_on_frozen_parameters_only(in_vain):
    module = with_net(Automatic, TwoHeads(in_vain))
    callback = as_published(units=[[f"net.{n}" for n in u] if isinstance(u, list) else f"net.{u}" for u in UNITS])
    trainer(callbacks=[callback]).fit(module, loader(36))
    assert_same_weights(module, reference(TwoHeads(in_vain), 36, TWO_HEADS))
    assert callback.engines[0].missed_turns.count > 0


def test_a_scaler_takes_a_turn_without_gradients_for_one_that_did_not_overflow():
    module, twin = with_net(Automatic, Dropping()), Dropping()
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))
    callback = as_published()
    trainer(callbacks=[callback], plugins=[precision]).fit(module, loader(37))
    engine = attach_published(twin, adamw(twin.parameters()))
    for batch in tokens(37):
        with torch.autocast("cpu", torch.float16):
            loss = next_token_loss(twin, batch)
        loss.backward()
        engine.optimizer.step()
    assert_same_weights(module, twin)
    assert precision.scaler._growth_tracker.item() == 37


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_master_weights(precision):
    found = []
    for master_weights in ("full", "auto"):
        module = with_net(Automatic, Dropping())
        strategy = HiFTStrategy(master_weights=master_weights)
        run = trainer(strategy=strategy, precision=precision, gradient_clip_val=0.1)
        run.fit(module, loader(37))
        assert run.global_step == 37
        assert run.callbacks[0].engines[0].missed_turns.count > 5
        found.append(module)
    assert_same_weights(*found)


class Drops(Automatic):
    """Does away with gradients, as one does who looks for NaN in them."""

    def __init__(self, whole):
        super().__init__()
        self.whole, self.count = whole, 0

    def on_after_backward(self):
        self.count += 1
        if self.count < 4 or self.count % 5 == 0:
            if self.whole:
                self.optimizers().zero_grad()
            else:
                for p in self.parameters():
                    p.grad = None


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_dropped_gradients_in_one_group_are_full_fine_tuning(whole, accumulate):
    found = []
    for callbacks in ([], [HiFTCallback(group_size=100)]):
        module = Drops(whole)
        trainer(callbacks=callbacks, accumulate_grad_batches=accumulate).fit(module, loader(24))
        found.append(module)
    assert_same_weights(*found)


def test_dropped_gradients_in_turns():
    module, twin = Drops(whole=True), Net()
    with pytest.warns(UserWarning, match=MISSED) as caught:
        trainer(strategy="hift").fit(module, loader(24))
    assert sum(MISSED in str(each.message) for each in caught) == 1
    optimizers = [adamw([twin.get_parameter(name) for name in group]) for group in GROUPS]
    for number, batch in enumerate(tokens(24)):
        twin.zero_grad()
        next_token_loss(twin, batch).backward()
        if number > 2 and number % 5 != 4:
            optimizers[number % 5].step()
    assert_same_weights(module, twin)


class TwoOptimizers(Automatic):
    """Each network has its own; the second one's loss is left out at times, but both are stepped."""

    def __init__(self, with_closure=False):
        super().__init__()
        self.automatic_optimization, self.with_closure = False, with_closure
        self.net, self.second = Dropping(), Dropping()

    def training_step(self, batch, batch_idx):
        for index, (optimizer, net) in enumerate(zip(self.optimizers(), (self.net, self.second), strict=True)):

            def closure(net=net, index=index, optimizer=optimizer):
                optimizer.zero_grad()
                loss = next_token_loss(net, batch)
                if not (index and batch_idx % 3 == 0):
                    self.manual_backward(loss)
                return loss

            if self.with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()

    def configure_optimizers(self):
        return [adamw(self.net.parameters()), adamw(self.second.parameters())]


@pytest.mark.parametrize("with_closure", [False, True])
def test_several_optimizers(with_closure):
    module, twins = TwoOptimizers(with_closure), [Dropping(), Dropping()]
    trainer(callbacks=[as_published()]).fit(module, loader(36))
    for index, (twin, trained) in enumerate(zip(twins, (module.net, module.second), strict=True)):
        optimizers = [adamw([twin.get_parameter(name) for name in group]) for group in GROUPS]
        for number, batch in enumerate(tokens(36)):
            twin.zero_grad()
            loss = next_token_loss(twin, batch)
            if not (index and number % 3 == 0):
                loss.backward()
            optimizers[number % 5].step()
        assert_same_weights(trained, twin)


def test_an_activation_budget():
    found = []
    for budget in (None, 4000):
        module = with_net(Automatic, Dropping())
        trainer(strategy=HiFTStrategy(activation_budget=budget)).fit(module, loader(37))
        found.append(module)
    assert_same_weights(*found)


def test_a_scheduler_goes_on_as_usual():
    module = with_net(lambda: Automatic(make_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o)), Dropping())
    run = trainer(strategy="hift")
    run.fit(module, loader(12))
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 12


class WithoutGraph(Automatic):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            return super().training_step(batch, batch_idx)


def test_a_loss_without_graph():
    with pytest.raises(RuntimeError, match=r"Layer group 0 \(embedding\) has never had a gradient.*torch.no_grad"):
        trainer(strategy="hift").fit(WithoutGraph(), loader(9))
    with pytest.raises(RuntimeError, match="The loss depends on no parameter that trains"):
        trainer(callbacks=[HiFTCallback(group_size=100)]).fit(WithoutGraph(), loader(9))


def test_flags_of_the_user_come_back_although_a_group_was_waited_for():
    module = with_net(Automatic, Dropping(1.0))
    module.net.blocks[1].requires_grad_(False)

    class Watch(pl.Callback):
        def on_train_batch_end(self, run, module, *args):
            flags.append({n for n, p in module.net.named_parameters() if not p.requires_grad})

    flags = []
    trainer(callbacks=[as_published(), Watch()]).fit(module, loader(7))
    assert all(each == set(GROUPS[2]) for each in flags)


class Adapts(Automatic):
    """MAML: its loss is that of weights after a step of their own."""

    def __init__(self, only_trainable):
        super().__init__()
        self.only_trainable = only_trainable

    def training_step(self, batch, batch_idx):
        parameters = {n: p for n, p in self.net.named_parameters() if p.requires_grad or not self.only_trainable}
        loss = next_token_loss(self.net, batch)
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        fast = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
        return next_token_loss(lambda t: torch.func.functional_call(self.net, fast, (t,)), batch)


def test_gradients_of_frozen_parameters_are_explained():
    with pytest.raises(RuntimeError, match="differentiated Tensors does not require grad") as caught:
        trainer(callbacks=[as_published()]).fit(Adapts(only_trainable=False), loader(5))
    if sys.version_info >= (3, 11):
        assert any("parameters with requires_grad alone" in note for note in caught.value.__notes__)
    module, start = Adapts(only_trainable=True), Net()
    trainer(callbacks=[as_published()]).fit(module, loader(5))
    assert not any(torch.equal(p, start.get_parameter(name)) for name, p in module.net.named_parameters())
