"""What only a CUDA device can show: real streams, page-locked memory, races. Run with ``pytest -m gpu``."""

import pytest
import torch
from torch import nn

from lightning_hift import HiFTDDPStrategy, HiFTFSDPStrategy, HiFTStrategy, StateOffloader
from lightning_hift.distributed.sharded_checkpoint import consolidate
from tests.models import Automatic, Net, as_published, assert_same_weights, attach_published, loader, trainer
from tests.processes import Processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTH = 4096


class Wide(nn.Module):
    """Large layers and little work: copies take longer than the step, so a missing wait shows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)) for _ in range(4)]
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def train(steps, busy=False, pressure=False, optimizer=None, masters="none", max_group_numel=None, **options):
    """Weights after some steps on the GPU."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    model = Wide().cuda()
    make = optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True))
    engine = attach_published(
        model,
        make(model.parameters()),
        make_offloader=lambda: StateOffloader("cuda", **options),
        master_weights=masters,
        weights_dtype=None if masters == "none" else torch.bfloat16,
        max_group_numel=max_group_numel,
    )
    other, ballast = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    generator = torch.Generator("cuda").manual_seed(1)
    for _ in range(steps):
        if busy:
            with torch.cuda.stream(other):
                ballast = (ballast @ ballast).clamp(-1, 1)
        if pressure:
            # Memory that is freed at once is handed out again at once.
            torch.empty(64 * 2**20, device="cuda").fill_(torch.nan)
        x = torch.randn(2, WIDTH, device="cuda", generator=generator).to(next(model.parameters()).dtype)
        model(x).square().mean().backward()
        engine.optimizer.step()
    engine.close()
    torch.cuda.synchronize()
    return {name: p.detach().cpu() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def resident():
    return train(500, offload="none")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefetch": False},
        {"pin_memory": False},
        {"busy": True},
        {"pressure": True},
        {"max_group_numel": 2**20},
        {"max_group_numel": 2**20, "busy": True, "pressure": True},
        {"busy": True, "pressure": True},
    ],
    ids=str,
)
def test_500_steps_equal_those_with_resident_state(options, resident):
    assert_same_weights(train(500, **options), resident)


def test_500_steps_with_state_on_disk(tmp_path, resident):
    assert_same_weights(train(500, offload="disk", directory=tmp_path), resident)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{}, {"busy": True, "pressure": True}, {"max_group_numel": 2**20}], ids=str)
def test_500_steps_with_master_weights(options):
    expected = train(500, masters="full", offload="none")
    for masters in ("full", "split"):
        assert_same_weights(train(500, masters=masters, **options), expected)


@pytest.mark.parametrize("name", ["foreach", "capturable", "sgd", "adagrad"])
def test_other_optimizers(name):
    make = {
        "foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
        "capturable": lambda p: torch.optim.AdamW(p, lr=1e-3, capturable=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
    }[name]
    assert_same_weights(train(60, optimizer=make), train(60, optimizer=make, offload="none"))


def test_trainer_on_the_gpu_is_close_to_the_cpu():
    models = {}
    for accelerator in ("cpu", "gpu"):
        models[accelerator] = Automatic()
        trainer(accelerator=accelerator, strategy=HiFTStrategy()).fit(models[accelerator], loader(25))
    for name, p in models["cpu"].named_parameters():
        # Another order of summation, which AdamW amplifies where a gradient is close to 0.
        torch.testing.assert_close(models["gpu"].get_parameter(name).cpu(), p, rtol=1e-3, atol=1e-4)


def test_state_on_the_device_stays_small():
    model = Wide().cuda()
    engine = attach_published(model, torch.optim.AdamW(model.parameters(), fused=True))
    for _ in range(8):
        model(torch.randn(2, WIDTH, device="cuda")).mean().backward()
        engine.optimizer.step()
    torch.cuda.synchronize()
    weights = sum(p.numel() * 4 for p in model.parameters())
    largest = max(group.numel for group in engine.groups)
    # Weights, one slot, and what the step itself needs for a moment.
    assert torch.cuda.memory_allocated() < weights + 8 * largest + 2**26
    assert engine.offloader.device_bytes < 8 * largest + 2**20
    # What is page-locked is what there is, and a page for each stretch.
    arenas = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _host_tensors(engine)}
    assert sum(arenas.values()) < 1.02 * 2 * weights
    assert all(t.is_pinned() for t in _host_tensors(engine))


