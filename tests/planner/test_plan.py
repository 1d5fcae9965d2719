"""The planner: published numbers, real training under the tracker, configurations, the command line."""

from __future__ import annotations

import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import Tensor

from lightning_hift import HFT, LISA, BAdam, SelectionPolicy, StateOffloader
from lightning_hift.cli import HiFTCLI
from lightning_hift.planner.allocations import AllocationTracker
from lightning_hift.planner.forecast import forecast
from lightning_hift.planner.memory import CONTEXT_BYTES
from lightning_hift.planner.plan import make_plan
from lightning_hift.planner.plot import plot_plan
from lightning_hift.planner.report import Plan
from lightning_hift.planner.setup import Setup
from lightning_hift.planner.workload import Workload
from lightning_hift.tasks.network import NetworkSource, build_network
from tests.lagging import LaggingDevice
from tests.matrices import crossed
from tests.models import Net, attach_published, language_model

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "plan").glob("*.yaml"))
GB, GIB, MIB = 10**9, 2**30, 2**20
LLAMA = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4}

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:[\s\S]*deprecated in v4"),
    pytest.mark.filterwarnings(r"ignore:[\s\S]*JsonargparseDeprecationWarning"),
]


def options_of(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "configs" / "plan" / f"{name}.yaml").read_text())["model"]["init_args"]


def published(name: str, optimizer: Any = torch.optim.AdamW, **changes: Any) -> Workload:
    """A model of ``configs/plan``."""
    options = options_of(name)
    with torch.device("meta"):
        network = language_model(options["model_type"], {**options["model_config"], **changes})
    return Workload(network, lambda parameters: optimizer(parameters, lr=0.1))


@cache
def llama2_7b() -> Workload:
    return published("llama2_7b")


def static(workload: Workload, **options: Any) -> Any:
    """Bytes without activations, in the largest group."""
    workload._compute_loss = None
    return max(forecast(workload, Setup(**options)).groups.values(), key=lambda group: group.compute)


# --- published numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "total", "block", "embedding"),
    [
        ("llama2_7b", 6_738_415_616, 202_383_360, 131_072_000),
        ("llama3_8b", 8_030_261_248, 218_112_000, 525_336_576),
        ("llama2_13b", 13_015_864_320, 317_204_480, 163_840_000),
        ("qwen3_32b", 32_762_123_264, 487_598_336, 777_912_320),
        ("llama3_70b", 70_553_706_496, 855_654_400, 1_050_673_152),
        ("llama3_405b", 405_853_388_800, 3_187_703_808, 2_101_346_304),
    ],
)
def test_group_sizes_are_the_published_ones(name: str, total: int, block: int, embedding: int) -> None:
    workload = llama2_7b() if name == "llama2_7b" else published(name)
    sizes = [group.numel for group in workload.groups(1)]
    assert sizes[:2] == [embedding, block]
    assert len(set(sizes[1:-1])) == 1
    assert sum(sizes) == total


# Para, Gra and Sta of the paper's table for LLaMA-7B, in MB of 2^20 bytes, and their sum in GB of 2^30.
@pytest.mark.parametrize(
    ("optimizer", "options", "expected"),
    [
        (torch.optim.AdamW, {"precision": "32-true"}, (25705.04, 772.03, 1544.06, 27.36)),
        (torch.optim.AdamW, {"precision": "bf16-true", "master_weights": "full"}, (13624.53, 772.03, 1544.06, 15.57)),
        (torch.optim.SGD, {"precision": "32-true"}, (25705.04, 772.03, 0, 25.86)),
        (torch.optim.Adagrad, {"precision": "32-true"}, (25705.04, 772.03, 772.03, 26.61)),
        ("Adafactor", {"precision": "32-true"}, (25705.04, 772.03, 0.33, 25.86)),
    ],
)
def test_the_papers_table(optimizer: Any, options: Any, expected: tuple[float, ...]) -> None:
    if optimizer == "Adafactor":
        from transformers.optimization import Adafactor

        optimizer = partial(Adafactor, relative_step=False)
    group = static(published("llama2_7b", optimizer, num_hidden_layers=1), **options)
    missing = 31 * 202_383_360 * (2 if options["precision"] == "bf16-true" else 4)
    weights = (group.weights + missing + group.masters) / MIB  # the paper counts masters as parameters
    # The paper counts gradients in 32 bits.
    gradients = 4 * group.numel / MIB
    state = group.state / MIB
    assert weights == pytest.approx(expected[0], abs=0.05)  # buffers of rotary embeddings are 256 bytes
    assert (gradients, state) == (pytest.approx(expected[1], abs=0.005), pytest.approx(expected[2], abs=0.005))
    assert (weights + gradients + state) / 1024 == pytest.approx(expected[3], abs=0.006)


