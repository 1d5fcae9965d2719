"""Learning rates by how rarely a layer group trains."""

import math
from itertools import chain

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_hift import HFT, LISA, BAdam, HiFTCallback, MeZO, SelectionPolicy, SweepSchedule
from lightning_hift.engine.lr_scale import lr_scales
from lightning_hift.groups.grouping import find_layer_units, group_units
from tests.lagging import lagging
from tests.models import (
    GROUPS,
    Automatic,
    Net,
    ResumableLoader,
    adamw,
    assert_same_weights,
    attach_published,
    loader,
    next_token_loss,
    tokens,
    trainer,
)
from tests.optimizers import with_tensor_lr
from tests.reference.round_robin import train_round_robin

OPTIMIZERS = {
    "adamw": adamw,
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw_tensor_lr": with_tensor_lr("AdamW", foreach=False, capturable=False),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "two_param_groups": lambda p: _two_param_groups(list(p)),
}


def _two_param_groups(parameters):
    parts = [
        {"params": [p for p in parameters if p.ndim > 1], "lr": 0.01},
        {"params": [p for p in parameters if p.ndim == 1], "lr": 0.003, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([part for part in parts if part["params"]])


class Cooling(torch.optim.Optimizer):
    """Gradient descent that lowers its own learning rate."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad)
            group["lr"] = group["lr"] * 0.5


def scaled(make, scales):
    """``make`` with the next one of ``scales`` at each call."""
    following = iter(scales)

    def make_scaled(parameters):
        optimizer, scale = make(parameters), next(following)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * scale
        return optimizer

    return make_scaled


def train(model, optimizer, batches):
    for batch in batches:
        next_token_loss(model, batch).backward()
        optimizer.step()


@pytest.mark.parametrize("lr_scale", [0, -1.0, math.inf, math.nan, "Auto", True])
def test_refused(lr_scale):
    with pytest.raises(ValueError, match=r"lr_scale=.*must be a number above 0.*'auto'"):
        HiFTCallback(lr_scale=lr_scale)
    with pytest.raises(ValueError, match=r"lr_scale=.*must be a number above 0.*'auto'"):
        attach_published(model := Net(), adamw(model.parameters()), lr_scale=lr_scale)


@pytest.mark.parametrize("make_offloader", [None, lagging])
@pytest.mark.parametrize("lr_scale", [3.0, "auto"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_independent_optimizers_with_other_learning_rates(name, lr_scale, make_offloader):
    model, twin, batches = Net(), Net(), tokens(13)
    optimizer = OPTIMIZERS[name](model.parameters())
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    engine = attach_published(model, optimizer, lr_scale=lr_scale, make_offloader=make_offloader)
    train(model, optimizer, batches)
    scales = [3.0] * 5 if lr_scale == 3.0 else engine.lr_scales
    train_round_robin(twin, GROUPS, scaled(OPTIMIZERS[name], scales), [[b] for b in batches], next_token_loss)
    assert_same_weights(model, twin)
    assert [float(group["lr"]) for group in optimizer.param_groups] == rates


def test_groups_with_turns_of_different_lengths():
    model, twin, batches = Net(), Net(), tokens(17)
    policy = SweepSchedule(turns=(1, 3, 1, 1, 2), num_groups=5)
    engine = attach_published(model, adamw(model.parameters()), policy=policy, lr_scale="auto")
    assert len(set(engine.lr_scales)) == 3
    train(model, engine.optimizer, batches)
    optimizers = [
        scaled(adamw, [scale])([dict(twin.named_parameters())[name] for name in names])
        for names, scale in zip(GROUPS, engine.lr_scales, strict=True)
    ]
    for step, batch in enumerate(batches):
        twin.zero_grad()
        next_token_loss(twin, batch).backward()
        optimizers[engine.policy.group_at(step)].step()
    assert_same_weights(model, twin)


def test_always_active_units_keep_their_learning_rate():
    model, twin, batches = Net(), Net(), tokens(11)
    engine = attach_published(model, adamw(model.parameters()), always_active=["head"], lr_scale=4.0)
    train(model, engine.optimizer, batches)
    make = scaled(adamw, chain([4.0] * 4, [1.0]))
    train_round_robin(twin, GROUPS[:-1], make, [[b] for b in batches], next_token_loss, always_active=GROUPS[-1])
    assert_same_weights(model, twin)


def test_slices_are_scaled_like_the_whole():
    whole, sliced, batches = Net(), Net(), tokens(11)
    for model, most in ((whole, None), (sliced, 40)):
        attach_published(model, optimizer := adamw(model.parameters()), lr_scale=2.5, max_group_numel=most)
        train(model, optimizer, batches)
    assert_same_weights(whole, sliced)


def test_masters_are_stepped_with_the_scaled_rate():
    plain, other, batches = Net().bfloat16(), Net().bfloat16(), tokens(11)
    attach_published(plain, once := scaled(adamw, [2.0])(plain.parameters()))
    attach_published(other, hift := adamw(other.parameters()), lr_scale=2.0)
    train(plain, once, batches)
    train(other, hift, batches)
    assert_same_weights(plain, other)


def test_a_rate_that_the_step_itself_changes_is_kept_in_proportion():
    model, twin, batches = Net(), Net(), tokens(11)
    engine = attach_published(model, Cooling(model.parameters()), lr_scale=4.0)
    train(model, engine.optimizer, batches)
    train_round_robin(twin, GROUPS, scaled(Cooling, [4.0] * 5), [[b] for b in batches], next_token_loss)
    assert_same_weights(model, twin)
    assert engine.optimizer.param_groups[0]["lr"] == 0.1 * 0.5**3  # the first group has had three steps


def test_a_step_that_fails_leaves_the_learning_rate_alone():
    model = Net()
    engine = attach_published(model, adamw(model.parameters()), lr_scale=4.0)
    next_token_loss(model, tokens(1)[0]).backward()
    engine.optimizer.param_groups[0]["betas"] = None
    with pytest.raises(TypeError):
        engine.optimizer.step()
    engine.activate()
    assert engine.optimizer.param_groups[0]["lr"] == 0.01


class Learned(SelectionPolicy):
    steps_per_sweep = 1

    def groups_at(self, step):
        return (0,)


def test_the_rule():
    groups = group_units(find_layer_units(Net(depth=6)))
    uneven = SweepSchedule(3, turns=(1, 2, 6))
    assert lr_scales(1.0, SweepSchedule(8), 8) == (1.0,) * 8
    assert lr_scales(2, SweepSchedule(8), 8) == (2.0,) * 8
    assert lr_scales("auto", SweepSchedule(1), 1) == (1.0,)
    assert lr_scales("auto", SweepSchedule(4, steps_per_group=5), 4) == pytest.approx([2**1.5] * 4)
    assert lr_scales("auto", uneven, 3) == pytest.approx([5.0, 4.5**0.75, 1.5**0.75])
    assert lr_scales("auto", SweepSchedule(1000), 1000) == (5.0,) * 1000
    assert lr_scales("auto", BAdam().bound_to(groups), 8) == pytest.approx([8**0.75] * 8)
    assert lr_scales("auto", LISA(num_blocks=2).bound_to(groups), 8) == pytest.approx([4**0.75] * 8)
    assert lr_scales("auto", HFT().bound_to(groups), 8) == pytest.approx([2**0.75] * 8)
    assert lr_scales("auto", Learned().bound_to(groups), 8) == pytest.approx([8**0.75] * 8)


def test_zeroth_order_optimizers_keep_their_learning_rate():
    model = Net()
    engine = attach_published(model, MeZO(model.parameters(), lr=0.01), lr_scale="auto")
    assert engine.lr_scales == (1.0,) * 5
    engine.close()
    with pytest.raises(ValueError, match=r"lr_scale=2\.0, but MeZO moves all active parameters at once"):
        attach_published(model, MeZO(model.parameters(), lr=0.01), lr_scale=2.0)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda p: pytest.importorskip("transformers").Adafactor(p, lr=None, warmup_init=True), "has no learning rate"),
        (lambda p: pytest.importorskip("prodigyopt").Prodigy(p), None),
    ],
)
def test_optimizers_that_find_their_own_rate_are_left_alone(make, why):
    model = Net()
    engine = attach_published(model, make(model.parameters()), lr_scale="auto")
    assert engine.lr_scales == (1.0,) * 5
    if why is not None:
        with pytest.raises(ValueError, match=f"lr_scale=2.0, but Adafactor {why}"):
            attach_published(other := Net(), make(other.parameters()), lr_scale=2.0)


def test_schedules_and_what_is_logged_know_nothing_of_it():
    def rates(**options):
        module = Automatic(make_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, total_iters=12))
        run = trainer(callbacks=[HiFTCallback(group_size=1, **options)])
        run.fit(module, loader(12))
        return module.lrs, run.optimizers[0].param_groups[0]["lr"]

    assert rates(lr_scale="auto") == rates(lr_scale=1.0)


def test_a_resumed_run_goes_on_with_the_same_rates(tmp_path):
    def fit(steps, lr_scale, path=None):
        callbacks = [HiFTCallback(group_size=1, lr_scale=lr_scale), ModelCheckpoint(tmp_path, f"{steps}")]
        module = Automatic()
        run = trainer(max_steps=steps, max_epochs=-1, callbacks=callbacks, enable_checkpointing=True)
        run.fit(module, ResumableLoader(tokens(7)), ckpt_path=path, weights_only=path is not None)
        return module

    whole = fit(11, "auto")
    fit(7, "auto")
    assert_same_weights(whole, fit(11, "auto", tmp_path / "7.ckpt"))
    with pytest.raises(ValueError, match=r"lr_scale: \[3\.34.* against None.*Use its settings to resume"):
        fit(11, 1.0, tmp_path / "7.ckpt")
    with pytest.raises(ValueError, match=r"lr_scale: \[3\.34.* against \[2\.0.*Use its settings to resume"):
        fit(11, 2.0, tmp_path / "7.ckpt")
