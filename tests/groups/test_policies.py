"""Selection policies: what they select, and that the engine does what they say."""

import contextlib
import io
import random
import sys

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import nn

from lightning_hift import (
    HFT,
    IST,
    LISA,
    BAdam,
    HiFTCallback,
    HiFTStrategy,
    LayerGroup,
    LayerUnit,
    LayerUpdates,
    MeZO,
    SelectionPolicy,
    StateOffloader,
    SweepSchedule,
)
from lightning_hift.cli import main
from lightning_hift.engine.optimizer_groups import find_groups
from lightning_hift.planner.memory import GroupBytes, check_memory
from lightning_hift.planner.preflight import check_before_run
from lightning_hift.table import format_bytes
from tests.lagging import lagging
from tests.matrices import crossed
from tests.models import (
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
)
from tests.optimizers import OPTIMIZERS as ALL_OPTIMIZERS
from tests.plugin.test_resume import assert_same_run
from tests.reference.selected_groups import train_selected

SEED = 3


class Counting(torch.optim.Optimizer):
    """Gradient descent whose steps shrink with a count that it keeps for a whole param_group."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1, "count": 0})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] / group["count"])
        return loss


class OddAndEven(SelectionPolicy):
    """A policy of a user: every other group, in turn."""

    state_handling = "reset"
    steps_per_sweep = 6
    most_groups = None

    def groups_at(self, step):
        return tuple(range(step // 3 % 2, len(self.groups), 2))


OPTIMIZERS = {
    "adamw": adamw,
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "counting": Counting,
}
POLICIES = {
    "badam": lambda: BAdam(3),
    "badam_keep": lambda: BAdam(2, "top2down", state_handling="keep"),
    "lisa": lambda: LISA(2, 3),
    "lisa_reset": lambda: LISA(2, 3, state_handling="reset"),
    "hft": lambda: HFT(3),
    "hft_reset": lambda: HFT(2, state_handling="reset"),
    "ist": lambda: IST(1, 3, explore=0.5),
    "ist_reset": lambda: IST(2, 2, state_handling="reset"),
    "sweep_reset": lambda: SweepSchedule(order="random", reshuffle=True, steps_per_group=2, state_handling="reset"),
    "own": OddAndEven,
}


OFFLOADERS = {
    "host": lambda: StateOffloader("cpu"),
    "none": lambda: StateOffloader("cpu", "none"),
    "lagging": lagging,
    "lagging_none": lambda: lagging(offload="none"),
    "lagging_no_prefetch": lambda: lagging(prefetch=False),
}


def attach(model, policy, optimizer="adamw", **options):
    made = OPTIMIZERS[optimizer](model.parameters())
    return attach_published(model, made, policy=policy, seed=SEED, **options)


def train(model, engine, batches, accumulate=1):
    for window in chunks(batches, accumulate):
        for batch in window:
            loss = next_token_loss(model, batch) / len(window)
            engine.observe(loss)
            loss.backward()
        engine.optimizer.step()


def chunks(batches, size):
    return [batches[i : i + size] for i in range(0, len(batches), size)]


def names_in(units):
    return [name.removeprefix("net.") for unit in units for name in unit.parameters]


def train_twin(engine, pattern, optimizer, windows):
    """A model that the oracle has trained in the groups of ``engine``, by a policy of its own."""
    twin, policy = Net(), pattern.bound_to(engine.groups, SEED)
    train_selected(
        twin,
        [names_in(group.units) for group in engine.groups],
        OPTIMIZERS[optimizer],
        windows,
        next_token_loss,
        policy.groups_at,
        always_active=names_in(engine.always_active),
        reset=policy.state_handling == "reset",
        observe=policy.observe,
    )
    return twin


# --- what is selected -------------------------------------------------------------------------------------------------


def units(count, parts=1):
    """Groups of one unit each, with ``parts`` parameters in modules of their own."""
    return [
        LayerUnit(
            f"blocks.{i}",
            (f"blocks.{i}",),
            {f"blocks.{i}.{k}.weight": nn.Parameter(torch.zeros(2, 2)) for k in range(parts)},
        )
        for i in range(count)
    ]


def groups(count):
    return [LayerGroup(i, (unit,)) for i, unit in enumerate(units(count))]


def selected(policy, steps):
    return [policy.groups_at(step) for step in range(steps)]


def test_badam_visits_every_block_once_a_sweep_in_a_new_order():
    policy = BAdam(steps_per_block=4).bound_to(groups(6), seed=1)
    assert policy.steps_per_sweep == 24
    assert policy.state_handling == "reset"
    first, second = selected(policy, 48)[:24:4], selected(policy, 48)[24::4]
    assert sorted(first) == sorted(second) == [(i,) for i in range(6)]
    assert first != second
    assert all(len(set(selected(policy, 24)[i : i + 4])) == 1 for i in range(0, 24, 4))
    assert selected(BAdam(4, "top2down").bound_to(groups(3)), 12)[::4] == [(2,), (1,), (0,)]


def test_lisa_draws_different_blocks_with_equal_chances():
    policy = LISA(2, 5).bound_to(groups(6), seed=1)
    draws = selected(policy, 5 * 600)[::5]
    assert all(len(set(draw)) == 2 and list(draw) == sorted(draw) for draw in draws)
    counts = [sum(i in draw for draw in draws) for i in range(6)]
    assert all(150 < count < 250 for count in counts)
    assert [policy.starts_sweep(step) for step in range(6)] == [True, False, False, False, False, True]
    assert all(len(set(selected(policy, 5 * 9)[i : i + 5])) == 1 for i in range(0, 45, 5))
    assert draws != selected(LISA(2, 5).bound_to(groups(6), seed=2), 5 * 600)[::5]


@pytest.mark.parametrize("parts", [1, 3, 4, 7])
def test_hft_trains_half_of_each_block_then_the_other_half(parts):
    pattern = HFT(steps_per_half=2)
    split = [part for unit in units(4, parts) for part in pattern.split_unit(unit)]
    assert [part.name for part in split[:parts]] == [f"blocks.0.{k}" for k in range(parts)]
    policy = pattern.bound_to([LayerGroup(i, (part,)) for i, part in enumerate(split)], seed=5)
    halves = selected(policy, 32)[::2]
    for first, second in chunks(halves, 2):
        assert sorted(first + second) == list(range(4 * parts))
        for block in range(4):
            members = sum(i // parts == block for i in first)
            assert members in (parts // 2, (parts + 1) // 2)
        assert abs(len(first) - len(second)) <= 1
    assert len(set(halves)) > 2
    assert selected(policy, 8)[::2] == list(halves[:4])


def test_hft_halves_matrices_and_vectors_apart_and_keeps_biases_with_their_matrix():
    (block,) = [group for group in attach(Net(), HFT(1)).groups if group.name == "blocks.0.norm"]
    assert list(block.parameters) == ["blocks.0.norm.weight", "blocks.0.norm.bias"]
    engine = attach(Net(), HFT(1))
    assert [group.name for group in engine.groups[1:4]] == ["blocks.0.norm", "blocks.0.up", "blocks.0.down"]
    for step in range(20):
        active = engine.policy.groups_at(step)
        for block in range(3):
            assert sum(3 * block + 2 <= i <= 3 * block + 3 for i in active) == 1  # up or down


def test_ist_prefers_the_blocks_during_which_the_loss_fell():
    policy = IST(1, 4, explore=0.3).bound_to(groups(5), seed=1)
    assert policy.importance == pytest.approx([0.2] * 5)
    loss, noise, drawn = 100.0, random.Random(0), []
    for step in range(4 * 300):
        (index,) = policy.groups_at(step)
        drawn.append(index)
        loss -= (0.03 if index == 2 else 0.01) + noise.uniform(-0.001, 0.001)
        policy.observe(step, torch.tensor(loss))
    late = drawn[600::4]
    assert max(range(5), key=policy.importance.__getitem__) == 2
    assert late.count(2) > 0.35 * len(late)
    assert set(late) == set(range(5))
    assert min(policy.importance) >= 0.3 / 5
    assert sum(policy.importance) == pytest.approx(1)


def test_ist_waits_for_no_loss_within_a_draw_and_survives_what_is_not_finite():
    policy = IST(1, 3).bound_to(groups(4), seed=1)
    for step in range(9):
        policy.groups_at(step)
        policy.observe(step, torch.tensor(float("nan") if step == 4 else 1.0))
    policy.groups_at(9)
    assert policy.importance == [0.25] * 4
    with pytest.raises(RuntimeError, match="IST has gone on: it knows steps from 9"):
        policy.groups_at(8)


@pytest.mark.parametrize("name", POLICIES)
def test_a_pattern_shares_nothing_with_its_copies(name):
    pattern = POLICIES[name]()
    before = dict(vars(pattern))
    first, second = (pattern.bound_to(groups(6), seed) for seed in (1, 2))
    for step in range(20):
        first.observe(step, torch.tensor(float(step % 7)))
        first.groups_at(step)
    assert vars(pattern) == before
    assert second.state_dict() == pattern.bound_to(groups(6), 2).state_dict()
    assert first.steps_per_sweep >= 1
    assert first.most_groups is None or len(first.groups_at(20)) == first.most_groups


# --- against the oracle -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "optimizer", "offloader"), crossed(POLICIES, OPTIMIZERS, ["host", "lagging"]))
def test_equals_independent_optimizers(name, optimizer, offloader):
    model, batches = Net(), tokens(17)
    engine = attach(model, POLICIES[name](), optimizer, make_offloader=OFFLOADERS[offloader])
    train(model, engine, batches)
    assert_same_weights(model, train_twin(engine, POLICIES[name](), optimizer, [[batch] for batch in batches]))


@pytest.mark.usefixtures("torchao_uncompiled")
@pytest.mark.parametrize("policy", [LISA(2, 3), BAdam(3), HFT(2, "reset")], ids=["lisa", "badam", "hft_reset"])
@pytest.mark.parametrize("name", ["Prodigy", "DAdapt_Adam", "ScheduleFree_AdamW", "optimi_Adan", "torchao_AdamW8bit"])
def test_optimizers_of_others(name, policy):
    case, batches = ALL_OPTIMIZERS[name], tokens(13)
    model, twin = case.model(), case.model()
    if name.startswith("ScheduleFree") and policy.state_handling == "reset":
        pytest.skip("refused")
    optimizer = case.make(model.parameters())
    engine = attach_published(model, optimizer, policy=policy, seed=SEED, make_offloader=lagging)
    train(model, engine, batches)
    train_selected(
        twin,
        [names_in(group.units) for group in engine.groups],
        case.make,
        [[batch] for batch in batches],
        next_token_loss,
        policy.bound_to(engine.groups, SEED).groups_at,
        always_active=names_in(engine.always_active),
        reset=policy.state_handling == "reset",
    )
    assert_same_weights(model, twin)


@pytest.mark.parametrize("offloader", OFFLOADERS)
@pytest.mark.parametrize("name", ["lisa", "lisa_reset", "hft_reset", "badam", "ist_reset"])
def test_where_state_lives_changes_no_number(name, offloader):
    model, batches = Net(), tokens(22)
    engine = attach(model, POLICIES[name](), "adagrad", make_offloader=OFFLOADERS[offloader])
    train(model, engine, batches, accumulate=2)
    assert_same_weights(model, train_twin(engine, POLICIES[name](), "adagrad", chunks(batches, 2)))


@pytest.mark.parametrize("optimizer", ["adamw", "adagrad"])
@pytest.mark.parametrize("make", [lambda **o: StateOffloader("cpu", **o), lagging], ids=["plain", "lagging"])
def test_state_on_disk_is_reset_and_its_space_given_back(make, optimizer, tmp_path):
    model, batches, policy = Net(), tokens(30), LISA(2, 1, "reset")
    engine = attach(model, policy, optimizer, make_offloader=lambda: make(offload="disk", directory=tmp_path))
    sizes = []
    for batch in batches:
        train(model, engine, [batch])
        sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("*.bin")))
    assert_same_weights(model, train_twin(engine, policy, optimizer, [[batch] for batch in batches]))
    total = 12 * sum(p.numel() for p in model.parameters())  # two moments, and what is being replaced
    assert 0 < max(sizes) <= total
    engine.close()


@pytest.mark.parametrize(
    ("name", "master_weights", "optimizer"),
    crossed(["lisa", "lisa_reset", "badam", "hft_reset"], ["full", "split"], ["adamw", "adagrad"]),
)
def test_masters_and_slices_survive_a_reset(name, master_weights, optimizer):
    """In 16 bits, with slices, on a lagging device, against the same without slices and copies."""

    def run(**options):
        model = Net()
        engine = attach(
            model,
            POLICIES[name](),
            optimizer,
            master_weights=master_weights,
            weights_dtype=torch.bfloat16,
            **options,
        )
        train(model, engine, tokens(17))
        return model, engine

    model, engine = run(max_group_numel=60, make_offloader=lagging)
    plain, unsliced = run()
    assert engine.master_weights == master_weights
    assert_same_weights(model, plain)
    first, second = engine.optimizer.state_dict(), unsliced.optimizer.state_dict()
    assert first["hift"]["masters"].keys() == set(range(len(list(model.parameters()))))
    for i, master in first["hift"]["masters"].items():
        assert torch.equal(master, second["hift"]["masters"][i])
    assert first["state"].keys() == second["state"].keys()


def test_a_reset_frees_the_state_of_all_groups_that_do_not_train():
    model = Net()
    engine = attach(model, BAdam(2, "bottom2up"), make_offloader=lagging)
    largest = max(group.numel for group in engine.groups) * 8
    for batch in tokens(25):
        train(model, engine, [batch])
        state = engine.optimizer.state_dict()["state"]
        named = dict(enumerate(dict(model.named_parameters())))
        assert {named[i] for i in state} <= set(engine.active_group.parameters)
        assert engine.offloader.host_bytes <= largest + 100
    assert engine.step == 25
    assert state


def test_always_active_units_are_never_reset():
    model = Net()
    engine = attach(model, LISA(1, 2, state_handling="reset"))
    assert [unit.name for unit in engine.always_active] == ["embedding", "head"]
    train(model, engine, tokens(9))
    position = list(dict(model.named_parameters())).index("embedding.weight")
    assert engine.optimizer.state_dict()["state"][position]["step"] == 9


def test_several_groups_are_active_and_named():
    model = Net()
    engine = attach(model, LISA(2, 1))
    assert [group.index for group in engine.active_groups] == list(engine.policy.groups_at(0))
    assert engine.active_group is engine.active_groups[0]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(names_in([*(u for g in engine.active_groups for u in g.units), *engine.always_active]))
    with pytest.warns(UserWarning, match=r"Layer group \d \(blocks.\d\) got no gradient in its turn"):
        engine.optimizer.step()
    assert engine.missed_turns.count == 2


def test_the_proof_waits_until_every_group_has_had_a_turn():
    model = Net()
    engine = attach(model, LISA(1, 2))
    seen, reports = set(), []
    for batch in tokens(40):
        seen |= {group.index for group in engine.active_groups}
        train(model, engine, [batch])
        if (report := engine.first_sweep_report()) is not None:
            reports.append((report, engine.step, set(seen)))
    ((report, step, visited),) = reports
    assert report.complete
    assert visited == {0, 1, 2}
    assert step % 2 == 0
    assert step >= 6


def test_a_closure_shows_its_loss_to_the_policy():
    model, twin, batches = Net(), Net(), tokens(12)
    engine, other = attach(model, IST(1, 2)), attach(twin, IST(1, 2))
    for batch in batches:

        def closure(batch=batch):
            loss = next_token_loss(model, batch)
            loss.backward()
            return loss

        engine.optimizer.step(closure)
    train(twin, other, batches)
    assert engine.policy.state_dict() == other.policy.state_dict()
    assert_same_weights(model, twin)


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "optimizer", "cut"), crossed(POLICIES, OPTIMIZERS, [1, 7, 9]))
def test_exact_resume(name, optimizer, cut):
    batches = tokens(16)
    whole, model = Net(), Net()
    engine = attach(whole, POLICIES[name](), optimizer)
    train(whole, engine, batches)

    first = attach(model, POLICIES[name](), optimizer, make_offloader=lagging)
    train(model, first, batches[:cut])
    file = io.BytesIO()
    torch.save([model.state_dict(), first.optimizer.state_dict()], file)
    file.seek(0)
    saved, state = torch.load(file, weights_only=True)
    rest = Net(seed=1)
    rest.load_state_dict(saved)
    second = attach(rest, POLICIES[name](), optimizer, make_offloader=lagging)
    second.optimizer.load_state_dict(state)
    assert [g.index for g in second.active_groups] == [g.index for g in first.active_groups]
    train(rest, second, batches[cut:])
    assert_same_weights(whole, rest)
    assert second.policy.state_dict() == engine.policy.state_dict()


def test_a_checkpoint_of_plain_torch_starts_the_policy_anew():
    model = Net()
    engine = attach(model, IST(1, 2))
    train(model, engine, tokens(5))
    engine.optimizer.load_state_dict(adamw(model.parameters()).state_dict())
    assert engine.step == 0
    assert engine.policy.state_dict() == IST(1, 2).bound_to(engine.groups, SEED).state_dict()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (LISA(2, 3), LISA(1, 3), "num_blocks: 2 against 1"),
        (LISA(2, 3), LISA(2, 3, "reset"), "state_handling: 'keep' against 'reset'"),
        (SweepSchedule(), BAdam(1), "policy: None against 'BAdam'"),
        (BAdam(1), SweepSchedule(), "policy: 'BAdam' against None"),
        (SweepSchedule(state_handling="reset"), SweepSchedule(), "state_handling: 'reset' against None"),
    ],
)
def test_another_policy_cannot_resume(before, after, message):
    engine, other = attach(Net(), before, always_active=[]), attach(Net(), after, always_active=[])
    with pytest.raises(ValueError, match=message):
        other.optimizer.load_state_dict(engine.optimizer.state_dict())


def test_a_closed_engine_goes_on_where_it_stood():
    model, whole, batches = Net(), Net(), tokens(12)
    optimizer = adamw(model.parameters())
    for part in (batches[:5], batches[5:]):
        engine = attach_published(model, optimizer, policy=IST(1, 2, state_handling="reset"), seed=SEED)
        train(model, engine, part)
        engine.close()
    train(whole, attach(whole, IST(1, 2, state_handling="reset")), batches)
    assert_same_weights(model, whole)


# --- in a Trainer -----------------------------------------------------------------------------------------------------


def fit(model, policy, count=12, **options):
    callbacks = [as_published(policy=policy, seed=SEED), *options.pop("callbacks", [])]
    run = trainer(callbacks=callbacks, **options)
    run.fit(model, loader(count))
    return run


@pytest.mark.parametrize(("name", "strategy", "accumulate"), crossed(POLICIES, ["auto", "hift"], [1, 3]))
def test_the_callback_trains_as_the_plain_loop(name, strategy, accumulate):
    model, twin, batches = Automatic(), Net(), tokens(18)
    run = fit(model, POLICIES[name](), 18, strategy=strategy, accumulate_grad_batches=accumulate)
    assert run.global_step == 18 // accumulate
    twin.load_state_dict(Automatic().net.state_dict())
    train(twin, attach(twin, POLICIES[name]()), batches, accumulate)
    assert_same_weights(model, twin)


@pytest.mark.parametrize("cut", [3, 8])
@pytest.mark.parametrize("name", ["ist", "ist_reset", "lisa_reset", "hft", "badam"])
def test_resume_in_a_trainer(name, cut, tmp_path):
    def start(steps):
        callback = as_published(policy=POLICIES[name](), seed=SEED)
        return trainer(strategy="hift", callbacks=[callback], max_epochs=-1, max_steps=steps)

    batches = tokens(9)
    whole = start(13)
    whole.fit(Automatic(OPTIMIZERS["adagrad"]), ResumableLoader(batches))
    first = start(cut)
    first.fit(Automatic(OPTIMIZERS["adagrad"]), ResumableLoader(batches))
    first.save_checkpoint(tmp_path / "cut.ckpt")
    second, rest = start(13), ResumableLoader(batches)
    rest.load_state_dict({"next": cut})
    second.fit(Automatic(OPTIMIZERS["adagrad"]), rest, ckpt_path=tmp_path / "cut.ckpt", weights_only=True)
    assert_same_run(whole, second)


def test_reset_state_needs_less_of_the_host():
    parts = [GroupBytes(f"group {i}", 10, 40, 80, 0, 1.0) for i in range(5)]
    check_memory(100, parts, host_memory=100, resets=True)
    with pytest.raises(RuntimeError, match="optimizer state of all groups"):
        check_memory(100, parts, host_memory=100)
    with pytest.raises(RuntimeError, match="optimizer state of one group"):
        check_memory(100, parts, host_memory=70, resets=True)


@pytest.mark.parametrize(("policy", "written"), [(LISA(2, 5), 2 / 3), (HFT(), 1 / 2), (SweepSchedule(), 1 / 5)])
def test_what_a_disk_is_in_for(policy, written, tmp_path, caplog):
    model = Automatic()
    callback = as_published(policy=policy)
    optimizer = adamw(model.parameters())
    told = check_before_run(
        model,
        [optimizer],
        find_groups(model, [optimizer], callback.grouping),
        torch.device("cpu"),
        offload="disk",
        directory=tmp_path,
        policy=policy,
        processes_per_host=3,
    )
    total = 3 * 8 * sum(p.numel() for p in model.parameters())
    assert f"optimizer state of 3 processes takes {format_bytes(total)}" in told
    assert f"1,000 steps write about {format_bytes(1000 * total * written)}" in told


@pytest.mark.parametrize("name", ["lisa_reset", "badam", "ist"])
def test_bf16_masters_in_a_trainer_survive_clipping(name):
    """Gradients are clipped in 32 bits, those of several groups together."""
    run = fit(Automatic(), POLICIES[name](), 12, strategy="hift", precision="bf16-true", gradient_clip_val=0.01)
    sliced = fit(
        Automatic(),
        POLICIES[name](),
        12,
        strategy=HiFTStrategy(max_group_numel=10**6),
        precision="bf16-true",
        gradient_clip_val=0.01,
    )
    assert_same_weights(run.lightning_module, sliced.lightning_module)
    assert run.callbacks[0].engines[0].master_weights == "split"


def test_the_loss_that_a_policy_sees_is_not_scaled():
    policy = fit(Automatic(), IST(1, 2), 8, strategy="hift", precision="16-true").callbacks[0].engines[0].policy
    assert 1 < policy.state_dict()["last"] < 10
    whole = fit(Automatic(), IST(1, 2), 8, strategy="hift").callbacks[0].engines[0].policy
    assert policy.state_dict()["last"] == pytest.approx(whole.state_dict()["last"], rel=0.05)


@pytest.mark.parametrize("name", ["lisa", "hft"])
def test_an_activation_budget_changes_no_weight(name):
    run = fit(Automatic(), POLICIES[name](), 12, strategy=HiFTStrategy(activation_budget=20_000))
    assert_same_weights(run.lightning_module, fit(Automatic(), POLICIES[name](), 12).lightning_module)


@pytest.mark.parametrize("name", ["lisa", "hft_reset"])
def test_layer_updates_of_several_groups(name, tmp_path):
    updates = LayerUpdates(tmp_path, plot=False)
    fit(Automatic(), POLICIES[name](), 24, callbacks=[updates])
    assert not updates.never_moved
    steps = {(row["sweep"], row["unit"]): row["steps"] for row in updates.rows}
    if name == "lisa":
        blocks = [count for (sweep, unit), count in steps.items() if sweep == 1 and unit.startswith("net.blocks")]
        assert blocks == [3, 3]
        assert steps[1, "embedding"] == 3


class Two(pl.LightningModule):
    """Two networks with an optimizer each, in manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.left, self.right = Net(seed=1), Net(seed=2)

    def training_step(self, batch, batch_idx):
        for optimizer, net in zip(self.optimizers(), (self.left, self.right), strict=True):
            self.toggle_optimizer(optimizer)
            loss = next_token_loss(net, batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [adamw(self.left.parameters()), adamw(self.right.parameters())]


@pytest.mark.parametrize("name", ["ist", "lisa_reset", "badam", "hft"])
def test_one_pattern_serves_several_optimizers_and_fits(name):
    callback, batches = as_published(policy=POLICIES[name](), seed=SEED, always_active=[]), tokens(9)
    for _ in range(2):
        model = Two()
        trainer(callbacks=[callback]).fit(model, loader(9))
        for net, seed in ((model.left, 1), (model.right, 2)):
            twin = Net(seed=seed)
            train(twin, attach(twin, POLICIES[name](), always_active=[]), batches)
            assert_same_weights(net, twin)
        first, second = callback.engines
        assert first.policy is not second.policy
        assert first.policy is not callback.policy


def test_what_is_logged_and_shown(capsys, caplog):
    class Reader(pl.Callback):
        def __init__(self):
            self.groups = []

        def on_train_batch_end(self, trainer, *args):
            self.groups.append(int(trainer.logged_metrics["hift/group"]))

    reader = Reader()
    run = fit(Automatic(), LISA(2, 2), 8, strategy="hift", callbacks=[reader])
    callback = next(c for c in run.callbacks if isinstance(c, HiFTCallback))
    (engine,) = callback.engines
    bound = LISA(2, 2).bound_to(engine.groups, SEED)
    assert reader.groups == [bound.groups_at(step)[0] for step in range(8)]
    assert callback.summary(run.lightning_module).startswith(
        "LISA over 3 layer groups: state_handling=keep, num_blocks=2"
    )
    assert as_published().policy.describe(5) == "HiFT: bottom2up over 5 layer groups, 1 step each"


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BAdam(0), "Got steps_per_block=0; it must be a whole number"),
        (lambda: BAdam(order="sideways"), "Got order='sideways'"),
        (lambda: LISA(0), "Got num_blocks=0"),
        (lambda: LISA(1, 2.5), r"Got steps_per_draw=2.5"),
        (lambda: LISA(state_handling="drop"), "Got state_handling='drop'; choose one of 'keep', 'reset'"),
        (lambda: SweepSchedule(state_handling="drop"), "Got state_handling='drop'"),
        (lambda: HFT(True), "Got steps_per_half=True"),
        (lambda: IST(explore=0), "Got explore=0; it must be above 0"),
        (lambda: IST(importance_rate=-1), "Got importance_rate=-1"),
        (lambda: as_published(policy=LISA(), steps_per_group=2), "beside the policy LISA, which decides by itself"),
        (lambda: as_published(policy=LISA(), order="random"), r"Got order='random' beside .* Leave that out"),
        (lambda: attach(Net(), LISA(4)), "Got num_blocks=4 for LISA, but only 3 layer groups take turns"),
        (
            lambda: attach(Net(), HFT(), group_size=2),
            "but group embedding ... blocks.0.norm joins several. Use group_size=1",
        ),
        (lambda: attach(nn.Embedding(2, 2), HFT()), "HFT needs at least 2 matrices"),
        (lambda: attach(Net(), LISA(), always_active=["nose"]), "Pattern 'nose' matches no layer unit"),
        (lambda: attach(Net(), BAdam(), always_active=["*", "blocks.*"]), "which leaves nothing to rotate"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_class_is_no_policy_but_its_name_is():
    with pytest.raises(TypeError, match=r"it must be a SelectionPolicy, such as lightning_hift.LISA\(\)"):
        as_published(policy=LISA)
    assert isinstance(as_published(policy="LISA").policy, LISA)
    with pytest.raises(ValueError, match="Got policy='Lisa'; choose one of 'BAdam', 'LISA', 'HFT', 'IST'"):
        as_published(policy="Lisa")


def run_yaml(policy):
    return {
        "hift": {"policy": policy},
        "trainer": {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
        "model": {
            "class_path": "lightning_hift.tasks.CausalLM",
            "init_args": {
                "model_type": "llama",
                "model_config": {
                    "vocab_size": 256,
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 2,
                },
            },
        },
        "data": {
            "class_path": "lightning_hift.data.PythonSourceDataModule",
            "init_args": {"sequence_length": 16, "batch_size": 4, "max_train_bytes": 1000, "max_val_bytes": 400},
        },
    }


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a subcommand with a policy from YAML; returns all that it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-hift"])

    def run(subcommand, policy, *options):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_yaml(policy)))
        with contextlib.suppress(SystemExit):
            main([subcommand, "--config", "run.yaml", *options])
        said = capsys.readouterr()
        return said.out + said.err

    return run


