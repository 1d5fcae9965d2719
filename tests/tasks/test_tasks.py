"""CausalLM: a transformers model from its configuration, trained by HiFT."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from lightning_hift.data import PythonSourceDataModule
from lightning_hift.tasks import CausalLM
from tests.models import as_published

TINY = {
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def tiny(**options: Any) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(**{"model_type": "llama", "model_config": TINY, "bytes_per_token": 1.0, **options})


@pytest.fixture
def data(tmp_path: Path) -> PythonSourceDataModule:
    """Very regular text, which even a tiny model can learn."""
    for number in range(10):
        (tmp_path / f"file_{number}.py").write_text("for i in range(10):\n    print(i)\n" * 40)
    return PythonSourceDataModule(sequence_length=32, batch_size=8, folder=str(tmp_path), val_fraction=0.3)


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", enable_model_summary=False, **{**quiet, **options})


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def test_loss_falls_and_is_logged_in_bits_too(data: PythonSourceDataModule) -> None:
    module = tiny(optimizer=adam)
    before = trainer().validate(module, data, verbose=False)[0]
    fitted = trainer(max_steps=60, callbacks=as_published(always_active=["head"]), num_sanity_val_steps=0)
    fitted.fit(module, data)
    after = trainer().validate(module, data, verbose=False)[0]

    assert before["val_loss"] == pytest.approx(math.log(256), abs=0.1)
    assert after["val_loss"] < 0.7 * before["val_loss"]
    assert after["val_bits_per_byte"] == pytest.approx(after["val_loss"] / math.log(2))
    assert fitted.logged_metrics.keys() >= {"train_loss", "hift/sweep", "hift/group"}


def test_validation_loss_is_the_mean_over_tokens(data: PythonSourceDataModule) -> None:
    module = tiny()
    logged = trainer().validate(module, data, verbose=False)[0]["val_loss"]
    batches = [batch["input_ids"] for batch in data.val_dataloader()]
    assert len(batches[-1]) < len(batches[0])
    everything = {"input_ids": torch.cat(batches), "labels": torch.cat(batches)}
    with torch.no_grad():
        assert logged == pytest.approx(float(module(everything).loss), rel=1e-5)


def test_labels_of_the_batch_are_used() -> None:
    module = tiny()
    module.configure_model()
    ids = torch.arange(20).view(2, 10)
    ignored = torch.full_like(ids, -100)
    ignored[0, 5] = 7
    with torch.no_grad():
        loss = module.loss({"input_ids": ids, "labels": ignored})
        expected = -module({"input_ids": ids}).logits[0, 4].log_softmax(-1)[7]
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_test_and_predict(data: PythonSourceDataModule) -> None:
    module = tiny()
    found = trainer().test(module, data, verbose=False)[0]
    assert found.keys() == {"test_loss", "test_perplexity", "test_bits_per_byte"}
    assert found["test_perplexity"] == pytest.approx(math.exp(found["test_loss"]), rel=1e-5)
    predicted = trainer(limit_predict_batches=1).predict(module, data)
    assert predicted is not None
    batch = next(iter(data.predict_dataloader()))
    expected = [module.loss({name: value[i : i + 1] for name, value in batch.items()}).item() for i in range(8)]
    assert [record["loss"] for record in predicted[0]] == pytest.approx(expected, rel=1e-5)
    assert [record["tokens"] for record in predicted[0]] == [31] * 8


def test_configure_model_keeps_a_built_network_and_works_on_the_meta_device() -> None:
    module = tiny()
    with torch.device("meta"):
        module.configure_model()
    network = module.network
    module.configure_model()
    assert module.network is network
    assert all(p.is_meta for p in module.parameters())


def test_optimizer_and_scheduler_come_from_the_arguments() -> None:
    module = tiny(optimizer=adam, lr_scheduler=lambda optimizer: StepLR(optimizer, 5), interval="epoch")
    module.configure_model()
    config = module.configure_optimizers()
    assert type(config["optimizer"]) is torch.optim.Adam
    assert type(config["lr_scheduler"]["scheduler"]) is StepLR
    assert config["lr_scheduler"]["interval"] == "epoch"

    default = tiny()
    default.configure_model()
    assert type(default.configure_optimizers()) is torch.optim.AdamW


def test_accumulation_and_clipping_reach_the_base_class() -> None:
    module = tiny(accumulate_grad_batches=3, gradient_clip_val=0.5, gradient_clip_algorithm="value", lr_monitor="loss")
    assert (module.accumulate_grad_batches, module.gradient_clip_val) == (3, 0.5)
    assert (module.gradient_clip_algorithm, module.lr_monitor) == ("value", "loss")


def test_other_architectures_work() -> None:
    module = CausalLM(
        model_type="gpt2", model_config={"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 256, "n_positions": 32}
    )
    module.configure_model()
    assert module({"input_ids": torch.zeros(1, 4, dtype=torch.long)}).logits.shape == (1, 4, 256)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("lama", "Got model_type='lama', which is no model for causal language modelling .* Did you mean 'llama'"),
        ("vit", "Got model_type='vit', which is no model for causal language modelling"),
    ],
)
def test_unknown_model_type_is_refused(model_type: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(model_type=model_type).configure_model()


def test_unknown_field_of_the_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Got 'hiden_size' in model_config.* Did you mean 'hidden_size'"):
        tiny(model_config={"hiden_size": 16}).configure_model()


def test_bytes_per_token_must_be_positive() -> None:
    with pytest.raises(ValueError, match="Got bytes_per_token=0; it must be above 0"):
        tiny(bytes_per_token=0)


@pytest.mark.slow  # test_imports.py looks for such imports
def test_import_does_not_load_transformers() -> None:
    # torchmetrics, which Lightning imports, loads some of it itself.
    code = """if True:
        import sys, lightning.pytorch.cli
        before = {name for name in sys.modules if name.startswith("transformers")}
        import lightning_hift.cli, lightning_hift.tasks
        print({name for name in sys.modules if name.startswith("transformers")} - before)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_values_that_do_not_go_together_are_named() -> None:
    with pytest.raises(ValueError, match=r"'hidden_size': 65.*not a multiple of the number of attention heads"):
        CausalLM(model_type="llama", model_config={"hidden_size": 65, "num_attention_heads": 4}).configure_model()
