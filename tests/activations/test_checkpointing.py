"""Activation budgets: gradients and weights as without them, bytes within the budget, no block too many."""

import copy
import gc
import io
import itertools
import warnings
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from lightning_hift import HiFTCallback
from lightning_hift.activations.checkpointing import ActivationBudget
from lightning_hift.activations.reentrant import refuse_reentrant_graph, refuse_reentrant_modules
from lightning_hift.activations.saved_bytes import SavedBytes
from tests.matrices import crossed
from tests.models import (
    Automatic,
    Manual,
    Net,
    adamw,
    as_published,
    assert_same_weights,
    attach_published,
    loader,
    next_token_loss,
    tokens,
    trainer,
)
from tests.reference.live_bytes import peak_bytes
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
    return LlamaForCausalLM(LlamaConfig(**{**small, **changes}, num_hidden_layers=depth)).train()


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


def without_cache(model):
    """A budget switches the cache off, which changes the last bit of some products. So compare with runs without."""
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
    return model


def make(name):
    return without_cache(MODELS[name]())


def loss_of(model, batch):
    return next_token_loss(model, batch) if isinstance(model, Net) else model(input_ids=batch, labels=batch).loss


class Rotation:
    """A model whose groups are made trainable by hand."""

    def __init__(self, model):
        self.model = model
        self.engine = attach_published(model, torch.optim.SGD(model.parameters(), lr=0.1), advance_on_step=False)
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
    rotation = Rotation(make(name))
    batch = tokens(1)[0]
    held = []
    for index in range(len(rotation.groups)):
        rotation.activate(index)
        held.append(saved_bytes(rotation.model, lambda: loss_of(rotation.model, batch))[1])
    assert len(held) == 6
    # With the embedding active, all blocks are frozen: they save their gradients' way, but not the inputs of weights.
    assert all(lower > upper for lower, upper in itertools.pairwise(held[1:])), held
    assert held[0] > held[2]


# Without data the masks of Llama and GPT-2 cannot be built: transformers looks for packed sequences.
@pytest.mark.parametrize(
    ("name", "device"), [*((name, "cpu") for name in MODELS), ("net", "meta"), ("bert", "meta"), ("t5", "meta")]
)
def test_saved_bytes_are_those_of_the_reference_also_without_data(name, device):
    rotation, batch = Rotation(make(name)), tokens(1)[0]
    for index in range(len(rotation.groups)):
        rotation.activate(index)
        _, expected = saved_bytes(rotation.model, lambda: loss_of(rotation.model, batch))
        twin = copy.deepcopy(rotation.model).to(device)
        with SavedBytes((*twin.parameters(), *twin.buffers())) as counted:
            loss_of(twin, batch.to(device))
        assert counted.nbytes == expected


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_without_a_budget(name):
    """For every group: measured, at the smallest budget, between, and with everything whole."""
    rotation, twin, batches = Rotation(make(name)), Rotation(make(name)), tokens(2)
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
    with pytest.raises(ValueError, match=r"holds .* bytes .* for its backward pass") as error:
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
    rotation, batch = Rotation(make(name)), tokens(1)[0]
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


@pytest.mark.parametrize("index", [0, 1, 3])
def test_recomputation_stays_within_the_budget_because_the_lowest_blocks_are_checkpointed(index):
    rotation, batch = Rotation(without_cache(llama(8, vocab_size=64, hidden_size=32))), torch.randint(17, (8, 32))
    model = rotation.model

    def peak():
        rotation.activate(index)
        return peak_bytes(model, lambda: loss_of(model, batch).backward())

    smallest, held = extremes(rotation, index, batch)
    passing = peak() - held  # what kernels need for the moment, and gradients
    for share in (0, 1 / 3, 2 / 3):
        nbytes = smallest + int(share * (held - smallest))
        budget = ActivationBudget(model, nbytes)
        rotation.activate(index)
        one_batch(model, batch, budget)
        budget.begin_batch()
        lowest, count = peak(), budget.num_checkpointed
        budget.close()
        assert lowest <= nbytes + passing
        for i, layer in enumerate(model.model.layers):
            layer.gradient_checkpointing = i >= 8 - count
            layer._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        topmost = peak()
        for layer in model.model.layers:
            layer.gradient_checkpointing = False
        assert topmost > lowest or share == 0  # at the smallest budget, every block is checkpointed