LISA_YAML = {"class_path": "lightning_hift.LISA", "init_args": {"num_blocks": 1, "steps_per_draw": 2}}


@pytest.mark.filterwarnings("ignore")
def test_a_policy_from_yaml(command):
    assert "all  embedding" in command("groups", LISA_YAML)
    assert "self_attn.q_proj" in command("groups", "HFT")
    command("fit", LISA_YAML)
    assert "always active, in every row: embedding, head" in command("plan", LISA_YAML, "--compare", "false")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("Lisa", (), "choose one of 'BAdam', 'LISA', 'HFT', 'IST'"),
        (LISA_YAML | {"init_args": {"num_blocks": 0}}, (), 'Parser key "hift": Got num_blocks=0'),
        (LISA_YAML | {"init_args": {"num_blocks": 9}}, (), "only 3 layer groups take turns"),
        (LISA_YAML, ("--hift.order", "random"), "Parser key \"hift\": Got order='random'"),
        ("HFT", ("--hift.group_size", "2"), "Use group_size=1"),
    ],
)
def test_a_bad_policy_from_yaml_ends_in_a_short_message(command, policy, options, message):
    assert message in command("groups", policy, *options)


@pytest.mark.parametrize("answer", [(), (5,), (-1, 0)])
def test_a_policy_that_selects_nonsense_is_refused(answer):
    class Nonsense(OddAndEven):
        def groups_at(self, step):
            return answer

    with pytest.raises(ValueError, match=r"Nonsense.groups_at\(0\) returned .* the groups 0 to 4"):
        attach(Net(), Nonsense())


