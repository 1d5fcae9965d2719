"""Large groups stepped in slices of rows: the same result with less state on the device."""

import gc
import weakref

import pytest
import torch
from torch import nn

from lightning_hift import HiFTStrategy, StateOffloader
from lightning_hift.engine.optimizer_state import OptimizerState
from lightning_hift.engine.row_slices import Piece, cut_into_turns, steps_element_wise
from lightning_hift.engine.state_partition import UndividedState
from lightning_hift.engine.step_view import StepView, Turn
from lightning_hift.precision.master_weights import split_master
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

WIDTH, VOCABULARY = 64, 50


class Tall(nn.Module):
    """An embedding and a head that are large against the layer between them."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, batch):
        x = self.embedding(batch)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW_amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "AdamW_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


def lagging():
    return StateOffloader("cpu", device_module=LaggingDevice(), always_copy=True)


def train(make, max_group_numel=None, steps=11, model=None, **options):
    model = model or Tall()
    engine = attach_published(model, make(model.parameters()), max_group_numel=max_group_numel, **options)
    for batch in tokens(steps):
        next_token_loss(model, batch).backward()
        engine.optimizer.step()
    return model, engine


@pytest.mark.parametrize(
    ("name", "numel", "make_offloader"), crossed(OPTIMIZERS, [64, 300, 1000, 3200], [None, lagging])
)
def test_slices_change_no_number(name, numel, make_offloader):
    whole, other = train(OPTIMIZERS[name])
    sliced, engine = train(OPTIMIZERS[name], numel, make_offloader=make_offloader)
    assert_same_weights(whole, sliced)
    expected, state = other.optimizer.state_dict()["state"], engine.optimizer.state_dict()["state"]
    assert state.keys() == expected.keys()
    for i, values in expected.items():
        assert all(torch.equal(value, state[i][key]) for key, value in values.items())


@pytest.mark.parametrize("mode", ["full", "split"])
def test_slices_with_master_weights(mode):
    options = {"master_weights": mode, "weights_dtype": torch.bfloat16}
    whole, _ = train(OPTIMIZERS["AdamW"], **options)
    sliced, _ = train(OPTIMIZERS["AdamW"], 300, make_offloader=lagging, **options)
    assert_same_weights(whole, sliced)


def test_slices_beside_an_always_active_unit():
    whole, _ = train(OPTIMIZERS["AdamW"], always_active=["head"])
    sliced, _ = train(OPTIMIZERS["AdamW"], 300, always_active=["head"])
    assert_same_weights(whole, sliced)


def test_state_on_the_device_is_that_of_a_slice():
    _, engine = train(OPTIMIZERS["AdamW"], make_offloader=lagging)
    assert engine.offloader.device_bytes >= 8 * VOCABULARY * WIDTH
    model, engine = Tall(), None
    engine = attach_published(
        model, OPTIMIZERS["AdamW"](model.parameters()), max_group_numel=640, make_offloader=lagging
    )
    for batch in tokens(15):
        next_token_loss(model, batch).backward()
        engine.optimizer.step()
        assert engine.offloader.device_bytes <= 8 * 640 + 10 * 64


@pytest.mark.parametrize(("saved_with", "resumed_with"), [(300, None), (None, 300), (300, 1000)])
def test_resume_with_another_limit(saved_with, resumed_with):
    whole, _ = train(OPTIMIZERS["AdamW"])
    model, engine = train(OPTIMIZERS["AdamW"], saved_with, steps=6)
    again = Tall(seed=4)
    again.load_state_dict(model.state_dict())
    other = attach_published(again, OPTIMIZERS["AdamW"](again.parameters()), max_group_numel=resumed_with)
    other.optimizer.load_state_dict(engine.optimizer.state_dict())
    for batch in tokens(11)[6:]:
        next_token_loss(again, batch).backward()
        other.optimizer.step()
    assert_same_weights(again, whole)


def test_in_a_trainer_with_resume(tmp_path):
    def run(steps, limit, model, **options):
        fitting = trainer(strategy=HiFTStrategy(max_group_numel=limit), max_steps=steps, max_epochs=None)
        fitting.fit(model, ResumableLoader(tokens(11)), **options)
        return fitting

    whole, half, rest = Module(), Module(), Module()
    run(11, None, whole)
    run(6, 300, half).save_checkpoint(tmp_path / "c.ckpt")
    run(11, 300, rest, ckpt_path=tmp_path / "c.ckpt")
    assert_same_weights(rest, whole)


def test_every_slice_is_proved_to_have_moved(caplog):
    trainer(strategy=HiFTStrategy(max_group_numel=300), callbacks=[as_published()]).fit(Module(), loader(6))
    assert "all 7 trainable parameters were updated" in caplog.text


def test_turns():
    p, q, scalar = nn.Parameter(torch.zeros(10, 64)), nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(()))
    whole = cut_into_turns([p, q, scalar], None)
    assert [[piece.is_whole for piece in turn] for turn in whole] == [[True, True, True]]
    turns = cut_into_turns([p, q, scalar], 200)
    assert [[(piece.start, piece.stop) for piece in turn] for turn in turns] == [
        [(0, 3)],
        [(3, 6)],
        [(6, 9)],
        [(9, 10), (None, None), (None, None)],
    ]
    assert len(cut_into_turns([p], 1)) == 10  # never less than a row


def test_element_wise_is_found_out():
    def verdict(make):
        return steps_element_wise(make(nn.Linear(3, 3).parameters()))

    assert all(verdict(make) for make in OPTIMIZERS.values())
    assert not verdict(lambda p: torch.optim.Adafactor(p))


def test_other_optimizers_are_refused():
    with pytest.raises(ValueError, match=r"max_group_numel=300, and group .* Adafactor does not compute the same"):
        train(lambda p: torch.optim.Adafactor(p), 300)
    train(lambda p: torch.optim.Adafactor(p), 10**6)  # where nothing is sliced it does not matter


def test_bad_limit():
    with pytest.raises(ValueError, match="max_group_numel=0; it must be at least 1"):
        train(OPTIMIZERS["SGD"], 0)


class Module(Automatic):
    def __init__(self):
        super().__init__()
        self.net = Tall()


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true", "bf16-mixed"])
def test_slices_with_clipping_in_each_precision(precision, algorithm):
    models = []
    for limit in (None, 300):
        models.append(Module())
        clip = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
        strategy = HiFTStrategy(max_group_numel=limit)
        trainer(strategy=strategy, precision=precision, **clip).fit(models[-1], loader(11))
    assert_same_weights(*models)


@pytest.mark.parametrize("numel", range(1, 400, 7))
def test_every_row_is_stepped_whatever_the_limit(numel):
    whole, _ = train(OPTIMIZERS["SGD"], model=Net(), steps=5)
    sliced, _ = train(OPTIMIZERS["SGD"], numel, model=Net(), steps=5)
    assert_same_weights(whole, sliced)


def test_slices_hold_on_to_no_weights():
    model, engine = train(OPTIMIZERS["AdamW"], 300)
    storage = model.embedding.weight.untyped_storage()
    gone = []
    weakref.finalize(storage, gone.append, True)
    del storage
    model.embedding.weight.data = model.embedding.weight.detach().double()
    gc.collect()
    assert gone
    engine.close()


def test_sparse_gradients_are_refused():
    model = nn.Sequential(nn.Embedding(50, 64, sparse=True), nn.Linear(64, 4))
    engine = attach_published(model, torch.optim.SGD(model.parameters(), lr=0.1), max_group_numel=300)
    model(tokens(1)[0]).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradient, which cannot be cut into rows"):
        engine.optimizer.step()


@pytest.mark.parametrize("master_weights", ["split", "full"])
def test_masters_of_a_turn_of_slices_and_whole_parameters(master_weights):
    """As with sharded parameters beside one that is not: the whole one may be raised before the step, to be clipped."""
    whole, sliced = (nn.Parameter(torch.randn(4, 3).bfloat16()) for _ in range(2))
    optimizer = torch.optim.SGD([whole, sliced], lr=1.0)
    offloader = StateOffloader("cpu")
    pieces = [Piece(whole, whole), Piece(sliced, nn.Parameter(torch.empty(0).bfloat16(), requires_grad=False), 0, 4)]
    turn = Turn(0, pieces, pieces, offloader.add([piece.handle for piece in pieces]))
    view = StepView(optimizer, offloader, master_weights)
    state = OptimizerState(optimizer, view, offloader, [turn], UndividedState())
    state.make_masters()
    for p in (whole, sliced):
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in (whole, sliced)]
    view.prepare(turn)
    view.show([turn])
    assert [piece.handle.dtype for piece in pieces] == [torch.float32] * 2
    optimizer.step()
    view.hide()
    view.lower_gradients()
    for p, old in zip((whole, sliced), before, strict=True):
        assert torch.equal(p.detach(), split_master(old.float() - 1)[0])