@pytest.mark.parametrize(
    ("name", "options", "device", "host"),
    [
        ("llama2_7b", {"master_weights": "full"}, 16.3, 81),
        ("llama2_7b", {"master_weights": "split", "eight_bit": True}, 14.7, 27),
        ("llama3_8b", {"master_weights": "full"}, 19.1, 96),
    ],
)
def test_memory_plan_of_7b_and_8b(name: str, options: Any, device: float, host: int) -> None:
    workload = llama2_7b() if name == "llama2_7b" else published(name)
    compute, workload._compute_loss = workload._compute_loss, None
    # The largest group is the slot; the numbers speak of blocks, so larger embeddings and heads are sliced.
    found = forecast(workload, Setup("bf16-true", group_size=1, max_group_numel=workload.units[1].numel, **options))
    workload._compute_loss = compute
    assert found.groups[1].compute / GB == pytest.approx(device, abs=0.05)
    assert found.host_bytes / GB == pytest.approx(host, abs=0.5)


@pytest.mark.parametrize(
    ("link", "flops", "milliseconds", "tokens"),
    [(25, 312e12, 97, 590), (25, 989e12, 97, 1872), (50, 989e12, 49, 936)],  # A100, H100 on two generations of PCIe
)
def test_transfer_is_hidden_by_as_many_tokens_as_calculated(
    link: int, flops: float, milliseconds: int, tokens: int
) -> None:
    workload = llama2_7b()
    compute, workload._compute_loss = workload._compute_loss, None
    found = forecast(workload, Setup("bf16-true", master_weights="full"))
    workload._compute_loss = compute
    plan = Plan(found, 0, (), (), None, (), None, None, None, link * GB, 0.4 * flops)
    assert plan.mean_flops_per_token / 1e9 == pytest.approx(20.5, abs=0.05)
    assert 1000 * plan.seconds(found.groups[1]) == pytest.approx(milliseconds, abs=0.5)
    assert plan.hiding_tokens(found.groups[1]) == pytest.approx(tokens, rel=0.003)
    assert plan.written_per_1000_steps / 1e12 == pytest.approx(2.4, abs=0.05)


# --- real training under the tracker ----------------------------------------------------------------------------------

GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 4, "n_head": 4, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
BERT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
RUNS: dict[str, dict[str, Any]] = {
    "llama": {"model": ("llama", LLAMA)},
    "llama in bf16": {"model": ("llama", LLAMA), "precision": "bf16-true"},
    "llama, groups of 2, large batch": {"model": ("llama", LLAMA), "group_size": 2, "batch_size": 16},
    "llama, checkpointed": {"model": ("llama", LLAMA), "checkpointed": True, "batch_size": 8},
    "llama, head always, momentum": {
        "model": ("llama", LLAMA),
        "always_active": ["head"],
        "optimizer": partial(torch.optim.SGD, momentum=0.9),
    },
    "llama, large vocabulary": {"model": ("llama", {**LLAMA, "vocab_size": 4096})},
    "gpt2": {"model": ("gpt2", GPT2)},
    "llama with a large embedding, balanced groups": {
        "model": ("llama", {**LLAMA, "vocab_size": 4000}),
        "group_size": "balanced",
    },
    "gpt2 in bf16, groups of 3": {"model": ("gpt2", GPT2), "precision": "bf16-true", "group_size": 3},
    "bert": {"model": ("bert", BERT), "batch_size": 8},
    "bert in bf16, full fine-tuning": {"model": ("bert", BERT), "precision": "bf16-true", "group_size": 99},
    "bf16-mixed": {"model": ("llama", LLAMA), "precision": "bf16-mixed"},
    "llama with split masters": {"model": ("llama", LLAMA), "precision": "bf16-true", "master_weights": "split"},
    "llama with full masters": {"model": ("llama", LLAMA), "precision": "bf16-true", "master_weights": "full"},
    "gpt2 with split masters, in slices": {
        "model": ("gpt2", GPT2),
        "precision": "bf16-true",
        "master_weights": "split",
        "max_group_numel": 30_000,
    },
}


