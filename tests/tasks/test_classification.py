"""Networks of transformers from a folder or a configuration, and classification of texts with them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import nn
from transformers import AutoTokenizer

from lightning_hift.cli import main
from lightning_hift.data import ClassificationDataModule
from lightning_hift.tasks import SequenceClassification
from lightning_hift.tasks.export import read_tokenizer_files
from lightning_hift.tasks.network import NetworkSource, build_network
from lightning_hift.tasks.weight_decay import decay_groups
from tests.matrices import crossed
from tests.models import as_published
from tests.text_models import WORDS, save_network, save_tokenizer

pytest.importorskip("datasets")

CONFIGS = Path(__file__).parents[2] / "configs"
HEAD = "AutoModelForSequenceClassification"
GOOD, BAD = ["good", "fine", "great", "yes"], ["bad", "poor", "awful", "no"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-hift"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_network(tmp_path / "bert")


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", **{**quiet, "enable_model_summary": False, **options})


def reviews(tmp_path: Path, **options: Any) -> ClassificationDataModule:
    rows = [{"text": f"the film was {word} and {word}", "label": "bad"} for word in BAD]
    rows += [{"text": f"the film was {word}", "label": "good"} for word in GOOD]
    path = tmp_path / "reviews.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = dict.fromkeys(("train", "validation", "test"), str(path))
    return ClassificationDataModule(
        **{"files": files, "cache_dir": str(tmp_path / "cache"), "batch_size": 4, **options}
    )


# --- networks ---------------------------------------------------------------------------------------------------------


def test_weights_come_from_the_folder_and_only_the_head_is_new(folder: Path) -> None:
    from transformers import AutoModel

    network = build_network(NetworkSource(str(folder)), HEAD, num_labels=3)
    saved = AutoModel.from_pretrained(folder).state_dict()
    loaded = {name.removeprefix("bert."): value for name, value in network.state_dict().items()}
    assert loaded.keys() - saved.keys() == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(value, loaded[name]) for name, value in saved.items())
    assert all(module.training for module in network.modules())
    assert loaded["classifier.weight"].shape == (3, 16)


def test_random_weights_take_only_the_configuration(folder: Path) -> None:
    a, b = (build_network(NetworkSource(str(folder), random_weights=fresh), HEAD) for fresh in (True, False))
    assert a.config.hidden_size == b.config.hidden_size == 16  # type: ignore[union-attr]
    assert not torch.equal(a.get_input_embeddings().weight, b.get_input_embeddings().weight)  # type: ignore[operator]


def test_options_reach_the_network(folder: Path) -> None:
    source = NetworkSource(
        str(folder),
        dtype="bfloat16",
        attn_implementation="eager",
        gradient_checkpointing=True,
        model_config={"hidden_dropout_prob": 0.25},
    )
    network = build_network(source, HEAD)
    assert next(network.parameters()).dtype == torch.bfloat16
    assert network.config._attn_implementation == "eager"  # type: ignore[union-attr]
    assert any(getattr(m, "gradient_checkpointing", False) for m in network.modules())
    assert {m.p for m in network.modules() if isinstance(m, nn.Dropout)} >= {0.25}


def test_nothing_is_read_on_the_meta_device(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with torch.device("meta"):
        network = build_network(NetworkSource(str(folder)), HEAD)
    assert {p.device.type for p in network.parameters()} == {"meta"}


def test_a_head_of_another_size_starts_anew(tmp_path: Path) -> None:
    saved = save_network(tmp_path / "three", HEAD, num_labels=3)
    with pytest.warns(UserWarning, match=r"head of .* has another shape and starts random: classifier"):
        network = build_network(NetworkSource(str(saved)), HEAD, num_labels=2)
    assert network.config.num_labels == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "Got model=None and model_type=None; give one of them"),
        ({"model": "x", "model_type": "bert"}, ValueError, "give one of them"),
        ({"model_type": "brt"}, ValueError, "Got model_type='brt', .* Did you mean 'bert'"),
        ({"model_type": "vit"}, ValueError, "is no model for sequence classification"),
        ({"model_type": "vits"}, ValueError, "is no model for sequence classification"),
        ({"model": "no/such"}, OSError, "model='no/such', which is no local folder .*hf download no/such"),
        ({"model_config": {"hidden": 3}}, ValueError, "Got 'hidden' in model_config, .* Did you mean 'hidden_"),
        (
            {"model_config": {"hidden_size": 32}},
            ValueError,
            r"weights do not fit .* has shape \(.*\), .* random_weights",
        ),
    ],
)
def test_networks_that_cannot_be_had(
    folder: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    named = "model" in options or "model_type" in options or not options
    with pytest.raises(error, match=message):
        build_network(NetworkSource(**({} if named else {"model": str(folder)}), **options), HEAD)


def test_a_model_without_the_head_says_which_it_has(tmp_path: Path) -> None:
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ValueError, match=r"no model for causal language modelling .* It has one for .*sequence-to-seq"):
        build_network(NetworkSource(model_type="t5", model_config=t5), "AutoModelForCausalLM")


def test_fields_that_only_the_code_of_the_network_reads() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    relative = {**sizes, "relative_attention": True, "position_buckets": 8}
    network = build_network(NetworkSource(model_type="deberta-v2", model_config=relative), HEAD)
    assert network.deberta.encoder.rel_embeddings.num_embeddings == 16  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="Got 'position_bucket' in model_config"):
        build_network(NetworkSource(model_type="deberta-v2", model_config={**sizes, "position_bucket": 8}), HEAD)


def test_a_decoder_starts_with_padding_where_its_configuration_does_not_say() -> None:
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    network = build_network(NetworkSource(model_type="t5", model_config=t5), HEAD)
    assert network.config.decoder_start_token_id == network.config.pad_token_id == 0  # type: ignore[union-attr]
    assert network(torch.tensor([[5, 6, 1]])).logits.shape == (1, 2)
    given = NetworkSource(model_type="t5", model_config={**t5, "decoder_start_token_id": 3})
    assert build_network(given, HEAD).config.decoder_start_token_id == 3  # type: ignore[union-attr]


def test_an_architecture_without_a_limit_of_positions() -> None:
    assert SequenceClassification(model_type="xlnet", model_config={"n_layer": 1}).max_positions is None


def test_missing_weights_below_the_head_are_a_warning(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(
        UserWarning, match="1 weights below the head are not in .* start random: bert.encoder.layer.1.out"
    ):
        build_network(NetworkSource(str(folder)), HEAD)


def test_norms_and_biases_are_not_decayed() -> None:
    network = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm((2, 2)), nn.Linear(4, 4, bias=False))
    network[3].weight = network[1].weight
    decayed, spared = decay_groups(network)
    assert [p.shape for p in decayed["params"]] == [(3, 4), (4, 4)]
    assert [p.shape for p in spared["params"]] == [(4,), (2, 2), (2, 2)]
    assert spared["weight_decay"] == 0
    network.requires_grad_(False)[0].requires_grad_(True)
    assert [len(group["params"]) for group in decay_groups(network)] == [1]


# --- classification ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"callbacks": True}, {"strategy": "hift", "callbacks": True}])
def test_reviews_are_learnt(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    pl.seed_everything(0)
    if "callbacks" in options:
        options = {**options, "callbacks": as_published(always_active=["head"], steps_per_group=2)}
    task = SequenceClassification(model=str(folder), optimizer=adam, lr_scheduler="linear")
    fitted = trainer(max_epochs=100, check_val_every_n_epoch=100, **options)
    fitted.fit(task, reviews(tmp_path))
    assert fitted.callback_metrics["val_accuracy"] == 1
    assert fitted.callback_metrics["val_f1"] == 1
    assert task.network.config.id2label == {0: "bad", 1: "good"}  # type: ignore[union-attr]
    records = [record for batch in trainer().predict(task, reviews(tmp_path)) for record in batch]  # type: ignore[union-attr]
    assert [record["label"] for record in records] == ["bad"] * 4 + ["good"] * 4
    assert all(0.5 < record["probability"] <= 1 for record in records)


def test_a_data_module_takes_the_tokenizer_of_each_module_that_it_serves(tmp_path: Path) -> None:
    data = reviews(tmp_path)
    seen = []
    for name, words in (("one", WORDS), ("other", WORDS[::-1])):
        module = SequenceClassification(model=str(save_network(tmp_path / name)), optimizer=adam)
        save_tokenizer(tmp_path / name, words)
        trainer(max_steps=1).fit(module, data)
        seen.append(data.examples["train"]["input_ids"][0])
        assert module.tokenizer_files == read_tokenizer_files(AutoTokenizer.from_pretrained(tmp_path / name))
        trainer().test(module, data, verbose=False)
        assert data.examples["train"]["input_ids"][0] == seen[-1]
    assert seen[0] != seen[1]


def test_the_tokenizer_is_of_the_same_revision_as_the_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    read = AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda name, revision: asked.append((name, revision)) or read(name)
    )
    for options in ({}, {"tokenizer": str(folder)}):
        data = reviews(tmp_path, **options)
        trainer(max_steps=1).fit(SequenceClassification(model=str(folder), revision="v2", optimizer=adam), data)
    assert asked == [(str(folder), "v2"), (str(folder), None)]


def test_a_single_class_is_none(folder: Path, tmp_path: Path) -> None:
    data = reviews(tmp_path, label_names=["good"], on_bad_row="skip")
    with pytest.raises(ValueError, match=r"Got the labels \['good'\] of the data; .* label_names of the data module"):
        trainer(max_steps=1).fit(SequenceClassification(model=str(folder)), data)


@pytest.mark.parametrize("regression", [False, True])
def test_module_and_data_agree_on_what_a_label_is(folder: Path, tmp_path: Path, regression: bool) -> None:
    task = SequenceClassification(model=str(folder), regression=regression)
    (tmp_path / "numbers.jsonl").write_text("".join(f'{{"text": "the film", "label": {i}}}\n' for i in range(4)))
    files = {"train": str(tmp_path / "numbers.jsonl")}
    with pytest.raises(ValueError, match=f"Got regression={regression} for the module .* Set both alike"):
        trainer(max_steps=1).fit(task, reviews(tmp_path, regression=not regression, files=files))


def test_without_training_rows_the_labels_are_those_of_the_model(folder: Path, tmp_path: Path) -> None:
    run, task = trainer(max_steps=1), SequenceClassification(model=str(folder))
    run.fit(task, reviews(tmp_path, label_names=["good", "bad"]))
    saved = task.save_pretrained(tmp_path / "saved")
    data = reviews(tmp_path)
    data.files = {"test": data.files["test"], "predict": data.files["test"]}  # type: ignore[index]
    again = SequenceClassification(model=str(saved))
    trainer().test(again, data, verbose=False)
    assert data.label_names == ["good", "bad"]
    assert again.network.config.id2label == {0: "good", 1: "bad"}  # type: ignore[union-attr]
    del data.label_names
    with pytest.raises(ValueError, match=r"Got no label_names, no training rows .* Give label_names, in the order of"):
        trainer().predict(SequenceClassification(model=str(folder)), data)


def test_metrics_are_those_of_all_rows(folder: Path, tmp_path: Path) -> None:
    task = SequenceClassification(model=str(folder))
    data = reviews(tmp_path, eval_batch_size=3)
    found = trainer().validate(task, data, verbose=False)[0]
    task.eval()
    with torch.no_grad():
        batches = list(data.val_dataloader())
        logits = torch.cat([task(batch).logits for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    chosen = logits.argmax(-1)
    tp, tn, fp, fn = ((chosen == a) & (labels == b) for a, b in ((1, 1), (0, 0), (1, 0), (0, 1)))
    tp, tn, fp, fn = (float(x.sum()) for x in (tp, tn, fp, fn))
    assert found["val_loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert found["val_accuracy"] == pytest.approx((tp + tn) / 8)
    assert found["val_f1"] == pytest.approx(2 * tp / max(2 * tp + fp + fn, 1), rel=1e-5)
    scale = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert found["val_matthews"] == pytest.approx((tp * tn - fp * fn) / scale if scale else 0, abs=1e-5)


def test_numbers_are_learnt(folder: Path, tmp_path: Path) -> None:
    pl.seed_everything(0)
    rows = [{"text": " ".join(["good"] * n), "score": n / 2} for n in range(1, 9)]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = dict.fromkeys(("train", "validation", "test"), str(tmp_path / "scores.jsonl"))
    data = ClassificationDataModule(
        files=files, label="score", regression=True, cache_dir=str(tmp_path / "cache"), batch_size=4
    )
    task = SequenceClassification(model=str(folder), regression=True, optimizer=adam, lr_scheduler="linear")
    fitted = trainer(max_epochs=60, check_val_every_n_epoch=60, callbacks=as_published(always_active=["head"]))
    fitted.fit(task, data)
    assert fitted.callback_metrics["val_pearson"] > 0.9
    assert fitted.callback_metrics["val_spearman"] > 0.9
    (records,) = trainer().predict(
        task,
        ClassificationDataModule(
            files=files, label="score", regression=True, cache_dir=str(tmp_path / "cache"), batch_size=8
        ),
    )  # type: ignore[misc]
    assert len(records) == 8
    assert records[7]["score"] > records[0]["score"]


def test_labels_of_a_trained_head_in_another_order_are_told(tmp_path: Path) -> None:
    labels = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    trained = save_network(tmp_path / "trained", HEAD, **labels)
    with pytest.warns(UserWarning, match="has the labels good, bad, but here they are in another order: bad, good"):
        trainer(max_steps=1).fit(SequenceClassification(model=str(trained), optimizer=adam), reviews(tmp_path))


@pytest.mark.parametrize("labels", [["good", "bad"], 3])
def test_labels_of_the_module_are_those_of_the_data(folder: Path, tmp_path: Path, labels: Any) -> None:
    module = SequenceClassification(model=str(folder), labels=labels)
    with pytest.raises(ValueError, match=r"Got labels=.* in the module, but the data module has bad, good. Leave"):
        trainer(max_steps=1).fit(module, reviews(tmp_path))


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("gpt2", {}),
        ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 16}),
        ("roberta", {"pad_token_id": 0}),
        ("distilbert", {"dim": 16, "n_layers": 2, "n_heads": 2}),
        ("deberta-v2", {}),
        ("modernbert", {"pad_token_id": 0}),
    ],
)
def test_other_architectures(tmp_path: Path, model_type: str, sizes: dict[str, Any]) -> None:
    folder = save_network(tmp_path / model_type, HEAD, model_type, **sizes)
    save_tokenizer(folder, pad_token=None, eos_token="[SEP]") if model_type in ("gpt2", "llama") else None
    task = SequenceClassification(model=str(folder), optimizer=adam)
    fitted = trainer(max_steps=20, callbacks=as_published())
    fitted.fit(task, reviews(tmp_path))
    assert torch.isfinite(fitted.callback_metrics["train_loss"])
    if "pad_token" in sizes or model_type in ("gpt2", "llama"):
        assert task.network.config.pad_token_id == 3  # type: ignore[union-attr]


def test_a_text_ends_where_the_padding_of_the_tokenizer_begins(tmp_path: Path) -> None:
    folder = save_network(tmp_path / "llama", HEAD, "llama", num_key_value_heads=2, pad_token_id=0)
    save_tokenizer(folder, pad_token=None, eos_token="[SEP]")
    task = SequenceClassification(model=str(folder))
    together = trainer().predict(task, reviews(tmp_path, batch_size=8))
    alone = trainer().predict(task, reviews(tmp_path, batch_size=1))
    records = [[row["probability"] for batch in found for row in batch] for found in (together, alone)]  # type: ignore[union-attr]
    assert records[0] == pytest.approx(records[1], abs=1e-6)


def test_an_adapter_trains_itself_and_the_head(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    task = SequenceClassification(model=str(folder), adapter={"peft_type": "LORA", "r": 2}, optimizer=adam)
    trainer(max_steps=6, callbacks=as_published()).fit(task, reviews(tmp_path))
    trained = [name for name, p in task.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name or "classifier" in name for name in trained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["one"]}, r"Got labels=\['one'\]; a classification needs at least two"),
        ({"labels": 3, "regression": True}, "labels=3 with regression=True, which has none"),
        ({"warmup": 1.0}, "Got warmup=1.0; it is a share of the steps"),
        ({"lr_scheduler": "square"}, "Got lr_scheduler='square'; by name there are constant, .*linear"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceClassification(model="bert", **options)


def test_a_tokenizer_too_large_for_the_network(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "large", [f"word{i}" for i in range(500)])
    data = reviews(tmp_path, tokenizer=str(tmp_path / "large"))
    with pytest.raises(ValueError, match=r"Got a tokenizer of 505 tokens for a network of 27. Use the network's own"):
        trainer().validate(SequenceClassification(model=str(folder)), data)
    fresh = SequenceClassification(model=str(folder), random_weights=True)
    trainer().validate(fresh, data, verbose=False)
    assert fresh.network.config.vocab_size == 505  # type: ignore[union-attr]


def test_schedules_end_at_the_last_step(folder: Path, tmp_path: Path) -> None:
    class Rates(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
            self.seen.append(optimizer.param_groups[0]["lr"])

    rates = Rates()
    task = SequenceClassification(
        model=str(folder), optimizer=adam, lr_scheduler="linear", warmup=0.5, accumulate_grad_batches=2
    )
    trainer(max_epochs=4, callbacks=rates).fit(task, reviews(tmp_path, batch_size=2))
    assert rates.seen == pytest.approx([0, 2.5e-3, 5e-3, 7.5e-3, 1e-2, 7.5e-3, 5e-3, 2.5e-3])
    with pytest.raises(ValueError, match=r"in a run without an end. Set max_epochs or max_steps"):
        trainer(max_epochs=-1).fit(SequenceClassification(model=str(folder), lr_scheduler="linear"), reviews(tmp_path))


# --- configurations ---------------------------------------------------------------------------------------------------


def classification_tasks() -> list[Path]:
    return [path for path in sorted(CONFIGS.glob("task/*.yaml")) if "SequenceClassification" in path.read_text()]


@pytest.mark.parametrize(
    ("task", "method"),
    crossed(classification_tasks(), ["hift", "full"]),
    ids=lambda value: getattr(value, "stem", value),
)
def test_configs_run(task: Path, method: str, folder: Path, tmp_path: Path) -> None:
    columns = yaml.safe_load(task.read_text())["data"]["init_args"]
    names = [columns[key] for key in ("text", "text_pair") if key in columns]
    rows = [{**dict.fromkeys(names, word), columns["label"]: i % 2} for i, word in enumerate([*GOOD, *BAD])]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {
        "dataset": "null",
        "config_name": "null",
        "splits": "null",
        "max_length": "16",
        "cache_dir": tmp_path / "c",
    }
    main(
        [
            "fit",
            *("--config", str(task), "--config", str(CONFIGS / "model/roberta_base.yaml")),
            *("--config", str(CONFIGS / f"method/{method}.yaml"), f"--model.model={folder}"),
            *(f"--data.{name}={value}" for name, value in files.items()),
            f'--data.files={{"train": "{path}", "validation": "{path}"}}',
            *("--trainer.accelerator=cpu", "--trainer.max_epochs=4", "--trainer.logger=false"),
            *("--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"),
            *(
                "--trainer.callbacks+=lightning_hift.benchmark.RunMeasures",
                f"--trainer.callbacks.path={tmp_path / 'report'}",
            ),
        ]
    )
    report = json.loads((tmp_path / "report").read_text())
    assert report["step"] == 4
    assert (report["trainable_at_once"] < report["trained_parameters"]) == (method == "hift")
    assert math.isfinite(report["val_loss"])
