"""Weights in 16 bits, their masters in 32: rounding, and Mixed^Hi against its oracle."""

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_hift import HiFTCallback, HiFTStrategy, StateOffloader
from lightning_hift.precision.master_weights import (
    join_master,
    join_masters,
    recheck_masters,
    split_master,
    store_masters,
)
from tests.lagging import LaggingDevice
from tests.matrices import crossed
from tests.models import (
    GROUPS,
    Automatic,
    Manual,
    Net,
    ResumableLoader,
    adamw,
    assert_same_weights,
    attach_published,
    loader,
    next_token_loss,
    tokens,
    trainer,
    weights,
)
from tests.reference.mixed_hi import round_ties_away, train_mixed_hi

MODES = ["full", "split"]


def lagging():
    return StateOffloader("cpu", device_module=LaggingDevice(), always_copy=True)


def bits(tensor):
    return tensor.view(torch.int32)


def oracle(windows, **options):
    model = Net()
    masters = train_mixed_hi(model, GROUPS, adamw, windows, next_token_loss, **options)
    return weights(model), masters


def masters_of(optimizer, model):
    """Masters as a checkpoint holds them, by name."""
    saved = optimizer.state_dict()["hift"]["masters"]
    names = [name for name, _ in model.named_parameters()]
    live = [p.detach() for p in model.parameters()]
    joined = {i: join_master(live[i], m) if m.dtype == torch.int16 else m for i, m in saved.items()}
    return {names[i].removeprefix("net."): master for i, master in joined.items()}


# --- rounding ---------------------------------------------------------------------------------------------------------


def test_every_bit_comes_back():
    generator = torch.Generator().manual_seed(0)
    master = torch.randint(-(2**31), 2**31 - 1, (4_000_000,), generator=generator).to(torch.int32).view(torch.float32)
    live, remainder = split_master(master)
    assert (live.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    joined, is_nan = join_master(live, remainder), master.isnan()
    assert torch.equal(bits(joined)[~is_nan], bits(master)[~is_nan])
    assert is_nan.any()
    assert joined[is_nan].isnan().all()
    assert live[is_nan].isnan().all()


def test_ties_go_away_from_zero():
    ties = ((torch.arange(2**16) << 16) | 0x8000).to(torch.int32).view(torch.float32)
    ties = ties[~ties.isnan()]
    live, remainder = split_master(ties)
    assert torch.equal(bits(join_master(live, remainder)), bits(ties))
    assert (live.float().abs() > ties.abs()).all()
    assert remainder.unique().tolist() == [-(2**15)]


def test_special_values():
    largest, smallest = torch.finfo(torch.float32).max, 2.0**-149
    master = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, largest, -largest, smallest, -smallest])
    live, remainder = split_master(master)
    assert torch.equal(bits(join_master(live, remainder)), bits(master))
    assert live[2:6].isinf().all()


def test_rounding_is_that_of_the_oracle():
    master = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(split_master(master)[0], round_ties_away(master))


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_rounding_in_any_layout(shape, channels_last):
    layout = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
    master = torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)
    live, remainder = split_master(master)
    assert torch.equal(join_master(live, remainder), master)


