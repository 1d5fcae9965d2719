"""The planner with several devices: arithmetic by hand, proposals, published models, the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_hift.engine.gradient_buckets import copied_bytes
from lightning_hift.planner.forecast import Forecast, forecast
from lightning_hift.planner.memory import CONTEXT_BYTES
from lightning_hift.planner.partition import divide
from lightning_hift.planner.plan import make_plan
from lightning_hift.planner.report import Plan
from lightning_hift.planner.setup import Setup
from lightning_hift.planner.workload import Workload
from lightning_hift.plugin.module import HiFTModule
from lightning_hift.trainer import HiFTTrainer
from tests.models import Rows, as_published, language_model, next_token_loss, tokens, trainer
from tests.planner.test_plan import GIB, LLAMA, MIB, command, config, published
from tests.processes import Processes, succeeded

__all__ = ["command"]  # a fixture

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:[\s\S]*deprecated in v4"),
    pytest.mark.filterwarnings(r"ignore:[\s\S]*JsonargparseDeprecationWarning"),
]

# By hand, elements of the Llama of 4 blocks: embedding, one block (attention, feed-forward, norms), head with its norm.
EMBEDDING = 96 * 32
BLOCK = 4 * 32 * 32 + 3 * 32 * 80 + 2 * 32
HEAD = 96 * 32 + 32
ALL = EMBEDDING + 4 * BLOCK + HEAD
COUNTERS = 4 * (1 + 4 * 9 + 2)  # AdamW's steps, a float32 for each tensor
BUFFERS = 2 * 2 * 4  # frequencies of rotary embeddings, twice, in 16 bits


@cache
def llama() -> Workload:
    return Workload(language_model("llama", LLAMA), partial(torch.optim.AdamW, fused=True))


def plan_of(**options: Any) -> Forecast:
    given = {"precision": "bf16-true", "batch_size": 4, "sequence_length": 64, **options}
    return forecast(llama(), Setup(**given), every_group=True)


# --- arithmetic by hand -----------------------------------------------------------------------------------------------


def test_hift_ddp() -> None:
    found = plan_of(strategy="hift_ddp", devices=8, hosts=2)
    block, alone = found.groups[2], plan_of().groups[2]
    assert (block.weights, block.gradients) == (2 * ALL + BUFFERS, 2 * BLOCK)
    assert (block.state, block.masters, block.traffic) == (8 * BLOCK, 2 * BLOCK, 10 * BLOCK)
    assert found.host_bytes == 4 * (10 * ALL + COUNTERS)
    # All nine tensors share a bucket, and are sent twice round a ring of 8.
    assert (block.exchange, block.exchanged, block.sent) == (2 * BLOCK, 2 * BLOCK, 2 * 2 * BLOCK * 7 // 8)
    assert block.compute == alone.compute + 2 * BLOCK
    assert block.step == alone.step
    assert found.groups[0].exchange == 0  # one tensor is sent as it is
    assert found.groups[5].exchange == 2 * HEAD


def test_gradients_that_are_sent_alone_are_not_copied() -> None:
    def gradient(mebibytes: int) -> Tensor:
        return torch.empty(mebibytes * MIB // 4, dtype=torch.float32, device="meta")

    # From the last to the first, in buckets of 25 MiB: 30, 4 + 20, 6, 25.
    assert copied_bytes([gradient(n) for n in (25, 6, 20, 4, 30)]) == 24 * MIB
    assert copied_bytes([gradient(25), gradient(30)]) == 0


def test_hift_fsdp() -> None:
    found = plan_of(strategy="hift_fsdp", devices=8, hosts=2)
    block = found.groups[1]
    assert (block.weights, block.gradients) == (2 * ALL // 8 + BUFFERS, 2 * BLOCK // 8)
    assert (block.state, block.masters, block.traffic) == (BLOCK, 2 * BLOCK // 8, 10 * BLOCK // 8)
    assert found.host_bytes == 4 * (10 * ALL // 8 + COUNTERS)
    # Whole weights of what is in no block and of two blocks, and one block's gradients before they are scattered.
    assert block.exchange == 2 * (EMBEDDING + HEAD) + 2 * 2 * BLOCK + 2 * BLOCK
    assert found.groups[5].exchange == 2 * (EMBEDDING + HEAD) + 2 * 2 * BLOCK + 2 * HEAD
    # Two blocks are above the one at index 2; it and they are gathered a second time.
    assert found.groups[2].exchanged == 2 * (ALL + 3 * BLOCK + BLOCK)
    assert found.groups[2].sent == 2 * (ALL + 3 * BLOCK + BLOCK) * 7 // 8
    assert found.groups[0].sent == 2 * (ALL + 4 * BLOCK + EMBEDDING) * 7 // 8
    assert found.groups[5].sent == 2 * (ALL + HEAD) * 7 // 8
    # At the step neither activations nor whole weights are there; its block in 32 bits is: master and gradient.
    assert block.step == block.weights + block.gradients + block.state + block.masters + 8 * BLOCK // 8
    assert found.peak == CONTEXT_BYTES + max(group.compute for group in found.groups.values())


def test_rows_are_rounded_up_to_the_devices() -> None:
    found = plan_of(strategy="hift_fsdp", devices=3)
    # 96 rows are 32 each, 32 are 11, 80 are 27.
    block = 4 * 11 * 32 + 2 * 27 * 32 + 11 * 80 + 2 * 11
    head = 32 * 32 + 11
    assert found.groups[1].weights == 2 * (32 * 32 + 4 * block + head) + BUFFERS
    assert found.groups[1].gradients == 2 * block
    assert found.groups[5].sent == 2 * 3 * (32 * 32 + 4 * block + head + head) * 2 // 3


class Counted(pl.Callback):
    """Bytes of the whole tensors that were gathered or scattered, by the group that was trained meanwhile."""

    def __init__(self) -> None:
        self.exchanged: dict[int, int] = {}
        self._now = 0
        gather, scatter = ("all_gather_single", "reduce_scatter_single")  # since torch 2.13
        if not hasattr(dist, gather):
            gather, scatter = ("all_gather_into_tensor", "reduce_scatter_tensor")
        self._whole = {gather: "output", scatter: "input"}
        self._before = {name: getattr(dist, name) for name in self._whole}

    def setup(self, *args: Any, **kwargs: Any) -> None:
        for name, collective in self._before.items():
            setattr(dist, name, self._counting(collective, self._whole[name]))

    def _counting(self, collective: Callable[..., Any], whole: str) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(collective).bind(*args, **kwargs).arguments
            self._now += next(value for name, value in given.items() if name.startswith(whole)).nbytes
            return collective(*args, **kwargs)

        return count

    def on_train_batch_start(self, run: pl.Trainer, *args: Any) -> None:
        self._now = 0

    def on_after_backward(self, run: pl.Trainer, module: pl.LightningModule) -> None:
        (engine,) = run.callbacks[0].engines  # type: ignore[attr-defined]
        self.exchanged[engine.active_group.index] = self._now

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        for name, collective in self._before.items():
            setattr(dist, name, collective)


class TinyLlama(HiFTModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = language_model("llama", LLAMA)

    def training_loss(self, batch: Tensor, batch_idx: int) -> Tensor:
        return next_token_loss(lambda tokens: self.net(tokens).logits, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def run_counted(world: int) -> dict[int, int]:
    counted = Counted()
    run = trainer(strategy="hift_fsdp", devices=world, callbacks=[as_published(), counted], max_steps=6)
    run.fit(TinyLlama(), DataLoader(Rows(tokens(18)), 4))
    return counted.exchanged


@pytest.mark.parametrize("count", [2, 3])
def test_a_run_exchanges_what_is_planned(count: int, two: Processes, three: Processes) -> None:
    planned = plan_of(strategy="hift_fsdp", devices=count, precision="32-true", group_size=1)
    found, *others = succeeded({2: two, 3: three}[count].run(run_counted, count))
    assert found == {index: group.exchanged for index, group in planned.groups.items()}
    assert all(other == found for other in others)


def test_gradients_that_leave_are_no_activations() -> None:
    """In full fine-tuning all gradients together are 107 KB, the largest block's a fifth of that."""
    options = {"group_size": 99, "batch_size": 1, "sequence_length": 8, "offload": "none"}
    alone, sharded = plan_of(**options), plan_of(**options, strategy="hift_fsdp", devices=8)
    (whole,), (part,) = alone.groups.values(), sharded.groups.values()
    assert whole.gradients == 2 * ALL
    # All in no block is reduced at the end of the backward pass, the blocks one by one.
    assert part.exchange == 2 * (EMBEDDING + HEAD) + 4 * BLOCK + 2 * (EMBEDDING + HEAD + BLOCK)
    assert part.activations is not None
    assert part.activations < 2 * ALL


