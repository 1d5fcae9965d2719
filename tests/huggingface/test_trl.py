"""TRL's trainers under HiFT: with one group they are what they were, and they resume in mid-sweep."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoTokenizer

from tests.huggingface.runs import ALL_AT_ONCE, ONE_BY_ONE, assert_same, hift, logged, network, weights
from tests.text_models import WORDS, save_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings(
    "ignore:This run has about", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


def texts(count, length, shift=0):
    return [" ".join(WORDS[(3 * i + j + shift) % len(WORDS)] for j in range(length + i % 3)) for i in range(count)]


DATA = {
    "SFT": {"text": texts(22, 5)},
    "DPO": {"prompt": texts(22, 3), "chosen": texts(22, 3, 1), "rejected": texts(22, 3, 7)},
    "Reward": {"chosen": texts(22, 6), "rejected": texts(22, 6, 7)},
}


def trained(kind, options, folder, resume=None, dtype=torch.float32):
    """A run of 12 steps; plain where there are no ``options``."""
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(folder / "tokenizer", eos_token="[SEP]"))
    plain, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    make = plain if options is None else hift(options, plain)
    arguments = config(
        str(folder),
        max_steps=12,
        learning_rate=0.01,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    model = network("classifier", num_labels=1, pad_token_id=0) if kind == "Reward" else network(pad_token_id=0)
    data = datasets.Dataset.from_dict(DATA[kind])
    reference = {"ref_model": copy.deepcopy(model).to(dtype)} if kind == "DPO" else {}
    trainer = make(model.to(dtype), args=arguments, train_dataset=data, processing_class=tokenizer, **reference)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("kind", DATA)
def test_one_group_is_the_trainer_as_it_was(tmp_path, kind):
    plain, ours = trained(kind, None, tmp_path), trained(kind, ALL_AT_ONCE, tmp_path)
    assert_same(weights(ours), weights(plain))
    assert logged(ours, "loss", "grad_norm", "learning_rate") == logged(plain, "loss", "grad_norm", "learning_rate")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", DATA)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, kind, dtype):
    whole = trained(kind, ONE_BY_ONE, tmp_path, dtype=dtype)
    for step in (3, 6, 8):
        again = trained(kind, ONE_BY_ONE, tmp_path / str(step), str(tmp_path / f"checkpoint-{step}"), dtype)
        assert_same(weights(again), weights(whole))
    assert len({group for (group,) in logged(whole, "hift/group")}) == 5
