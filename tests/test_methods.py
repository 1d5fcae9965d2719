"""The YAML files of methods: each goes with each kind of task, and trains what it says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lightning_hift import HiFTCallback, HiFTCLI, HiFTStrategy, MeZO, packaged_optimizers
from lightning_hift.engine.optimizer_checks import check_optimizer
from lightning_hift.packaged_optimizers import GaLoreAdamW, OffloadedAdamW
from lightning_hift.tasks.adapters import add_adapter
from lightning_hift.tasks.network import NetworkSource, build_network, peft_task_type
from lightning_hift.tasks.run_facts import run_facts
from tests.matrices import crossed
from tests.models import Manual, ResumableLoader, assert_same_weights, loader, tokens, trainer, weights
from tests.text_models import save_network
from tests.tiny_texts import byte_tokenizer, write_rows

pytest.importorskip("datasets")

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = sorted(path.stem for path in CONFIGS.glob("method/*.yaml") if not path.stem.startswith("mixed_hi"))
PACKAGES = {"lora": "peft", "adamw_8bit": "torchao", "cpu_offload": "torchao", "galore": "galore_torch"}
GPT2 = {"vocab_size": 300, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512}
LLAMA = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "trec": [{"text": word, "coarse_label": i % 2} for i, word in enumerate(["good", "bad", "fine", "poor"] * 2)],
    "e2e": [{"mr": f"name[Place {i}]", "ref": f"Place {i} has pie."} for i in range(8)],
    "alpaca": [{"instruction": f"Say {i}.", "input": "", "output": f"{i}!"} for i in range(8)],
}

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:[\s\S]*deprecated in v4"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # of peft, about what it then does by itself
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # torchao and bitsandbytes
]


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-hift"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
        yield


def run(task: str, method: str, tmp_path: Path, *arguments: str, network: dict[str, Any] | None = None) -> HiFTCLI:
    """Fit three steps of ``task`` by ``method``, with a tiny network and eight rows."""
    rows = ROWS[task]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data: dict[str, Any] = {"batch_size": 2, "cache_dir": str(tmp_path / "cache")}
    data["files"] = dict.fromkeys(("train", "validation") if task != "alpaca" else ("train",), path)
    model: dict[str, Any] = network or {"model": None, "model_type": "gpt2", "model_config": GPT2}
    if task == "trec":
        model = network or {"model": str(save_network(tmp_path / "bert"))}
        data |= {"dataset": None, "splits": None, "max_length": 16}
    else:
        data["tokenizer"] = str(tmp_path / "tokenizer")
        byte_tokenizer([" ".join(row.values()) for row in rows], tmp_path / "tokenizer")
    if task == "alpaca":
        data["packing"] = False
    if task == "e2e":
        model["generation"] = {"max_new_tokens": 4}
    trainer = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "limit_train_batches": 3, "logger": False}
    trainer |= {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    tiny = {"seed_everything": 0, "trainer": trainer, "model": {"init_args": model}, "data": {"init_args": data}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    files = (CONFIGS / f"task/{task}.yaml", CONFIGS / f"method/{method}.yaml", tmp_path / "tiny.yaml")
    return HiFTCLI(args=["fit", *(part for file in files for part in ("-c", str(file))), *arguments])


def optimizer_of(cli: HiFTCLI) -> torch.optim.Optimizer:
    (optimizer,) = cli.trainer.optimizers
    return optimizer


def skip_without_package(method: str) -> None:
    if method in PACKAGES:
        pytest.importorskip(PACKAGES[method])
    if method == "cpu_offload" and not torch.cuda.is_available():
        pytest.skip("cpu_offload needs a CUDA GPU")


@pytest.mark.parametrize(("method", "task"), crossed(METHODS, ROWS))
def test_each_method_runs_on_each_kind_of_task(method: str, task: str, tmp_path: Path) -> None:
    skip_without_package(method)
    small = ["--model.optimizer.rank=4"] if method == "galore" else []
    cli = run(task, method, tmp_path, *small)
    assert cli.trainer.global_step == 3
    assert torch.isfinite(cli.trainer.callback_metrics["val_loss"])
    by_hift = method.startswith("hift") or method in ("mezo_blockwise", "badam", "lisa", "hft", "ist")
    assert any(isinstance(callback, HiFTCallback) for callback in cli.trainer.callbacks) == by_hift  # type: ignore[attr-defined]
    assert isinstance(cli.trainer.strategy, HiFTStrategy) == by_hift
    assert isinstance(optimizer_of(cli), MeZO) == method.startswith("mezo")
    assert all(p.requires_grad for p in cli.model.parameters()) == (method != "lora")
    moved = [state for state in optimizer_of(cli).state_dict()["state"].values() if state]
    assert moved


@pytest.mark.filterwarnings("ignore:HiFT. after the first sweep")  # whose learning rate is 0
def test_full_fine_tuning_is_one_group_of_hift(tmp_path: Path) -> None:
    plain = run("trec", "full", tmp_path)
    # Held for a sweep, the learning rate would not begin at 0.
    one_group = ["--plain=false", "--hift.group_size=100000", "--hift.hold_lr=off", "--trainer.strategy=hift"]
    grouped = run("trec", "full", tmp_path, *one_group)
    assert any(isinstance(callback, HiFTCallback) for callback in grouped.trainer.callbacks)  # type: ignore[attr-defined]
    assert_same_weights(plain.model, grouped.model)


@pytest.mark.parametrize(("method", "task"), crossed(["bitfit", "linear_probing"], ROWS))
def test_a_part_trains_and_the_rest_neither_moves_nor_has_state(method: str, task: str, tmp_path: Path) -> None:
    cli = run(task, method, tmp_path)
    names = {id(p): name for name, p in cli.model.named_parameters()}
    stepped = {names[id(p)] for group in optimizer_of(cli).param_groups for p in group["params"]}
    untouched = run(task, method, tmp_path, "--model.optimizer.lr=0").model
    after, start = weights(cli.model), weights(untouched)
    assert {name for name in after if not torch.equal(after[name], start[name])} <= stepped
    heads = {"trec": "classifier", "e2e": "ln_f", "alpaca": "ln_f"}
    assert any(heads[task] in name for name in stepped)
    if method == "bitfit":
        assert {name for name in after if name.endswith("bias")} <= stepped
    patterns = "*bias, head" if method == "bitfit" else "head"
    assert run_facts(cli.model)["Method"] == {"method": f"all layers at once, all parameters that match {patterns}"}
    inner = [name for name in stepped if ".0." in name]
    assert all(name.endswith("bias") for name in inner)
    assert bool(inner) == (method == "bitfit")


def test_bitfit_needs_biases(tmp_path: Path) -> None:
    llama = {"model": None, "model_type": "llama", "model_config": LLAMA}
    with pytest.raises(ValueError, match=r"pattern '\*bias' in TrainOnly, which matches no trainable parameter"):
        run("alpaca", "bitfit", tmp_path, network=llama)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2", "llama"])
def test_lora_finds_the_layers_of_each_architecture(model_type: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    network = {"model": str(save_network(tmp_path / model_type, model_type=model_type))}
    if model_type in ("gpt2", "llama"):
        network = {"model": None, "model_type": model_type, "model_config": GPT2 if model_type == "gpt2" else LLAMA}
    if model_type in ("bert", "roberta"):
        cli = run("trec", "lora", tmp_path, network=network)
    else:
        cli = run("alpaca", "lora", tmp_path, network=network)
    trained = {name for name, p in cli.model.named_parameters() if p.requires_grad}
    blocks = {name.split(".lora_")[0] for name in trained if "lora_A" in name}
    assert len(blocks) == {"bert": 13, "roberta": 12, "gpt2": 8, "llama": 14}[model_type]
    assert any("modules_to_save" in name for name in trained) == (model_type in ("bert", "roberta"))


@pytest.mark.parametrize(
    ("model_type", "head", "expected"),
    [
        ("distilbert", "SequenceClassification", {"pre_classifier", "classifier"}),
        ("t5", "SequenceClassification", {"classification_head"}),
        ("bert", "TokenClassification", {"classifier"}),
        ("llama", "TokenClassification", {"score"}),
        ("gpt2", "QuestionAnswering", {"qa_outputs"}),
        ("t5", "QuestionAnswering", {"qa_outputs"}),
        ("bert", "MaskedLM", set()),
    ],
)
def test_lora_trains_a_new_head_as_a_whole(model_type: str, head: str, expected: set[str]) -> None:
    pytest.importorskip("peft")
    adapter = yaml.safe_load((CONFIGS / "method/lora.yaml").read_text())["model"]["init_args"]["adapter"]
    sizes: dict[str, Any] = {"vocab_size": 40, "num_hidden_layers": 1}
    sizes |= {"t5": {"num_layers": 1, "d_model": 16, "d_ff": 32}, "distilbert": {"n_layers": 1}}.get(model_type, {})
    if model_type in ("t5", "distilbert"):
        del sizes["num_hidden_layers"]
    bare = build_network(NetworkSource(model_type=model_type, model_config=sizes), f"AutoModelFor{head}")
    network = add_adapter(bare, adapter, peft_task_type(f"AutoModelFor{head}"))
    trained = {name.removeprefix("base_model.model.") for name, p in network.named_parameters() if p.requires_grad}
    whole = {name for name in trained if "lora_" not in name}
    assert {name.split(".")[0] for name in whole} == expected
    assert not any(name.split(".")[0] in expected for name in trained - whole)


@pytest.mark.parametrize(
    ("method", "module", "message"),
    [
        ("adamw_8bit", "torchao.optim", "Got an optimizer of torchao, but torchao is not installed. Run: pip install"),
        ("galore", "galore_torch", "pip install galore-torch"),
        ("lora", "peft", "pip install"),
    ],
)
def test_a_missing_package_is_named(
    method: str, module: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeError, match=message):
        run("trec", method, tmp_path)


class _LowRank(torch.optim.AdamW):
    """Stands in for the optimizer of galore-torch: takes its arguments."""

    def __init__(self, params: Any, no_deprecation_warning: bool = False, **options: Any) -> None:
        assert no_deprecation_warning
        super().__init__(params, **options)


def test_galore_projects_matrices_that_are_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "galore_torch", SimpleNamespace(GaLoreAdamW=_LowRank))
    monkeypatch.setitem(sys.modules, "galore_torch.galore_projector", SimpleNamespace(GaLoreProjector=_LowRank))
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2))
    optimizer = GaLoreAdamW([{"params": model.parameters(), "weight_decay": 0.1}], lr=0.5, rank=4)
    large, rest = optimizer.param_groups
    assert [tuple(p.shape) for p in large["params"]] == [(16, 8)]
    assert (large["rank"], large["update_proj_gap"], large["scale"], large["proj_type"]) == (4, 200, 0.25, "std")
    assert "rank" not in rest
    assert [tuple(p.shape) for p in rest["params"]] == [(16,), (2, 16), (2,)]
    assert (large["weight_decay"], rest["weight_decay"], rest["lr"]) == (0.1, 0.1, 0.5)
    with pytest.raises(ValueError, match="Got rank=8, but no matrix has more rows and columns"):
        GaLoreAdamW(model.parameters(), rank=8)


@pytest.mark.parametrize("name", ["AdamW8bit", "GaLoreAdamW"])
def test_a_resumed_run_is_one_that_was_never_interrupted(name: str, tmp_path: Path) -> None:
    pytest.importorskip({"AdamW8bit": "torchao", "GaLoreAdamW": "galore_torch"}[name])
    options = {"AdamW8bit": {"block_size": 8}, "GaLoreAdamW": {"rank": 4, "update_proj_gap": 2}}[name]

    def fit(steps: int, **resumed: Any) -> Manual:
        module = Manual(lambda parameters: getattr(packaged_optimizers, name)(parameters, lr=1e-2, **options))
        fitting = trainer(max_epochs=-1, max_steps=steps)
        fitting.fit(module, ResumableLoader(tokens(8)), **resumed)
        fitting.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    fit(5)
    assert_same_weights(fit(8, ckpt_path=tmp_path / "5.ckpt"), fit(8))


class CPUOffloadOptimizer(torch.optim.Optimizer):
    """Stands in for that of torchao: it is an Optimizer by name only, and its inner ones hold all."""

    def __init__(self, params: Any, kind: Any, *, offload_gradients: bool, **options: Any) -> None:
        assert not offload_gradients
        self.optim_dict = {0: kind(params, **options)}

    @property
    def param_groups(self) -> Any:
        return self.optim_dict[0].param_groups

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        self.optim_dict[0].step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optim_dict[0].zero_grad(set_to_none)

    def state_dict(self) -> Any:
        return {"offloaded": [self.optim_dict[0].state_dict()]}


def test_offloading_fits_into_a_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "torchao.optim", SimpleNamespace(CPUOffloadOptimizer=CPUOffloadOptimizer))
        patched.setattr("lightning_hift.packaged_optimizers._has_gpu", lambda: True)
        on_the_cpu = ("--trainer.accelerator=cpu", "--model.optimizer.weight_decay=0")
        offloaded = run("trec", "cpu_offload", tmp_path, *on_the_cpu)
    plain = run("trec", "full", tmp_path, "--model.optimizer.weight_decay=0")
    assert_same_weights(offloaded.model, plain.model)


def test_what_cannot_be_clipped_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", SimpleNamespace(CPUOffloadOptimizer=CPUOffloadOptimizer))
    monkeypatch.setattr("lightning_hift.packaged_optimizers._has_gpu", lambda: True)
    for kind in (OffloadedAdamW, MeZO):
        with pytest.raises(
            ValueError, match=r"Got gradient_clip_val=1.0, but .* has no gradients that could be clipped"
        ):
            trainer().fit(Manual(kind, gradient_clip_val=1.0), loader(1))


def test_an_offloading_optimizer_is_not_for_hift(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = CPUOffloadOptimizer(nn.Linear(2, 2).parameters(), torch.optim.AdamW, offload_gradients=False)
    with pytest.raises(TypeError, match="it wraps AdamW, which holds the state and steps by itself"):
        check_optimizer(optimizer)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_offloading_says_that_it_needs_a_gpu() -> None:
    pytest.importorskip("torchao")
    with pytest.raises(RuntimeError, match="OffloadedAdamW, which needs a CUDA GPU"):
        OffloadedAdamW(nn.Linear(2, 2).parameters())
