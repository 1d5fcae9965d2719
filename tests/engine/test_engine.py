"""The engine in plain torch loops, against the plain twin in ``tests/reference``."""

import copy
import gc
import weakref
from itertools import chain

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from lightning_hift import StateOffloader, SweepLR, attach_engines
from tests.lagging import lagging
from tests.matrices import crossed
from tests.models import GROUPS, Net, adamw, assert_same_weights, attach_published, next_token_loss, tokens, weights
from tests.reference.round_robin import train_round_robin
from tests.reference.sweep_means import sweep_means

OPTIMIZERS = {
    "adamw": adamw,
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "adadelta": torch.optim.Adadelta,
}


OFFLOADERS = {
    "host": lambda: StateOffloader("cpu"),
    "none": lambda: StateOffloader("cpu", "none"),
    "lagging": lagging,
    "lagging_no_prefetch": lambda: lagging(prefetch=False),
}


def train(model, engine, batches, accumulate=1, clip_norm=None, scheduler=None):
    """The loop of any torch user."""
    for start in range(0, len(batches), accumulate):
        for batch in batches[start : start + accumulate]:
            (next_token_loss(model, batch) / accumulate).backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def windows(batches, size=1):
    return [batches[i : i + size] for i in range(0, len(batches), size)]


@pytest.mark.parametrize("offloader", OFFLOADERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_independent_optimizers_in_turn(name, offloader):
    model, twin, batches = Net(), Net(), tokens(13)
    engine = attach_published(model, OPTIMIZERS[name](model.parameters()), make_offloader=OFFLOADERS[offloader])
    train(model, engine, batches)
    train_round_robin(twin, GROUPS, OPTIMIZERS[name], windows(batches), next_token_loss)
    assert_same_weights(model, twin)


@pytest.mark.parametrize(
    ("order", "group_size", "offloader"),
    crossed(["bottom2up", "top2down", "random"], [2, 3, 4], ["host", "lagging"]),
)
def test_orders_and_group_sizes(order, group_size, offloader):
    joined = [list(chain(*GROUPS[i : i + group_size])) for i in range(0, 5, group_size)]
    model, twin, batches = Net(), Net(), tokens(4 * len(joined) + 1)
    optimizer = adamw(model.parameters())
    engine = attach_published(
        model, optimizer, group_size=group_size, order=order, seed=5, make_offloader=OFFLOADERS[offloader]
    )
    assert [list(group.parameters) for group in engine.groups] == joined
    train(model, engine, batches)
    train_round_robin(twin, joined, adamw, windows(batches), next_token_loss, order=engine.policy.group_at)
    assert_same_weights(model, twin)


@pytest.mark.parametrize("offloader", ["host", "none", "lagging"])
@pytest.mark.parametrize("group_size", [5, 6, 100])
def test_one_group_is_full_fine_tuning(group_size, offloader):
    model, twin, batches = Net(), Net(), tokens(6)
    engine = attach_published(
        model, adamw(model.parameters()), group_size=group_size, make_offloader=OFFLOADERS[offloader]
    )
    train(model, engine, batches)
    optimizer = adamw(twin.parameters())
    for batch in batches:
        optimizer.zero_grad()
        next_token_loss(twin, batch).backward()
        optimizer.step()
    assert_same_weights(model, twin)


@pytest.mark.parametrize("offloader", OFFLOADERS)
def test_steps_per_group_keeps_the_state(offloader):
    model, twin, batches = Net(), Net(), tokens(23)
    engine = attach_published(model, adamw(model.parameters()), steps_per_group=3, make_offloader=OFFLOADERS[offloader])
    train(model, engine, batches)
    train_round_robin(twin, GROUPS, adamw, windows(batches), next_token_loss, steps_per_group=3)
    assert_same_weights(model, twin)


@pytest.mark.parametrize("offloader", ["host", "lagging"])
def test_always_active_units_train_at_every_step(offloader):
    model, twin, batches = Net(), Net(), tokens(11)
    engine = attach_published(
        model, adamw(model.parameters()), always_active=["head"], make_offloader=OFFLOADERS[offloader]
    )
    assert len(engine.groups) == 4
    train(model, engine, batches)
    train_round_robin(twin, GROUPS[:4], adamw, windows(batches), next_token_loss, always_active=GROUPS[4])
    assert_same_weights(model, twin)


def test_accumulation_keeps_one_group_per_window_and_clipping_sees_only_it():
    model, twin, batches = Net(), Net(), tokens(22)
    engine = attach_published(model, adamw(model.parameters()))
    train(model, engine, batches, accumulate=4, clip_norm=0.05)
    train_round_robin(twin, GROUPS, adamw, windows(batches, 4), next_token_loss, clip_norm=0.05, window_size=4)
    assert_same_weights(model, twin)


def test_accumulation_equals_one_large_batch():
    model, twin, batches = Net(), Net(), tokens(40)
    train(model, attach_published(model, adamw(model.parameters())), batches, accumulate=4)
    joined = [torch.cat(batches[i : i + 4]) for i in range(0, 40, 4)]
    train(twin, attach_published(twin, adamw(twin.parameters())), joined)
    for name, p in model.named_parameters():
        # Another order of summation, and AdamW amplifies rounding where a gradient is close to 0.
        torch.testing.assert_close(p, twin.get_parameter(name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 5, 12])
def test_held_learning_rate(steps):
    lr = sweep_means(lambda t: 0.01 * (1 - t / 20), 5)
    model, twin, batches = Net(), Net(), tokens(steps)
    optimizer = adamw(model.parameters())
    engine = attach_published(model, optimizer)
    bare = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 20)
    scheduler = SweepLR(bare, engine, total_steps=steps)
    train(model, engine, batches, scheduler=scheduler)
    train_round_robin(twin, GROUPS, adamw, windows(batches), next_token_loss, lr_at=lr)
    assert_same_weights(model, twin)