def real_model(model_type: str, config: dict[str, Any], dtype: torch.dtype, checkpointed: bool) -> Any:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    if model_type == "bert":
        network: Any = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model_type, **config))
    else:
        network = language_model(model_type, config)
    if checkpointed:
        network.activation_checkpointing_enable({"use_reentrant": False})
    return network.train().to(dtype)


def loss_of(network: Any, batch_size: int, length: int, autocast: bool = False) -> Tensor:
    ids = torch.randint(96, (batch_size, length))
    labels = torch.zeros(batch_size, dtype=torch.long) if "Classification" in type(network).__name__ else ids
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return network(input_ids=ids, labels=labels).loss  # type: ignore[no-any-return]


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_prediction_against_real_training(run: dict[str, Any]) -> None:
    run = dict(run)
    checkpointed, optimizer = run.pop("checkpointed", False), run.pop("optimizer", torch.optim.AdamW)
    always_active, model = run.pop("always_active", None), run.pop("model")
    setup = Setup(**{"batch_size": 4, "sequence_length": 64, "master_weights": "none", **run})
    network = real_model(*model, setup.dtype, checkpointed)
    workload = Workload(network, lambda p: optimizer(p, lr=1e-3), always_active=always_active)
    predicted = forecast(workload, setup, every_group=True)
    weights = sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
    assert predicted.groups[0].weights == weights

    with AllocationTracker() as tracker:
        opt = optimizer(network.parameters(), lr=1e-3)
        engine = attach_published(
            network,
            opt,
            group_size=setup.group_size,
            always_active=always_active,
            master_weights=setup.master_weights,
            max_group_numel=setup.max_group_numel,
            make_offloader=lambda: StateOffloader("cpu", device_module=LaggingDevice(), always_copy=True),
        )
        peaks = {}
        for _ in range(2 * len(engine.groups) + 1):
            index, before = engine.active_group.index, tracker.current
            group = predicted.groups[index]
            tracker.reset_peak()
            loss_of(network, setup.batch_size, setup.sequence_length, setup.precision == "bf16-mixed").backward()
            needed = tracker.peak - before
            assert needed == pytest.approx(group.gradients + (group.activations or 0), rel=0.05)
            assert sum(p.grad.nbytes for p in engine.active_parameters if p.grad is not None) == group.gradients
            peaks[index] = weights + engine.offloader.device_bytes + needed
            opt.step()
            opt.zero_grad()
            saved = opt.state_dict()
            moved = {id(p) for p in engine.groups[index].parameters.values()}
            indices = [i for i, p in enumerate(network.parameters()) if id(p) in moved]
            kept = [t for i in indices for t in saved["state"][i].values() if t.ndim]
            kept += [saved["hift"]["masters"][i] for i in indices if i in saved["hift"]["masters"]]
            assert sum(t.nbytes for t in kept) == group.traffic
    assert max(peaks.values()) == pytest.approx(predicted.peak - CONTEXT_BYTES, rel=0.05)


FEW: dict[str, SelectionPolicy] = {"lisa": LISA(2, 1), "badam": BAdam(1), "lisa_reset": LISA(1, 2, "reset")}


@pytest.mark.parametrize(("name", "offload"), crossed(FEW, ["host", "none"]))
def test_prediction_of_a_policy_against_real_training(name: str, offload: Any) -> None:
    policy = FEW[name]
    network, batch = real_model("llama", LLAMA, torch.float32, False), (4, 64)
    workload = Workload(network, lambda p: torch.optim.AdamW(p, lr=1e-3), policy=policy)
    setup = Setup(batch_size=4, sequence_length=64, offload=offload)
    predicted = forecast(workload, setup, every_group=True)
    weights, peaks, on_host = predicted.groups[0].weights, [], []
    with AllocationTracker() as tracker:
        engine = attach_published(
            network,
            torch.optim.AdamW(network.parameters(), lr=1e-3),
            policy=policy,
            make_offloader=lambda: StateOffloader("cpu", offload, device_module=LaggingDevice(), always_copy=True),
        )
        for _ in range(40):
            before = tracker.current
            tracker.reset_peak()
            loss_of(network, *batch, False).backward()
            peaks.append(weights + engine.offloader.device_bytes + tracker.peak - before)
            engine.optimizer.step()
            on_host.append(engine.offloader.host_bytes)
    assert max(peaks) == pytest.approx(predicted.peak - CONTEXT_BYTES, rel=0.05)
    if offload == "host" and policy.state_handling == "keep":
        assert max(on_host) == pytest.approx(predicted.host_bytes, rel=0.05)
    elif offload == "host":
        assert max(on_host) <= predicted.host_bytes  # it may be dropped before it ever leaves the device


