"""Packed rows: documents keep apart, losses and gradients are those of documents one by one, runs can be resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_hift.data import InstructionDataModule, PretrainingDataModule
from lightning_hift.data.packing import TokenBlocks, first_fit_decreasing, join_documents
from lightning_hift.tasks import CausalLM
from lightning_hift.tasks.packing_trial import refuse_contamination
from tests.models import as_published
from tests.tiny_texts import SMALL, adam, quiet_trainer, word_tokenizer, write_rows

SPECIFIC = {"opt": {"ffn_dim": 32, "word_embed_proj_dim": 16}, "gemma3_text": {"sliding_window": 4, "head_dim": 8}}
SPECIFIC["gemma2"] = SPECIFIC["gemma3_text"]
SPECIFIC["mistral"] = {"sliding_window": 4}
HEEDING = ["llama", "gpt2", "qwen3", "gpt_neox", "mistral", "gemma3_text", "mixtral"]
NOT_HEEDING = ["opt", "bloom", "mamba"]


def network_of(model_type: str, **options: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    known = AutoConfig.for_model(model_type)
    fields = {**SMALL, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    fields = {name: value for name, value in fields.items() if hasattr(known, name)} | SPECIFIC.get(model_type, {})
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, use_cache=False, **fields), **options)


def module_of(network: Any, **options: Any) -> CausalLM:
    module = CausalLM(model_type="llama", **options)
    module.network = network
    return module


def documents(*lengths: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 40, (n,), generator=generator)} for n in lengths]


def gradients(network: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


# --- rows -------------------------------------------------------------------------------------------------------------


def test_first_fit_decreasing_by_hand() -> None:
    rows = first_fit_decreasing([6, 5, 4, 3, 2], capacity=10)
    assert [sorted(row) for row in rows] == [[0, 2], [1, 3, 4]]  # 6 + 4, 5 + 3 + 2: nothing is left over


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=60), st.integers(0, 3), st.integers(1, 20))
def test_each_document_is_in_one_row_and_rows_hold_no_more_than_they_can(
    lengths: list[int], seed: int, window: int
) -> None:
    rows = first_fit_decreasing(lengths, 12, seed, window)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 12 for row in rows)
    assert rows == first_fit_decreasing(lengths, 12, seed, window)
    if window >= len(lengths) and rows:  # no two rows of a window would go into one
        sums = sorted(sum(lengths[i] for i in row) for row in rows)
        assert len(sums) == 1 or sums[0] + sums[1] > 12


def test_seeds_make_other_rows_and_a_long_document_is_refused() -> None:
    lengths = [1 + i % 5 for i in range(50)]
    assert first_fit_decreasing(lengths, 9, 0) != first_fit_decreasing(lengths, 9, 1)
    with pytest.raises(ValueError, match="Got a document of 9 tokens for rows of 8"):
        first_fit_decreasing([3, 9], 8)


def test_a_joined_row_by_hand() -> None:
    rows = [[{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}], [{"input_ids": [4, 5, 6, 7]}]]
    batch = join_documents(rows, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 5, 6, 7, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9], [-100, 5, 6, 7, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    allowed = join_documents(rows, pad_token_id=0, contamination="allow")
    assert allowed.keys() == {"input_ids", "labels"}
    assert allowed["labels"].tolist() == [[5, 6, 7, -100, 9], [4, 5, 6, 7, -100]]


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", HEEDING)
@pytest.mark.parametrize("chunk", [None, 5])
def test_packed_rows_train_as_documents_one_by_one(model_type: str, attention: str, chunk: int | None) -> None:
    network = network_of(model_type, attn_implementation=attention).eval()
    apart = documents(7, 5, 9, 3, 2)
    num_predicted = sum(len(document["input_ids"]) - 1 for document in apart)
    for document in apart:
        ids = document["input_ids"][None]
        loss = network(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).sum()
        (-loss / num_predicted).backward()
    expected = gradients(network)
    network.zero_grad()

    loss = module_of(network, loss_chunk_tokens=chunk).loss(join_documents([apart[:2], apart[2:]], 0))
    loss.backward()
    found = gradients(network)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # The same sums in another order: 32 bits, of numbers around 1.
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model_type", HEEDING)
def test_the_trial_lets_networks_pass_that_keep_documents_apart(model_type: str, training: bool) -> None:
    network = network_of(model_type).train(training)
    before, state = [p.clone() for p in network.parameters()], torch.get_rng_state()
    refuse_contamination(network, 2)
    refuse_contamination(network.bfloat16(), 1)
    assert torch.equal(state, torch.get_rng_state())
    assert network.training == training
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(network.parameters(), before, strict=True))


@pytest.mark.parametrize("model_type", NOT_HEEDING)
def test_networks_that_mix_documents_are_refused(model_type: str) -> None:
    module = module_of(network_of(model_type))
    rows = [documents(7, 5), documents(9, 3)]
    with pytest.raises(ValueError, match=r"packed rows.*logits change with the first.*packing=False.*contamination="):
        module.loss(join_documents(rows, 0))
    assert module.loss(join_documents(rows, 0, contamination="allow")).isfinite()


def test_a_network_that_packs_single_rows_only_is_told_so() -> None:
    """As flash attention does: several rows are computed as if nothing was packed."""
    network = network_of("llama")
    forward = network.forward

    def single_rows(input_ids: Tensor, position_ids: Tensor, **rest: Any) -> Any:
        whole = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return forward(input_ids=input_ids, position_ids=position_ids if len(input_ids) == 1 else whole, **rest)

    network.forward = single_rows
    refuse_contamination(network, 1)
    with pytest.raises(ValueError, match="With batch_size=1 it keeps them apart"):
        refuse_contamination(network, 2)


def test_a_network_without_position_ids_is_refused() -> None:
    network = network_of("llama")
    forward = network.forward
    network.forward = lambda input_ids, labels=None: forward(input_ids=input_ids, labels=labels)
    with pytest.raises(ValueError, match="does not take position_ids"):
        refuse_contamination(network, 2)


def test_prompt_adapters_mix_documents_and_are_refused() -> None:
    module = CausalLM(
        model_type="llama", model_config=SMALL, adapter={"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}
    )
    module.configure_model()
    with pytest.raises(ValueError, match="Got packed rows"):
        module.loss(join_documents([documents(7, 5)], 0))


def test_low_rank_adapters_keep_documents_apart() -> None:
    module = CausalLM(model_type="llama", model_config=SMALL, adapter={"peft_type": "LORA", "r": 2})
    module.configure_model()
    assert module.loss(join_documents([documents(7, 5)], 0)).isfinite()


def test_rows_that_are_not_packed_are_not_tried() -> None:
    module = module_of(network_of("opt"))
    ids = documents(6)[0]["input_ids"][None]
    assert module.loss({"input_ids": ids, "position_ids": torch.arange(6)[None]}).isfinite()


# --- pre-training -----------------------------------------------------------------------------------------------------

WORDS = [f"w{i}" for i in range(20)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Documents of 1 to 6 words, an empty one among them, and a tokenizer that knows them."""
    word_tokenizer(WORDS, tmp_path / "tokenizer")
    texts = [" ".join(WORDS[(7 * i + j) % 20] for j in range(1 + i % 6)) for i in range(30)]
    write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in [*texts[:5], " ", *texts[5:]]])
    return tmp_path