def test_only_the_active_group_has_gradients_and_is_trainable():
    model, batches = Net(), tokens(7)
    optimizer = adamw(model.parameters())
    engine = attach_published(model, optimizer, order="top2down")
    for step, batch in enumerate(batches):
        expected = GROUPS[4 - step % 5]
        assert list(engine.active_group.parameters) == expected
        assert [name for name, p in model.named_parameters() if p.requires_grad] == [
            name for name, _ in model.named_parameters() if name in expected
        ]
        next_token_loss(model, batch).backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == set(expected)
        optimizer.step()
        assert all(p.grad is None for p in model.parameters())
        assert len(optimizer.state) == 0


def test_backward_stops_at_the_lowest_active_layer():
    def saved_bytes():
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            next_token_loss(model, batch).backward()
        return sum(sizes)

    model, batch = Net(), tokens(1)[0]
    everything = saved_bytes()
    model.zero_grad()
    engine = attach_published(model, adamw(model.parameters()))
    saved = []
    for _ in range(5):
        saved.append(saved_bytes())
        engine.optimizer.step()
    assert max(saved) < everything
    # An embedding saves its indices only, so the first block is the dearest.
    assert saved[1:] == sorted(saved[1:], reverse=True)
    assert saved[4] < saved[1] / 2


def test_state_bytes():
    model, batches = Net(), tokens(10)
    engine = attach_published(model, adamw(model.parameters()), make_offloader=lagging)
    train(model, engine, batches)
    step_counts = 4 * len(list(model.parameters()))
    assert engine.offloader.host_bytes == 8 * sum(p.numel() for p in model.parameters()) + step_counts
    # One slot, as large as the largest group: all of its state is in one flat tensor.
    largest = max(8 * g.numel + 4 * len(g.parameters) for g in engine.groups)
    assert engine.offloader.device_bytes == -(-largest // 64) * 64


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cut", "name", "offloader"),
    crossed([1, 4, 5, 8], ["adamw", "adamw_fused", "sgd_momentum", "adagrad", "adafactor"], OFFLOADERS),
)
def test_resumed_equals_uninterrupted(name, cut, offloader, tmp_path):
    def attach(model):
        return attach_published(
            model,
            OPTIMIZERS[name](model.parameters()),
            order="random",
            reshuffle=True,
            seed=2,
            make_offloader=OFFLOADERS[offloader],
        )

    batches = tokens(12)
    whole, first, second = Net(), Net(), Net(seed=9)
    train(whole, attach(whole), batches)

    engine = attach(first)
    train(first, engine, batches[:cut])
    torch.save({"model": first.state_dict(), "optimizer": engine.optimizer.state_dict()}, tmp_path / "state.pt")

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = attach(second)
    second.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    assert len(resumed.optimizer.state) == 0
    assert resumed.step == cut
    train(second, resumed, batches[cut:])
    assert_same_weights(whole, second)


