"""HiFT in a loop of Fabric, against the same loop in plain torch, and against plain Fabric where all is one group."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision, TorchCheckpointIO
from lightning.fabric.plugins.precision import HalfPrecision
from torch import nn

from lightning_hift import LISA, HiFTFabricStrategy, HiFTStrategy, SweepLR, attach_engines
from lightning_hift.fabric.precision import FabricMasterPrecision
from tests.lagging import lagging
from tests.matrices import crossed
from tests.models import (
    Automatic,
    Net,
    adamw,
    as_published,
    assert_same_weights,
    attach_published,
    loader,
    next_token_loss,
    published,
    tokens,
    trainer,
    weights,
)

EVERYTHING = {"group_size": 100}
HALF = ["bf16-true", "16-true"]


class LaggingStrategy(HiFTFabricStrategy):
    """Copies that lag behind, on the CPU."""

    def _make_offloader(self):
        return lagging(prefetch=self.options.prefetch)


def mixed_16(init_scale=2.0**16):
    """AMP with a scaler, which Fabric gives to GPUs only."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=3))


def hift(kind=HiFTFabricStrategy, precision="32-true", **options):
    """Fabric with HiFT as published."""
    return plain(precision, strategy=kind(**published(options)))


def plain(precision="32-true", **arguments):
    own = {"plugins": precision()} if callable(precision) else {"precision": precision}
    return Fabric(accelerator="cpu", devices=1, **own, **arguments)


def train(fabric, model, optimizer, batches, accumulate=1, clip=None, scheduler=None):
    """The loop of any user of Fabric. Returns the losses."""
    losses = []
    for i, batch in enumerate(batches):
        is_accumulating = (i + 1) % accumulate != 0
        with fabric.no_backward_sync(model, enabled=is_accumulating):
            loss = next_token_loss(model, batch)
            fabric.backward(loss / accumulate)
        losses.append(loss.item())
        if not is_accumulating:
            if clip is not None:
                fabric.clip_gradients(model, optimizer, **clip, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
    return losses


OPTIMIZERS = {
    "adamw": adamw,
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}
CLIPS = {"not": None, "norm": {"max_norm": 0.1}, "value": {"clip_val": 0.01}}
PRECISIONS = {
    "32-true": "32-true",
    "64-true": "64-true",
    "bf16-mixed": "bf16-mixed",
    "16-mixed": mixed_16,
    "16-mixed-overflows": lambda: mixed_16(2.0**21),
}


def plain_loop(engine, model, batches, accumulate, clip):
    for i, batch in enumerate(batches):
        (next_token_loss(model, batch) / accumulate).backward()
        if (i + 1) % accumulate == 0:
            if clip is not None and "max_norm" in clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip["max_norm"])
            elif clip is not None:
                nn.utils.clip_grad_value_(model.parameters(), clip["clip_val"])
            engine.optimizer.step()
            engine.optimizer.zero_grad()


@pytest.mark.parametrize(
    ("name", "kind", "accumulate", "clip"),
    crossed(OPTIMIZERS, [HiFTFabricStrategy, LaggingStrategy], [1, 2], CLIPS),
)
def test_equals_the_engine_in_a_plain_loop(name, kind, accumulate, clip):
    model, twin, batches = Net(), Net(), tokens(26)
    engine = attach_published(twin, OPTIMIZERS[name](twin.parameters()))
    plain_loop(engine, twin, batches, accumulate, CLIPS[clip])
    fabric = hift(kind)
    train(fabric, *fabric.setup(model, OPTIMIZERS[name](model.parameters())), batches, accumulate, CLIPS[clip])
    assert_same_weights(model, twin)


