"""Batches in which the active group gets no gradient, against independent optimizers that are stepped in turn."""

import copy
import pickle
import random
import warnings

import pytest
import torch
from torch import nn

from lightning_hift import BAdam, HiFTEngine
from tests.models import GROUPS, Net, adamw, assert_same_weights, attach_published, next_token_loss, tokens, weights
from tests.reference.round_robin import train_round_robin

MISSED = "got no gradient in its turn, which passes without an update"


class Dropping(Net):
    """Leaves out each block for half of the batches: the same ones in each run."""

    def __init__(self, share=0.5):
        super().__init__()
        self.share, self.count = share, 0

    def forward(self, tokens):
        self.count += 1
        drawn = random.Random(self.count)
        x = self.embedding(tokens)
        for block in self.blocks:
            if drawn.random() >= self.share:
                x = block(x)
        return self.head(self.norm(x))


class TwoHeads(Net):
    """The head of each batch is chosen by its number; the other one is left out, or computed in vain."""

    def __init__(self, in_vain=False):
        super().__init__()
        self.other, self.in_vain, self.count = nn.Linear(8, 17), in_vain, 0

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        self.count += 1
        heads = [self.head, self.other] if self.count % 4 < 2 else [self.other, self.head]
        results = [head(self.norm(x)) for head in heads[: 1 + self.in_vain]]
        return results[0]


TWO_HEADS = [*GROUPS[:4], ["norm.weight", "norm.bias", "head.weight", "head.bias"], ["other.weight", "other.bias"]]
FROZEN = ["embedding", "norm", "head"]
UNITS = ["embedding", "blocks.*", ["norm", "head"], "other"]


def train(model, engine, batches, window=1):
    for start in range(0, len(batches), window):
        for batch in batches[start : start + window]:
            (next_token_loss(model, batch) / window).backward()
        engine.optimizer.step()