@pytest.mark.parametrize(("cut", "masters", "offloader"), crossed([0, 1, 3, 6], ["none", "split", "full"], OFFLOADERS))
def test_rolled_back_equals_uninterrupted(cut, masters, offloader):
    """In one process: groups that had no state when it was saved have none again."""

    def start():
        model = Net() if masters == "none" else Net().bfloat16()
        return model, attach_published(
            model, adamw(model.parameters()), make_offloader=OFFLOADERS[offloader], master_weights=masters
        )

    batches = tokens(12)
    whole, engine = start()
    train(whole, engine, batches)

    model, engine = start()
    train(model, engine, batches[:cut])
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": engine.optimizer.state_dict()})
    train(model, engine, batches[:8])
    model.load_state_dict(saved["model"])
    engine.optimizer.load_state_dict(saved["optimizer"])
    assert engine.optimizer.state_dict()["state"].keys() == saved["optimizer"]["state"].keys()
    train(model, engine, batches[cut:])
    assert_same_weights(whole, model)


@pytest.mark.parametrize("offloader", OFFLOADERS)
def test_tools_that_look_into_the_optimizer_make_no_step_and_find_all(offloader):
    """``torch.distributed.checkpoint`` fills an optimizer without state by a step of its own."""
    model, batches = Net(), tokens(9)
    engine = attach_published(model, adamw(model.parameters()), make_offloader=OFFLOADERS[offloader])
    get_optimizer_state_dict(model, engine.optimizer)
    assert engine.step == 0
    train(model, engine, batches[:7])
    before = weights(model)
    found = get_optimizer_state_dict(model, engine.optimizer)["state"]
    assert engine.step == 7
    assert_same_weights(before, model)
    expected = engine.optimizer.state_dict()["state"]
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for i, (name, p) in enumerate(model.named_parameters()):
        for key, value in expected[i].items():
            assert torch.equal(found[name][key], value)
            assert torch.equal(engine.optimizer.state[p][key], value)
    assert len(engine.optimizer.state) == 0
    twin = Net()
    twin.load_state_dict(model.state_dict())
    again = attach_published(twin, adamw(twin.parameters()), make_offloader=OFFLOADERS[offloader])
    again.optimizer.load_state_dict(engine.optimizer.state_dict())
    train(twin, again, batches[7:])
    train(model, engine, batches[7:])
    assert_same_weights(twin, model)


def test_a_copy_of_an_optimizer_steps_what_has_no_state_yet():
    model, batches = Net(), tokens(3)
    engine = attach_published(model, adamw(model.parameters()))
    train(model, engine, batches[:2])
    twin = copy.deepcopy(engine.optimizer)
    for p in twin.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    twin.step()
    assert len(twin.state) == len(list(model.parameters()))


def test_checkpoint_opens_in_a_plain_optimizer():
    model, batches = Net(), tokens(8)
    engine = attach_published(model, adamw(model.parameters()))
    train(model, engine, batches)
    saved = copy.deepcopy(engine.optimizer.state_dict())

    plain = adamw(copy.deepcopy(model).parameters())
    plain.load_state_dict(saved)
    assert set(plain.state_dict()["state"]) == set(range(len(list(model.parameters()))))
    for index, state in plain.state_dict()["state"].items():
        for key, value in saved["state"][index].items():
            assert torch.equal(state[key], value)
    # Two sweeps visited groups 0 to 2 twice and groups 3 and 4 once.
    visits = [int(saved["state"][i]["step"]) for i, (n, _) in enumerate(model.named_parameters()) if "embedding" in n]
    assert visits == [2]


def test_plain_checkpoint_opens_in_the_engine():
    model = Net()
    plain = adamw(model.parameters())
    for batch in tokens(3):
        plain.zero_grad()
        next_token_loss(model, batch).backward()
        plain.step()
    plain.zero_grad()
    saved = copy.deepcopy(plain.state_dict())

    twin = copy.deepcopy(model)
    engine = attach_published(model, adamw(model.parameters()))
    engine.optimizer.load_state_dict(saved)
    assert engine.step == 0
    train(model, engine, tokens(5, seed=8))

    named = dict(twin.named_parameters())
    indices = {name: i for i, name in enumerate(named)}
    for group, batch in zip(GROUPS, tokens(5, seed=8), strict=True):
        optimizer = adamw([named[name] for name in group])
        state = {i: saved["state"][indices[name]] for i, name in enumerate(group)}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        twin.zero_grad()
        next_token_loss(twin, batch).backward()
        optimizer.step()
    assert_same_weights(model, twin)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"group_size": 2}, "group_size: 1 against 2"),
        ({"order": "top2down"}, "order: 'bottom2up' against 'top2down'"),
        ({"steps_per_group": 2}, "steps_per_group: 1 against 2"),
        ({"always_active": ["head"]}, "always_active: 0 against 1"),
        ({"frozen": ["embedding"]}, "units: 5 against 4"),
        ({"units": ["embedding", "blocks.*", "norm", "head"]}, "units: 5 against 6"),
    ],
)
def test_checkpoint_of_another_grouping(changed, message):
    model, other = Net(), Net()
    saved = attach_published(model, adamw(model.parameters())).optimizer.state_dict()
    engine = attach_published(other, adamw(other.parameters()), **changed)
    with pytest.raises(ValueError, match=message):
        engine.optimizer.load_state_dict(saved)