def pretraining(folder: Path, **options: Any) -> PretrainingDataModule:
    defaults = {
        "files": {"train": str(folder / "texts.jsonl")},
        "tokenizer": str(folder / "tokenizer"),
        "cache_dir": str(folder / "cache"),
        "sequence_length": 8,
        "batch_size": 4,
    }
    return PretrainingDataModule(**{**defaults, **options})


def stream(data: PretrainingDataModule) -> list[int]:
    return [token for ids in data.examples["train"]["input_ids"] for token in ids]


@pytest.mark.parametrize("before", [True, False])
def test_a_thousand_empty_rows_are_passed_over(tmp_path: Path, before: bool) -> None:
    word_tokenizer(WORDS, tmp_path / "tokenizer")
    rows = [{"text": ""}] * 2000
    write_rows(tmp_path / "texts.jsonl", [*rows, {"text": "w1"}] if before else [{"text": "w1"}, *rows])
    data = pretraining(tmp_path)
    data.setup("fit")
    assert len(stream(data)) == 2


def test_an_end_that_pads_is_learnt_from_what_follows_it(folder: Path) -> None:
    word_tokenizer(WORDS, folder / "tokenizer", pad_token=None)
    module = CausalLM(model_type="llama", model_config=SMALL, optimizer=adam)
    data = pretraining(folder, contamination="allow")
    quiet_trainer(max_steps=2).fit(module, data)
    embedding = module.network.get_input_embeddings().weight  # type: ignore[union-attr, operator]
    assert data.tokenizer.pad_token_id == data.tokenizer.eos_token_id == 1
    assert module.network.config.pad_token_id == 1  # type: ignore[union-attr]
    assert (embedding[1] != 0).all()