def _host_tensors(engine):
    state = engine.optimizer.state_dict()["state"]
    return [value for values in state.values() for value in values.values() if value.dim() and not value.is_cuda]


@pytest.mark.parametrize("prefetch", [True, False])
def test_exposed_milliseconds_are_measured(prefetch):
    model = Wide().cuda()
    engine = attach_published(
        model,
        torch.optim.AdamW(model.parameters(), fused=True),
        make_offloader=lambda: StateOffloader("cuda", prefetch=prefetch),
    )
    for _ in range(9):
        model(torch.randn(2, WIDTH, device="cuda")).mean().backward()
        engine.optimizer.step()
    torch.cuda.synchronize()
    exposed = engine.offloader.exposed_ms()
    assert exposed > (0 if prefetch else 1)  # 134 MB over any link there is


def test_refused_page_lock_is_forgotten():
    from lightning_hift.offload.host_memory import page_lock

    memory = torch.empty(2**20, dtype=torch.uint8)
    page_lock(memory, torch.device("cuda"))
    with pytest.raises(RuntimeError):
        page_lock(memory, torch.device("cuda"))  # it is locked already
    assert torch.ones(1, device="cuda").add(1).item() == 2  # CUDA does not report it again


def test_no_host_sync_on_the_step_path():
    model = Wide().cuda()
    engine = attach_published(model, torch.optim.AdamW(model.parameters(), fused=True))

    def step():
        model(torch.randn(2, WIDTH, device="cuda")).mean().backward()
        engine.optimizer.step()

    for _ in range(8):
        step()
    engine.first_sweep_report()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.step == 16


def test_small_net_state_dict_after_offload():
    model = Net().cuda()
    engine = attach_published(model, torch.optim.AdamW(model.parameters()))
    for _ in range(5):
        model(torch.zeros(2, 3, dtype=torch.long, device="cuda")).mean().backward()
        engine.optimizer.step()
    state = engine.optimizer.state_dict()["state"]
    assert len(state) == len(list(model.parameters()))
    assert all(torch.isfinite(value).all() for s in state.values() for value in s.values())


STRATEGIES = {
    "hift": HiFTStrategy,
    "hift_ddp": lambda: HiFTDDPStrategy(partition_state=True, check_every_n_steps=1),
    "hift_fsdp": HiFTFSDPStrategy,
}


def run_strategy(name, precision, path, accelerator="gpu"):
    run = trainer(
        strategy=STRATEGIES[name](),
        accelerator=accelerator,
        precision=precision,
        gradient_clip_val=0.1,
        callbacks=[as_published()],
        use_distributed_sampler=False,  # which would shuffle
    )
    run.fit(Automatic(), loader(12))
    run.save_checkpoint(path)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["hift_ddp", "hift_fsdp"])
def test_strategies_of_several_processes_with_one(name, precision, tmp_path):
    one = Processes(1)
    for each in ("hift", name):
        (error,) = one.run(run_strategy, each, precision, tmp_path / f"{each}.ckpt")
        assert error is None
    one.close()
    if name == "hift_fsdp":
        consolidate(str(tmp_path / "hift_fsdp.ckpt"), str(tmp_path / "one.ckpt"))
    found = torch.load(tmp_path / ("one.ckpt" if name == "hift_fsdp" else f"{name}.ckpt"), weights_only=True)
    expected = torch.load(tmp_path / "hift.ckpt", weights_only=True)
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    for key, value in expected["state_dict"].items():
        # Norms of gradients are summed up in another order.
        torch.testing.assert_close(
            found["state_dict"][key], value, rtol=1e-2 if "bf16" in precision else 1e-5, atol=1e-5
        )
    states = [saved["optimizer_states"][0] for saved in (found, expected)]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    assert states[0]["hift"]["step"] == states[1]["hift"]["step"] == 12
