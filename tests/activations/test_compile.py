"""Compiled blocks: few graphs at any depth, the same weights, also with an activation budget."""

import logging

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from lightning_hift.activations.checkpointing import ActivationBudget
from tests.activations.test_checkpointing import PLENTY, llama, loss_of, without_cache
from tests.matrices import crossed
from tests.models import Net, adamw, assert_same_weights, attach_published, tokens

MODELS = {"net": lambda depth: Net(depth=depth), "llama": lambda depth: without_cache(llama(depth))}
BACKENDS = {"eager": lambda graph, inputs: graph.forward, "aot_eager": aot_eager}
TIGHT = {"net": {3: 8500, 12: 15000}, "llama": {3: 40_000, 12: 80_000}}


@pytest.fixture(autouse=True)
def strict_dynamo():
    torch._dynamo.reset()
    logging.getLogger("torch.__trace").disabled = True  # pytest would keep all of it
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


class Counting:
    """One backend for all blocks: dynamo keeps graphs of different backends apart."""

    def __init__(self, name):
        self.graphs = 0
        self._compile = BACKENDS[name]

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self._compile(graph, inputs)


def blocks_of(model):
    return model.blocks if isinstance(model, Net) else model.model.layers


def train(model, sweeps=3, nbytes=None, **options):
    """Train, evaluate after each sweep; how many blocks were checkpointed in each batch of the last sweep."""
    engine = attach_published(model, adamw(model.parameters()), **options)
    budget = ActivationBudget(model, nbytes) if nbytes else None
    batch, counts = tokens(1)[0], []
    for _ in range(sweeps):
        counts = []
        for _ in engine.groups:
            if budget:
                budget.begin_batch()
            loss_of(model, batch).backward()
            if budget:
                budget.end_batch()
                counts.append(budget.num_checkpointed)
            engine.optimizer.step()
            engine.optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            loss_of(model, batch)
        model.train()
    engine.close()
    if budget:
        budget.close()
    return counts


CASES = [
    *crossed(["net"], ["no budget", "plenty", "tight"], BACKENDS),
    pytest.param("llama", "no budget", "eager", marks=pytest.mark.slow),
    ("llama", "tight", "aot_eager"),
]


@pytest.mark.parametrize(("name", "memory", "backend"), CASES)
def test_number_of_graphs_does_not_grow_with_depth(name, backend, memory):
    for depth in (3, 12):
        nbytes = {"no budget": None, "plenty": PLENTY, "tight": TIGHT[name][depth]}[memory]
        plain, model, counting = MODELS[name](depth), MODELS[name](depth), Counting(backend)
        train(plain)
        for block in blocks_of(model):
            block.compile(backend=counting)
        counts = train(model, nbytes=nbytes)
        assert_same_weights(plain, model)
        # Frozen with an input that needs no gradient, trainable, frozen above the trainable one; and evaluation.
        assert counting.graphs == 4
        if memory == "plenty":
            assert set(counts) == {0}
        elif memory == "tight":
            assert 0 < max(counts) < depth
            assert min(counts) == 0
        torch._dynamo.reset()


@pytest.mark.parametrize("options", [{"group_size": 2}, {"always_active": ["embedding"]}, {"order": "random"}], ids=str)
def test_other_groups_need_two_graphs_more_at_most(options):
    """A trainable block above another one of its group, and evaluation while a block is trainable."""
    plain, model, counting = Net(depth=12), Net(depth=12), Counting("eager")
    for block in model.blocks:
        block.compile(backend=counting)
    train(plain, **options)
    train(model, nbytes=12_000, **options)
    assert_same_weights(plain, model)
    assert counting.graphs <= 6


def test_batches_of_many_sizes_with_evaluation_after_each():
    model, counting = Net(depth=12), Counting("eager")
    for block in model.blocks:
        block.compile(backend=counting, dynamic=True)
    engine = attach_published(model, adamw(model.parameters()), group_size=2)
    budget = ActivationBudget(model, 30_000)
    for i in range(4 * len(engine.groups)):
        batch = torch.cat(tokens(2), dim=1)[: 2 + i % 3, : 5 + i % 4]
        budget.begin_batch()
        loss_of(model, batch).backward()
        budget.end_batch()
        engine.optimizer.step()
        with torch.no_grad():
            loss_of(model.eval(), batch)
        model.train()
    budget.close()
    assert counting.graphs <= 6


def test_dropout_of_a_compiled_block_is_recomputed_alike():
    class Dropping(Net):
        def __init__(self):
            super().__init__(depth=4)
            for block in self.blocks:
                block.norm = nn.Sequential(block.norm, nn.Dropout(0.3))

    ends = []
    for nbytes in (None, 9000):
        model, counting = Dropping(), Counting("aot_eager")
        for block in model.blocks:
            block.compile(backend=counting)
        torch.manual_seed(0)
        counts = train(model, nbytes=nbytes)
        assert counting.graphs == 4
        ends.append(model)
        torch._dynamo.reset()
    assert max(counts) > 0
    assert_same_weights(*ends)


def test_blocks_that_are_compiled_later_are_wrapped_again():
    model, counting = Net(), Counting("eager")
    budget = ActivationBudget(model, PLENTY)
    for graphs in (0, 1):
        budget.begin_batch()
        loss_of(model, tokens(1)[0]).backward()
        budget.end_batch()
        assert counting.graphs == graphs
        for block in model.blocks:
            block.compile(backend=counting)
    compiled = [block._compiled_call_impl for block in model.blocks]
    budget.close()
    assert [block._compiled_call_impl for block in model.blocks] == compiled


@pytest.mark.parametrize("depth", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_whole_model_makes_one_graph_per_group(depth):
    """Why the guide says not to do it."""
    counting = Counting("eager")
    model = compiled_net(depth, counting)
    with torch._dynamo.config.patch(recompile_limit=64):
        train(model)
    assert counting.graphs == depth + 2 + 1
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        train(compiled_net(12, counting))


def compiled_net(depth, backend):
    model = Net(depth=depth)
    model.compile(backend=backend)
    return model


def test_a_budget_cannot_reach_into_a_model_that_is_compiled_as_a_whole():
    model = compiled_net(3, Counting("eager"))
    budget = ActivationBudget(model, PLENTY)
    budget.begin_batch()
    loss_of(model, tokens(1)[0]).backward()
    with pytest.raises(RuntimeError, match=r"none of the blocks \(blocks.0, ...\) was called.*block.compile\(\)"):
        budget.end_batch()
    budget.close()
