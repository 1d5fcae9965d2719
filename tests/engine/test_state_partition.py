"""Optimizer state divided among processes: the same weights, bit for bit, and a part of the memory."""

import csv
import errno
import os
import tempfile

import lightning.pytorch as pl
import pytest
import torch

from lightning_hift import HiFTDDPStrategy, HiFTModule, HiFTStrategy, LayerUpdates
from lightning_hift.engine.optimizer_checks import check_divisible
from lightning_hift.engine.optimizer_groups import find_groups
from lightning_hift.engine.options import HiFTOptions
from lightning_hift.offload import host_memory
from lightning_hift.planner import preflight
from lightning_hift.plugin.callback import find_callback
from tests.models import (
    Automatic,
    Net,
    ResumableLoader,
    as_published,
    attach_published,
    next_token_loss,
    tokens,
    trainer,
    weights,
)
from tests.optimizers import OPTIMIZERS
from tests.processes import Processes, succeeded

STEPS = 11


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def decayed(parameters):
    """Two param_groups, so that a process may own nothing of one of them."""
    parameters = list(parameters)
    matrices, vectors = ([p for p in parameters if (p.dim() > 1) is large] for large in (True, False))
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}], lr=0.01
    )


class Nested(torch.optim.Optimizer):
    """State of all kinds: dicts and lists of tensors of several dtypes, and plain values."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if not state:
                state |= {"means": [torch.zeros_like(p), torch.zeros(3, dtype=torch.int16)], "name": "x"}
                state["scales"] = {"first": torch.ones((), dtype=torch.float64), "empty": torch.zeros(0)}
            state["means"][0].mul_(0.9).add_(p.grad)
            state["means"][1] += 1
            state["scales"]["first"] *= 0.99
            p -= self.param_groups[0]["lr"] * float(state["scales"]["first"]) * state["means"][0]
        return loss


class Gradients(Automatic):
    """Reads what the processes have averaged."""

    def on_before_optimizer_step(self, optimizer):
        self.log("gradient", sum(p.grad.float().sum() for p in self.parameters() if p.grad is not None))


class TwoOptimizers(HiFTModule):
    def __init__(self, make_optimizer):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.other = Net(0), Net(1)
        self.make_optimizer = make_optimizer

    def training_step(self, batch, batch_idx):
        for net, optimizer in zip((self.one, self.other), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(next_token_loss(net, batch))
            optimizer.step()

    def configure_optimizers(self):
        return [self.make_optimizer(self.one.parameters()), self.make_optimizer(self.other.parameters())]


class Reports(pl.Callback):
    """Keeps what the engines have said, and the bytes that were kept here."""

    def __init__(self):
        self.reports, self.host_bytes = [], []

    def on_train_start(self, run, module):
        for engine in find_callback(run).engines:
            ask = engine.first_sweep_report
            engine.first_sweep_report = lambda ask=ask: self._noted(ask())

    def _noted(self, report):
        self.reports += [] if report is None else [report]
        return report

    def on_train_end(self, run, module):
        self.host_bytes = [engine.offloader.host_bytes for engine in find_callback(run).engines]
        self.sent = run.callback_metrics.get("hift/sent_bytes")


def fit(
    partition_state=True,
    world=2,
    module=Gradients,
    make=adamw,
    steps=STEPS,
    resumed=None,
    position=7,
    path=None,
    **options,
):
    """Train as one of ``world`` processes; return the weights and what was reported.

    Args:
        resumed: A checkpoint.
        position: The batch that comes after it.
        path: Where to save one at the end.
    """
    strategy_options = options.pop("strategy", {})
    strategy = (
        HiFTDDPStrategy(check_every_n_steps=1, partition_state=partition_state, **strategy_options)
        if world > 1
        else HiFTStrategy(**strategy_options)
    )
    torch.manual_seed(0)
    model = module(make)
    seen = Reports()
    run = trainer(
        strategy=strategy,
        devices=world,
        max_steps=steps * (2 if module is TwoOptimizers else 1),
        max_epochs=-1,
        callbacks=[as_published(**options.pop("callback", {})), seen, *options.pop("callbacks", [])],
        use_distributed_sampler=False,
        **options,
    )
    mine = [batch[run.global_rank :: world] for batch in tokens(33, 8)]
    held = ResumableLoader(mine)
    if resumed is not None:
        held.load_state_dict({"next": position})
    run.fit(model, held, ckpt_path=resumed, weights_only=None if resumed is None else True)
    if path is not None:
        run.save_checkpoint(path)
    return weights(model), seen.reports, seen.host_bytes, seen.sent


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


# --- the same weights -------------------------------------------------------------------------------------------------

CASES = {
    "adamw": {},
    "momentum": {"make": momentum},
    "param_groups": {"make": decayed},
    "larger_groups": {"callback": {"group_size": 2, "steps_per_group": 2}},
    "always_active": {"callback": {"always_active": ["head"]}},
    "slices": {"strategy": {"max_group_numel": 40}},
    "accumulated": {"accumulate_grad_batches": 3},
    "clipped": {"gradient_clip_val": 0.05},
    "bf16_split": {"precision": "bf16-true"},
    "bf16_full": {"precision": "bf16-true", "strategy": {"master_weights": "full"}},
    "bf16_clipped": {"precision": "bf16-true", "gradient_clip_val": 0.05},
    "bf16_slices": {"precision": "bf16-true", "gradient_clip_val": 0.05, "strategy": {"max_group_numel": 40}},
    "fp16": {"precision": "16-true", "gradient_clip_val": 0.05},
    "on_disk": {"strategy": {"offload": "disk", "offload_directory": tempfile.gettempdir()}},
    "several_optimizers": {"module": TwoOptimizers},
    "several_groups": {"callback": {"policy": "LISA"}},
    "reset": {"callback": {"policy": "BAdam"}, "make": lambda p: torch.optim.Adagrad(p, lr=0.01)},
}


def run_case(name, partition_state):
    return fit(partition_state, **CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_equals_state_that_is_not_divided(name, two):
    divided = succeeded(two.run(run_case, name, True))
    expected = succeeded(two.run(run_case, name, False))
    for (found, reports, *_), (weights_there, reports_there, *_) in zip(divided, expected, strict=True):
        assert_equal(found, weights_there)
        assert reports == reports_there
    # In float16 the first step overflows, and is skipped; other policies leave groups out for long.
    if "policy" not in CASES[name].get("callback", {}) and name != "fp16":
        reports = divided[1][1]
        assert len(reports) == (2 if name == "several_optimizers" else 1)
        assert all(report.complete for report in reports)


def run_once(name):
    class AllMatrices(Automatic):
        def __init__(self, make):
            super().__init__(make)
            self.net = OPTIMIZERS[name].model()

    return [fit(divided, module=AllMatrices, make=OPTIMIZERS[name].make)[0] for divided in (True, False)]


@pytest.mark.parametrize(
    "name", ["AdamW_loop", "Adafactor_foreach", "NAdam_foreach", "RMSprop_loop", "Muon", "Adam_fused"]
)
def test_optimizers(name, two):
    for divided, expected in succeeded(two.run(run_once, name)):
        assert_equal(divided, expected)


def test_half_of_the_bytes_each(two):
    everything = sum(16 * p.numel() // 2 for p in Net().parameters())
    first, second = (host_bytes for _, _, (host_bytes,), _ in succeeded(two.run(run_case, "adamw", True)))
    largest = max(8 * p.numel() for p in Net().parameters())
    counters = 4 * len(list(Net().parameters()))
    assert first + second == everything + counters
    assert abs(first - second) <= largest + counters
    halves = [host_bytes for _, _, (host_bytes,), _ in succeeded(two.run(run_case, "bf16_split", True))]
    assert sum(halves) == sum(10 * p.numel() for p in Net().parameters()) + counters
    assert abs(halves[0] - halves[1]) <= 10 * largest // 8 + counters


def test_weights_that_were_stepped_here_are_counted(two):
    divided = [float(sent) for *_, sent in succeeded(two.run(run_case, "adamw", True))]
    whole = [float(sent) for *_, sent in succeeded(two.run(run_case, "adamw", False))]
    assert sum(divided) - sum(whole) == whole[0]  # each weight is sent once, by one of the two


# --- checkpoints ------------------------------------------------------------------------------------------------------


RESUMED = {
    "adamw": {},
    "bf16_slices": {"precision": "bf16-true", "strategy": {"max_group_numel": 40}},
    "nested": {"make": Nested},
    "on_device": {"strategy": {"offload": "none"}},
}


def run_saving(options, path, partition_state):
    return fit(partition_state, steps=7, path=path, **options)[0]


def run_resumed(options, path, partition_state):
    return fit(partition_state, resumed=path, **options)[0]


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_is_that_of_state_that_is_not_divided(name, two, tmp_path):
    options = RESUMED[name] | {"default_root_dir": str(tmp_path)}
    succeeded(two.run(run_saving, options, tmp_path / "divided.ckpt", True))
    succeeded(two.run(run_saving, options, tmp_path / "whole.ckpt", False))
    divided, whole = (torch.load(tmp_path / f"{which}.ckpt", weights_only=True) for which in ("divided", "whole"))
    for part in ("optimizer_states", "state_dict", "global_step"):
        assert_same(divided[part], whole[part])
    assert {path.name for path in tmp_path.iterdir()} == {"divided.ckpt", "whole.ckpt"}

    (expected, _) = succeeded(two.run(run_resumed, options, tmp_path / "whole.ckpt", False))
    for partition_state in (True, False):
        for found in succeeded(two.run(run_resumed, options, tmp_path / "divided.ckpt", partition_state)):
            assert_equal(found, expected)
    alone = fit(world=1, resumed=tmp_path / "divided.ckpt", **options)[0]
    of_whole = fit(world=1, resumed=tmp_path / "whole.ckpt", **options)[0]
    assert_equal(alone, of_whole)


def assert_same(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one, other)
    else:
        assert one == other


def test_state_is_gathered_by_a_group_for_the_host(two, tmp_path):
    """As with a backend for GPUs, which knows no tensors on the host; here it is one of another name."""
    options = {"strategy": {"process_group_backend": "cpu:gloo"}}
    others = Processes(2)  # whose backend is not chosen yet
    try:
        divided = succeeded(others.run(run_saving, options, tmp_path / "divided.ckpt", True))
        assert others.run(backends) == [("cpu:gloo", ["gloo"])] * 2
    finally:
        others.close()
    whole = succeeded(two.run(run_saving, {}, tmp_path / "whole.ckpt", False))
    assert_equal(divided[0], whole[0])
    found, expected = (
        torch.load(tmp_path / f"{which}.ckpt", weights_only=True)["optimizer_states"] for which in ("divided", "whole")
    )
    assert_same(found, expected)


def backends():
    groups = torch.distributed.distributed_c10d._world.pg_map
    names = [torch.distributed.get_backend(group) for group in groups]
    return names[0], names[1:]


class ChannelsLast(pl.LightningModule):
    """State that is laid out like the weights."""

    def __init__(self, make):
        super().__init__()
        self.convolutions = torch.nn.Sequential(*[torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)])
        self.convolutions.to(memory_format=torch.channels_last)
        self.make = make

    def training_step(self, batch, batch_idx):
        images = batch.float()[:, None, :, None].expand(-1, 3, 6, 6)
        return self.convolutions(images).square().mean()

    def configure_optimizers(self):
        return self.make(self.parameters())


def test_layouts_are_kept(two, tmp_path):
    options = {"module": ChannelsLast}
    divided = succeeded(two.run(run_saving, options, tmp_path / "divided.ckpt", True))
    whole = succeeded(two.run(run_saving, options, tmp_path / "whole.ckpt", False))
    assert_equal(divided[1], whole[1])
    found, expected = (
        torch.load(tmp_path / f"{which}.ckpt", weights_only=True)["optimizer_states"] for which in ("divided", "whole")
    )
    assert_same(found, expected)
    assert any(not s["exp_avg"].is_contiguous() for s in found[0]["state"].values())


def run_full_disk(path):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    rank = int(os.environ["LOCAL_RANK"])
    with pytest.MonkeyPatch.context() as patched:
        if rank == 0:
            patched.setattr(host_memory.os, "posix_fallocate", refuse)
        fit(steps=7, path=path)


def test_a_full_disk_stops_all_processes_and_leaves_the_checkpoint_before(two, tmp_path):
    (tmp_path / "c.ckpt").write_bytes(b"before")
    for error in two.run(run_full_disk, tmp_path / "c.ckpt"):
        assert isinstance(error, OSError)
        assert "Could not reserve" in str(error)
    assert (tmp_path / "c.ckpt").read_bytes() == b"before"


# --- what is refused --------------------------------------------------------------------------------------------------


def run_parts():
    class Asks(pl.Callback):
        def on_train_end(self, run, module):
            self.optimizer = find_callback(run).engines[0].optimizer
            self.state = self.optimizer.state_dict()

    kept = Asks()
    fit(callbacks=[kept])
    messages = []
    for act in (
        lambda: kept.optimizer.load_state_dict(kept.state),
        lambda: kept.optimizer.step(),
        lambda: attach_published(Net(), kept.optimizer, units=[]),
    ):
        try:
            act()
        except (RuntimeError, ValueError) as error:
            messages.append(str(error))
    return len(kept.state["state"]), messages


def test_a_part_is_not_taken_for_the_whole(two):
    parts = succeeded(two.run(run_parts))
    assert sum(count for count, _ in parts) == len(list(Net().parameters()))
    for rank, (_, messages) in enumerate(parts):
        assert f"the part of the optimizer's state that process {rank} of 2 has kept" in messages[0]
        assert "divided among processes, so it cannot be used without the engine" in messages[1]


class Together(torch.optim.SGD):
    """Divides by the norm of all gradients."""

    @torch.no_grad()
    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        for gradient in gradients:
            gradient.div_(norm)
        return super().step(closure)


class Counting(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


class FirstOptions(torch.optim.SGD):
    def step(self, closure=None):
        self.momentum = self.param_groups[0]["momentum"]
        return super().step(closure)


class Averaging(torch.optim.SGD):
    def train(self):
        pass

    def eval(self):
        pass


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Together, "Together does not compute the same for a parameter alone as beside others"),
        (Counting, "Counting keeps k in its param_groups, which count for all parameters"),
        (FirstOptions, r"FirstOptions could not be tried out on the CPU \(IndexError"),
        (Averaging, "Averaging moves weights outside of its steps"),
    ],
)
def test_optimizers_that_step_parameters_together_are_refused(kind, reason):
    optimizer = kind(Net().parameters(), lr=0.1)
    with pytest.raises(TypeError, match=f"{reason}.*cannot be divided among processes. Leave partition_state out"):
        check_divisible(optimizer)


def run_refused():
    fit(make=lambda p: Counting(p, lr=0.1))


def test_a_run_refuses_them(two):
    for error in two.run(run_refused):
        assert isinstance(error, TypeError)
        assert "Counting keeps k" in str(error)


def test_a_part_needs_a_part_of_the_host(monkeypatch):
    model = Net()
    optimizer = adamw(model.parameters())
    found = find_groups(model, [optimizer], HiFTOptions())
    everything = 8 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(preflight, "available_host_memory", lambda: round(0.7 * everything))
    with pytest.raises(RuntimeError, match=r"This run needs at least 9.* on the host"):
        preflight.check_before_run(model, [optimizer], found, torch.device("cpu"))
    assert preflight.check_before_run(model, [optimizer], found, torch.device("cpu"), processes=2) is None


# --- what watches -----------------------------------------------------------------------------------------------------


def run_watched(folder, partition_state):
    kept = LayerUpdates(folder, every_n_sweeps=2, plot=False)
    strategy = {"max_group_numel": 40}
    fit(partition_state, callbacks=[kept], steps=14, strategy=strategy, path=folder / "c.ckpt")
    return kept.rows


def test_layer_updates_are_summed_up(two, tmp_path):
    divided = succeeded(two.run(run_watched, tmp_path / "divided", True))
    whole, _ = succeeded(two.run(run_watched, tmp_path / "whole", False))
    for rows in divided:
        assert [(row["sweep"], row["unit"], row["steps"]) for row in rows] == [
            (row["sweep"], row["unit"], row["steps"]) for row in whole
        ]
        for row, expected in zip(rows, whole, strict=True):
            # Sums of squares are made in another order.
            assert [row[key] for key in ("update", "weight", "relative")] == pytest.approx(
                [expected[key] for key in ("update", "weight", "relative")], rel=1e-12
            )
    written = list(csv.DictReader((tmp_path / "divided" / "layer_updates.csv").open()))
    assert len(written) == len(whole) > 0


def test_frozen_parameters_do_not_move(two):
    for found, expected in succeeded(two.run(run_frozen)):
        assert torch.equal(found["head.weight"], Net().head.weight)
        assert_equal(found, expected)


def run_frozen():
    return [fit(divided, callback={"frozen": ["net.head"]})[0] for divided in (True, False)]