def parameters(*rows: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.empty(n, 64, device="meta")) for n in rows]


def test_state_goes_tensor_by_tensor_to_who_has_least() -> None:
    first, second = divide([parameters(10), parameters(2, 4, 3)], 2)
    assert first.numel == (640, 0)
    assert second.numel == (0, 64 * 9)
    # 6 rows at once, in slices: 6 and 4 of the first; of 9, which are 2 + 4 and 3, again largest first.
    first, second = divide([parameters(10), parameters(2, 4, 3)], 2, 6 * 64)
    assert (first.numel, first.at_once) == ((6 * 64, 4 * 64), (6 * 64, 4 * 64))
    assert (second.numel, second.at_once) == ((2 * 64 + 3 * 64, 4 * 64), (3 * 64, 4 * 64))


def test_partition_state() -> None:
    found, whole = (plan_of(strategy="hift_ddp", devices=2, partition_state=part) for part in (True, False))
    # The first process has the embedding of 3072. Of the first block then, largest first: 2560 and 2560 go to the
    # second (5120), 2560 to the first (5632), and 1024 in turns; both norms of 32 go to the second.
    second = 2 * 80 * 32 + 2 * 32 * 32 + 2 * 32
    block = found.groups[1]
    assert block.traffic == 10 * second
    assert (block.weights, block.gradients) == (whole.groups[1].weights, whole.groups[1].gradients)
    assert found.host_bytes == 10 * ALL + 2 * COUNTERS
    assert whole.host_bytes == 2 * (10 * ALL + COUNTERS)
    # The slot is that of a process that has an embedding or a head to itself, or more than that of a block.
    assert block.state == 8 * second
    # Gradients are averaged, and new weights broadcast, in copies as these are small.
    assert (block.exchanged, block.sent) == (2 * 2 * BLOCK, (2 + 1) * 2 * BLOCK // 2)
    # Gradients of the block in 32 bits, masters of what is stepped here, copies of weights.
    assert block.step == block.weights + block.gradients + 10 * second + 4 * (BLOCK + second) + 2 * BLOCK


def test_two_hosts_divide_the_state() -> None:
    found = plan_of(strategy="hift_ddp", devices=4, hosts=2, partition_state=True)
    assert found.host_bytes - 2 * COUNTERS == pytest.approx(10 * ALL / 2, rel=0.05)
    assert found.host_bytes - 2 * COUNTERS >= 10 * ALL / 2


def test_disks_are_shared_by_the_processes_of_a_host() -> None:
    found = plan_of(strategy="hift_ddp", devices=8, hosts=2, offload="disk")
    assert found.disk_bytes == 4 * 10 * ALL
    assert found.host_bytes == 4 * COUNTERS
    plan = Plan(found, ALL, (), (), None, (), None, None, None, 1.0, 1.0)
    assert plan.written_per_1000_steps == pytest.approx(1000 * 4 * 10 * ALL / 6)


# --- what holds for any number ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["hift_ddp", "hift_fsdp"])
def test_one_device_is_planned_as_ever(strategy: Any) -> None:
    one = plan_of(strategy=strategy)
    assert (one.groups, one.host_bytes) == (plan_of().groups, plan_of().host_bytes)
    texts = [
        str(make_plan(language_model("llama", LLAMA), Setup(strategy=name), device_memory=GIB))
        for name in ("hift", strategy)
    ]
    assert texts[0] == texts[1]
    assert "exchange" not in texts[0]


def test_more_devices_need_less_of_each_and_send_more() -> None:
    plans = [plan_of(strategy="hift_fsdp", devices=n) for n in (2, 3, 4, 8, 16)]
    peaks, sent = [plan.peak for plan in plans], [plan.most_sent for plan in plans]
    assert peaks == sorted(set(peaks), reverse=True)
    assert sent == sorted(set(sent))
    hosts = [plan_of(strategy="hift_fsdp", devices=8, hosts=n).host_bytes for n in (1, 2, 4, 8)]
    assert hosts == [hosts[0] // n for n in (1, 2, 4, 8)]


@pytest.mark.parametrize("strategy", ["hift_ddp", "hift_fsdp"])
def test_frozen_weights_and_what_is_always_active(strategy: Any) -> None:
    frozen = Workload(language_model("llama", LLAMA), partial(torch.optim.AdamW, fused=True), always_active=["head"])
    setup = Setup(precision="bf16-true", batch_size=1, sequence_length=8, strategy=strategy, devices=2)
    found = forecast(frozen, setup, every_group=True).groups[1]
    gathered = ALL + 4 * BLOCK + (BLOCK + HEAD)
    assert found.sent == (2 * gathered // 2 if strategy == "hift_fsdp" else 2 * 2 * (BLOCK + HEAD) // 2)


def test_adapters_are_sharded_with_the_blocks_they_are_in() -> None:
    model = language_model("llama", LLAMA)
    for name, p in model.named_parameters():
        p.requires_grad_("self_attn.q_proj" in name)
    workload = Workload(model, lambda parameters: torch.optim.AdamW([p for p in parameters if p.requires_grad]))
    assert len(workload.groups(1)) == 4
    setup = Setup(precision="bf16-true", batch_size=1, sequence_length=8, strategy="hift_fsdp", devices=2)
    found = forecast(workload, setup, every_group=True).groups[0]
    assert found.exchange == 2 * (EMBEDDING + HEAD) + 4 * BLOCK + 2 * 32 * 32


# --- what fits --------------------------------------------------------------------------------------------------------


def propose(device: int | None, host: int | None, **options: Any) -> Plan:
    setup = Setup(**{"precision": "bf16-true", "sequence_length": 8, "strategy": "hift_ddp", "devices": 4, **options})
    model = language_model("llama", {**LLAMA, "vocab_size": 2**15})
    return make_plan(model, setup, device_memory=device, host_memory=host, compare=False)


def test_state_is_divided_first_and_everything_next() -> None:
    asked = propose(None, None).forecast
    divided = propose(None, asked.host_bytes - 1)
    assert divided.changed == ("partition_state",)
    sharded = propose(None, None, strategy="hift_fsdp").forecast
    assert sharded.peak < asked.peak
    everything = propose(sharded.peak, None)
    assert everything.changed == ("strategy",)
    assert everything.proposal is not None
    assert everything.proposal.setup.strategy == "hift_fsdp"
    assert "strategy=hift_fsdp" in str(everything)
    assert f"on each device, {10 * (2**16 * 32 + 4 * BLOCK + 32) / MIB:.2f} MiB on each host" in str(everything)


def test_a_proposal_of_sharding_is_taken_back_where_something_else_helped() -> None:
    tight = propose(None, 1)  # only the disk helps
    assert tight.proposal is None
    disk = propose(None, 8 * COUNTERS)
    assert disk.changed == ("offload",)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 0}, "Got devices=0; it must be at least 1"),
        ({"hosts": 0}, "Got hosts=0; it must be at least 1"),
        ({"devices": 6, "hosts": 4, "strategy": "hift_ddp"}, "Got devices=6, in all, with hosts=4; each host must"),
        ({"strategy": "ddp"}, "Got strategy='ddp'; the planner knows 'hift', 'hift_ddp', 'hift_fsdp'"),
        ({"devices": 2}, "Got strategy='hift', which trains on one device, with devices=2. Use 'hift_ddp' or"),
        ({"devices": 2, "strategy": "hift_fsdp", "partition_state": True}, "it is for 'hift_ddp', and 'hift_fsdp'"),
    ],
)
def test_what_does_not_go_together_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Setup(**options)