OPTIMIZERS = {
    "adamw": adamw,
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "foreach": lambda p: torch.optim.NAdam(p, lr=0.01, foreach=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.filterwarnings(f"ignore:.*{MISSED}")
@pytest.mark.parametrize("options", [{}, {"steps_per_group": 2}, {"max_group_numel": 60}, {"order": "top2down"}])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_turn_without_gradient_passes_without_an_update(name, options):
    model, twin, batches = Dropping(), Dropping(), tokens(37)
    engine = attach_published(model, OPTIMIZERS[name](model.parameters()), **options)
    train(model, engine, batches)
    taken = train_round_robin(
        twin,
        GROUPS,
        OPTIMIZERS[name],
        [[b] for b in batches],
        next_token_loss,
        steps_per_group=options.get("steps_per_group", 1),
        order=(lambda place: 4 - place) if "order" in options else None,
    )
    assert_same_weights(model, twin)
    assert engine.step == len(taken) == 37
    kept = [[each.random() >= 0.5 for _ in range(3)] for each in map(random.Random, range(1, 38))]
    missed = [1 <= group <= 3 and not kept[step][group - 1] for step, group in enumerate(taken)]
    assert engine.missed_turns.count == sum(missed)


@pytest.mark.filterwarnings(f"ignore:.*{MISSED}")
def test_accumulation_where_some_micro_batches_leave_the_group_out():
    model, twin, batches = Dropping(), Dropping(), tokens(60)
    engine = attach_published(model, adamw(model.parameters()))
    train(model, engine, batches, window=3)
    train_round_robin(twin, GROUPS, adamw, [batches[i : i + 3] for i in range(0, 60, 3)], next_token_loss)
    assert_same_weights(model, twin)
    assert 0 < engine.missed_turns.count < 6


@pytest.mark.filterwarnings(f"ignore:.*{MISSED}")
def test_always_active_units_are_stepped_all_the_same():
    model, twin, batches = Dropping(), Dropping(), tokens(24)
    engine = attach_published(model, adamw(model.parameters()), always_active=["head"])
    train(model, engine, batches)
    train_round_robin(twin, GROUPS[:4], adamw, [[b] for b in batches], next_token_loss, always_active=GROUPS[4])
    assert_same_weights(model, twin)
    assert engine.missed_turns.count > 5


@pytest.mark.filterwarnings(f"ignore:.*{MISSED}")
@pytest.mark.parametrize("in_vain", [False, True])
def test_heads_that_alternate(in_vain):
    model, twin, batches = TwoHeads(in_vain), TwoHeads(in_vain), tokens(36)
    engine = attach_published(model, adamw(model.parameters()), units=UNITS)
    train(model, engine, batches)
    train_round_robin(twin, TWO_HEADS, adamw, [[b] for b in batches], next_token_loss)
    assert_same_weights(model, twin)
    assert engine.missed_turns.count > 0


def test_dropped_gradients_and_a_single_warning():
    model, twin, batches = Net(), Net(), tokens(20)
    engine = attach_published(model, adamw(model.parameters()))

    def train_with_drops():
        for number, batch in enumerate(batches):
            next_token_loss(model, batch).backward()
            if number % 4 == 0:
                engine.optimizer.zero_grad()
            engine.optimizer.step()

    with pytest.warns(UserWarning, match=r"Layer group 0 \(embedding\) " + MISSED) as caught:
        train_with_drops()
    assert sum(MISSED in str(each.message) for each in caught) == 1

    optimizers = [adamw([twin.get_parameter(name) for name in group]) for group in GROUPS]
    for number, batch in enumerate(batches):
        twin.zero_grad()
        next_token_loss(twin, batch).backward()
        if number % 4:
            optimizers[number % 5].step()
    assert_same_weights(model, twin)
    assert engine.missed_turns.count == 5


@pytest.mark.filterwarnings(f"ignore:.*{MISSED}")
def test_one_group_is_full_fine_tuning():
    model, twin, batches = Net(), Net(), tokens(12)
    engine = attach_published(model, adamw(model.parameters()), group_size=100)
    optimizer = adamw(twin.parameters())
    for number, batch in enumerate(batches):
        for each, stepped in ((model, engine.optimizer), (twin, optimizer)):
            stepped.zero_grad()
            next_token_loss(each, batch).backward()
            if number < 4 or number == 7:
                stepped.zero_grad()
            stepped.step()
    assert_same_weights(model, twin)
    assert engine.missed_turns.count == 5


@pytest.mark.filterwarnings(f"ignore:.*{MISSED}")
@pytest.mark.parametrize("master_weights", ["full", "split"])
def test_masters(master_weights):
    found = []
    for mode in (master_weights, "full"):
        model = Dropping().bfloat16()
        engine = attach_published(model, adamw(model.parameters()), master_weights=mode, max_group_numel=100)
        train(model, engine, tokens(25))
        found.append((weights(model), engine.optimizer.state_dict()["state"]))
        assert engine.missed_turns.count > 3
    assert_same_weights(found[0][0], found[1][0])


@pytest.mark.filterwarnings(f"ignore:.*{MISSED}")
def test_a_group_that_is_waited_for_trains_in_its_turn_only():
    model = Dropping(1.0)  # nothing but embedding and head
    engine = attach_published(model, adamw(model.parameters()))
    batches = tokens(9)
    train(model, engine, batches[:2])
    assert engine.active_group.index == 2
    first = list(model.blocks[0].parameters())
    assert all(p.requires_grad for p in first)
    before, model.share = weights(model), 0.0
    next_token_loss(model, batches[2]).backward()
    assert all(p.grad is None for p in first)
    assert all(p.grad is not None for p in model.blocks[1].parameters())
    engine.optimizer.step()
    assert not any(p.requires_grad for p in first)
    after = weights(model)
    assert {name for name in after if not torch.equal(after[name], before[name])} == set(GROUPS[2])


class Unused(Net):
    def __init__(self):
        super().__init__()
        self.blocks.append(type(self.blocks[0])())
        self.used = 3

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks[: self.used]:
            x = block(x)
        return self.head(self.norm(x))


@pytest.mark.filterwarnings(f"ignore:.*{MISSED}")
@pytest.mark.parametrize("always_active", [[], ["head"]])
def test_a_group_out_of_reach_is_refused(always_active):
    model = Unused()
    engine = attach_published(model, adamw(model.parameters()), always_active=always_active)
    with pytest.raises(RuntimeError, match=r"Layer group 4 \(blocks.3\) has never had a gradient.*frozen=\[...\]"):
        train(model, engine, tokens(13))
    assert engine.step == 4 + 8  # more than a sweep
    engine.close()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings(f"ignore:.*{MISSED}")
def test_a_forward_pass_without_graph_is_refused():
    model = Net()
    engine = attach_published(model, adamw(model.parameters()))
    for batch in tokens(8):
        with torch.no_grad():
            next_token_loss(model, batch)
        engine.optimizer.step()
    with pytest.raises(RuntimeError, match=r"Layer group 0 \(embedding\) has never.*under torch.no_grad"):
        engine.optimizer.step()


@pytest.mark.filterwarnings(f"ignore:.*{MISSED}")
def test_another_policy():
    model = Dropping()
    engine = HiFTEngine.attach(model, adamw(model.parameters()), policy=BAdam(2), group_size=1)
    train(model, engine, tokens(30))
    assert engine.missed_turns.count > 0


def test_nothing_is_said_where_every_group_has_a_gradient():
    model = Net()
    engine = attach_published(model, adamw(model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, engine, tokens(7))
    assert engine.missed_turns.count == 0


def test_what_the_model_returns_has_a_graph_in_training_alone():
    model, (batch,) = Dropping(1.0), tokens(1)
    engine = attach_published(model, adamw(model.parameters()), order="top2down", units=["blocks.*"], frozen=FROZEN)
    copied = copy.deepcopy(model)
    loss = next_token_loss(model, batch)
    assert loss.requires_grad
    logits = model(batch)
    logits[0] = 0.0  # as in plain training, it is no leaf
    logits.sum().backward()
    with torch.no_grad():
        assert not model(batch).requires_grad
    assert not copied(batch).requires_grad
    assert not pickle.loads(pickle.dumps(model))(batch).requires_grad
    engine.close()
    for p in model.parameters():
        p.requires_grad_(False)
    assert not model(batch).requires_grad


class Reverses(torch.autograd.Function):
    """As Reformer does, it calls a module by itself, and hands on a graph only from its input."""

    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.block(x).backward(gradient)
        return x.grad, None


class Reversible(Net):
    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = Reverses.apply(x, block)
        return self.head(self.norm(x))


@pytest.mark.filterwarnings(f"ignore:.*{MISSED}")
def test_a_function_that_needs_an_input_with_gradient():
    model = Reversible()
    engine = attach_published(model, adamw(model.parameters()))
    with pytest.raises(RuntimeError, match=r"\(blocks.\d\) has never had a gradient.*always_active=\['embedding'\]"):
        train(model, engine, tokens(16 * 5))
    engine.close()

    model, twin = Reversible(), Net()
    engine = attach_published(model, adamw(model.parameters()), always_active=["embedding"])
    train(model, engine, tokens(11))
    assert engine.missed_turns.count == 0
    train_round_robin(twin, GROUPS[1:], adamw, [[b] for b in tokens(11)], next_token_loss, always_active=GROUPS[0])
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, twin.get_parameter(name), rtol=1e-5, atol=1e-6)