@pytest.mark.parametrize(
    ("precision", "name", "accumulate", "clip"), crossed(PRECISIONS, ["adamw", "sgd_momentum"], [1, 2], CLIPS)
)
def test_one_group_equals_plain_fabric(precision, name, accumulate, clip):
    results = []
    for fabric in (plain(PRECISIONS[precision]), hift(precision=PRECISIONS[precision], **EVERYTHING)):
        model = Net()
        model, optimizer = fabric.setup(model, OPTIMIZERS[name](model.parameters()))
        losses = train(fabric, model, optimizer, tokens(12), accumulate, CLIPS[clip])
        results.append((losses, weights(model.module)))
    assert results[0][0] == results[1][0]
    assert_same_weights(results[0][1], results[1][1])
    changed = [name for name, before in weights(Net()).items() if not torch.equal(before, results[0][1][name])]
    assert len(changed) == len(weights(Net()))


@pytest.mark.parametrize("name", PRECISIONS)
def test_mixed_precision_of_several_groups(name):
    """The plain loop has the same precision by Fabric, and the engine attached by hand."""
    results = []
    for fabric in (plain(PRECISIONS[name]), hift(precision=PRECISIONS[name])):
        model = Net()
        optimizer = adamw(model.parameters())
        if not isinstance(fabric.strategy, HiFTFabricStrategy):
            attach_published(model.to(torch.float64 if name == "64-true" else torch.float32), optimizer)
        model, optimizer = fabric.setup(model, optimizer)
        losses = train(fabric, model, optimizer, tokens(23), clip={"max_norm": 0.5})
        results.append((losses, weights(model.module)))
    assert results[0][0] == results[1][0]
    assert_same_weights(results[0][1], results[1][1])


# --- weights in 16 bits -----------------------------------------------------------------------------------------------


class FloatLoss(Automatic):
    """The loss in 32 bits, in which Fabric hands over what a model returns."""

    def training_step(self, batch, batch_idx):
        return next_token_loss(lambda rows: self.net(rows).float(), batch)


def by_trainer(precision, clip=None, **options):
    module = FloatLoss()
    run = trainer(
        strategy=HiFTStrategy(**options),
        callbacks=[as_published()],
        precision=precision,
        gradient_clip_val=clip,
    )
    run.fit(module, loader(13))
    return module.net, run.optimizers[0]


@pytest.mark.parametrize("setup", ["together", "apart"])
@pytest.mark.parametrize(
    "options", [{}, {"master_weights": "full"}, {"max_group_numel": 100}, {"master_weights": "none"}], ids=str
)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_masters_are_those_of_the_trainer(setup, options, clip):
    fabric = hift(precision="bf16-true", **options)
    model = Net()
    optimizer = adamw(model.parameters())
    if setup == "together":
        model, optimizer = fabric.setup(model, optimizer)
    else:
        model = fabric.setup(model)
        optimizer = fabric.setup_optimizers(optimizer)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    batches = list(loader(13))
    train(fabric, model, optimizer, batches, clip=None if clip is None else {"max_norm": clip})
    twin, other = by_trainer("bf16-true", clip, **options)
    assert_same_weights(model.module, twin)
    masters, others = optimizer.state_dict()["hift"]["masters"], other.state_dict()["hift"]["masters"]
    assert masters.keys() == others.keys()
    assert all(torch.equal(masters[i], others[i]) for i in masters)
    assert bool(masters) == (options != {"master_weights": "none"})


