"""The planner: published numbers, real training under the tracker, configurations, the command line."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from lightning_hift import HiFTEngine, StateOffloader
from lightning_hift.allocations import AllocationTracker
from lightning_hift.forecast import Setup, forecast
from lightning_hift.plan import Plan
from lightning_hift.tasks.causal_lm import build_network
from lightning_hift.workload import Workload

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs" / "plan").glob("*.yaml"))
GB, GIB, MIB = 10**9, 2**30, 2**20
LLAMA = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 5, "num_attention_heads": 4}

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
        network = build_network(options["model_type"], {**options["model_config"], **changes})
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
        from transformers.optimization import Adafactor as optimizer
    one_block = {"num_hidden_layers": 1}
    group = static(published("llama2_7b", optimizer, **one_block), **options)
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
    found = forecast(workload, Setup(precision="bf16-true", max_group_numel=workload.units[1].numel, **options))
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
    "llama, bf16, checkpointed": {"model": ("llama", LLAMA), "checkpointed": True, "precision": "bf16-true"},
    "llama, head always": {"model": ("llama", LLAMA), "always_active": ["head"]},
    "llama, large vocabulary": {"model": ("llama", {**LLAMA, "vocab_size": 4096})},
    "llama, SGD": {"model": ("llama", LLAMA), "optimizer": torch.optim.SGD},
    "gpt2": {"model": ("gpt2", GPT2)},
    "gpt2 in bf16, groups of 3": {"model": ("gpt2", GPT2), "precision": "bf16-true", "group_size": 3},
    "bert": {"model": ("bert", BERT), "batch_size": 8},
    "bert in bf16, full fine-tuning": {"model": ("bert", BERT), "precision": "bf16-true", "group_size": 99},
    "bf16-mixed": {"model": ("llama", LLAMA), "precision": "bf16-mixed"},
}


def real_model(model_type: str, config: dict[str, Any], dtype: torch.dtype, checkpointed: bool) -> Any:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    if model_type == "bert":
        network: Any = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model_type, **config))
    else:
        network = build_network(model_type, config)
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
    # On a CPU the slot and the host are the same memory.
    workload = Workload(network, lambda p: optimizer(p, lr=1e-3), always_active=always_active)
    predicted = forecast(workload, setup, every_group=True)

    with AllocationTracker() as tracker:
        opt = optimizer(network.parameters(), lr=1e-3)
        offloader = StateOffloader("cpu")
        engine = HiFTEngine.attach(
            network, opt, group_size=setup.group_size, always_active=always_active, make_offloader=lambda: offloader
        )
        largest_slot = 0
        for _ in range(2 * len(engine.groups)):
            group = predicted.groups[engine.active_group.index]
            before = tracker.current
            tracker.reset_peak()
            loss_of(network, setup.batch_size, setup.sequence_length, setup.precision == "bf16-mixed").backward()
            activations = tracker.peak - before
            assert activations == pytest.approx(group.gradients + (group.activations or 0), rel=0.05)
            assert sum(p.grad.nbytes for p in engine.active_parameters if p.grad is not None) == group.gradients
            largest_slot = max(largest_slot, offloader.device_bytes)
            opt.step()
            opt.zero_grad()
        state = sum(workload.state(setup.stepped_dtype)[p].device for p in workload.model.parameters())
    assert predicted.groups[0].weights == sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
    assert tracker.current == pytest.approx(state, abs=512 * 4 * len(list(network.parameters())))