# --- published models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "devices", "hosts", "weights", "exchange", "host"),
    [
        # In GB of 10^9 by hand: weights 2 B / N; 2 B for embedding, head, two blocks, one unit's gradients; state
        # and masters 10 B / hosts.
        ("llama3_70b", 70.554e9, 8, 1, 17.64, 2 * (2 * 1.0507 + 2 * 0.8557) + 2 * 1.0507, 705.5),
        ("llama3_405b", 405.853e9, 24, 3, 33.82, 2 * (2 * 2.1013 + 2 * 3.1877) + 2 * 3.1877, 1352.8),
    ],
)
def test_large_models_before_activations(
    name: str, parameters: float, devices: int, hosts: int, weights: float, exchange: float, host: float
) -> None:
    workload = published(name)
    workload._compute_loss = None
    setup = Setup("bf16-true", strategy="hift_fsdp", devices=devices, hosts=hosts)
    found = forecast(workload, setup)
    assert sum(p.numel() for p in workload.model.parameters()) == pytest.approx(parameters, rel=1e-5)
    assert found.groups[0].weights / 1e9 == pytest.approx(weights, abs=0.02)
    assert max(group.exchange for group in found.groups.values()) / 1e9 == pytest.approx(exchange, abs=0.01)
    assert found.host_bytes / 1e9 == pytest.approx(host, abs=1)
    assert found.fits(80 * GIB, 2048 * GIB)