@pytest.mark.parametrize("masters", ["split", "full"])
@pytest.mark.parametrize("by", ["load_raw", "load_state_dict", "initialization of one layer"])
@pytest.mark.parametrize("when", ["after setup", "after a forward pass", "between setup and optimizer"])
def test_what_is_loaded_before_the_first_step_makes_the_masters(masters, by, when, tmp_path):
    """As if the model had been built with it: nothing is left of the masters of random weights."""

    def load(fabric, model):
        if by == "load_raw":
            torch.save({name: w.bfloat16() for name, w in Net(7).state_dict().items()}, tmp_path / "weights.pth")
            fabric.load_raw(tmp_path / "weights.pth", model)
        elif by == "load_state_dict":
            model.load_state_dict({name: w.bfloat16() for name, w in Net(7).state_dict().items()})
        else:
            with torch.no_grad():
                model.head.weight.copy_(Net(7).head.weight.bfloat16())

    expected = Net()
    load(plain(), expected)
    fabric, model = hift(precision="bf16-true", master_weights=masters), Net()
    if when == "between setup and optimizer":
        model = fabric.setup(model)
        load(fabric, model)
        optimizer = fabric.setup_optimizers(adamw(model.parameters()))
    else:
        model, optimizer = fabric.setup(model, adamw(model.parameters()))
        if when == "after a forward pass":
            model(tokens(1)[0])
        load(fabric, model)
    train(fabric, model, optimizer, tokens(8))
    other = hift(precision="bf16-true", master_weights=masters)
    expected, its = other.setup(expected, adamw(expected.parameters()))
    train(other, expected, its, tokens(8))
    assert_same_weights(model.module, expected.module)
    kept, wanted = optimizer.state_dict()["hift"]["masters"], its.state_dict()["hift"]["masters"]
    assert all(torch.equal(kept[i], wanted[i]) for i in wanted)


@pytest.mark.parametrize("precision", HALF)
def test_modules_are_built_on_the_host_in_32_bits(precision):
    fabric = hift(precision=precision)
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16}[precision]
    with fabric.init_module():
        model = Net()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with fabric.init_tensor():
        assert torch.zeros(1).dtype == dtype
    model = fabric.setup(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # masters are still to come
    optimizer = fabric.setup_optimizers(adamw(model.parameters()))
    assert {p.dtype for p in model.parameters()} == {dtype}
    train(fabric, model, optimizer, tokens(6))


def test_a_module_without_optimizer_is_rounded_when_it_is_used():
    fabric = hift(precision="bf16-true")
    teacher = fabric.setup(Net(1))
    model = Net()
    model, optimizer = fabric.setup(model, adamw(model.parameters()))
    batch = tokens(1)[0]
    with torch.no_grad():
        logits = teacher(batch)
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    reference = plain("bf16-true").setup(Net(1))
    assert torch.equal(logits, reference(batch))
    fabric.backward(nn.functional.mse_loss(model(batch), logits))
    optimizer.step()
    assert optimizer.state_dict()["hift"]["step"] == 1


def test_a_step_that_is_left_out_after_clipping():
    """As where the norm is no number: gradients are dropped, and the next batch has the same group."""
    batches = tokens(7)
    results = []
    for left_out in (False, True):
        fabric = hift(precision="bf16-true")
        model = Net()
        model, optimizer = fabric.setup(model, adamw(model.parameters()))
        train(fabric, model, optimizer, batches[:2])
        if left_out:
            fabric.backward(next_token_loss(model, batches[6]))
            assert fabric.clip_gradients(model, optimizer, max_norm=1.0).dtype == torch.float32
            optimizer.zero_grad()
        train(fabric, model, optimizer, batches[2:])
        results.append(weights(model.module))
    assert_same_weights(*results)


def test_no_masters_if_none_are_wanted():
    assert type(hift(precision="bf16-true", master_weights="none").strategy.precision) is HalfPrecision
    assert type(hift(precision="bf16-true").strategy.precision) is FabricMasterPrecision


# --- checkpoints ------------------------------------------------------------------------------------------------------


class WithDropout(Net):
    def __init__(self, seed=0):
        super().__init__(seed)
        self.norm = nn.Sequential(self.norm, nn.Dropout(0.3))


def schedule(optimizer, warmup=7):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / warmup) * 0.97**step)


def set_up(fabric, make_optimizer=adamw, seed=0):
    model = WithDropout(seed)
    optimizer = make_optimizer(model.parameters())
    return fabric.setup(model, optimizer, scheduler=schedule(optimizer))