def test_checkpoint_of_the_same_units_in_another_order():
    model, other = Net(), Net()
    names = ["embedding", "blocks.0", "blocks.1", "blocks.2", ["norm", "head"]]
    engine = attach_published(model, adamw(model.parameters()), units=names)
    resumed = attach_published(other, adamw(other.parameters()), units=[names[i] for i in (0, 2, 1, 3, 4)])
    with pytest.raises(ValueError, match=r"units: 'blocks.0' against 'blocks.1'"):
        resumed.optimizer.load_state_dict(engine.optimizer.state_dict())


def test_checkpoint_of_another_seed():
    model, other = Net(), Net()
    saved = attach_published(model, adamw(model.parameters()), order="random", seed=1).optimizer.state_dict()
    engine = attach_published(other, adamw(other.parameters()), order="random", seed=2)
    with pytest.raises(ValueError, match="seed: 1 against 2"):
        engine.optimizer.load_state_dict(saved)


def test_moments_keep_their_dtype_on_load():
    model = Net().to(torch.bfloat16)
    engine = attach_published(model, adamw(model.parameters()))
    train(model, engine, tokens(5))
    saved = engine.optimizer.state_dict()
    saved["state"] = {i: {k: v.float() if k != "step" else v for k, v in s.items()} for i, s in saved["state"].items()}
    other = Net().to(torch.bfloat16)
    resumed = attach_published(other, adamw(other.parameters()))
    resumed.optimizer.load_state_dict(saved)
    assert {s["exp_avg"].dtype for s in resumed.optimizer.state_dict()["state"].values()} == {torch.float32}


# --- the life of an optimizer -----------------------------------------------------------------------------------------


def test_close_restores_everything_and_loses_nothing():
    model, twin, batches = Net(), Net(), tokens(12)
    for net in (model, twin):
        net.blocks[1].up.weight.requires_grad_(False)
    optimizer = adamw(model.parameters())
    engine = attach_published(model, optimizer, frozen=["blocks.0"])
    train(model, engine, batches[:10])
    before = copy.deepcopy(optimizer.state_dict())
    engine.close()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["blocks.1.up.weight"]
    after = optimizer.state_dict()
    assert after["hift"] == before["hift"]
    for index, state in before["state"].items():
        assert all(torch.equal(after["state"][index][key], value) for key, value in state.items())

    # Stepped by hand afterwards, it is an ordinary optimizer with all its moments.
    plain = adamw(twin.parameters())
    twin.load_state_dict(model.state_dict())
    plain.load_state_dict({k: v for k, v in copy.deepcopy(before).items() if k != "hift"})
    for net, stepped in ((model, optimizer), (twin, plain)):
        for batch in batches[10:]:
            stepped.zero_grad()
            next_token_loss(net, batch).backward()
            stepped.step()
    assert_same_weights(model, twin)
    assert "hift" not in optimizer.state_dict()


def test_second_engine_takes_over_state_and_position():
    model, twin, batches = Net(), Net(), tokens(14)
    optimizer = adamw(model.parameters())
    engine = attach_published(model, optimizer)
    train(model, engine, batches[:7])
    engine.close()
    assert len(optimizer.state) == 0
    second = attach_published(model, optimizer)
    assert second.step == 7
    train(model, second, batches[7:])
    train_round_robin(twin, GROUPS, adamw, windows(batches), next_token_loss)
    assert_same_weights(model, twin)


