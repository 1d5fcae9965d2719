"""One tensor that is given to a block several times is one tensor in its recomputation, too."""

import warnings
from collections import namedtuple

import pytest
import torch
from torch import nn

from lightning_hift.activations.arguments import Arguments
from lightning_hift.activations.checkpointing import ActivationBudget
from tests.models import assert_same_weights, attach_published

Pair = namedtuple("Pair", ["first", "second"])


class Asks(nn.Module):
    """Takes another path for tensors that are the same one, and one of as many kernels for others."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), nn.LayerNorm(8)

    def forward(self, first, second, **more):
        found = [first, *(each for each in flat(second)), *(each for value in more.values() for each in flat(value))]
        same = sum(each is first for each in found)
        x = self.linear(torch.tanh(first * same)) if same == len(found) else torch.sin(self.linear(first))
        return first + self.norm(x)


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [each for item in (value.values() if isinstance(value, dict) else value) for each in flat(item)]


class Holder(dict):
    """No plain dict."""


CALLS = {
    "positional": lambda block, x: block(x, x),
    "keyword": lambda block, x: block(x, second=x),
    "list": lambda block, x: block(x, [x, (x,)]),
    "dict": lambda block, x: block(x, {"a": x, "b": [x]}),
    "named_tuple": lambda block, x: block(x, Pair(x, x)),
    "more_keywords": lambda block, x: block(x, x, mask=x, others=[x]),
    "other_container": lambda block, x: block(x, Holder(a=x), mask=x),
    "keywords_alone": lambda block, x: block(first=x, second=x),
}


class Stack(nn.Module):
    def __init__(self, call, make_block):
        super().__init__()
        torch.manual_seed(0)
        self.inlet = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([make_block() for _ in range(3)])
        self.head = nn.Linear(8, 4)
        self.call = call

    def forward(self, x):
        x = self.inlet(x)
        for block in self.blocks:
            x = self.call(block, torch.tanh(x))
        return self.head(x)


def train(call, make_block, nbytes):
    model = Stack(call, make_block)
    engine = attach_published(
        model, torch.optim.SGD(model.parameters(), lr=0.1), units=["inlet", "blocks.*", "head"], always_active=[]
    )
    units = [unit for group in engine.groups for unit in group.units]
    budget = None if nbytes is None else ActivationBudget(model, nbytes, units)
    checkpointed = 0
    for seed in range(12):
        if budget is not None:
            budget.begin_batch()
        x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()
        if budget is not None:
            checkpointed += budget.num_checkpointed
            budget.end_batch()
        engine.optimizer.step()
    return model, checkpointed


@pytest.mark.parametrize("nbytes", [1 << 40, 5000])
@pytest.mark.parametrize("name", CALLS)
def test_identity_of_arguments(name, nbytes):
    model, checkpointed = train(CALLS[name], Asks, nbytes)
    assert checkpointed > 0
    assert_same_weights(model, train(CALLS[name], Asks, None)[0])


@pytest.mark.parametrize("nbytes", [1 << 40, 12000])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_to_itself(batch_first, dropout, nbytes):
    def make_block():
        return nn.MultiheadAttention(8, 2, batch_first=batch_first, dropout=dropout)

    def call(block, y):
        return y + block(y, y, y, need_weights=False)[0]

    model, checkpointed = train(call, make_block, nbytes)
    assert checkpointed > 0
    assert_same_weights(model, train(call, make_block, None)[0])


def test_containers_are_one_where_they_were_one():
    x, y = torch.ones(2), torch.zeros(2)
    shared = [x, y]
    arguments = Arguments((shared, {"a": shared}), {"pair": Pair(x, 1), "none": None})
    tensors = arguments.take_tensors()
    assert [id(t) for t in tensors] == [id(x), id(y)]
    args, kwargs = arguments.filled(tensors)
    assert args[0] is shared  # as it was given
    others = [t.clone() for t in tensors]
    (first, second), kwargs = arguments.filled(others)
    assert second["a"] is first is not shared
    assert first[0] is kwargs["pair"].first is others[0]
    assert first[1] is others[1]
    assert kwargs["pair"].second == 1
    assert kwargs["none"] is None


def test_a_block_may_add_to_a_list_that_it_is_given():
    class Adds(Asks):
        def forward(self, x, seen):
            seen.append(x)
            return super().forward(x, seen[-1])

    seen = []
    model, _ = train(lambda block, x: block(x, seen), Adds, 1 << 40)
    once = len(seen)
    assert once == 12 * 3
    assert_same_weights(model, train(lambda block, x: block(x, []), Adds, None)[0])


def test_a_change_in_place_of_a_keyword_is_noticed():
    def call(block, x):
        result = block(first=x, second=x)
        x.mul_(2)
        return result

    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        train(call, Asks, 1 << 40)