@pytest.mark.parametrize("name", MODELS)
def test_plenty_checkpoints_nothing_after_the_first_sweep(name):
    model, batches = make(name), tokens(1)
    engine = attach_published(model, adamw(model.parameters()))
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


@pytest.mark.parametrize(
    ("name", "options"),
    crossed(MODELS, [{}, {"order": "random", "reshuffle": True}, {"always_active": ["head"]}]),
    ids=str,
)
def test_training_ends_with_the_same_weights(name, options):
    """Batches of many lengths, accumulation of two, dropout on, three sweeps."""
    lengths = [6, 9, 4, 12, 7, 3]
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(17, (1 + i % 4, lengths[i % 6]), generator=generator) for i in range(48)]
    ends = []
    for nbytes in (None, PLENTY, 250_000):
        model = make(name)
        engine = attach_published(model, adamw(model.parameters()), **options)
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


@pytest.mark.parametrize("name", ["net", "bert", "gpt2"])
def test_larger_batches_count_what_lies_below_the_blocks(name):
    """Their measurement begins at the first block; what the embedding saved is estimated from the smaller batch."""
    model, small, large = make(name), tokens(1, batch_size=2)[0], tokens(1, batch_size=8)[0]
    whole = saved_bytes(model, lambda: loss_of(model, large))[1]
    for nbytes, count in ((whole * 102 // 100, 0), (whole - 16, 1)):  # position ids do not grow with the batch
        budget = ActivationBudget(model, nbytes)
        for batch in (small, large, large):
            one_batch(model, batch, budget)
        assert budget.num_checkpointed == count
        budget.close()


@pytest.mark.parametrize("rows", range(1, 9))
def test_smaller_batches_are_planned_in_proportion(rows):
    model, batch = Net(depth=4), torch.randint(17, (8, 13))
    part = batch[:rows].clone()
    held = [saved_bytes(model, lambda c=c: net_with_checkpoints(model, part, c))[1] for c in range(5)]
    whole = saved_bytes(model, lambda: next_token_loss(model, batch))[1]
    for count, nbytes in enumerate(held):
        budget = ActivationBudget(model, max(nbytes, whole // 2))
        one_batch(model, batch, budget)
        budget.begin_batch()
        _, now = saved_bytes(model, lambda: next_token_loss(model, part))
        assert now <= budget.nbytes + 4  # the number of targets is one float in any batch
        if nbytes >= whole // 2:
            assert budget.num_checkpointed == count
        budget.close()


# --- what the model is made of ----------------------------------------------------------------------------------------


class Steps(nn.Module):
    """Blocks of a given class over float rows, and a head."""

    def __init__(self, make_block, depth=3):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList([make_block() for _ in range(depth)])
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = self.step(block, x)
        return self.head(x).square().mean()

    def step(self, block, x):
        return block(x)


class WithState(nn.Module):
    """Batch norm and spectral norm change their buffers in each forward pass; dropout draws random numbers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.up = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 16))
        self.down = nn.Linear(16, 8)

    def forward(self, x):
        return x + nn.functional.dropout(self.down(torch.tanh(self.up(self.norm(x)))), 0.2)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, *, extra):
        return torch.sigmoid(self.first(x["value"])) + extra, {"second": [torch.tanh(self.second(extra))]}


class Pairs(Steps):
    """Keyword arguments, mappings, tuples; the input of one block is kept for the next ones."""

    def step(self, block, x):
        out, more = block({"value": x}, extra=x * 2)
        return out + more["second"][0]


class Shared(Steps):
    """One block that is run three times, in two parts of one batch."""

    def forward(self, x):
        half, rest = self.stem(x).chunk(2)
        for block in [*self.blocks, *self.blocks, *self.blocks]:
            half, rest = block(half), block(rest)
        return self.head(half).square().mean() + self.head(rest).abs().mean()


class MLP(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


SHAPES = {
    "state": lambda: Steps(WithState),
    "pairs": lambda: Pairs(Pair),
    "shared": lambda: Shared(MLP, depth=2),
    "one": lambda: Shared(MLP, depth=1),
    "transformer": lambda: Steps(lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1)),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", SHAPES)
def test_any_block(name, autocast):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))

    def loss_and_gradients(model):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(x)
        loss.backward()
        return {"loss": loss.detach(), **gradients(model)}

    plain, model = Rotation(SHAPES[name]()), Rotation(SHAPES[name]())
    for nbytes in (PLENTY, 8000 if name == "transformer" else 4500):
        budget = ActivationBudget(model.model, nbytes)
        counts = set()
        for index in [*range(len(plain.groups))] * 3:
            plain.activate(index)
            model.activate(index)
            budget.begin_batch()
            found = loss_and_gradients(model.model)
            budget.end_batch()
            counts.add(budget.num_checkpointed)
            assert_same_gradients(found, loss_and_gradients(plain.model))
            assert_same_gradients(dict(plain.model.named_buffers()), dict(model.model.named_buffers()))
        assert len(counts) > 1
        budget.close()


def test_blocks_that_are_skipped_at_random():
    """What was measured may not fit; then everything is checkpointed, and the next batch is measured."""

    class Skipping(Net):
        order = (0, 1, 2, 3)

        def forward(self, tokens):
            x = self.embedding(tokens)
            for i in self.order:
                x = self.blocks[i](x)
            return self.head(self.norm(x))

    model, plain = Skipping(depth=4), Skipping(depth=4)
    budget = ActivationBudget(model, PLENTY)
    counts = []
    for order in [(0, 1, 2, 3)] * 2 + [(0, 2, 3)] * 3 + [(0, 2, 3, 3)] * 3 + [()] * 2:
        model.order = plain.order = order
        model.zero_grad()
        plain.zero_grad()
        assert_same_gradients(one_batch(model, tokens(1)[0], budget)[1], one_batch(plain, tokens(1)[0])[1])
        counts.append(budget.num_checkpointed)
    assert counts == [4, 0, 2, 3, 0, 1, 4, 0, 0, 0]
    budget.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_on_a_gpu_dropout_is_recomputed_alike_without_waiting(name):
    plain, model, batch = make(name).cuda(), make(name).cuda(), tokens(1)[0].cuda()
    _, whole = saved_bytes(plain, lambda: loss_of(plain, batch))
    budget = ActivationBudget(model, whole // 2)
    for _ in range(3):
        model.zero_grad()
        plain.zero_grad()
        assert_same_gradients(one_batch(model, batch, budget)[1], one_batch(plain, batch)[1])
    assert 0 < budget.num_checkpointed < 4
    # Some networks wait by themselves.
    assert waits(lambda: one_batch(model, batch, budget)) == waits(lambda: one_batch(plain, batch))
    budget.close()


def waits(run):
    """How often the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in found)


def test_cache_of_keys_and_values_is_off_in_a_batch_and_only_there():
    model = llama()
    assert model.config.use_cache
    budget = ActivationBudget(model, PLENTY)
    with torch.no_grad():
        assert model(input_ids=tokens(1)[0]).past_key_values is not None
    budget.begin_batch()
    assert model(input_ids=tokens(1)[0]).past_key_values is None
    with pytest.raises(RuntimeError, match=r"Block model.layers.0 got a cache .* use_cache=False"):
        model(input_ids=tokens(1)[0], use_cache=True)
    budget.end_batch()
    assert model.config.use_cache
    budget.close()


def test_hidden_states_and_attentions_are_those_of_one_forward_pass():
    model = without_cache(llama(attn_implementation="eager"))
    plain = copy.deepcopy(model)
    budget = ActivationBudget(model, PLENTY)
    budget.begin_batch()
    options = {"input_ids": tokens(1)[0], "output_hidden_states": True, "output_attentions": True}
    out, expected = model(**options), plain(**options)
    for kind in ("hidden_states", "attentions"):
        assert len(out[kind]) == len(expected[kind])
        assert all(torch.equal(a, b) for a, b in zip(out[kind], expected[kind], strict=True))
    (out.hidden_states[2].square().sum() + out.logits.sum()).backward()
    (expected.hidden_states[2].square().sum() + expected.logits.sum()).backward()
    assert len(out.hidden_states) == len(expected.hidden_states)
    assert_same_gradients(gradients(model), gradients(plain))
    budget.close()


# --- a guest in the model ---------------------------------------------------------------------------------------------


def test_evaluation_and_generation_are_untouched():
    model = llama()
    expected = model.eval().generate(tokens(1)[0], max_new_tokens=5, do_sample=False)
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    budget = ActivationBudget(model.train(), 1)
    with torch.no_grad():
        model.eval()
        for begin in (lambda: None, budget.begin_batch):
            begin()
            assert torch.equal(model.generate(tokens(1)[0], max_new_tokens=5, do_sample=False), expected)
            with torch.inference_mode():
                model(input_ids=tokens(1)[0])
    assert budget.num_checkpointed == 0
    budget.end_batch()
    model(input_ids=tokens(1)[0], labels=tokens(1)[0]).loss.backward()  # outside of a batch: whole, whatever the budget
    assert budget.num_checkpointed == 0
    assert len(calls) == 2 * (5 + 1) + 1
    budget.close()


@pytest.mark.parametrize("moment", ["new", "in a batch", "after an exception"])
def test_close_leaves_no_trace(moment):
    model = llama()
    traces = [dict(vars(module)) for module in model.modules()]
    state = list(model.state_dict())
    budget = ActivationBudget(model, PLENTY)
    one_batch(model, tokens(1)[0], budget)
    assert list(model.state_dict()) == state
    assert repr(model) == repr(llama())
    if moment != "new":
        fresh = ActivationBudget(model, PLENTY) if moment == "in a batch" else budget
        fresh.begin_batch()
        if moment == "in a batch":
            loss_of(model, tokens(1)[0])
            fresh.close()
        else:
            with pytest.raises(IndexError):
                model(input_ids=torch.tensor([[99]]))
    budget.close()
    budget.close()
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    for module, trace in zip(model.modules(), traces, strict=True):
        assert vars(module).keys() == trace.keys()
        assert all(vars(module)[key] is trace[key] for key in trace)
    assert model.config.use_cache
    gone = weakref.ref(budget)
    fresh = None
    del budget
    gc.collect()
    assert gone() is None


def test_copies_know_nothing_of_the_budget():
    model = Net()
    budget = ActivationBudget(model, PLENTY)
    budget.begin_batch()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        next_token_loss(twin, tokens(1)[0]).backward()
        assert "_compiled_call_impl" not in vars(twin.blocks[0])
    assert budget.num_checkpointed == 0
    budget.close()


def test_no_value_is_read_back_from_the_device():
    class NoSync(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(function)
            return function(*args, **(kwargs or {}))

    model = Net()
    budget = ActivationBudget(model, 8000)
    for _ in range(2):
        with NoSync():
            budget.begin_batch()
            next_token_loss(model, tokens(1)[0]).backward()
            budget.end_batch()
    assert 0 < budget.num_checkpointed < 3
    budget.close()


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_budget_too_small_names_the_smallest_that_works():
    rotation, batch = Rotation(llama()), tokens(1)[0]
    for index in range(5):
        smallest, _ = extremes(rotation, index, batch)
        for nbytes in (smallest, smallest - 1):
            budget = ActivationBudget(rotation.model, nbytes)
            rotation.activate(index)
            if nbytes == smallest:
                one_batch(rotation.model, batch, budget)
            else:
                with pytest.raises(ValueError, match=f"holds {smallest} bytes"):
                    one_batch(rotation.model, batch, budget)
            budget.close()


@pytest.mark.parametrize("nbytes", [0, -1, 1.5, "6GiB", True, None])
def test_budgets_that_are_no_number_of_bytes(nbytes):
    with pytest.raises(ValueError, match="whole number of bytes"):
        ActivationBudget(Net(), nbytes)


def test_a_model_without_blocks():
    with pytest.raises(ValueError, match=r"Found no blocks in Linear.* units="):
        ActivationBudget(nn.Linear(2, 2), PLENTY)


def test_checkpointing_of_transformers_is_refused():
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    refuse_reentrant_modules(model)
    with pytest.raises(ValueError, match=r"of its own is switched on in model.*drop activation_budget"):
        ActivationBudget(model, PLENTY)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    for refuse in (refuse_reentrant_modules, partial(ActivationBudget, nbytes=PLENTY)):
        with pytest.raises(ValueError, match=r"use_reentrant=True in model.*use_reentrant=False"):
            refuse(model)
    model.gradient_checkpointing_disable()
    refuse_reentrant_modules(model)
    ActivationBudget(model, PLENTY).close()


def test_reentrant_checkpoint_wrappers_of_torch_are_refused():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

    model = Net()
    model.blocks[1] = checkpoint_wrapper(model.blocks[1], CheckpointImpl.NO_REENTRANT)
    refuse_reentrant_modules(model)
    model.blocks[2] = checkpoint_wrapper(model.blocks[2], CheckpointImpl.REENTRANT)
    with pytest.raises(ValueError, match=r"use_reentrant=True in blocks\.2"):
        refuse_reentrant_modules(model)


def test_reentrant_checkpoints_are_found_in_the_graph():
    model, batch = Net(), tokens(1)[0]
    refuse_reentrant_graph(next_token_loss(model, batch))
    refuse_reentrant_graph(net_with_checkpoints(model, batch, 2))
    refuse_reentrant_graph(torch.zeros(()))

    def reentrant():
        x = torch.utils.checkpoint.checkpoint(model.blocks[0], model.embedding(batch), use_reentrant=True)
        return model.head(model.blocks[1](x)).sum()

    with pytest.raises(RuntimeError, match=r"use_reentrant=True in the forward pass.*use_reentrant=False"):
        refuse_reentrant_graph(reentrant())
    refuse_reentrant_graph(reentrant(), limit=3)
    reentrant().backward()


def test_checkpoints_within_forward_are_refused_next_to_a_budget():
    class Own(Net):
        def forward(self, tokens):
            x = self.embedding(tokens)
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            return self.head(x)

    model = Own()
    budget = ActivationBudget(model, PLENTY)
    budget.begin_batch()
    loss = next_token_loss(model, tokens(1)[0])
    with pytest.raises(RuntimeError, match=r"recomputed by activation checkpointing in the model itself.*or drop"):
        loss.backward()
    budget.close()


# --- in a Trainer -----------------------------------------------------------------------------------------------------


class WithBudget(HiFTCallback):
    """The calls that a callback has to make."""

    def __init__(self, nbytes, **options):
        super().__init__(1, "bottom2up", steps_per_group=1, lr_scale=1.0, **options)
        self.nbytes = nbytes
        self.counts = []

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        units = [unit for group in self.groups for unit in group.units]
        self.budget = ActivationBudget(pl_module, self.nbytes, units)
        self.looked_at_graph = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.budget.begin_batch()

    def on_before_backward(self, trainer, pl_module, loss):
        super().on_before_backward(trainer, pl_module, loss)
        if not self.looked_at_graph:
            refuse_reentrant_graph(loss)
            self.looked_at_graph = True

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.budget.end_batch()
        self.counts.append(self.budget.num_checkpointed)

    def on_exception(self, trainer, pl_module, exception):
        self.budget.close()
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer, pl_module, stage):
        self.budget.close()
        super().teardown(trainer, pl_module, stage)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("make_module", [Automatic, Manual])
def test_calls_of_a_callback_in_a_trainer(make_module, precision, tmp_path):
    ends = []
    for callback in (as_published(), WithBudget(8000), WithBudget(PLENTY)):
        module = make_module()
        options = {"max_epochs": 3, "precision": precision, "default_root_dir": tmp_path, "enable_checkpointing": True}
        # Manual modules do their own accumulation.
        extra = {"accumulate_grad_batches": 2} if make_module is Automatic else {}
        fitted = trainer(callbacks=[callback], **options, **extra)
        fitted.fit(module, loader(12), loader(2))
        ends.append(module)
    assert_same_weights(ends[0], ends[1])
    assert_same_weights(ends[0], ends[2])
    assert callback.counts[0] == 3
    assert callback.counts[-10:] == [0] * 10
    assert all("_compiled_call_impl" not in vars(m) for m in module.modules())


def test_a_trainer_ends_with_the_words_of_the_budget():
    module = Automatic()
    with pytest.raises(ValueError, match=r"Got activation_budget=1000 .* holds \d+ bytes"):
        trainer(callbacks=[WithBudget(1000)]).fit(module, loader(4))
    assert all("_compiled_call_impl" not in vars(m) for m in module.modules())
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