@pytest.mark.parametrize(
    ("cut", "name", "precision", "kind", "order"),
    crossed(
        [3, 8],
        ["adamw", "adagrad"],
        ["32-true", "bf16-true", "16-mixed"],
        [HiFTFabricStrategy, LaggingStrategy],
        ["random", "top2down"],
    ),
)
def test_resumes_in_mid_sweep(cut, name, precision, kind, order, tmp_path):
    """Weights, state, schedule, and the dropout of a run that was never interrupted."""

    def fabric():
        return hift(kind, PRECISIONS.get(precision, precision), order=order, seed=3, steps_per_group=2)

    def state_of(run, model, optimizer, scheduler):
        scaler = getattr(run.strategy.precision, "scaler", None)
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        own = {"random": torch.get_rng_state(), **({} if scaler is None else {"scaler": scaler})}
        return own | (parts if order == "random" else dict(reversed(parts.items())))

    batches = tokens(14)
    whole = fabric()
    model, optimizer, scheduler = set_up(whole, OPTIMIZERS[name])
    torch.manual_seed(5)
    train(whole, model, optimizer, batches[:cut], scheduler=scheduler)
    whole.save(tmp_path / "c.ckpt", state_of(whole, model, optimizer, scheduler))
    losses = train(whole, model, optimizer, batches[cut:], scheduler=scheduler)

    resumed = fabric()
    other = set_up(resumed, OPTIMIZERS[name], seed=1)
    state = state_of(resumed, *other)
    assert resumed.load(tmp_path / "c.ckpt", state) == {}
    torch.set_rng_state(state["random"])
    assert train(resumed, *other[:2], batches[cut:], scheduler=other[2]) == losses
    assert_same_weights(model.module, other[0].module)
    first, second = optimizer.state_dict(), other[1].state_dict()
    assert first["hift"]["step"] == second["hift"]["step"]
    assert first["hift"]["step"] == 14 or precision == "16-mixed"  # a step that overflows is none
    assert first["param_groups"] == second["param_groups"]
    for i, values in first["state"].items():
        assert all(torch.equal(torch.as_tensor(values[k]), torch.as_tensor(second["state"][i][k])) for k in values)
    assert scheduler.state_dict()["last_epoch"] == other[2].state_dict()["last_epoch"] == 14


def test_checkpoints_go_to_and_come_from_plain_fabric(tmp_path):
    one, other = hift(), plain()
    model = Net()
    model, optimizer = one.setup(model, adamw(model.parameters()))
    train(one, model, optimizer, tokens(10))
    one.save(tmp_path / "hift.ckpt", {"model": model, "optimizer": optimizer})
    twin = Net(1)
    twin, its = other.setup(twin, adamw(twin.parameters()))
    other.load(tmp_path / "hift.ckpt", {"model": twin, "optimizer": its})
    train(other, twin, its, tokens(2))
    other.save(tmp_path / "plain.ckpt", {"model": twin, "optimizer": its})
    assert one.load(tmp_path / "plain.ckpt", {"model": model, "optimizer": optimizer}) == {}
    assert_same_weights(model.module, twin.module)
    assert optimizer.state_dict()["hift"]["step"] == 0  # a sweep begins
    assert [s["step"].item() for s in optimizer.state_dict()["state"].values()] == [4.0] * len(weights(twin.module))


def test_files_are_whole_unless_fabric_is_told_otherwise(tmp_path):
    assert type(hift().strategy.checkpoint_io).__name__ == "StreamingCheckpointIO"
    own = TorchCheckpointIO()
    assert plain(strategy=HiFTFabricStrategy(), plugins=own).strategy.checkpoint_io is own
    assert plain(strategy=HiFTFabricStrategy(checkpoint_io=own)).strategy.checkpoint_io is own


