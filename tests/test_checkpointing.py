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
