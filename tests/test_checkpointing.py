"""Activation budgets: gradients and weights as without them, bytes within the budget, no block too many."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lightning_hift import HiFTEngine
from lightning_hift.checkpointing import ActivationBudget
from tests.models import Block, Net, adamw, assert_same_weights, next_token_loss, tokens
from tests.reference.saved_bytes import saved_bytes

PLENTY = 1 << 40


def llama(depth=4, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = {
        "vocab_size": 17,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**small, num_hidden_layers=depth, **changes)).train()


def gpt2(depth=4):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=17, n_embd=16, n_head=2, n_layer=depth, n_positions=64, attn_pdrop=0.1, resid_pdrop=0.1
    )
    return GPT2LMHeadModel(config).train()


def bert(depth=4):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    small = {"vocab_size": 17, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(**small, num_hidden_layers=depth, max_position_embeddings=64)).train()


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    small = {"vocab_size": 17, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 3}
    return T5ForConditionalGeneration(T5Config(**small, num_decoder_layers=3, decoder_start_token_id=0)).train()


MODELS = {"net": lambda: Net(depth=4), "llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5}


def loss_of(model, batch):
    return next_token_loss(model, batch) if isinstance(model, Net) else model(input_ids=batch, labels=batch).loss


class Rotation:
    """A model whose groups are made trainable by hand."""

    def __init__(self, model):
        self.model = model
        self.engine = HiFTEngine.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), advance_on_step=False)
        self.groups = self.engine.groups

    def activate(self, index):
        self.engine.step = index
        self.engine.activate()
        self.model.zero_grad()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def one_batch(model, batch, budget=None):
    """Loss and gradients of one batch, from a fixed seed."""
    torch.manual_seed(3)
    if budget is not None:
        budget.begin_batch()
    loss = loss_of(model, batch)
    loss.backward()
    if budget is not None:
        budget.end_batch()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("name", ["net", "llama"])
def test_truncated_backward_saves_less_the_higher_the_active_group(name):
    rotation = Rotation(MODELS[name]())
    batch = tokens(1)[0]
    held = []
    for index in range(len(rotation.groups)):
        rotation.activate(index)
        held.append(saved_bytes(rotation.model, lambda: loss_of(rotation.model, batch))[1])
    assert len(held) == 6
    # The embedding itself saves nothing but token ids.
    assert all(low > high for low, high in zip(held[1:], held[2:], strict=False)), held
    assert held[0] > held[2]


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_without_a_budget(name):
    """For every group: measured, at the smallest budget, between, and with everything whole."""
    rotation, twin, batches = Rotation(MODELS[name]()), Rotation(MODELS[name]()), tokens(2)
    for index in range(len(rotation.groups)):
        twin.activate(index)
        expected = [one_batch(twin.model, batch) for batch in batches]
        smallest, whole = extremes(rotation, index, batches[0])
        for nbytes in (smallest, (smallest + whole) // 2, whole):
            budget = ActivationBudget(rotation.model, nbytes)
            for batch, (loss, gradient) in zip(batches, expected, strict=True):
                rotation.activate(index)
                twin.activate(index)
                one_loss, one_gradient = one_batch(rotation.model, batch, budget)
                assert torch.equal(one_loss, one_batch(twin.model, batch)[0])
                assert_same_gradients(one_gradient, gradients(twin.model))
                assert torch.equal(one_loss, loss) or batch is batches[1]
                assert one_gradient.keys() == gradient.keys()
            budget.close()


def extremes(rotation, index, batch):
    """The smallest budget that works, by the error that names it, and the bytes of a batch without checkpoints."""
    rotation.activate(index)
    whole = saved_bytes(rotation.model, lambda: loss_of(rotation.model, batch))[1]
    budget = ActivationBudget(rotation.model, 1)
    rotation.activate(index)
    with pytest.raises(ValueError, match="holds .* bytes .* for its backward pass") as error:
        one_batch(rotation.model, batch, budget)
    budget.close()
    return int(str(error.value).split(" holds ")[1].split()[0]), whole


def net_with_checkpoints(net, batch, count):
    """The loss of a ``Net`` whose first ``count`` blocks that save anything are checkpointed, in plain torch."""
    x = net.embedding(batch[:, :-1])
    for block in net.blocks:
        saves = x.requires_grad or any(p.requires_grad for p in block.parameters())
        if saves and count:
            count -= 1
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        else:
            x = block(x)
    return nn.functional.cross_entropy(net.head(net.norm(x)).flatten(0, 1), batch[:, 1:].flatten())


@pytest.mark.parametrize("index", range(6))
def test_no_block_is_checkpointed_without_need(index):
    rotation, batch = Rotation(Net(depth=4)), tokens(1)[0]
    rotation.activate(index)
    saving = min(5 - index, 4)
    held = [
        saved_bytes(rotation.model, lambda c=c: net_with_checkpoints(rotation.model, batch, c))[1]
        for c in range(saving + 1)
    ]
    assert held == sorted(held, reverse=True)
    smallest, _ = extremes(rotation, index, batch)
    assert smallest == held[-1]  # the head holds more than one block does, so recomputation finds room enough
    for count, nbytes in enumerate(held):
        for slack in (0, 1, -1):
            if nbytes + slack < smallest:
                continue
            budget = ActivationBudget(rotation.model, nbytes + slack)
            rotation.activate(index)
            one_batch(rotation.model, batch, budget)
            assert budget.num_checkpointed == saving
            rotation.activate(index)
            budget.begin_batch()
            _, now = saved_bytes(rotation.model, lambda: next_token_loss(rotation.model, batch))
            assert budget.num_checkpointed == count + (slack < 0)
            assert now <= nbytes + slack
            budget.close()


@pytest.mark.parametrize("name", [name for name in MODELS if name != "net"])
def test_bytes_held_stay_within_the_budget(name):
    rotation, batch = Rotation(MODELS[name]()), tokens(1)[0]
    for index in range(len(rotation.groups)):
        smallest, whole = extremes(rotation, index, batch)
        counts = []
        for nbytes in range(smallest, whole + 1, max(1, (whole - smallest) // 7)):
            budget = ActivationBudget(rotation.model, nbytes)
            rotation.activate(index)
            one_batch(rotation.model, batch, budget)
            rotation.activate(index)
            budget.begin_batch()
            _, held = saved_bytes(rotation.model, lambda: loss_of(rotation.model, batch))
            assert held <= nbytes
            counts.append(budget.num_checkpointed)
            budget.close()
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] == 0 or nbytes < whole


@pytest.mark.parametrize("name", MODELS)
def test_plenty_checkpoints_nothing_after_the_first_sweep(name):
    model, batches = MODELS[name](), tokens(1)
    engine = HiFTEngine.attach(model, adamw(model.parameters()))
    budget = ActivationBudget(model, PLENTY)
    counts = []
    for _ in range(2 * len(engine.groups)):
        budget.begin_batch()
        loss_of(model, batches[0]).backward()
        budget.end_batch()
        engine.optimizer.step()
        counts.append(budget.num_checkpointed)
    assert counts[0] == len(budget.blocks)
    assert counts[len(engine.groups) :] == [0] * len(engine.groups)
    budget.close()


@pytest.mark.parametrize("options", [{}, {"order": "random", "reshuffle": True}, {"always_active": ["head"]}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_training_ends_with_the_same_weights(name, options):
    """Batches of many lengths, accumulation of two, dropout on, three sweeps."""
    lengths = [6, 9, 4, 12, 7, 3]
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(17, (1 + i % 4, lengths[i % 6]), generator=generator) for i in range(48)]
    ends = []
    for nbytes in (None, PLENTY, 200_000):
        model = MODELS[name]()
        engine = HiFTEngine.attach(model, adamw(model.parameters()), **options)
        budget = ActivationBudget(model, nbytes) if nbytes else None
        torch.manual_seed(4)
        for i, batch in enumerate(batches):
            if budget:
                budget.begin_batch()
            (loss_of(model, batch) / 2).backward()
            if budget:
                budget.end_batch()
            if i % 2:
                engine.optimizer.step()
                engine.optimizer.zero_grad()
        if budget:
            budget.close()
        ends.append(model)
    assert_same_weights(ends[0], ends[1])
    assert_same_weights(ends[0], ends[2])


def test_smaller_batches_are_planned_from_larger_ones_and_larger_ones_are_measured():
    model, batch = Net(depth=4), torch.randint(17, (8, 13))
    budget = ActivationBudget(model, PLENTY)
    counts = []
    for rows, length in [(8, 13), (4, 13), (8, 5), (2, 2), (8, 14), (9, 2), (9, 2), (8, 14), (9, 14), (9, 14), (8, 8)]:
        one_batch(model, batch.repeat(2, 2)[:rows, :length], budget)
        counts.append(budget.num_checkpointed)
    assert counts == [4, 0, 0, 0, 4, 4, 0, 0, 4, 0, 0]


@pytest.mark.parametrize("rows", range(1, 9))
def test_smaller_batches_are_planned_in_proportion(rows):
    model, batch = Net(depth=4), torch.randint(17, (8, 13))
    held = [saved_bytes(model, lambda c=c: net_with_checkpoints(model, batch[:rows], c))[1] for c in range(5)]
    whole = saved_bytes(model, lambda: next_token_loss(model, batch))[1]
    for count, nbytes in enumerate(held):
        budget = ActivationBudget(model, max(nbytes, whole // 2))
        one_batch(model, batch, budget)
        budget.begin_batch()
        _, now = saved_bytes(model, lambda: next_token_loss(model, batch[:rows]))
        assert now <= budget.nbytes
        if nbytes >= whole // 2:
            assert budget.num_checkpointed == count
        budget.close()