# --- several optimizers and modules, schedulers -----------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_each_optimizer_has_turns_of_its_own(precision):
    def optimizers(model):
        return adamw(model.blocks.parameters()), torch.optim.SGD(
            [*model.embedding.parameters(), *model.norm.parameters(), *model.head.parameters()], lr=0.1
        )

    model = Net()
    fabric = hift(precision=precision)
    model, *both = fabric.setup(model, *optimizers(model))
    assert [[group.name for group in engine.groups] for engine in fabric.strategy.engines] == [
        ["blocks.0", "blocks.1", "blocks.2"],
        ["embedding", "head"],
    ]
    twin = Net()
    for batch in tokens(7):
        fabric.backward(next_token_loss(model, batch))
        for optimizer in both:
            optimizer.step()
    if precision == "32-true":
        others = optimizers(twin)
        attach_engines(twin, others, **published({}))
        for batch in tokens(7):
            next_token_loss(twin, batch).backward()
            for optimizer in others:
                optimizer.step()
        assert_same_weights(model.module, twin)
    assert [o.state_dict()["hift"]["step"] for o in both] == [7, 7]


def test_modules_that_are_set_up_one_by_one():
    """As in a GAN: each with an optimizer, without each other's parameters."""
    fabric = hift()
    (one, its), (other, _) = (fabric.setup(m, adamw(m.parameters())) for m in (Net(), Net(1)))
    twin = Net()
    engine = attach_published(twin, adamw(twin.parameters()))
    plain_loop(engine, twin, tokens(7), 1, None)
    train(fabric, one, its, tokens(7))
    assert_same_weights(one.module, twin)
    assert_same_weights(other.module, Net(1))
    assert [engine.step for engine in fabric.strategy.engines] == [7, 0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_one_optimizer_for_two_modules(precision):
    fabric = hift(precision=precision)
    encoder, decoder = fabric.setup(Net()), fabric.setup(Net(1))
    optimizer = fabric.setup_optimizers(adamw([*encoder.parameters(), *decoder.parameters()]))
    (engine,) = fabric.strategy.engines
    names = [next(iter(group.parameters)) for group in engine.groups]
    assert [name.partition(".")[0] for name in names] == ["0"] * 5 + ["1"] * 5
    before = [weights(encoder.module), weights(decoder.module)]
    for batch in tokens(10):
        fabric.backward(next_token_loss(encoder, batch) + next_token_loss(decoder, batch))
        optimizer.step()
    for old, new in zip(before, (encoder, decoder), strict=True):
        assert all(not torch.equal(old[name], p) for name, p in weights(new.module).items())


def test_optimizers_that_hift_cannot_place():
    fabric = hift()
    model = Net()
    with pytest.raises(RuntimeError, match=r"no parameters of a module that was set up.*fabric\.setup_module"):
        fabric.setup_optimizers(adamw(model.parameters()))
    model = fabric.setup(model)
    with pytest.raises(ValueError, match="No optimizer holds the trainable parameters"):
        fabric.setup_optimizers(adamw(model.blocks.parameters()))


@pytest.mark.parametrize("hold_lr", ["replay", "once", "off"])
@pytest.mark.parametrize("built", ["before setup", "of what setup returns"])
def test_schedulers(hold_lr, built):
    model, twin, batches = Net(), Net(), tokens(23)
    optimizer = adamw(twin.parameters())
    engine = attach_published(twin, optimizer)
    expected = SweepLR(schedule(optimizer), engine, hold_lr)
    rates = []
    for batch in batches:
        rates.append(optimizer.param_groups[0]["lr"])
        next_token_loss(twin, batch).backward()
        optimizer.step()
        expected.step()
    fabric = plain(strategy=HiFTFabricStrategy(hold_lr=hold_lr, **published({})))
    optimizer = adamw(model.parameters())
    if built == "before setup":
        model, optimizer, scheduler = fabric.setup(model, optimizer, scheduler=schedule(optimizer))
    else:
        model, optimizer = fabric.setup(model, optimizer)
        scheduler = SweepLR(schedule(optimizer), fabric.strategy.engines[0], hold_lr)
    used = []
    for batch in batches:
        used.append(optimizer.param_groups[0]["lr"])
        train(fabric, model, optimizer, [batch], scheduler=scheduler)
    assert used == rates
    assert_same_weights(model.module, twin)


def test_a_scheduler_of_another_optimizer_is_refused():
    model = Net()
    with pytest.raises(ValueError, match="not a scheduler of the optimizers"):
        hift().setup(model, adamw(model.parameters()), scheduler=schedule(adamw(Net(1).parameters())))


# --- options and words ------------------------------------------------------------------------------------------------


def test_options_reach_the_engine():
    model = Net()
    fabric = plain(
        strategy=HiFTFabricStrategy(policy=LISA(), offload="none", always_active=["head"], frozen=["embedding"])
    )
    fabric.setup(model, adamw(model.parameters()))
    (engine,) = fabric.strategy.engines
    assert isinstance(engine.policy, LISA)
    assert engine.offloader.offload == "none"
    assert [unit.name for unit in engine.always_active] == ["head"]
    assert not model.embedding.weight.requires_grad
    with pytest.raises(TypeError, match="group_sice"):
        HiFTFabricStrategy(group_sice=3)
    with pytest.raises(ValueError, match="order"):
        HiFTFabricStrategy(order="sideways")
    with pytest.raises(ValueError, match="hold_lr"):
        HiFTFabricStrategy(hold_lr="never")


def test_the_seed_is_that_of_seed_everything():
    def order(of_all, **options):
        fabric = hift(order="random", **options)
        fabric.seed_everything(of_all, verbose=False)
        model = Net(depth=9)
        fabric.setup(model, adamw(model.parameters()))
        engine = fabric.strategy.engines[0]
        return [engine.policy.groups_at(i) for i in range(11)]

    assert order(1) != order(2)
    assert order(1, seed=7) == order(2, seed=7)


def test_the_groups_are_shown_and_the_first_sweep_is_proven(caplog):
    caplog.set_level(logging.INFO)
    logging.getLogger("lightning.fabric").propagate = True
    fabric = hift()
    model = Net()
    model, optimizer = fabric.setup(model, adamw(model.parameters()))
    assert "bottom2up over 5 layer groups" in caplog.text
    train(fabric, model, optimizer, tokens(5))
    assert caplog.text.count("first sweep done, all 23 trainable parameters were updated") == 1
    other = Net()
    other.norm.weight.register_hook(torch.zeros_like)
    other, optimizer = fabric.setup(other, torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match="norm.weight"):
        train(fabric, other, optimizer, tokens(5))


def test_an_engine_that_was_closed_leaves_an_ordinary_optimizer():
    fabric = hift()
    model = Net()
    model, optimizer = fabric.setup(model, adamw(model.parameters()))
    train(fabric, model, optimizer, tokens(7))
    fabric.strategy.engines[0].close()
    before = weights(model.module)
    train(fabric, model, optimizer, tokens(2))
    assert all(not torch.equal(before[name], w) for name, w in weights(model.module).items())


@pytest.mark.parametrize("too_many", [{"devices": 2}, {"devices": 1, "num_nodes": 2}])
def test_one_device_only(too_many):
    with pytest.raises(ValueError, match=r"one device, got \w+=2.*strategy='hift_ddp'"):
        Fabric(accelerator="cpu", strategy="hift", **too_many)


def test_the_name_is_registered():
    fabric = Fabric(accelerator="cpu", devices=1, strategy="hift")
    assert type(fabric.strategy) is HiFTFabricStrategy
    assert fabric.device == torch.device("cpu")


@pytest.mark.slow
def test_the_command_line_of_fabric(tmp_path):
    (tmp_path / "script.py").write_text(
        "from lightning.fabric import Fabric\nimport lightning_hift\nprint(type(Fabric().strategy).__name__)\n"
    )
    environment = {**os.environ, "LT_STRATEGY": "hift", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "lightning.fabric.cli", "--accelerator=cpu", "script.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert "HiFTFabricStrategy" in result.stdout, result.stderr