def test_two_open_engines_on_one_optimizer_are_refused():
    model = Net()
    optimizer = adamw(model.parameters())
    attach_published(model, optimizer)
    with pytest.raises(RuntimeError, match="already under HiFT"):
        attach_published(model, optimizer, group_size=2)


def test_engine_and_optimizer_are_freed_together():
    model = Net()
    engine = attach_published(model, adamw(model.parameters()))
    train(model, engine, tokens(2))
    engine_ref, optimizer_ref = weakref.ref(engine), weakref.ref(engine.optimizer)
    del engine, model
    gc.collect()
    assert engine_ref() is None
    assert optimizer_ref() is None


def test_scaler_that_skips_a_step_repeats_the_group_in_a_plain_loop():
    model = Net()
    optimizer = adamw(model.parameters())
    engine = attach_published(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(model.state_dict())
    scaler.scale(next_token_loss(model, tokens(1)[0]) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert engine.step == 0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# --- the first sweep --------------------------------------------------------------------------------------------------


def test_first_sweep_report():
    model = Net()
    engine = attach_published(model, adamw(model.parameters()))
    train(model, engine, tokens(4))
    assert engine.first_sweep_report() is None
    train(model, engine, tokens(1))
    report = engine.first_sweep_report()
    assert report.complete
    assert report.num_parameters == len(list(model.parameters()))
    assert engine.first_sweep_report() is None


def test_a_warm_up_of_all_parameters_is_not_taken_for_a_fault():
    model = Net()
    engine = attach_published(model, adamw(model.parameters()), group_size=99)
    for rate in (0.0, 0.0, 0.01):
        assert engine.first_sweep_report() is None
        engine.optimizer.param_groups[0]["lr"] = rate
        next_token_loss(model, tokens(1)[0]).backward()
        engine.optimizer.step()
    assert engine.first_sweep_report().complete


def test_first_sweep_report_names_what_did_not_move():
    model = Net()
    model.blocks[0].unused = nn.Parameter(torch.ones(2))
    model.blocks[1].scaled = nn.Parameter(torch.ones(2))
    model.blocks[1].register_forward_hook(lambda module, args, out: out + 0 * module.scaled.sum())
    engine = attach_published(model, torch.optim.SGD(model.parameters(), lr=0.1))
    train(model, engine, tokens(5))
    report = engine.first_sweep_report()
    assert not report.complete
    assert report.without_gradient == ["blocks.0.unused"]
    assert report.unchanged == ["blocks.1.scaled"]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_refused_optimizers(refused):
    model = Net()
    with pytest.raises(TypeError, match=f"{refused.__name__} cannot train one layer group at a time"):
        attach_published(model, refused(model.parameters()))
    assert all(p.requires_grad for p in model.parameters())


def test_parameter_in_no_optimizer():
    model = Net()
    with pytest.raises(ValueError, match=r"No optimizer holds the trainable parameters \['norm.weight', 'norm.bias'\]"):
        attach_published(model, adamw([p for n, p in model.named_parameters() if not n.startswith("norm.")]))


def test_optimizer_with_a_strange_parameter():
    model = Net()
    stranger = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"no layer group has, of shapes \[\(3,\)\]"):
        attach_published(model, adamw([*model.parameters(), stranger]))
    assert all(p.requires_grad for p in model.parameters())


def test_parameter_in_two_optimizers():
    model = Net()
    optimizers = [adamw(model.parameters()), adamw(model.head.parameters())]
    with pytest.raises(ValueError, match=r"More than one optimizer holds the parameters \['head.weight'"):
        attach_engines(model, optimizers)


def test_group_without_gradient_is_named():
    model = Net()
    model.blocks.append(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    model.forward = lambda x: model.head(model.norm(model.embedding(x)))
    engine = attach_published(model, adamw(model.parameters()))
    with (
        pytest.warns(UserWarning, match=r"Layer group 1 \(blocks.0\) got no gradient in its turn"),
        pytest.raises(RuntimeError, match=r"Layer group 1 \(blocks.0\) has never.*frozen=.*use_reentrant=False"),
    ):
        train(model, engine, tokens(10))


def test_everything_always_active_is_refused():
    model = Net()
    with pytest.raises(ValueError, match="group_size=5"):
        attach_published(model, adamw(model.parameters()), always_active=["embedding", "blocks.*", "head"])


def test_parameters_added_later_are_refused():
    model = Net()
    engine = attach_published(model, adamw(model.parameters()))
    engine.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(RuntimeError, match="new parameters after HiFT was attached"):
        engine.activate()
