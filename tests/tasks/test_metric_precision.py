"""Metrics of the tasks are the same in every precision of the network, for the same predictions."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_hift.benchmark.run_measures import RunMeasures
from lightning_hift.plugin.training_speed import count_tokens
from lightning_hift.tasks import (
    CausalLM,
    ConditionalGeneration,
    PromptClassification,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
)
from tests.tiny_texts import SMALL, quiet_trainer

BERT = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
T5 = {"vocab_size": 20, "d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}
T5 |= {"decoder_start_token_id": 0}
LLAMA = {**SMALL, "vocab_size": 20, "num_hidden_layers": 1}
WORDS = ["a", "the", "film", "plot", "is", "was", "and", "good", "bad", "fine"]
RUNS: list[dict[str, Any]] = [{"precision": "bf16-mixed"}]
RUNS += [{"precision": p, "strategy": s} for p in ("bf16-true", "16-true") for s in ("auto", "hift")]

Batches = list[dict[str, Any]]


# --- tasks whose network answers what the batch says ------------------------------------------------------------------


def logits_of(*shape: int) -> Tensor:
    """Random multiples of 1/32 with 7 bits, which all floating dtypes hold exactly."""
    return torch.randint(-127, 128, shape) / 32


def ids_of(*shape: int) -> Tensor:
    return torch.randint(1, 20, shape)


def causal() -> tuple[CausalLM, Batches]:
    batches = [{"input_ids": ids_of(4, 9), "logits": logits_of(4, 9, 20)} for _ in range(100)]
    return CausalLM(model_type="llama", model_config=LLAMA, bytes_per_token=2.0), batches


def classes() -> tuple[SequenceClassification, Batches]:
    batches = [
        {"input_ids": ids_of(7, 5), "labels": torch.randint(3, (7,)), "logits": logits_of(7, 3)} for _ in range(60)
    ]
    return SequenceClassification(model_type="bert", model_config=BERT, labels=3), batches


def numbers() -> tuple[SequenceClassification, Batches]:
    batches = []
    for _ in range(60):
        labels = torch.randint(41, (7,)) / 8
        logits = (labels + torch.randint(-8, 9, (7,)) / 8)[:, None]
        batches.append({"input_ids": ids_of(7, 5), "labels": labels, "logits": logits})
    return SequenceClassification(model_type="bert", model_config=BERT, regression=True), batches


def prompts() -> tuple[PromptClassification, Batches]:
    batches = [
        {
            "input_ids": ids_of(7, 5),
            "blank_position": torch.randint(5, (7,)),
            "labels": torch.randint(2, (7,)),
            "logits": logits_of(7, 5, 20),
        }
        for _ in range(60)
    ]
    return PromptClassification(model_type="bert", model_config=BERT, word_ids=[4, 5]), batches


def tags() -> tuple[TokenClassification, Batches]:
    batches = [
        {"input_ids": ids_of(7, 5), "labels": torch.randint(3, (7, 5)), "logits": logits_of(7, 5, 3)} for _ in range(60)
    ]
    return TokenClassification(model_type="bert", model_config=BERT, labels=["O", "B-X", "I-X"]), batches


def questions() -> tuple[QuestionAnswering, Batches]:
    length, text = len(WORDS), " ".join(WORDS)
    starts = torch.tensor([len(" ".join(WORDS[:i])) + (i > 0) for i in range(length)])
    ends = starts + torch.tensor([len(word) for word in WORDS])
    ends[0] = 0  # the first token stands for no answer
    batches = [
        {
            "input_ids": ids_of(5, length),
            "start_positions": torch.randint(1, length, (5,)),
            "end_positions": torch.randint(1, length, (5,)),
            "question": torch.arange(5) + 5 * number,
            "null_positions": torch.zeros(5, dtype=torch.long),
            "text": [text] * 5,
            "char_starts": starts.expand(5, length),
            "char_ends": ends.expand(5, length),
            "answers": [[" ".join(WORDS[2 : 3 + i])] for i in range(5)],
            "logits": logits_of(5, length, 2),
        }
        for number in range(60)
    ]
    return QuestionAnswering(model_type="bert", model_config=BERT), batches


def texts() -> tuple[ConditionalGeneration, Batches]:
    module = ConditionalGeneration(model_type="t5", model_config=T5)
    batches, written = [], []
    for number in range(60):
        labels, rows = ids_of(4, 6), torch.randint(len(WORDS), (4, 12)).tolist()
        references = [" ".join(WORDS[i] for i in row) for row in rows]
        written += [" ".join(text.split()[:9] + ["is"] * (i % 4)) for i, text in enumerate(references)]
        batches.append(
            {
                "input_ids": ids_of(4, 5),
                "labels": labels,
                "prompts": {"input_ids": torch.arange(4 * number, 4 * number + 4)[:, None]},
                "references": [[text] for text in references],
                "logits": logits_of(4, 6, 20),
            }
        )
    module.generate = lambda prompts: [written[i] for i in prompts["input_ids"][:, 0]]  # type: ignore[method-assign]
    return module, batches


TASKS: list[Callable[[], tuple[Any, Batches]]] = [causal, classes, numbers, prompts, tags, questions, texts]


def told(module: Any) -> Any:
    """The module, whose network returns the logits of the batch in its dtype, with a loss as in transformers."""

    def forward(batch: Mapping[str, Any]) -> Any:
        mixed = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if mixed else next(module.network.parameters()).dtype
        logits = batch["logits"].to(dtype)
        loss = None
        if isinstance(module, CausalLM):  # in float32
            loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())
        if isinstance(module, ConditionalGeneration):  # as in T5
            loss = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        if isinstance(module, SequenceClassification) and "labels" in batch:  # as in BERT
            measure = mse_loss if module.regression else cross_entropy
            loss = measure(logits.squeeze(-1), batch["labels"])
        return SimpleNamespace(
            logits=logits, loss=loss, start_logits=logits[..., 0], end_logits=logits[..., min(1, logits.shape[-1] - 1)]
        )

    module.forward = forward
    return module


def loader(batches: Batches) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def measured(task: Callable[[], tuple[Any, Batches]], **options: Any) -> tuple[dict[str, float], Any]:
    """What is logged, and the module."""
    torch.manual_seed(0)
    module, batches = task()
    (logged,) = quiet_trainer(**options).validate(told(module), loader(batches), verbose=False)
    return dict(logged), module


def metrics_of(module: Any) -> list[Metric]:
    found = [metric for metric in module.modules() if isinstance(metric, Metric)]
    assert found
    return found


def check_states(module: Any) -> None:
    """All states, and what they are reset to, are float32 or int64."""
    for metric in metrics_of(module):
        states = [*metric._defaults.values(), *metric.metric_state.values()]
        assert states
        for state in states:
            for part in state if isinstance(state, list) else [state]:
                assert part.dtype == (torch.float32 if part.is_floating_point() else torch.int64)
        assert metric.dtype == torch.float32


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_precision_changes_no_metric(task: Callable[[], tuple[Any, Batches]]) -> None:
    expected, module = measured(task, precision="32-true")
    check_states(module)
    assert all(math.isfinite(value) for value in expected.values())
    for options in RUNS:
        found, module = measured(task, **options)
        assert found == expected, options
        check_states(module)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "32-true"])
def test_loss_and_perplexity_are_those_of_64_bits(precision: Any) -> None:
    found, _ = measured(causal, precision=precision)
    torch.manual_seed(0)
    _, batches = causal()
    losses = [
        cross_entropy(batch["logits"][:, :-1].flatten(0, 1).double(), batch["input_ids"][:, 1:].flatten())
        for batch in batches
    ]
    expected = float(torch.stack(losses).mean())
    assert found["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["val_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert found["val_bits_per_byte"] == pytest.approx(expected / math.log(2) / 2, rel=1e-5)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "to a dtype": lambda module: module.to(torch.bfloat16),
    "to a device and a dtype": lambda module: module.to("cpu", torch.float16),
    "copied": lambda module: copy.deepcopy(module.bfloat16()),
    "pickled": lambda module: pickle.loads(pickle.dumps(module.bfloat16())),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_metrics_stay_in_32_bits(change: Callable[[Any], Any]) -> None:
    module = SequenceClassification(model_type="bert", model_config=BERT, regression=True)
    with default_dtype(torch.bfloat16):
        module.configure_model()
        check_states(module)
        metrics = module.metrics["val"]
        preds, target = torch.arange(500).bfloat16(), torch.arange(500).float() + torch.tensor([0.0, 1.0]).repeat(250)
        metrics.update(preds[:250], target[:250])  # type: ignore[operator]
        module = change(module)
        metrics = module.metrics["val"]
        check_states(module)
        metrics.update(preds[250:], target[250:])  # type: ignore[operator]
        found = metrics.compute()  # type: ignore[operator]
    check_states(module)
    values = torch.stack([preds.double(), target.double()])
    assert float(found["val_pearson"]) == pytest.approx(float(values.corrcoef()[0, 1]), rel=1e-5)
    assert float(found["val_mse"]) == pytest.approx(float((values[0] - values[1]).square().mean()), rel=1e-5)
    metrics.reset()  # type: ignore[operator]
    check_states(module)


def test_metrics_move_with_the_module() -> None:
    module = SequenceClassification(model_type="bert", model_config=BERT, regression=True)
    module.configure_model()
    module.to("meta", torch.bfloat16)
    check_states(module)
    assert all(metric.device.type == "meta" for metric in metrics_of(module))
    assert module.metrics["val"]["mse"].sum_squared_error.is_meta  # type: ignore[index]


def test_metrics_of_a_loaded_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, batches = numbers()
    trainer = quiet_trainer(precision="bf16-true")
    (expected,) = trainer.validate(told(module), loader(batches), verbose=False)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=False)["state_dict"]
    assert all(name.startswith("network.") for name in saved)
    loaded = SequenceClassification.load_from_checkpoint(
        tmp_path / "saved.ckpt", model_type="bert", model_config=BERT, regression=True
    )
    (found,) = quiet_trainer(precision="bf16-true").validate(told(loaded), loader(batches), verbose=False)
    assert found == expected
    check_states(loaded)


@pytest.mark.parametrize("kind", ["regression", "classes", "texts"])
def test_measured_loss_is_that_of_the_network(kind: str) -> None:
    torch.manual_seed(0)
    batch = {"input_ids": ids_of(3, 5)}
    if kind == "texts":
        module: Any = ConditionalGeneration(model_type="t5", model_config=T5)
        batch["labels"] = ids_of(3, 5)
    else:
        module = SequenceClassification(model_type="bert", model_config=BERT, regression=kind == "regression")
        batch["labels"] = torch.rand(3) if module.regression else torch.tensor([0, 1, 1])
    (logged,) = quiet_trainer().validate(module, loader([batch]), verbose=False)
    with torch.no_grad():
        assert logged["val_loss"] == float(module.eval().loss(batch))


class Alternating(pl.LightningModule):
    """Loses 1 and 129/128 in turns: 16 bits hold both, but not their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.weight * 0 + 1 + (batch_idx % 2) / 128
        assert loss.dtype == torch.bfloat16
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_means_of_losses_of_16_bits_have_32(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    measures = RunMeasures(str(path), memory=False)
    trainer = quiet_trainer(precision="bf16-true", max_epochs=1, callbacks=[measures])
    trainer.fit(Alternating(), DataLoader(torch.zeros(400)))  # type: ignore[arg-type]
    assert float(trainer.callback_metrics["train_loss"]) == 1 + 1 / 256
    losses = json.loads(path.read_text())["losses"]
    assert {point["loss"] for point in losses} == {round(1 + 1 / 256, 5)}


def test_tokens_are_counted_in_whole_numbers() -> None:
    ids = torch.ones(7, 143, dtype=torch.long)
    found = count_tokens({"input_ids": ids, "attention_mask": torch.ones(7, 143, dtype=torch.bfloat16)})
    assert int(found) == 1001  # type: ignore[arg-type]