def test_blocks_hold_all_tokens_in_order_with_an_end_behind_each_document(folder: Path) -> None:
    data = pretraining(folder, validation_fraction=0.2)
    data.setup("fit")
    assert all(ids[-1] == 1 and ids.count(1) == 1 for ids in data.examples["train"]["input_ids"])
    blocks = data.blocks("train")
    tokens = [[int(t) for piece in block for t in piece["input_ids"]] for block in blocks]
    assert [t for block in tokens for t in block] == stream(data)
    assert {len(block) for block in tokens[:-1]} == {8}
    assert blocks.num_tokens == len(stream(data))
    ends = [int(piece["input_ids"][-1]) for block in blocks for piece in block[:-1]]
    assert set(ends) == {1}  # a piece ends where a document does, or the block
    assert all(1 not in piece["input_ids"][:-1] for block in blocks for piece in block)


@pytest.mark.parametrize(("num_tokens", "expected"), [(16, [8, 8]), (17, [8, 8]), (18, [8, 8, 2]), (3, [3])])
def test_the_last_block_is_shorter_but_for_a_single_token(num_tokens: int, expected: list[int]) -> None:
    from datasets import Dataset

    blocks = TokenBlocks(Dataset.from_dict({"input_ids": [list(range(num_tokens))]}), 8)
    assert [sum(len(piece["input_ids"]) for piece in block) for block in blocks] == expected


def test_blocks_across_chunks_of_a_table_that_rows_were_chosen_from() -> None:
    from datasets import Dataset, concatenate_datasets

    parts = [Dataset.from_dict({"input_ids": [[10 * i, 10 * i + 1], [10 * i + 2]]}) for i in range(3)]
    table = concatenate_datasets(parts).select([5, 0, 1, 3, 2])
    blocks = TokenBlocks(table, 4)
    assert [[piece["input_ids"].tolist() for piece in block] for block in blocks] == [
        [[22], [0, 1], [2]],
        [[12], [10, 11]],
    ]


def test_a_batch_of_blocks_starts_anew_with_each_document(folder: Path) -> None:
    batch = next(iter(pretraining(folder).train_dataloader()))
    starts = batch["position_ids"] == 0
    follows_an_end = torch.nn.functional.pad(batch["input_ids"][:, :-1] == 1, (1, 0), value=True)
    assert torch.equal(starts, follows_an_end)
    assert torch.equal(batch["labels"] == -100, starts)
    assert "attention_mask" not in batch
    allowed = next(iter(pretraining(folder, contamination="allow").train_dataloader()))
    assert torch.equal(allowed["labels"], allowed["input_ids"])


