"""Every optimizer against its round-robin oracle: independent optimizers of its class, one per layer group."""

import io
import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_hift import HiFTStrategy, StateOffloader, SweepLR
from tests.lagging import LaggingDevice
from tests.matrices import crossed
from tests.models import (
    Automatic,
    Net,
    ResumableLoader,
    as_published,
    assert_same_weights,
    attach_published,
    loader,
    next_token_loss,
    tokens,
    trainer,
)
from tests.optimizers import COUNTING, ON_A_GPU, OPTIMIZERS, QUANTIZED, Case, Matrices, of, of_torch, variants
from tests.reference.round_robin import train_round_robin
from tests.reference.sweep_means import sweep_means

pytestmark = [
    pytest.mark.filterwarnings("ignore:Parameter `foreach` is deprecated"),  # optimi's, about its own option
    pytest.mark.filterwarnings("ignore:HiFT. after the first sweep"),  # SOAP only initialises at its first step
]
STEPS, CUT = 23, 13  # 4 whole sweeps and a part; a cut in the middle of one


pytestmark = pytest.mark.usefixtures("torchao_uncompiled")


def factor(step):
    return 1 - step / 40


def schedule(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def scheduled_lr(case, engine):
    """The learning rate at each step, as a number or a tensor like the optimizer's own."""
    if not case.scheduled:
        return None
    lr = case.make([nn.Parameter(torch.zeros(2, 2))]).param_groups[0]["lr"]
    held = sweep_means(lambda step: float(lr * factor(step)), len(engine.groups))
    return (lambda step: torch.full_like(lr, held(step))) if isinstance(lr, torch.Tensor) else held


class Module(Automatic):
    def __init__(self, case, seed=0):
        super().__init__(case.make, schedule if case.scheduled else None)
        self.net = case.model(seed)

    def training_step(self, batch, batch_idx):
        return next_token_loss(self.net, batch)


def lagging(**options):
    return StateOffloader("cpu", device_module=LaggingDevice(), always_copy=True, **options)


def attach(case, model, make_offloader=lagging, **options):
    return attach_published(model, case.make(model.parameters()), make_offloader=make_offloader, **options)


def train(model, engine, batches, scheduler=None):
    for batch in batches:
        next_token_loss(model, batch).backward()
        engine.optimizer.step()
        if scheduler is not None:
            scheduler.step()


def names_in(units):
    return [name.removeprefix("net.") for unit in units for name in unit.parameters]


def train_twin(case, engine, batches, lr_at=None, **options):
    """A model trained by independent optimizers in the engine's groups."""
    twin = case.model()
    train_round_robin(
        twin,
        [names_in(group.units) for group in engine.groups],
        case.make,
        [[batch] for batch in batches],
        next_token_loss,
        always_active=names_in(engine.always_active),
        lr_at=lr_at,
        **options,
    )
    return twin


def plain(value):
    """Nested values with tensor subclasses taken apart into plain tensors."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value):
        return {name: getattr(value, name) for name in value.__tensor_flatten__()[0]}
    return value


def assert_same(a, b, path="optimizer"):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}.{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif not callable(a):
        assert a == b, path


# --- against the oracle -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "always_active"), crossed(OPTIMIZERS, [[], ["head"]]), ids=str)
def test_plain_loop(name, always_active):
    case, batches = OPTIMIZERS[name], tokens(STEPS)
    model = case.model()
    engine = attach(case, model, always_active=always_active)
    scheduler = SweepLR(schedule(engine.optimizer), engine, total_steps=STEPS) if case.scheduled else None
    train(model, engine, batches, scheduler)
    assert len(engine.groups) == 5 - len(always_active)
    assert_same_weights(model, train_twin(case, engine, batches, scheduled_lr(case, engine)))


ALWAYS_ACTIVE = ["AdamW_loop", "SGD_fused", "Prodigy", "optimi_AdamW", "torchao_AdamW8bit"]


@pytest.mark.parametrize(
    ("name", "always_active"), [*((name, []) for name in OPTIMIZERS), *((name, ["net.head"]) for name in ALWAYS_ACTIVE)]
)
def test_trainer(name, always_active):
    case = OPTIMIZERS[name]
    module = Module(case)
    run = trainer(strategy=HiFTStrategy(), callbacks=[as_published(always_active=always_active)])
    run.fit(module, loader(STEPS))
    engine = run.callbacks[0].engines[0]
    assert engine.step == STEPS
    assert_same_weights(module, train_twin(case, engine, tokens(STEPS), scheduled_lr(case, engine)))


@pytest.mark.parametrize("name", [*COUNTING, "AdamW_loop", "hf_Adafactor_fixed", "Lion"])
def test_groups_of_options(name):
    """Counters belong to a layer group and a parameter group, even where the one has nothing of the other."""
    make = OPTIMIZERS[name].make

    def split(parameters):
        parameters = list(parameters)
        halves = [([p for p in parameters if p.ndim > 1], 0.1), ([p for p in parameters if p.ndim == 1], 0.0)]
        return make([{"params": half, "weight_decay": decay} for half, decay in halves if half])

    case, batches = Case(split), tokens(STEPS)
    model = Net()
    engine = attach(case, model)
    train(model, engine, batches)
    assert_same_weights(model, train_twin(case, engine, batches))


@pytest.mark.parametrize("name", [*COUNTING, "SGD_fused"])
def test_several_steps_per_group_from_the_top(name):
    case, batches = OPTIMIZERS[name], tokens(STEPS)
    model = case.model()
    engine = attach(case, model, order="top2down", steps_per_group=2)
    train(model, engine, batches)
    twin = train_twin(case, engine, batches, order=lambda place: 4 - place, steps_per_group=2)
    assert_same_weights(model, twin)


class Shrinking(torch.optim.AdamW):
    """Goes on after the step of its base class, as subclasses do. Hooks then run once more inside."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - 0.1 * group["lr"])
                    self.state[p]["shrunk"] = self.state[p].get("shrunk", 0) + 1
        return loss


@pytest.mark.parametrize("always_active", [[], ["head"]], ids=["rotating", "head_always_active"])
def test_subclass_that_goes_on_after_the_step_of_its_base(always_active):
    case, batches = Case(lambda parameters: Shrinking(parameters, lr=0.01)), tokens(STEPS)
    model = Net()
    engine = attach(case, model, always_active=always_active)
    train(model, engine, batches)
    assert_same_weights(model, train_twin(case, engine, batches))
    visits = [state["shrunk"] for state in engine.optimizer.state_dict()["state"].values()]
    assert len(visits) == len(list(model.parameters()))
    assert max(visits) == (STEPS if always_active else 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchao_AdamW8bit", "torchao_AdamW4bit"])
def test_compiled_step(name):
    case, batches = QUANTIZED[name], tokens(STEPS)
    model = case.model()
    engine = attach(case, model)
    train(model, engine, batches)
    assert_same_weights(model, train_twin(case, engine, batches))


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_in_the_middle_of_a_sweep(name):
    case, batches = OPTIMIZERS[name], tokens(STEPS)
    whole, first, second = case.model(), case.model(), case.model(seed=9)
    uninterrupted = attach(case, whole)
    train(whole, uninterrupted, batches)

    engine = attach(case, first)
    train(first, engine, batches[:CUT])
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": engine.optimizer.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = attach(case, second)
    second.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    assert resumed.step == CUT
    train(second, resumed, batches[CUT:])

    assert_same_weights(whole, second)
    assert_same(plain(uninterrupted.optimizer.state_dict()), plain(resumed.optimizer.state_dict()))


@pytest.mark.parametrize(
    "name", ["AdamW_loop", "Prodigy", "optimi_AdamW", "po_AdaBelief", "torchao_AdamW4bit", "bitsandbytes_AdamW8bit"]
)
def test_resumed_by_the_trainer(name, tmp_path):
    case = OPTIMIZERS[name]

    def fit(steps, seed=0, **options):
        module = Module(case, seed)
        run = trainer(strategy=HiFTStrategy(), max_epochs=-1, max_steps=steps)
        run.fit(module, ResumableLoader(tokens(9)), **options)
        return run

    whole = fit(STEPS)
    fit(CUT).save_checkpoint(tmp_path / "cut.ckpt")
    resumed = fit(STEPS, seed=9, ckpt_path=tmp_path / "cut.ckpt")
    assert_same_weights(whole.lightning_module, resumed.lightning_module)


# --- evaluation weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ScheduleFree_AdamW", "ScheduleFree_SGD", "ScheduleFree_RAdam"])
def test_evaluation_weights_of_all_groups(name):
    """``eval`` and ``train`` of a schedule-free optimizer move all weights, by state that HiFT keeps elsewhere."""
    case, batches = COUNTING[name], tokens(STEPS)
    model = case.model()
    engine = attach(case, model)
    twin = case.model()
    named = dict(twin.named_parameters())
    independent = [case.make([named[n] for n in names_in(group.units)]) for group in engine.groups]
    for step, batch in enumerate(batches):
        train(model, engine, [batch])
        twin.zero_grad()
        next_token_loss(twin, batch).backward()
        independent[step % 5].step()
        if step % 7 == 6:
            for switch in ("eval", "train"):
                getattr(engine.optimizer, switch)()
                for optimizer in independent:
                    getattr(optimizer, switch)()
                assert_same_weights(model, twin)
    assert_same_weights(model, twin)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("name", ["Adagrad_loop", "Adagrad_foreach", "Adagrad_fused"])
def test_state_from_the_constructor_is_never_on_the_device_as_a_whole(name, prefetch):
    case = OPTIMIZERS[name]
    model = case.model()
    optimizer = case.make(model.parameters())
    assert len(optimizer.state) == len(list(model.parameters()))
    engine = attach_published(model, optimizer, make_offloader=lambda: lagging(prefetch=prefetch))
    assert len(optimizer.state) == 0
    sizes = [4 * (group.numel + len(group.parameters)) for group in engine.groups]
    slot = -(-max(sizes) // 64) * 64
    assert engine.offloader.device_bytes <= (slot if prefetch else 0)
    in_step = []
    optimizer.register_step_pre_hook(lambda *_: in_step.append(sum(len(s) > 0 for s in optimizer.state.values())))
    for step, batch in enumerate(tokens(STEPS)):
        assert engine.offloader.device_bytes <= slot
        train(model, engine, [batch])
        assert in_step[-1] == len(engine.groups[step % 5].parameters)
    assert engine.offloader.host_bytes == sum(sizes)


# --- what the engine relies on ----------------------------------------------------------------------------------------

ELEMENT_WISE = {
    name: case
    for variant, options in {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}.items()
    for name, case in variants(variant, **options).items()
    if not name.startswith("Adafactor")
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ELEMENT_WISE)
def test_row_slices_step_as_the_whole_does(name, dtype):
    """If the cuts fall on multiples of 64 elements. Elsewhere the remainder of a vector loop may round otherwise."""

    def step_in(rows):
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(37, 64, generator=generator).to(dtype)
        parts = [nn.Parameter(part.clone()) for part in weight.split(rows)]
        optimizers = [ELEMENT_WISE[name].make([part]) for part in parts]
        for _ in range(5):
            gradient = torch.randn(37, 64, generator=generator).to(dtype)
            for part, piece, optimizer in zip(parts, gradient.split(rows), optimizers, strict=True):
                part.grad = piece.clone()
                optimizer.step()
        return torch.cat([part.detach() for part in parts])

    whole = step_in([37])
    assert torch.equal(step_in([11, 26]), whole)
    assert torch.equal(step_in([1, 20, 16]), whole)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [("LBFGS", "one flat vector of all parameters"), ("SparseAdam", "sparse gradients only")],
)
def test_refused_with_a_reason(name, reason):
    model = Net()
    with pytest.raises(TypeError, match=rf"{name} cannot train one layer group at a time: .*{reason}.*AdamW"):
        attach_published(model, of_torch(name)(model.parameters()))


class CountsOnItself(torch.optim.SGD):
    """Its step size falls with a count that is neither state nor an option."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.num_steps = 0

    def step(self, closure=None):
        self.num_steps += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.num_steps
        return super().step(closure)


def test_counts_on_the_optimizer_itself_are_refused():
    model = Net()
    engine = attach_published(model, CountsOnItself(model.parameters()))
    with pytest.raises(TypeError, match=r"CountsOnItself cannot train one layer group at a time: .*num_steps"):
        train(model, engine, tokens(2))


class Wrapper(torch.optim.Optimizer):
    """Steps another optimizer, which holds all state."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


def test_wrapped_optimizer_is_refused():
    model = Net()
    wrapper = Wrapper(torch.optim.AdamW(model.parameters()))
    with pytest.raises(TypeError, match=r"Wrapper cannot train one layer group at a time: it wraps .*AdamW"):
        attach_published(model, wrapper)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (of("bitsandbytes.optim", "PagedAdamW8bit", lr=0.01), "pages"),
        (of("optimi", "AdamW", lr=0.01, gradient_release=True), "gradient_release"),
    ],
    ids=["paged", "gradient_release"],
)
def test_third_party_features_that_move_state_themselves_are_refused(make, reason):
    model = Matrices()
    with pytest.raises(TypeError, match=f"cannot train one layer group at a time: .*{re.escape(reason)}"):
        attach_published(model, make(model.parameters()))


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ON_A_GPU)
def test_on_a_gpu(name):
    case = ON_A_GPU[name]
    on_gpu = case._replace(model=lambda seed=0: case.model(seed).cuda())
    batches = [batch.cuda() for batch in tokens(STEPS)]
    model = on_gpu.model()
    torch.use_deterministic_algorithms(True, warn_only=True)
    engine = attach(on_gpu, model, lambda: StateOffloader("cuda"))
    train(model, engine, batches)
    assert_same_weights(model, train_twin(on_gpu, engine, batches))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_constructor_state_never_is_on_the_gpu_as_a_whole():
    class Large(Automatic):
        def __init__(self):
            super().__init__(of_torch("Adagrad"))
            self.layers = nn.ModuleList([nn.Linear(2048, 2048) for _ in range(8)])

        def training_step(self, batch, batch_idx):
            x = self.net(batch).mean().expand(2, 2048)
            for layer in self.layers:
                x = x + torch.tanh(layer(x))
            return x.square().mean()

    module = Large()
    torch.cuda.reset_peak_memory_stats()
    trainer(accelerator="gpu", strategy=HiFTStrategy()).fit(module, loader(12))
    weights = sum(p.numel() * 4 for p in module.parameters())
    # One layer's gradient, two layers' state and what the step needs, against eight layers' state in the constructor.
    assert torch.cuda.max_memory_allocated() < weights + 6 * 4 * 2048**2