# --- the command line -------------------------------------------------------------------------------------------------

TINY = ["--batch-size=1", "--sequence-length=8", "--compare=false"]


@pytest.mark.parametrize(
    ("trainer", "arguments", "heading"),
    [
        ({"strategy": "hift_fsdp", "devices": 4, "num_nodes": 2}, [], "hift_fsdp on 8 devices, 4 on each of 2 host(s)"),
        ({"strategy": "hift_ddp", "devices": [0, 1]}, [], "hift_ddp on 2 devices, 2 on each of 1 host(s)"),
        ({"strategy": "hift_ddp", "devices": "0,2,3"}, [], "hift_ddp on 3 devices"),
        pytest.param({"devices": "auto"}, ["--devices=4"], "hift_ddp on 4 devices", marks=pytest.mark.slow),
        pytest.param(
            {"strategy": "hift_fsdp"},
            ["--devices=4", "--hosts=2"],
            "hift_fsdp on 4 devices, 2 on each of 2 host(s)",
            marks=pytest.mark.slow,
        ),
        ({"strategy": "hift_ddp", "devices": 8}, ["--strategy=hift_fsdp"], "hift_fsdp on 8 devices"),
        (
            {"strategy": {"class_path": "lightning_hift.HiFTDDPStrategy"}, "devices": 4},
            ["--partition-state=true"],
            "hift_ddp, partition_state on 4 devices",
        ),
    ],
)
def test_command_takes_devices_from_the_file_and_the_line(
    trainer: Any, arguments: list[str], heading: str, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command(config(**trainer), *arguments, *TINY, "--device-memory=24GiB", "--report=plan.md")
    shown = capsys.readouterr().out
    assert heading in shown
    assert "sent for it by each device" in shown
    assert "Fits 24.00 GiB on each device." in shown


def test_command_compares_the_strategies(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command(config(strategy="hift_ddp", devices=4), *TINY[:2], "--host-memory=1GiB", "--plot=plan.png")
    shown = capsys.readouterr().out
    for row in ("HiFT, hift_ddp, partition_state  ", "HiFT, hift_fsdp  ", "sent at most"):
        assert row in shown
    assert "HiFT, hift_ddp  " not in shown  # as asked


@pytest.mark.parametrize(
    "trainer",
    [{"strategy": "hift_fsdp", "devices": 1}, pytest.param({"strategy": "hift_ddp"}, marks=pytest.mark.slow)],
)
def test_command_on_one_device_says_what_it_always_said(
    trainer: Any, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command(config(), *TINY)
    expected = capsys.readouterr().out
    command(config(**trainer), *TINY)
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("trainer", "arguments", "message"),
    [
        ({}, ["--devices=0"], "Got devices=0; it must be at least 1"),
        ({}, ["--devices=3", "--hosts=2"], "Got devices=3, in all, with hosts=2"),
        ({}, ["--strategy=hift_zero"], "Got strategy='hift_zero'; the planner knows 'hift', 'hift_ddp', 'hift_fsdp'"),
        ({"strategy": "ddp", "devices": 2}, [], "Got strategy='ddp'; the planner knows 'hift'"),
        ({"strategy": "hift", "devices": 2}, [], "Got strategy='hift', which trains on one device, with devices=2"),
    ],
)
def test_command_refuses_in_a_short_message(
    trainer: Any, arguments: list[str], message: str, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command(config(**trainer), *arguments, *TINY)
    assert message in capsys.readouterr().err


def test_a_trainer_plans_for_its_own_devices() -> None:
    trainer = HiFTTrainer(accelerator="cpu", devices=2, strategy="hift_ddp", logger=False, enable_progress_bar=False)
    model = language_model("llama", LLAMA)
    model.configure_model = lambda: None  # type: ignore[attr-defined]
    setup = {"batch_size": 1, "sequence_length": 8}
    found = trainer.make_plan(model, None, setup, compare=False)  # type: ignore[arg-type]
    assert (found.forecast.setup.strategy, found.forecast.setup.devices) == ("hift_ddp", 2)