def test_without_packing_each_row_is_of_one_document(folder: Path) -> None:
    data = pretraining(folder, packing=False, sequence_length=4)
    rows = [row for batch in data.train_dataloader() for row in zip(batch["input_ids"], batch["labels"], strict=True)]
    texts = sorted(tuple(t for t, label in zip(*row, strict=True) if label != -100) for row in rows)
    pieces = [tuple(ids) for ids in data.examples["train"]["input_ids"]]
    assert texts == sorted(map(tuple, (torch.tensor(piece) for piece in pieces)))
    assert max(map(len, pieces)) == 4


def test_lines_of_a_file_can_be_one_document(folder: Path) -> None:
    for name in ("one", "two"):
        (folder / f"{name}.txt").write_text("w0 w1\n\nw2\n")
    files = {"train": [str(folder / "one.txt"), str(folder / "two.txt")]}
    data = pretraining(folder, files=files, document="file")
    data.setup("fit")
    assert data.examples["train"]["input_ids"][:] == [[3, 4, 5, 1]] * 2
    assert data.table("train")["text"][:] == ["w0 w1\n\nw2"] * 2


def test_a_tokenizer_without_an_end_is_refused(folder: Path) -> None:
    word_tokenizer(WORDS, folder / "endless", eos_token=None)
    with pytest.raises(ValueError, match="without an end-of-sequence token"):
        pretraining(folder, tokenizer=str(folder / "endless")).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 1}, "Got sequence_length=1; it must be at least 2"),
        ({"document": "page"}, "Got document='page'; it must be 'row' or 'file'"),
        ({"contamination": "some"}, "Got contamination='some'; it must be 'refuse' or 'allow'"),
        ({"files": None, "dataset": "d", "document": "file"}, "whose rows are in no file"),
    ],
)
def test_arguments_out_of_range_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pretraining(folder, **options)


# --- runs -------------------------------------------------------------------------------------------------------------


class Recorder(CausalLM):
    """Notes the batches that it is trained on."""

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        self.__dict__.setdefault("seen", []).append(batch["input_ids"].tolist())
        return super().training_loss(batch, batch_idx)


def instructions(folder: Path) -> InstructionDataModule:
    rows = [{"instruction": f"w{i % 7}", "input": "", "output": " ".join(WORDS[: 1 + i % 4])} for i in range(40)]
    path = folder / "instructions.jsonl"
    if not path.exists():
        write_rows(path, rows)
    return InstructionDataModule(
        files={"train": str(path)},
        tokenizer=str(folder / "tokenizer"),
        cache_dir=str(folder / "cache"),
        chat_template="{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} w19 {% else %}"
        "{% generation %}{{ m.content }} </s>{% endgeneration %}{% endif %}{% endfor %}",
        max_length=16,
        batch_size=2,
        packing=True,
    )


@pytest.mark.parametrize("make_data", [pretraining, instructions])
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(folder: Path, make_data: Any) -> None:

    def fit(steps: int, ckpt_path: str | None = None) -> tuple[pl.Trainer, Recorder]:
        torch.manual_seed(0)
        module = Recorder(model_type="llama", model_config=SMALL, optimizer=adam)
        trainer = quiet_trainer(max_steps=steps, callbacks=as_published())
        trainer.fit(module, datamodule=make_data(folder), ckpt_path=ckpt_path)
        return trainer, module

    _, through = fit(9)
    trainer, before = fit(5)
    trainer.save_checkpoint(folder / "stopped.ckpt")
    _, after = fit(9, str(folder / "stopped.ckpt"))
    assert before.seen + after.seen == through.seen
    assert all(torch.equal(p, q) for p, q in zip(after.parameters(), through.parameters(), strict=True))


def test_packed_instructions_hold_every_example_once_per_epoch(folder: Path) -> None:
    data = instructions(folder)
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader())
    ends = sum(int((batch["labels"] == 1).sum()) for batch in batches)
    assert ends == len(data.examples["train"]) == 40
    padding = sum(int((batch["input_ids"] == 0).sum()) for batch in batches)
    assert padding < 0.1 * sum(batch["input_ids"].numel() for batch in batches)