def test_a_policy_of_unknown_size_is_not_planned() -> None:
    with pytest.raises(ValueError, match="does not know how many layer groups HFT trains at once"):
        make_plan(real_model("llama", LLAMA, torch.float32, False), policy=HFT())


# --- what is not a language model -------------------------------------------------------------------------------------


class Plain(pl.LightningModule):
    """A batch of its own kind."""

    def __init__(self, example: Any = None) -> None:
        super().__init__()
        self.net = Net()
        self.example_input_array = example

    def forward(self, batch: Tensor) -> Tensor:
        return self.net(batch)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return {"optimizer": torch.optim.Adagrad(self.parameters())}


def test_without_a_batch_all_but_activations_is_planned() -> None:
    plan = make_plan(Plain(), Setup(batch_size=4), compare=False)
    groups = plan.forecast.groups
    assert [group.activations for group in groups.values()] == [None] * 5
    assert [group.traffic for group in groups.values()] == [group.gradients for group in groups.values()]  # Adagrad
    assert "Activations are not planned: no batch can be made up" in str(plan)
    assert "unknown" in str(plan)


def test_example_input_array_makes_a_batch_of_any_size() -> None:
    example = torch.zeros(1, 6, dtype=torch.long)
    small, large = (make_plan(Plain(example), Setup(batch_size=n), compare=False) for n in (8, 64))
    assert small.notes == ()
    assert 6 < (large.forecast.groups[1].activations or 0) / (small.forecast.groups[1].activations or 1) < 9


def test_a_loss_of_ones_own() -> None:
    def loss(model: Any, batch_size: int, length: int) -> Tensor:
        return model.net(torch.zeros(batch_size, length, dtype=torch.long, device="cpu")).square().mean()  # type: ignore[no-any-return]

    model = Plain()
    plan = make_plan(model, Setup(batch_size=4, sequence_length=32), compute_loss=loss, compare=False)
    assert [group.activations or 0 for group in plan.forecast.groups.values()] > [0] * 5
    assert all(p.requires_grad and p.device.type == "cpu" and p.grad is None for p in model.parameters())


def test_code_that_asks_for_values_is_a_note() -> None:
    def loss(model: Any, batch_size: int, length: int) -> Tensor:
        value = model.net(torch.zeros(2, 4, dtype=torch.long, device="cpu")).mean()
        return value * 2 if value.item() > 0 else value  # type: ignore[no-any-return]

    plan = make_plan(Plain(), compute_loss=loss, compare=False)
    assert plan.forecast.groups[0].activations is None
    assert "Activations are not planned: DataDependentOutputException" in plan.notes[0]


def test_two_optimizers_are_refused() -> None:
    class Two(Plain):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters()) for part in (self.net.head, self.net.blocks)], []

    with pytest.raises(ValueError, match="Got 2 optimizers"):
        make_plan(Two())


# --- what the knobs do ------------------------------------------------------------------------------------------------


@cache
def small() -> Workload:
    return Workload(language_model("llama", {**LLAMA, "vocab_size": 4096}))


def plan_of(**options: Any) -> Any:
    return forecast(small(), Setup(**{"precision": "bf16-true", "batch_size": 4, "sequence_length": 64, **options}))


def test_offload() -> None:
    host, disk, none = (plan_of(offload=offload) for offload in ("host", "disk", "none"))
    assert disk.disk_bytes == 10 * sum(p.numel() for p in small().model.parameters())
    assert host.disk_bytes == none.disk_bytes == 0
    assert host.host_bytes - none.host_bytes == disk.disk_bytes
    assert none.groups[0].state + none.groups[0].masters == disk.disk_bytes
    assert host.peak == disk.peak < none.peak


def test_prefetch_moves_the_slot_from_the_activations_to_the_step() -> None:
    ahead, late = plan_of(prefetch=True), plan_of(prefetch=False)
    head = max(ahead.groups)
    slot = 10 * 4096 * 32
    assert (late.groups[head].state, late.groups[head].masters) == (0, 0)
    assert ahead.groups[head].compute - late.groups[head].compute == pytest.approx(slot, abs=10 * 64)
    assert ahead.groups[head].step == late.groups[head].step


