"""Exported folders open in transformers and peft, and give the same logits."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import DataLoader

from lightning_hift.cli import main
from lightning_hift.data import ClassificationDataModule
from lightning_hift.tasks import CausalLM, SequenceClassification
from lightning_hift.tasks.export import EXPORT_KEY, export_checkpoint
from tests.models import as_published, trainer

BERT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
GPT2 = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 32}
LLAMA = {**BERT, "num_key_value_heads": 2, "vocab_size": 40, "tie_word_embeddings": True}
BART = {"d_model": 16, "vocab_size": 40, "max_position_embeddings": 32} | {
    f"{part}_{field}": value
    for part in ("encoder", "decoder")
    for field, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
}
WORDS = ["[PAD]", "[UNK]", "good", "bad", "film", "plot", "very", "not"]
IDS = torch.tensor([[2, 3, 4, 5], [6, 7, 2, 3]])

# Of peft's making.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


class Seq2Seq(CausalLM):
    auto_class = "AutoModelForSeq2SeqLM"


def fitted(module: Any, **options: Any) -> pl.Trainer:
    """A Trainer after two steps on token rows."""
    rows: Any = [{"input_ids": row, "labels": row} for row in IDS]
    run = trainer(max_steps=2, **{"callbacks": [as_published()], **options})
    run.fit(module, DataLoader(rows, batch_size=1))
    return run


def logits(network: Any) -> torch.Tensor:
    arguments = {"decoder_input_ids": IDS} if network.config.is_encoder_decoder else {}
    with torch.no_grad():
        output: torch.Tensor = network.eval()(input_ids=IDS, **arguments).logits
    return output


def checkpoint_of(run: pl.Trainer, folder: Path) -> str:
    run.save_checkpoint(folder / "last.ckpt")
    return str(folder / "last.ckpt")


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "model_type", "config"),
    [(CausalLM, "gpt2", GPT2), (CausalLM, "llama", LLAMA), (Seq2Seq, "bart", BART)],
)
@pytest.mark.parametrize("way", ["module", "checkpoint"])
def test_same_logits(kind: Any, model_type: str, config: dict[str, Any], way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = kind(model_type=model_type, model_config=config)
    run = fitted(module)
    if way == "module":
        folder = module.save_pretrained(tmp_path / "out")
    else:
        folder = export_checkpoint(checkpoint_of(run, tmp_path), str(tmp_path / "out"))
    opened = getattr(transformers, kind.auto_class).from_pretrained(folder)

    torch.testing.assert_close(logits(opened), logits(module.network), rtol=0, atol=0)
    assert opened.config.use_cache is True
    assert opened.generation_config.use_cache is not False
    assert module.network.config.use_cache is False


def test_exporting_leaves_the_module_as_it_is(tmp_path: Path) -> None:
    module = CausalLM(model_type="gpt2", model_config=GPT2)
    fitted(module)
    before = {name: (p, p.data_ptr(), p.dtype, p.detach().clone()) for name, p in module.named_parameters()}
    module.save_pretrained(tmp_path / "out", dtype="bfloat16")
    for name, p in module.named_parameters():
        parameter, pointer, dtype, values = before[name]
        assert p is parameter
        assert (p.data_ptr(), p.dtype) == (pointer, dtype)
        assert torch.equal(p, values)


def test_dtype_and_tied_weights(tmp_path: Path) -> None:
    module = CausalLM(model_type="llama", model_config=LLAMA)
    run = fitted(module)
    folder = export_checkpoint(checkpoint_of(run, tmp_path), str(tmp_path / "out"), dtype="bfloat16")
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in tensors, "the tied head is written twice"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    for name, p in module.network.named_parameters():  # type: ignore[union-attr]
        assert torch.equal(tensors[name], p.bfloat16())


def test_large_files_are_cut_and_open_again(tmp_path: Path) -> None:
    module = CausalLM(model_type="gpt2", model_config=GPT2)
    run = fitted(module)
    folder = export_checkpoint(checkpoint_of(run, tmp_path), str(tmp_path / "out"), max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(opened), logits(module.network))
    # In one piece again: the pieces of before must not be taken for it.
    module.save_pretrained(folder, overwrite=True)
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_cache_that_was_asked_to_be_off_stays_off(tmp_path: Path) -> None:
    module = CausalLM(model_type="gpt2", model_config={**GPT2, "use_cache": False})
    module.configure_model()
    folder = module.save_pretrained(tmp_path / "out")
    assert transformers.AutoConfig.from_pretrained(folder).use_cache is False


def test_weights_in_16_bits(tmp_path: Path) -> None:
    module = CausalLM(model_type="gpt2", model_config=GPT2)
    run = fitted(module, strategy="hift", precision="bf16-true", callbacks=[])
    folder = export_checkpoint(checkpoint_of(run, tmp_path), str(tmp_path / "out"))
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert opened.dtype == torch.bfloat16
    assert torch.equal(logits(opened), logits(module.network))


def test_how_to_generate_is_kept(tmp_path: Path) -> None:
    source = CausalLM(model_type="gpt2", model_config=GPT2)
    source.configure_model()
    source.save_pretrained(tmp_path / "base")
    published = {"do_sample": False, "temperature": 0.6, "eos_token_id": [3, 4]}  # breaks a rule, as Llama-2's does
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(published))
    module = CausalLM(model=str(tmp_path / "base"))
    folder = export_checkpoint(checkpoint_of(fitted(module), tmp_path), str(tmp_path / "out"))
    found = json.loads((folder / "generation_config.json").read_text())
    assert {key: found[key] for key in published} == published


# --- classification, with data module, from the command line ----------------------------------------------------------


def write_tokenizer(folder: Path) -> str:
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> ClassificationDataModule:
    rows = [f"very good film number {i}\tpos" if i % 2 else f"not good plot {i}\tneg" for i in range(8)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.tsv").write_text("text\tlabel\n" + "\n".join(rows) + "\n")
    return ClassificationDataModule(
        files={"train": str(tmp_path / "train.tsv"), "validation": str(tmp_path / "validation.tsv")},
        tokenizer=write_tokenizer(tmp_path / "tokenizer"),
        batch_size=4,
        max_length=16,
        cache_dir=str(tmp_path / "cache"),
    )


def test_a_checkpoint_converts_by_one_command(
    data: ClassificationDataModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = SequenceClassification(
        model_type="bert", model_config=BERT, lr_scheduler="linear", optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3)
    )
    run = trainer(max_epochs=2, callbacks=[as_published(order="top2down", always_active=["head"])])
    run.fit(module, data)
    command = ["export", "--checkpoint", checkpoint_of(run, tmp_path), "--output", str(tmp_path / "my_model")]
    main(command)
    with pytest.raises(SystemExit):
        main(command)
    assert "is not empty. Name another one, or set overwrite" in capsys.readouterr().err
    main([*command, "--overwrite"])

    folder = tmp_path / "my_model"
    assert str(folder) in capsys.readouterr().out
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert opened.config.id2label == {0: "neg", 1: "pos"}
    assert torch.equal(logits(opened), logits(module.network))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("good film")["input_ids"] == [2, 4]
    assert tokenizer.pad_token == "[PAD]"

    card = (folder / "README.md").read_text()
    for fact in (
        "library_name",
        "# my_model",
        "AutoModelForSequenceClassification.from_pretrained",
        "| base model | bert, from its configuration alone |",
        "| task | SequenceClassification |",
        "| data module | ClassificationDataModule |",
        "| files | train: train.tsv; validation: validation.tsv |",
        "| order | top2down |",
        "| layer groups | 3: embedding, network.bert.encoder.layer.0, network.bert.encoder.layer.1 |",
        "| sweeps | 1 |",
        "| precision | 32-true |",
        "| optimizer | AdamW (betas=0.9, 0.999, eps=1e-08, weight_decay=0.01) |",
        "| learning rate | 0.001, at the end 0 |",
        "| schedule | linear, warm-up 0.06 of the steps |",
        "| epochs | 2 |",
        "| optimizer steps | 4 |",
        "| val_accuracy |",
        f"| torch | {version('torch')} |",
        "## Licence",
    ):
        assert fact in card, card
    assert "hift/" not in card


def test_every_checkpoint_has_the_record_and_loads_without_running_code(
    data: ClassificationDataModule, tmp_path: Path
) -> None:
    module = SequenceClassification(model_type="bert", model_config=BERT)
    run = trainer(max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=True)
    run.fit(module, data)
    (path,) = tmp_path.rglob("*.ckpt")
    record = torch.load(path, weights_only=True)[EXPORT_KEY]
    assert record["auto_class"] == "AutoModelForSequenceClassification"
    assert "tokenizer.json" in record["tokenizer"]
    again = SequenceClassification(model_type="bert", model_config=BERT)
    trainer(max_epochs=2).fit(again, data, ckpt_path=path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cold", "warm"], r"labels neg, pos, but this run has others: cold, warm\. Give"),
        (["pos", "neg"], r"labels neg, pos, but this run has them in another order: pos, neg\. Give"),
    ],
)
def test_other_labels_are_refused(
    data: ClassificationDataModule, tmp_path: Path, labels: list[str], message: str
) -> None:
    run = trainer(max_epochs=1)
    run.fit(SequenceClassification(model_type="bert", model_config=BERT), data)
    path = checkpoint_of(run, tmp_path)
    batches = data.val_dataloader()  # a data module would be asked for its labels first
    with pytest.raises(ValueError, match=message):
        trainer().validate(SequenceClassification(model_type="bert", model_config=BERT, labels=labels), batches, path)
    unnamed = SequenceClassification(model_type="bert", model_config=BERT, labels=2)
    trainer().validate(unnamed, data, ckpt_path=path, verbose=False)


# --- adapters ---------------------------------------------------------------------------------------------------------

ADAPTERS = {
    "LORA": {"peft_type": "LORA", "r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    "IA3": {
        "peft_type": "IA3",
        "target_modules": ["c_attn", "mlp.c_proj"],
        "feedforward_modules": ["mlp.c_proj"],
        "fan_in_fan_out": True,
    },
    "ADALORA": {
        "peft_type": "ADALORA",
        "target_modules": ["c_attn"],
        "init_r": 3,
        "target_r": 2,
        "total_step": 10,
        "fan_in_fan_out": True,
    },
    "PREFIX_TUNING": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2},
    "PROMPT_TUNING": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2},
    "P_TUNING": {"peft_type": "P_TUNING", "num_virtual_tokens": 2, "encoder_hidden_size": 8},
}


@pytest.fixture
def base(tmp_path: Path) -> str:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("gpt2", **GPT2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def fitted_adapter(adapter: dict[str, Any], tmp_path: Path, **source: Any) -> tuple[CausalLM, str]:
    """A module and its checkpoint, with an adapter as far from its beginning as after a long training."""
    module = CausalLM(adapter=adapter, **source)
    run = fitted(module, callbacks=[])
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.requires_grad:
                kept = p != 0 if "lora_E" in name else True  # AdaLoRA gives up ranks for good
                p += 0.3 * torch.randn_like(p) * kept
    return module, checkpoint_of(run, tmp_path)


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_becomes_a_folder_of_peft(adapter: dict[str, Any], base: str, tmp_path: Path) -> None:
    from peft import PeftModel

    module, path = fitted_adapter(adapter, tmp_path, model=base)
    folder = export_checkpoint(path, str(tmp_path / "out"))
    assert not (folder / "config.json").exists(), "transformers would take the folder for a whole model"
    config = transformers.AutoConfig.from_pretrained(folder / "base")
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, config=config)
    without = logits(plain)
    opened = PeftModel.from_pretrained(plain, folder)
    torch.testing.assert_close(logits(opened), logits(module.network), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(opened)[:, -IDS.shape[1] :], without, atol=1e-4)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    assert "PeftModel.from_pretrained" in (folder / "README.md").read_text()


@pytest.mark.parametrize("kind", ["LORA", "ADALORA", "IA3"])
def test_an_adapter_is_merged(kind: str, base: str, tmp_path: Path) -> None:
    module, path = fitted_adapter(ADAPTERS[kind], tmp_path, model=base)
    expected, before = logits(module.network), {n: p.clone() for n, p in module.named_parameters()}
    from_module = module.save_pretrained(tmp_path / "a", merge=True)
    from_checkpoint = export_checkpoint(path, str(tmp_path / "b"), merge=True)
    for folder in (from_module, from_checkpoint):
        opened = transformers.AutoModelForCausalLM.from_pretrained(folder)
        # Merged weights round elsewhere than the sum of two products.
        torch.testing.assert_close(logits(opened), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())


def example_in(folder: Path) -> Any:
    """The model that the code in a model card opens, when it is run beside the folder."""
    (code,) = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["model"]


@pytest.mark.parametrize("adapter", [None, {"peft_type": "LORA", "r": 2, "target_modules": ["query"]}])
def test_the_code_in_the_model_card_opens_a_new_head_too(
    adapter: Any, data: ClassificationDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = transformers.AutoConfig.for_model("bert", **BERT, vocab_size=len(WORDS))
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    data.given_label_names = ["pos", "neg", "neither"]
    module = SequenceClassification(
        model=str(tmp_path / "base"), adapter=adapter, optimizer=lambda p: torch.optim.SGD(p, lr=0.5)
    )
    run = trainer(max_epochs=1)
    run.fit(module, data)
    folder = export_checkpoint(checkpoint_of(run, tmp_path), "my_model")
    opened = example_in(folder)
    assert opened.config.id2label == {0: "pos", 1: "neg", 2: "neither"}
    torch.testing.assert_close(logits(opened), logits(module.network), rtol=0, atol=1e-6)
    assert str(tmp_path) not in "".join(path.read_text() for path in folder.rglob("config.json"))


def test_an_adapter_on_random_weights_takes_them_along(tmp_path: Path) -> None:
    from peft import PeftModel

    module, path = fitted_adapter(ADAPTERS["LORA"], tmp_path, model_type="gpt2", model_config=GPT2)
    folder = export_checkpoint(path, str(tmp_path / "out"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(plain, folder)), logits(module.network))


def test_an_input_cannot_be_merged(base: str, tmp_path: Path) -> None:
    _, path = fitted_adapter(ADAPTERS["PREFIX_TUNING"], tmp_path, model=base)
    with pytest.raises(ValueError, match=r"a PREFIX_TUNING adapter is an input, .* Export it as an adapter"):
        export_checkpoint(path, str(tmp_path / "out"), merge=True)
    assert not (tmp_path / "out").exists()


# --- what cannot be exported ------------------------------------------------------------------------------------------


def test_nothing_to_merge(tmp_path: Path) -> None:
    module = CausalLM(model_type="gpt2", model_config=GPT2)
    module.configure_model()
    with pytest.raises(ValueError, match="Got merge, but there is no adapter"):
        module.save_pretrained(tmp_path / "out", merge=True)


def test_a_network_that_is_not_built(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"CausalLM has no network yet.* Fit it first"):
        CausalLM(model_type="gpt2", model_config=GPT2).save_pretrained(tmp_path / "out")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    module = CausalLM(model_type="gpt2", model_config=GPT2)
    module.configure_model()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"is not empty\. Name another one, or set overwrite"):
        module.save_pretrained(tmp_path)
    module.save_pretrained(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "model.safetensors").is_file()


def test_what_is_no_checkpoint_of_ours(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        export_checkpoint(str(tmp_path / "nothing.ckpt"), output)
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(ValueError, match="truncated or no checkpoint"):
        export_checkpoint(str(tmp_path / "text.ckpt"), output)
    with pytest.raises(ValueError, match="which is a folder"):
        export_checkpoint(str(tmp_path), output)
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"does not say what network .* Only checkpoints of modules of lightning_hift"):
        export_checkpoint(str(tmp_path / "other.ckpt"), output)
    torch.save({"state_dict": {}, EXPORT_KEY: {"from": "the future"}}, tmp_path / "new.ckpt")
    with pytest.raises(ValueError, match="another version of lightning_hift"):
        export_checkpoint(str(tmp_path / "new.ckpt"), output)
    torch.save({"state_dict": Path("x")}, tmp_path / "code.ckpt")
    with pytest.raises(ValueError, match="cannot be read without running code"):
        export_checkpoint(str(tmp_path / "code.ckpt"), output)
    assert not Path(output).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nothing.ckpt", "--output", "out"], "there is no such file"),
        (["--output", "out"], "checkpoint"),
        (["--checkpoint", "a", "--output", "out", "--dtype", "int8"], "bfloat16"),
    ],
)
def test_the_command_ends_in_a_short_message(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-hift", "export", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    told = capsys.readouterr().out
    assert "--checkpoint" in told
    assert "Replace what an earlier export wrote" in told
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "export --help" in capsys.readouterr().out


@pytest.mark.filterwarnings(r"ignore:[\s\S]*deprecated in v4")
@pytest.mark.filterwarnings(r"ignore:[\s\S]*JsonargparseDeprecationWarning")
def test_fit_predict_and_export_from_one_file(
    data: ClassificationDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-hift"])
    (tmp_path / "new.tsv").write_text("text\n" + "\n".join(["very good film", "not good plot", "film"]) + "\n")
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    config = {
        "trainer": {**quiet, "max_epochs": 1},
        "model": {
            "class_path": "lightning_hift.tasks.SequenceClassification",
            "init_args": {"model_type": "bert", "model_config": BERT},
        },
        "data": {
            "class_path": "lightning_hift.data.ClassificationDataModule",
            "init_args": {
                "files": {**data.files, "predict": "new.tsv"},  # type: ignore[dict-item]
                "tokenizer": str(tmp_path / "tokenizer"),
                "cache_dir": str(tmp_path / "cache"),
                "eval_batch_size": 2,
            },
        },
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(config))
    main(["fit", "-c", "mine.yaml"])
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    main(["predict", "-c", "mine.yaml", "--ckpt_path", str(checkpoint)])
    main(["export", "--checkpoint", str(checkpoint), "--output", "model"])

    predicted = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    opened = transformers.AutoModelForSequenceClassification.from_pretrained("model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("model")
    for text, record in zip(["very good film", "not good plot", "film"], predicted, strict=True):
        with torch.no_grad():
            chances = opened(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        assert record["label"] == opened.config.id2label[int(chances.argmax())]
        assert record["probability"] == pytest.approx(float(chances.max()), abs=1e-5)
