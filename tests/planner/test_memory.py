"""Bytes of state, of allocations, and of what must fit."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from lightning_hift.engine.probe import StateBytes, live_state_bytes, state_bytes
from lightning_hift.planner.allocations import AllocationTracker, Rehearsal, copy_without_memory, peaks_by_depth
from lightning_hift.planner.memory import (
    CONTEXT_BYTES,
    available_host_memory,
    check_memory,
    group_bytes,
    parse_bytes,
)
from lightning_hift.planner.transient import transient_bytes
from tests.models import Net, next_token_loss, tokens

GIB = 2**30
UNUSABLE = ("Optimizer", "LBFGS", "SparseAdam")
OPTIMIZERS = [o for o in vars(torch.optim).values() if inspect.isclass(o) and issubclass(o, Optimizer)]
OPTIMIZERS = [o for o in OPTIMIZERS if o.__name__ not in UNUSABLE]

# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24GiB", 24 * GIB), ("24 gib", 24 * GIB), ("1.5GB", 1_500_000_000), ("512MiB", 2**29), ("7", 7), (3, 3)],
)  # fmt: skip
def test_sizes(text: Any, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["24Gb/s", "GiB", "", "24XiB", "-1GiB", "0GiB", "24iB", "1e", "nan"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"Got budget=.*such as 24GiB"):
        parse_bytes(text, "budget")


# --- optimizer state --------------------------------------------------------------------------------------------------


def make(optimizer: Any) -> Any:
    return lambda parameters: optimizer(parameters, lr=0.1)


def bytes_after_a_real_step(optimizer: Optimizer, p: nn.Parameter) -> StateBytes:
    p.grad = torch.full_like(p, 0.1)
    optimizer.step()
    tensors = [t for t in optimizer.state[p].values() if isinstance(t, Tensor)]
    return StateBytes(sum(t.nbytes for t in tensors if t.ndim), sum(t.nbytes for t in tensors if not t.ndim))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_of_torch_optimizers(optimizer: Any, dtype: torch.dtype) -> None:
    shapes = [(6, 5)] if optimizer.__name__ == "Muon" else [(6, 5), (7,), (2, 3, 4)]
    unknown = [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes]
    found = state_bytes(make(optimizer), unknown)
    for shape, state in zip(shapes, found, strict=True):
        p = nn.Parameter(torch.ones(shape, dtype=dtype))
        assert state == bytes_after_a_real_step(optimizer([p], lr=0.1), p)


def test_factored_state_of_a_large_matrix() -> None:
    from transformers.optimization import Adafactor

    p = torch.empty(32000, 4096, device="meta")
    torchs, transformers = (state_bytes(make, [p])[0].device for make in (torch.optim.Adafactor, Adafactor))
    assert torchs == transformers == 4 * (32000 + 4096)


class BlockWise(Optimizer):
    """Two 8-bit moments in blocks of 256, codes and scales each in a dictionary of their own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.abs().max().item()
            if not self.state[p]:
                for name in ("first", "second"):
                    scales = torch.zeros(-(-p.numel() // 256))
                    self.state[p][name] = {"codes": torch.zeros_like(p, dtype=torch.uint8), "scales": [scales]}


@pytest.mark.parametrize("shape", [(16, 64), (50304, 768), (4096, 11008), (3 * 2**22,)])
def test_quantized_state_by_blocks(shape: tuple[int, ...]) -> None:
    p = torch.empty(shape, device="meta")
    assert state_bytes(BlockWise, [p]) == [StateBytes(2 * (p.numel() + 4 * p.numel() // 256))]


def test_state_is_that_of_the_dtype_that_is_stepped() -> None:
    p = torch.empty(4, 4, dtype=torch.bfloat16, device="meta")
    assert state_bytes(torch.optim.AdamW, [p])[0].device == 2 * 16 * 2
    assert state_bytes(torch.optim.AdamW, [p], torch.float32)[0].device == 2 * 16 * 4


def test_live_optimizer_with_options_by_group_is_left_alone() -> None:
    first, second = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([{"params": [first], "momentum": 0.9}, {"params": [second]}], lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("stepped"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    found = live_state_bytes(optimizer)
    assert found == {first: StateBytes(64), second: StateBytes(0)}
    assert optimizer.state_dict() == before
    assert scheduler.last_epoch == 0
    assert torch.equal(first, torch.ones(4, 4))


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"amsgrad": True}])
def test_live_optimizer_with_kernels_of_a_device(options: dict[str, bool]) -> None:
    p = nn.Parameter(torch.ones(4, 4))
    found = live_state_bytes(torch.optim.AdamW([p], **options))[p]  # type: ignore[arg-type]
    assert found == StateBytes(64 * (3 if "amsgrad" in options else 2), 4)


def test_temporaries_of_a_step() -> None:
    p = nn.Parameter(torch.ones(64, 64))
    assert transient_bytes(torch.optim.AdamW([p]), [p]) == p.nbytes
    assert transient_bytes(torch.optim.AdamW([p], fused=True), [p]) == 0
    assert transient_bytes(torch.optim.AdamW([p]), [p], torch.float64) == 2 * p.nbytes
    assert transient_bytes(BlockWise([p]), [p]) == p.nbytes


def test_an_optimizer_that_cannot_be_stepped_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"shape \(4,\) failed with ValueError: Muon only supports 2D"):
        state_bytes(torch.optim.Muon, [torch.empty(4)])


# --- allocations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fake", [False, True])
def test_tracker_counts_storages_not_views(fake: bool) -> None:
    with FakeTensorMode() if fake else torch.device("cpu"), torch.no_grad():
        before = torch.ones(1024)
        with AllocationTracker() as tracker:
            view = before[10:].view(-1, 2)
            assert tracker.current == 0
            a = view + 1
            assert tracker.current == 4 * 1024  # 1014 elements, in whole units of 512 bytes
            b = a.t()
            a.add_(1)
            assert tracker.current == 4 * 1024
            del a
            assert tracker.current == 4 * 1024
            del b
            assert (tracker.current, tracker.peak) == (0, 4 * 1024)
            tracker.reset_peak()
            c = torch.ones(1)
        del c
    assert (tracker.current, tracker.peak) == (0, 512)


def test_copy_without_memory_keeps_ties_and_the_original() -> None:
    net = Net()
    net.head.weight = net.embedding.weight
    fake, twins = copy_without_memory(net, torch.bfloat16)
    assert fake.head.weight is fake.embedding.weight is twins[id(net.head.weight)]
    assert {p.dtype for p in fake.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert torch.isfinite(net(tokens(1)[0])).all()


def test_rehearsal_is_what_really_happens() -> None:
    net, batch = Net(depth=5), tokens(1, batch_size=64)[0]
    rehearsal = Rehearsal(net)

    def loss(model: Any) -> Tensor:
        return next_token_loss(model, torch.zeros(batch.shape, dtype=torch.long, device="cpu"))

    for part in (net.embedding, net.blocks[0], net.blocks[4], net.head):
        net.requires_grad_(False)
        part.requires_grad_(True)
        with AllocationTracker() as tracker:
            next_token_loss(net, batch.clone()).backward()
        assert rehearsal.run(part.parameters(), loss).peak == tracker.peak
        net.zero_grad()


@pytest.mark.parametrize("shape", [lambda i: 5000 - 40 * i, lambda i: max(9000 - 700 * i, 4000 - 10 * i)])
def test_peaks_by_depth_are_exact_for_convex_ones_and_few_are_measured(shape: Any) -> None:
    asked: list[int] = []

    def measure(i: int) -> int:
        asked.append(i)
        return 10000 * int(shape(i))

    found = peaks_by_depth(measure, [range(1), range(1, 41), range(41, 42)])
    assert found == {i: 10000 * shape(i) for i in range(42)}
    assert len(asked) == len(set(asked)) < 20


# --- what must fit ----------------------------------------------------------------------------------------------------


def group(name: str, numel: int, **options: Any) -> Any:
    p = torch.empty(numel, dtype=torch.bfloat16, device="meta")
    return group_bytes(name, [p], [StateBytes(8 * numel)], **options)


def test_group_bytes() -> None:
    found = group("block", 1000, master_weights="full", max_group_numel=250)
    assert (found.gradients, found.state, found.masters, found.slot) == (2000, 8000, 4000, 3000)
    assert group("block", 1000, master_weights="split").slot == 10000
    assert group("block", 1000, dtype=torch.float32).gradients == 4000


def test_what_fits_passes_and_what_is_unknown_is_not_checked() -> None:
    groups = [group("block", GIB, master_weights="split"), group("head", GIB // 2, master_weights="split")]
    check_memory(4 * GIB, groups)
    check_memory(4 * GIB, groups, device_memory=16 * GIB + CONTEXT_BYTES, host_memory=15 * GIB)
    check_memory(4 * GIB, groups, device_memory=32 * GIB, host_memory=1, offload="disk")


def test_a_device_too_small_is_refused_with_the_sum() -> None:
    groups = [group("block", GIB, master_weights="split"), group("head", GIB // 2, master_weights="split")]
    with pytest.raises(RuntimeError, match=r"(?s)at least 16\.60 GiB on the device, which has 16\.00 GiB.*") as refused:
        check_memory(4 * GIB, groups, device_memory=16 * GIB)
    lines = [" ".join(line.split()) for line in str(refused.value).splitlines()[1:]]
    assert lines[:4] == [
        "weights 4.00 GiB",
        "gradients of block 2.00 GiB",
        "optimizer state and masters of block 10.00 GiB",
        "driver and CUDA context (assumed) 614.40 MiB",
    ]
    assert "Use a smaller group_size" in lines[4]
    with pytest.raises(RuntimeError, match="state of all groups"):
        check_memory(4 * GIB, groups, device_memory=20 * GIB, offload="none")
    with pytest.raises(RuntimeError, match=r"always active: gradients, state, masters +12\.00 GiB"):
        check_memory(4 * GIB, groups[1:], groups[:1], device_memory=20 * GIB)


def test_a_host_too_small_is_refused_with_the_sum() -> None:
    groups = [group("block", GIB, master_weights="split"), group("head", GIB // 2, master_weights="split")]
    with pytest.raises(RuntimeError, match=r"(?s)15\.00 GiB on the host.*state of all groups +12\.00 GiB.*3\.00 GiB"):
        check_memory(4 * GIB, groups, host_memory=14 * GIB)


def test_processes_share_a_host_but_no_device() -> None:
    groups = [group("block", GIB, master_weights="split"), group("head", GIB // 2, master_weights="split")]
    # 8 and 2 bytes for each of 1.5 * 2**30 elements, in each of 4 processes
    check_memory(4 * GIB, groups, device_memory=16 * GIB + CONTEXT_BYTES, host_memory=60 * GIB, processes=4)
    words = r"(?s)60\.00 GiB on the host.*in 4 processes +48\.00 GiB.*in 4 processes +12\.00 GiB.*fewer processes"
    with pytest.raises(RuntimeError, match=words):
        check_memory(4 * GIB, groups, host_memory=60 * GIB - 1, processes=4)


def test_available_host_memory(tmp_path: Path) -> None:
    assert available_host_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert available_host_memory(tmp_path) == 4000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1000\n")
    (group / "memory.max").write_text("max\n")
    assert available_host_memory(tmp_path) == 4000 * 1024
    (group / "memory.max").write_text("5000\n")
    assert available_host_memory(tmp_path) == 4000
    (group / "memory.stat").write_text("anon 600\ninactive_file 300\nactive_file 40\nfile 350\n")
    assert available_host_memory(tmp_path) == 4340