def flat_masters(numel=100, dtype=torch.bfloat16):
    """Two weights and their masters side by side, with ties, and weights that were set from outside since."""
    flat = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    flat.view(torch.int32)[::7] &= ~0xFFFF
    flat.view(torch.int32)[::7] |= 0x8000
    views = [flat[: numel // 2].view(2, -1), flat[numel // 2 :]]
    lives = [torch.empty_like(view, dtype=dtype) for view in views]
    return flat, views, lives


@pytest.mark.parametrize("part", [7, 2**28])
def test_flat_masters_are_those_of_each_weight(part, monkeypatch):
    monkeypatch.setattr("lightning_hift.precision.master_weights._PART", part)
    flat, views, lives = flat_masters()
    before, expected = flat.clone(), [split_master(view) for view in views]
    store_masters(flat, views, lives)
    assert torch.equal(bits(flat), bits(before))
    remainder = torch.empty(100, dtype=torch.int16)
    store_masters(flat, views, lives, remainder)
    assert all(torch.equal(live, one) for live, (one, _) in zip(lives, expected, strict=True))
    assert torch.equal(remainder, torch.cat([rest.flatten() for _, rest in expected]))
    flat.fill_(torch.nan)
    join_masters(flat, views, lives, remainder)
    assert torch.equal(bits(flat), bits(before))


EDITS = {
    "zero": lambda p: p.data.zero_(),
    "minus_zero": lambda p: p.data.fill_(-0.0),
    "infinite": lambda p: p.data.fill_(torch.inf),
    "nan": lambda p: p.data.fill_(torch.nan),
    "clamped": lambda p: p.clamp_(-0.01, 0.01),
    "copied": lambda p: p.copy_(torch.arange(p.numel()).view_as(p) / 100),
    "replaced": lambda p: setattr(p, "data", torch.ones_like(p)),
    "not_at_all": lambda p: None,
}


@pytest.mark.parametrize("edit", EDITS)
def test_weights_that_were_set_from_outside_keep_at_most_their_remainder(edit):
    flat, views, lives = flat_masters()
    remainder, full = torch.empty(100, dtype=torch.int16), flat.clone()
    store_masters(flat, views, lives, remainder)
    lives = [nn.Parameter(live, requires_grad=False) for live in lives]
    for live in lives:
        EDITS[edit](live)
    join_masters(flat, views, lives, remainder)
    recheck_masters(full, [full[:50].view(2, -1), full[50:]], lives)
    assert torch.equal(bits(full), bits(flat))
    for live, view in zip(lives, views, strict=True):
        if edit == "nan":
            assert view.isnan().all()
        elif edit != "infinite":  # a negative remainder of infinity is the largest number
            assert torch.equal(split_master(view)[0], live.detach())
    assert edit == "nan" or not flat.isnan().any()


@pytest.mark.parametrize("edit", EDITS)
def test_full_and_split_stay_equal_when_weights_are_set_from_outside(edit):
    def run(mode):
        model = Net()
        engine = attach_published(
            model, adamw(model.parameters()), master_weights=mode, weights_dtype=torch.bfloat16, group_size=2
        )
        for step, batch in enumerate(tokens(9)):
            if step == 5:
                with torch.no_grad():
                    EDITS[edit](model.head.weight)
            next_token_loss(model, batch).backward()
            engine.optimizer.step()
        return {name: torch.nan_to_num(p.detach()) for name, p in model.named_parameters()}

    assert_same_weights(run("full"), run("split"))


class Traffic(TorchDispatchMode):
    """Counts operations that touch memory, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.operations = self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and func is not torch.ops.aten.empty_like.default:
            is_copy = func in (torch.ops.aten.copy_.default, torch.ops.aten._foreach_copy_.default)
            read, written = (args[1], args[0]) if is_copy else (args, found)
            self.operations += 1
            self.nbytes += sum(t.nbytes for t in tree_leaves([read, written]) if isinstance(t, torch.Tensor))
        return found


def test_remainders_take_few_passes_over_memory():
    numel = 1 << 16
    flat, views, lives = flat_masters(numel)
    remainder = torch.zeros(numel, dtype=torch.int16)
    with Traffic() as traffic:
        join_masters(flat, views, lives, remainder)
        store_masters(flat, views, lives, remainder)
    assert traffic.operations <= 8
    assert traffic.nbytes <= 60 * numel


# --- a plain loop -----------------------------------------------------------------------------------------------------


def run_engine(mode, steps=12, weights_dtype=torch.bfloat16, make_optimizer=adamw, **options):
    model = Net()
    engine = attach_published(
        model, make_optimizer(model.parameters()), master_weights=mode, weights_dtype=weights_dtype, **options
    )
    for batch in tokens(steps):
        next_token_loss(model, batch).backward()
        engine.optimizer.step()
    return model, engine


@pytest.mark.parametrize("make_offloader", [None, lagging], ids=["host", "lagging"])
@pytest.mark.parametrize("mode", MODES)
def test_engine_equals_the_oracle(mode, make_offloader):
    model, engine = run_engine(mode, make_offloader=make_offloader)
    live, masters = oracle([[b] for b in tokens(12)])
    assert_same_weights(model, live)
    assert_same_weights(masters_of(engine.optimizer, model), masters)


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adagrad(p, lr=0.05),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
        lambda p: torch.optim.Adafactor(p, lr=0.05),
    ],
    ids=["sgd", "momentum", "adagrad", "fused", "foreach", "adafactor"],
)
def test_full_and_split_are_the_same_with_any_optimizer(make_optimizer):
    runs = [run_engine(mode, make_optimizer=make_optimizer)[0] for mode in MODES]
    assert_same_weights(*runs)
    twin = Net()
    train_mixed_hi(twin, GROUPS, make_optimizer, [[b] for b in tokens(12)], next_token_loss)
    assert_same_weights(runs[0], twin)


@pytest.mark.parametrize("mode", MODES)
def test_always_active_units_have_masters(mode):
    model, _ = run_engine(mode, always_active=["head"])
    twin = Net()
    train_mixed_hi(twin, GROUPS[:-1], adamw, [[b] for b in tokens(12)], next_token_loss, always_active=GROUPS[-1])
    assert_same_weights(model, twin)


def test_auto():
    kept = {torch.bfloat16: "split", torch.float16: "full", None: "none"}
    for dtype, mode in kept.items():
        model = Net()
        engine = attach_published(model, adamw(model.parameters()), weights_dtype=dtype)
        assert engine.master_weights == mode


def test_weights_that_are_in_16_bits_already_are_their_own_originals():
    model = Net().bfloat16()
    engine = attach_published(model, adamw(model.parameters()))
    for batch in tokens(12):
        next_token_loss(model, batch).backward()
        engine.optimizer.step()
    twin = Net().bfloat16().float()
    train_mixed_hi(twin, GROUPS, adamw, [[b] for b in tokens(12)], next_token_loss)
    assert_same_weights(model, twin)


def test_bytes_on_the_host():
    numel = sum(p.numel() for p in Net().parameters())
    counts = 4 * len(list(Net().parameters()))
    for mode, per_parameter in {"full": 12, "split": 10}.items():
        _, engine = run_engine(mode, make_offloader=lagging)
        assert engine.offloader.host_bytes == per_parameter * numel + counts


def test_split_never_has_a_whole_copy_of_an_inactive_group():
    of_other_tests = {id(t): t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)}
    model, engine = run_engine("split", make_offloader=lagging)
    engine.close()
    states = engine.optimizer.state_dict()["state"]
    moments = {value.data_ptr() for state in states.values() for value in state.values()}
    shapes = {p.shape for p in model.parameters() if p.dim() == 2}
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    plain = [t for t in gc.get_objects() if type(t) in kinds and id(t) not in of_other_tests]
    copies = [t for t in plain if t.dtype == torch.float32 and t.shape in shapes and t.data_ptr() not in moments]
    assert copies == []


def test_weights_that_someone_else_sets_become_the_masters():
    other = Net(seed=5)
    for mode in MODES:
        model, engine = run_engine(mode, steps=3)
        model.load_state_dict(other.state_dict())
        stepped = engine.active_group.parameters
        next_token_loss(model, tokens(1)[0]).backward()
        engine.optimizer.step()
        for name, p in model.named_parameters():
            distance = (p.detach() - other.get_parameter(name).bfloat16()).abs().max()
            assert distance <= (0.02 if name in stepped else 0.0), name  # one step of AdamW


@pytest.mark.parametrize("mode", MODES)
def test_clipping_in_32_bits(mode):
    model = Net()
    engine = attach_published(model, adamw(model.parameters()), master_weights=mode, weights_dtype=torch.bfloat16)
    for batch in tokens(12):
        next_token_loss(model, batch).backward()
        engine.prepare_step()
        torch.nn.utils.clip_grad_norm_(engine.active_parameters, 0.1)
        engine.optimizer.step()
    live, _ = oracle([[b] for b in tokens(12)], clip_norm=0.1)
    assert_same_weights(model, live)


@pytest.mark.parametrize("mode", MODES)
def test_cancelled_step_changes_nothing(mode):
    model, engine = run_engine(mode, steps=7)
    before, state = weights(model), engine.optimizer.state_dict()
    next_token_loss(model, tokens(1)[0]).backward()
    engine.prepare_step()
    assert {p.dtype for p in engine.active_parameters} == {torch.float32}
    engine.cancel_step()
    assert_same_weights(model, before)
    assert all(p.grad is None for p in model.parameters())
    after = engine.optimizer.state_dict()
    for i, values in state["state"].items():
        assert all(torch.equal(v, after["state"][i][k]) for k, v in values.items())
    assert all(torch.equal(m, after["hift"]["masters"][i]) for i, m in state["hift"]["masters"].items())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("numel", [None, 100])
def test_weights_that_are_changed_behind_everybodys_back_count(mode, numel):
    """Through ``.data``, as pruning masks and the clamping of a WGAN do; torch keeps no count of that."""
    model, engine = run_engine(mode, steps=7, max_group_numel=numel)
    for p in model.parameters():
        p.data.clamp_(-0.01, 0.01)
        p.data[..., ::2] = 0
    changed = weights(model)
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-9
        group["weight_decay"] = 0.0
    for batch in tokens(5):
        next_token_loss(model, batch).backward()
        engine.optimizer.step()
    for name, p in weights(model).items():
        torch.testing.assert_close(
            p, changed[name], rtol=2**-8, atol=1e-8
        )  # a remainder may outlive, half a last digit


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("numel", [None, 100])
def test_weights_loaded_between_two_runs_of_one_optimizer_count(mode, numel):
    model, engine = run_engine(mode, steps=7, max_group_numel=numel)
    engine.close()
    other = Net(seed=5).bfloat16()
    model.load_state_dict(other.state_dict())
    engine.optimizer.param_groups[0].update(lr=1e-9, weight_decay=0.0)
    again = attach_published(model, engine.optimizer, master_weights=mode, max_group_numel=numel)
    for batch in tokens(5):
        next_token_loss(model, batch).backward()
        again.optimizer.step()
    for name, p in weights(model).items():
        torch.testing.assert_close(p, other.get_parameter(name).detach(), rtol=2**-8, atol=1e-8)


@pytest.mark.parametrize("weights_dtype", [None, torch.bfloat16])
def test_a_step_that_failed_half_way_harms_no_other(weights_dtype):
    class Failing(torch.optim.AdamW):
        fails = False

        def step(self, closure=None):
            if self.fails:
                raise RuntimeError("out of memory")
            return super().step(closure)

    model = Net()
    engine = attach_published(
        model, Failing(model.parameters(), lr=0.01), weights_dtype=weights_dtype, always_active=["head"]
    )
    twin, other = Net(), None
    other = attach_published(twin, adamw(twin.parameters()), weights_dtype=weights_dtype, always_active=["head"])
    for step, batch in enumerate(tokens(11)):
        if step == 6:
            next_token_loss(model, batch).backward()
            Failing.fails = True
            with pytest.raises(RuntimeError, match="out of memory"):
                engine.optimizer.step()
            Failing.fails = False
            assert engine.step == step + 1  # an attempt counts
            engine.activate()
            model.zero_grad()
            other.step += 1
            other.activate()
        for each, of_each in ((model, engine), (twin, other)):
            next_token_loss(each, batch).backward()
            of_each.optimizer.step()
    assert_same_weights(model, twin)
    assert {p.dtype for p in model.parameters()} == {weights_dtype or torch.float32}


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("resumed_as", MODES)
@pytest.mark.parametrize("saved_as", MODES)
def test_resume_in_the_middle_of_a_sweep(saved_as, resumed_as, model_first, tmp_path):
    whole, _ = run_engine("full")
    model, engine = run_engine(saved_as, steps=7)
    torch.save([model.state_dict(), engine.optimizer.state_dict()], tmp_path / "c")
    saved_model, saved_optimizer = torch.load(tmp_path / "c", weights_only=True)
    again = Net(seed=3).bfloat16()
    if model_first:
        again.load_state_dict(saved_model)
    engine = attach_published(again, adamw(again.parameters()), master_weights=resumed_as)
    engine.optimizer.load_state_dict(saved_optimizer)
    again.load_state_dict(saved_model)
    for batch in tokens(12)[7:]:
        next_token_loss(again, batch).backward()
        engine.optimizer.step()
    assert_same_weights(again, whole)


def test_checkpoint_without_masters_starts_them_from_the_weights():
    model = Net().bfloat16()
    plain = adamw(model.parameters())
    next_token_loss(model, tokens(1)[0]).backward()
    plain.step()
    again = Net().bfloat16()
    again.load_state_dict(model.state_dict())
    engine = attach_published(again, adamw(again.parameters()), master_weights="full")
    engine.optimizer.load_state_dict(plain.state_dict())
    for name, master in masters_of(engine.optimizer, again).items():
        assert torch.equal(master, model.get_parameter(name).float())
    assert {s["exp_avg"].dtype for s in engine.optimizer.state_dict()["state"].values()} == {torch.float32}


@pytest.mark.parametrize("mode", MODES)
def test_a_run_in_32_bits_takes_over_the_masters(mode):
    model, engine = run_engine(mode, steps=7)
    masters = masters_of(engine.optimizer, model)
    again = Net(seed=3)
    again.load_state_dict(model.state_dict())
    other = attach_published(again, adamw(again.parameters()))
    other.optimizer.load_state_dict(engine.optimizer.state_dict())
    assert_same_weights(again, masters)


# --- Lightning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [Automatic, Manual])
@pytest.mark.parametrize("mode", MODES)
def test_trainer_equals_the_oracle(mode, module):
    model = module()
    trainer(strategy=HiFTStrategy(master_weights=mode), precision="bf16-true").fit(model, loader(12))
    live, _ = oracle([[b] for b in tokens(12)])
    assert_same_weights(model, live)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("mode", MODES)
def test_trainer_with_accumulation_and_clipping(mode):
    batches = tokens(12)
    live, _ = oracle([batches[i : i + 2] for i in range(0, 12, 2)], clip_norm=0.1)
    automatic, manual = Automatic(), Manual(accumulate_grad_batches=2, gradient_clip_val=0.1)
    strategy = HiFTStrategy(master_weights=mode)
    trainer(strategy=strategy, precision="bf16-true", accumulate_grad_batches=2, gradient_clip_val=0.1).fit(
        automatic, loader(12)
    )
    assert_same_weights(automatic, live)
    trainer(strategy=HiFTStrategy(master_weights=mode), precision="bf16-true").fit(manual, loader(12))
    assert_same_weights(manual, live)


@pytest.mark.parametrize("mode", MODES)
def test_trainer_resumes_exactly(mode, tmp_path):
    def run(steps, model, **options):
        fitting = trainer(
            strategy=HiFTStrategy(master_weights=mode), precision="bf16-true", max_steps=steps, max_epochs=None
        )
        fitting.fit(model, ResumableLoader(tokens(12)), **options)
        return fitting

    whole, half, rest = Automatic(), Automatic(), Automatic()
    run(12, whole)
    run(7, half).save_checkpoint(tmp_path / "c.ckpt")
    run(12, rest, ckpt_path=tmp_path / "c.ckpt")
    assert_same_weights(rest, whole)


def test_model_that_is_built_for_the_trainer_is_built_in_32_bits():
    class Late(Automatic):
        def configure_model(self):
            self.net = Net()

    model = Late()
    trainer(strategy="hift", precision="bf16-true").fit(model, loader(12))
    live, _ = oracle([[b] for b in tokens(12)])
    assert_same_weights(model, live)


def test_second_fit_with_the_same_optimizer_keeps_its_masters():
    class Caching(Automatic):
        def configure_optimizers(self):
            self.optimizer = getattr(self, "optimizer", None) or adamw(self.parameters())
            return self.optimizer

    model = Caching()
    trainer(strategy="hift", precision="bf16-true").fit(model, loader(7))
    before = masters_of(model.optimizer, model)
    trainer(strategy="hift", precision="bf16-true", limit_train_batches=0).fit(model, loader(7))
    assert_same_weights(masters_of(model.optimizer, model), before)


def test_without_masters_updates_are_rounded():
    model = Automatic()
    trainer(strategy=HiFTStrategy(master_weights="none"), precision="bf16-true").fit(model, loader(12))
    live, _ = oracle([[b] for b in tokens(12)])
    assert any(not torch.equal(p, live[name]) for name, p in weights(model).items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_other_precisions_have_no_masters(precision):
    model = Automatic()
    run = trainer(strategy="hift", precision=precision)
    run.fit(model, loader(7))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert run.optimizers[0].state_dict()["hift"]["masters"] == {}


# --- float16 ----------------------------------------------------------------------------------------------------------


class Half(Automatic):
    """Multiplies its loss by 1, or by what makes the gradients of some batches overflow."""

    def __init__(self, factors=(), **options):
        super().__init__(**options)
        self.factors = factors

    def training_step(self, batch, batch_idx):
        factor = self.factors[batch_idx] if batch_idx < len(self.factors) else 1.0
        return next_token_loss(self.net, batch).float() * factor


def half_plugin(scale=256.0):
    from lightning_hift.plugin.precision import HiFTPrecision

    return HiFTPrecision("16-true", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6))


def test_float16_equals_the_oracle():
    model = Half()
    trainer(strategy="hift", plugins=[half_plugin(1.0)]).fit(model, loader(12))
    twin = Net()
    train_mixed_hi(twin, GROUPS, adamw, [[b] for b in tokens(12)], next_token_loss, dtype=torch.float16)
    assert_same_weights(model, twin)


def test_float16_is_scaled_by_default():
    model = Half()
    run = trainer(strategy="hift", precision="16-true")
    run.fit(model, loader(12))
    assert run.scaler.get_scale() > 1
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_scaling_is_undone_before_clipping():
    models = [Half(), Half()]
    for model, scale in zip(models, (1.0, 512.0), strict=True):
        trainer(strategy="hift", plugins=[half_plugin(scale)], gradient_clip_val=0.1).fit(model, loader(5))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        # Small gradients that float16 cannot hold survive with the larger scale only.
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


def test_overflow_skips_the_step_and_changes_nothing():
    overflowing = [1.0] * 6 + [1e38] + [1.0] * 5
    model = Half(overflowing)
    snapshots = []

    class Look(HiFTCallback):
        def on_train_batch_end(self, run, module, outputs, batch, batch_idx):
            super().on_train_batch_end(run, module, outputs, batch, batch_idx)
            optimizer = run.optimizers[0]
            saved = optimizer.state_dict()
            snapshots.append((weights(module), masters_of(optimizer, module), saved["state"]))

    run = trainer(strategy="hift", plugins=[half_plugin()], callbacks=[Look()])
    run.fit(model, loader(12))
    before, after = snapshots[5], snapshots[6]
    assert_same_weights(before[0], after[0])
    assert_same_weights(before[1], after[1])
    for i, state in before[2].items():
        assert all(torch.equal(value, after[2][i][key]) for key, value in state.items())
    assert run.scaler.get_scale() == 128
    assert any(not torch.equal(a, b) for a, b in zip(after[0].values(), snapshots[7][0].values(), strict=True))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_fused_optimizer_skips_too():
    model = Half([1e38] * 12, make_optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, fused=True))
    before = weights(model)
    trainer(strategy="hift", plugins=[half_plugin()]).fit(model, loader(12))
    assert_same_weights(model, {name: p.half() for name, p in before.items()})


def test_scale_is_resumed(tmp_path):
    run = trainer(strategy="hift", precision="16-true")
    run.fit(Half([1e38] * 3), loader(6))
    run.save_checkpoint(tmp_path / "c.ckpt")
    again = trainer(strategy="hift", precision="16-true", max_epochs=2)
    again.fit(Half(), loader(6), ckpt_path=tmp_path / "c.ckpt")
    assert again.scaler.get_scale() == run.scaler.get_scale() == 65536 / 8


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_masters_of_32_bits_are_explained(mode, precision):
    with pytest.raises(ValueError, match="trainable weights are float32: they are their own masters"):
        trainer(strategy=HiFTStrategy(master_weights=mode), precision=precision).fit(Automatic(), loader(2))


def test_split_of_float16_is_explained():
    with pytest.raises(ValueError, match=r"only it has a 16-bit remainder. Use master_weights='full'"):
        trainer(strategy=HiFTStrategy(master_weights="split"), precision="16-true").fit(Automatic(), loader(2))


def test_unknown_mode():
    with pytest.raises(ValueError, match=r"master_weights='half'; choose one of 'auto', 'full', 'split', 'none'"):
        HiFTStrategy(master_weights="half")


def test_precision_without_hift():
    with pytest.raises(Exception, match="works with strategy='hift' only"):
        trainer(plugins=[half_plugin()]).fit(Automatic(), loader(2))


def test_scaler_for_bfloat16():
    from lightning_hift.plugin.precision import HiFTPrecision

    with pytest.raises(ValueError, match="whose range needs none"):
        HiFTPrecision("bf16-true", torch.amp.GradScaler("cpu"))


def test_precision_with_masters_and_strategy_without():
    with pytest.raises(ValueError, match=r"Got HiFTPrecision.*with master_weights='none'"):
        trainer(strategy=HiFTStrategy(master_weights="none"), plugins=[half_plugin()]).fit(Automatic(), loader(2))


# --- another precision ------------------------------------------------------------------------------------------------

PRECISIONS = {
    "split": (torch.bfloat16, "split"),
    "full": (torch.bfloat16, "full"),
    "half": (torch.float16, "full"),
    "single": (torch.float32, "none"),
}


def start_in(precision, seed=0):
    dtype, masters = PRECISIONS[precision]
    model = Net(seed=seed)
    engine = attach_published(model, adamw(model.parameters()), master_weights=masters, weights_dtype=dtype)
    return model.to(dtype), engine


def exact_weights(model, engine):
    """In 32 bits: the masters, where there are any."""
    saved = engine.optimizer.state_dict()["hift"]["masters"]
    exact = []
    for i, p in enumerate(q for group in engine.optimizer.param_groups for q in group["params"]):
        kept = saved.get(i)
        join = kept is not None and kept.dtype == torch.int16
        exact.append(join_master(p.detach(), kept) if join else p.detach().float() if kept is None else kept)
    return exact


@pytest.mark.parametrize(("before", "after", "edited"), crossed(["split", "full", "half"], PRECISIONS, [False, True]))
def test_masters_go_over_to_another_precision(before, after, edited):
    model, engine = start_in(before)
    for batch in tokens(7):
        next_token_loss(model, batch).backward()
        engine.optimizer.step()
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": engine.optimizer.state_dict()})
    expected = exact_weights(model, engine)
    if edited:
        saved["model"]["head.weight"][0] += 1.0

    model, engine = start_in(after, seed=3)
    model.load_state_dict(saved["model"])
    # Any bfloat16 weight goes with any remainder, which is at most half a step of it.
    is_noticed = edited and before != "split"
    with pytest.warns(UserWarning, match="8 weights are not those") if is_noticed else nullcontext():
        engine.optimizer.load_state_dict(saved["optimizer"])
    found = exact_weights(model, engine)
    for (name, p), one, other in zip(model.named_parameters(), expected, found, strict=True):
        rounded = other.to(p.dtype) if p.dtype == torch.float16 else split_master(other)[0].to(p.dtype)
        whole = slice(1, None) if edited and name == "head.weight" else slice(None)
        if p.dtype != torch.float32:
            assert torch.equal(rounded[whole], p.detach()[whole]), name
        # From float16, whose range is smaller, nothing is lost either: its masters are float32.
        assert torch.equal(one[whole], other[whole]), name
    if edited:
        row, wanted = model.head.weight[0].detach(), saved["model"]["head.weight"][0]
        if is_noticed:
            assert torch.equal(row, wanted.to(row.dtype))
        else:
            assert torch.equal(split_master(row.float())[0], wanted)