def test_slicing_cuts_the_slot_but_not_the_gradient() -> None:
    whole, sliced = plan_of(), plan_of(max_group_numel=4096 * 8)
    head = max(whole.groups)
    assert sliced.groups[head].gradients == whole.groups[head].gradients
    assert sliced.groups[head].state == 8 * 4096 * 8
    assert sliced.groups[head].step < whole.groups[head].step


def test_activation_budget() -> None:
    deep = {"batch_size": 32, "sequence_length": 128}
    whole = plan_of(**deep)
    with pytest.raises(ValueError, match=r"with every block recomputed this batch still holds (\S+ MiB)") as refused:
        plan_of(**deep, activation_budget=1)
    smallest = float(str(refused.value).split("still holds ")[1].split(" MiB")[0])
    tight = plan_of(**deep, activation_budget=int((smallest + 0.01) * MIB))
    assert tight.peak < whole.peak
    assert plan_of(**deep, activation_budget=100 * GIB).peak == whole.peak


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"sequence_length": 0}, {"group_size": 0}, {"max_group_numel": 0}, {"activation_budget": 0}],
)
def test_what_is_below_one_is_refused(options: Any) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"Got {name}=0; it must be (a whole number of )?at least 1"):
        Setup(**options)


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="Got precision='8-true'; the planner knows '32-true'"):
        Setup(precision="8-true")
    with pytest.raises(ValueError, match="Got offload='tape'; choose 'host', 'disk' or 'none'"):
        Setup(offload="tape")  # type: ignore[arg-type]


# --- what fits --------------------------------------------------------------------------------------------------------


def propose(device: float, host: float = 1e12, **options: Any) -> Plan:
    setup = Setup(**{"precision": "bf16-true", "batch_size": 256, **options})
    model = Plain(torch.zeros(1, 64, dtype=torch.long))
    return make_plan(model, setup, device_memory=round(device), host_memory=round(host), compare=False)


def test_what_fits_is_said_to_fit() -> None:
    plan = propose(GIB, GIB)
    assert plan.fits
    assert plan.proposal is None
    assert str(plan).endswith("Fits 1.00 GiB on the device and 1.00 GiB on the host.")


def test_proposals_fit_and_change_no_more_than_they_must() -> None:
    asked = propose(GIB, GIB, master_weights="full").forecast
    host = propose(GIB, asked.host_bytes - 1, master_weights="full")
    assert host.changed == ("master_weights",)
    disk = propose(GIB, asked.host_bytes / 10, master_weights="full")
    assert disk.changed == ("offload",)
    overhead = asked.groups[0].overhead
    device = propose(overhead + 0.8 * (asked.peak - overhead), master_weights="full")
    for plan in (host, disk, device):
        assert plan.proposal is not None
        assert plan.proposal.fits(plan.device_memory, plan.host_memory)
        assert "This fits" in str(plan)
    assert "batch_size" in device.changed or "activation_budget" in device.changed
    assert "precision" not in device.changed


def test_smallest_device_is_named_when_nothing_fits() -> None:
    plan = propose(1000)
    assert plan.proposal is None
    assert plan.smallest is not None
    assert "Nothing that was tried fits. The smallest that works needs 614." in str(plan)
    assert (plan.smallest.setup.batch_size, plan.smallest.setup.prefetch) == (1, False)


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(config: dict[str, Any], *args: str) -> None:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        monkeypatch.setattr(sys, "argv", ["lightning-hift", "plan", "--config", "run.yaml", *args])
        HiFTCLI()

    return run


def config(**trainer: Any) -> dict[str, Any]:
    model = {"class_path": "lightning_hift.tasks.CausalLM", "init_args": {"model_type": "llama", "model_config": LLAMA}}
    return {"trainer": {"precision": "bf16-true", **trainer}, "model": model}