def test_a_policy_that_selects_more_than_it_said_is_refused():
    class Greedy(OddAndEven):
        most_groups = 2

    with pytest.raises(ValueError, match=r"returned \(0, 2, 4\), more than its most_groups, 2"):
        attach(Net(), Greedy())


def test_a_policy_that_loses_parameters_is_refused():
    class Careless(OddAndEven):
        def split_unit(self, unit):
            return [LayerUnit(unit.name, unit.modules, dict(list(unit.parameters.items())[:1]))]

    with pytest.raises(ValueError, match=r"Careless.split_unit divides the layer unit blocks.0"):
        attach(Net(), Careless())


def test_ist_without_a_loss_says_what_to_do():
    model = Net()
    engine = attach(model, IST(1, 2))
    with pytest.raises(RuntimeError, match=r"got none. In a plain loop call engine.observe\(loss\)"):  # noqa: PT012
        for batch in tokens(3):
            next_token_loss(model, batch).backward()
            engine.optimizer.step()


def test_an_average_of_the_whole_run_cannot_be_reset():
    class Averaging(Counting):
        def train(self):
            pass

        def eval(self):
            pass

    model = Net()
    with pytest.raises(TypeError, match=r"Averaging keeps an average of the weights .* Use state_handling='keep'"):
        attach_published(model, Averaging(model.parameters()), policy=BAdam())
    attach_published(model, Averaging(model.parameters()), policy=LISA())


def test_default_always_active_units_may_be_missing_and_can_be_taken_back():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    engine = attach_published(model, adamw(model.parameters()), policy=LISA(1))
    assert {unit.name for unit in engine.always_active} <= {"embedding", "head"}
    assert attach(Net(), LISA(2), always_active=[]).always_active == ()


def test_an_optimizer_that_lives_by_its_state_is_not_reset():
    model = Net()
    with pytest.raises(TypeError, match=r"MeZO draws its noise by the steps .* Use state_handling='keep'"):
        attach_published(model, MeZO(model.parameters()), policy=BAdam())