def test_command_prints_a_plan_and_nothing_else(
    command: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    options = ["--batch-size", "2", "--sequence_length=32", "--link", "50GB/s", "--device-memory=24GiB"]
    command(config(accelerator="gpu", devices=1), *options, "--plot", "plan.png", "--report=plan.md")
    shown = capfd.readouterr()
    assert shown.err == ""
    assert shown.out.startswith("53,536 parameters, 6 layer groups, precision bf16-true, masters: split")
    assert "batch 2 x 32 tokens" in shown.out
    assert "50 GB/s" in shown.out
    assert "HiFT, Mixed^Hi, split, 8-bit state" in shown.out
    assert "Fits 24.00 GiB on the device." in shown.out
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert shown.out.strip() in (tmp_path / "plan.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "plan.png", "plan.md"}


def test_command_takes_groups_and_strategy_from_the_file(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    strategy = {"class_path": "lightning_hift.HiFTStrategy", "init_args": {"offload": "none", "prefetch": False}}
    command({**config(strategy=strategy, precision="32-true"), "hift": {"group_size": 3}}, "--compare=false")
    shown = capsys.readouterr().out
    assert "2 layer groups, precision 32-true, masters: none, offload: none, prefetch: no" in shown
    assert "other ways" not in shown


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"model_type": "lama"}, [], "Did you mean"),
        ({"model_config": {"hiden_size": 8}}, [], "Did you mean 'hidden_size'"),
        ({}, ["--device-memory", "24Gb/s"], "Got device_memory='24Gb/s'; write a number above 0 with one of B, KB"),
        ({}, ["--batch-size", "0"], "Got batch_size=0; it must be at least 1"),
        ({}, ["--link", "fast"], "Got link='fast'"),
    ],
)
def test_bad_input_ends_in_a_short_message(
    change: Any, arguments: list[str], message: str, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    options = config()
    options["model"]["init_args"] |= change
    with pytest.raises(SystemExit) as stopped:
        command(options, *arguments, "--compare=false")
    shown = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in shown
    assert len(shown.splitlines()) <= 4


def test_a_plot_without_matplotlib_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = propose(GIB)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match=r"pip install lightning-hift\[plot\]"):
        plot_plan(plan, tmp_path / "plan.png")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_are_planned(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = path.read_text().splitlines()[0].removeprefix("# lightning-hift ")
    assert f"--config {path.relative_to(ROOT)}" in first
    monkeypatch.chdir(ROOT)
    shallow = ["--model.model_config.num_hidden_layers=2", "--compare=false"]
    monkeypatch.setattr(sys, "argv", ["lightning-hift", *first.split(), *shallow])
    HiFTCLI()
    assert "4 layer groups, precision bf16-true, masters: split" in capsys.readouterr().out
    shipped = (ROOT / "examples" / "plans" / f"{path.stem}.md").read_text()
    layers = options_of(path.stem)["model_config"]["num_hidden_layers"]
    assert f"{layers + 2} layer groups, precision bf16-true" in shipped


def test_a_precision_that_cannot_be_rehearsed_spoils_no_other() -> None:
    def loss(model: Any, batch_size: int, length: int) -> Tensor:
        out = model.net(torch.zeros(batch_size, length, dtype=torch.long, device="cpu"))
        if out.dtype == torch.float32:
            raise RuntimeError("Expected inputs of BF16 type")
        return out.square().mean()  # type: ignore[no-any-return]

    plan = make_plan(Plain(), Setup(precision="bf16-true"), compute_loss=loss)
    split = next(row for row in plan.comparison if row.name == "HiFT, Mixed^Hi, split masters")
    assert split.peak == plan.forecast.peak
    assert any(note.endswith("(precision=32-true)") for note in plan.notes)
    assert not any("bf16-true" in note for note in plan.notes)


def test_recomputed_blocks_with_dropout_in_attention_are_planned() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    bert = build_network(NetworkSource(model_type="bert", model_config=sizes), "AutoModelForSequenceClassification")
    plan = make_plan(bert, Setup(batch_size=2, sequence_length=16, activation_budget=2**24), compare=False)
    assert plan.forecast.is_complete
    assert not plan.notes


def test_what_cannot_be_recomputed_is_not_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(module: Any) -> None:
        raise NotImplementedError("no recomputation")

    monkeypatch.setattr("lightning_hift.planner.allocations._run_checkpointed", refuse)
    network = language_model("llama", {**LLAMA, "vocab_size": 64})
    whole = make_plan(network, Setup(batch_size=4, sequence_length=32), compare=False)
    plan = make_plan(
        network, Setup(batch_size=4, sequence_length=32), compare=False, device_memory=whole.forecast.peak - 1
    )
    assert plan.forecast.is_complete
    assert plan.forecast.peak == whole.forecast.peak
    assert plan.proposal is None or plan.proposal.is_complete
    assert not plan.changed or plan.proposal is not None
    assert any("no recomputation (precision=32-true, blocks recomputed)" in note for note in plan.notes)
