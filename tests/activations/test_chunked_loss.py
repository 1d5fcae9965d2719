"""The loss in chunks: the same number and the same gradients, less memory, and a refusal where it would be another."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from lightning_hift import HiFTStrategy
from lightning_hift.activations.chunked_loss import chunked_loss, refuse_other_losses
from lightning_hift.activations.saved_bytes import SavedBytes
from lightning_hift.planner.allocations import AllocationTracker
from lightning_hift.planner.plan import make_plan
from lightning_hift.planner.setup import Setup
from lightning_hift.tasks import CausalLM
from tests.models import as_published, language_model, trainer
from tests.tasks.test_tasks import TINY

TOKENS = torch.randint(256, (3, 11), generator=torch.Generator().manual_seed(0))
LABELS = TOKENS.clone().masked_fill_(torch.arange(33).view(3, 11) % 4 == 1, -100)


def network(dtype: torch.dtype = torch.float32, model_type: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    return language_model(model_type, {**TINY, **changes}).to(dtype)


def gradients(model: Any, chunk_tokens: int | None, labels: torch.Tensor = LABELS) -> tuple[torch.Tensor, dict]:  # type: ignore[type-arg]
    model.zero_grad()
    if chunk_tokens is None:
        loss = model(input_ids=TOKENS, labels=labels).loss
    else:
        loss = chunked_loss(model, {"input_ids": TOKENS}, labels, chunk_tokens)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk_tokens", [1, 4, 33, 1000])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_in_32_bits(chunk_tokens: int, tied: bool) -> None:
    model = network(tie_word_embeddings=tied)
    loss, expected = gradients(model, None)
    found_loss, found = gradients(model, chunk_tokens)
    # Sums of at most 33 terms in another order: each addition rounds by 2**-24 of what has been added up.
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=33 * 2**-24 * float(gradient.abs().max()))


def test_loss_and_gradients_in_16_bits() -> None:
    model = network(torch.bfloat16)
    loss, expected = gradients(model, None)
    found_loss, found = gradients(model, 8)
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)  # of the same 16-bit logits, in 32 bits
    for name, gradient in expected.items():
        # Gradients are rounded to 8 bits: the head's after each of 5 chunks, and all others after other roundings.
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=5 * 2**-8 * float(gradient.abs().max()))


def test_no_label_left_is_as_without_chunks() -> None:
    labels = torch.full_like(TOKENS, -100)
    model = network()
    assert model(input_ids=TOKENS, labels=labels).loss.isnan()
    assert chunked_loss(model, {"input_ids": TOKENS}, labels, 4).isnan()


def test_attention_mask_reaches_the_base_model() -> None:
    model = network()
    inputs = {"input_ids": TOKENS, "attention_mask": (torch.arange(11) > 3).long().expand(3, -1)}
    with torch.no_grad():
        expected = float(model(**inputs, labels=LABELS).loss)
        assert float(chunked_loss(model, inputs, LABELS, 4)) == pytest.approx(expected, rel=1e-6)
        assert float(chunked_loss(model, {"input_ids": TOKENS}, LABELS, 4)) != pytest.approx(expected, rel=1e-6)


def test_what_the_base_model_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Got \['num_items_in_batch'\] in a batch, which LlamaModel does not take"):
        chunked_loss(network(), {"input_ids": TOKENS, "num_items_in_batch": 3}, LABELS, 4)


@pytest.mark.parametrize("active", ["lm_head", "layers.1", "embed_tokens"])
def test_peak_of_forward_and_backward_falls_by_most_of_the_logits(active: str) -> None:
    """float32 logits and their gradient: 2 x 128 tokens x 4096 x 4 bytes = 4 MiB, of which one chunk of 16 is left."""
    model = network(vocab_size=4096)
    tokens = torch.randint(4096, (4, 32))
    for name, p in model.named_parameters():
        p.requires_grad_(active in name)

    def peak(compute: Any) -> int:
        model.zero_grad()
        with AllocationTracker() as tracker:
            compute().backward()
        return tracker.peak

    whole = peak(lambda: model(input_ids=tokens, labels=tokens).loss)
    chunked = peak(lambda: chunked_loss(model, {"input_ids": tokens}, tokens, 16))
    assert whole - chunked > 0.7 * 4 * 2**20, (whole, chunked)


def test_backward_stays_truncated() -> None:
    model = network()
    saved = []
    for active in ("embed_tokens", "layers.0", "layers.1", "lm_head"):
        for name, p in model.named_parameters():
            p.requires_grad_(active in name)
        with SavedBytes((*model.parameters(), *model.buffers())) as counted:
            loss = chunked_loss(model, {"input_ids": TOKENS}, LABELS, 8)
        saved.append(counted.nbytes)
        loss.backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == {
            name for name, p in model.named_parameters() if active in name
        }
        model.zero_grad()
    # A frozen embedding saves no more than a trained one: its tokens. After it, each block that is not reached is less.
    assert saved[1] > saved[2] > saved[3]


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gemma2", {"head_dim": 8}),  # caps its logits
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"bos_token_id": 1, "eos_token_id": 2}),  # scales its logits
        ("mixtral", {"num_local_experts": 2, "output_router_logits": True}),  # adds a loss for the balance of experts
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_losses_are_refused(model_type: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    model = network(dtype, model_type, **changes)
    with pytest.raises(
        ValueError, match=r"Got loss_chunk_tokens for \w+ForCausalLM, but its loss is .* caps or scales"
    ):
        refuse_other_losses(model)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("qwen3", {"head_dim": 8}),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": None}),
        ("mixtral", {"num_local_experts": 2}),
        ("phi", {}),
    ],
)
def test_plain_losses_are_accepted_and_leave_no_trace(model_type: str, changes: dict[str, Any]) -> None:
    model = network(torch.bfloat16, model_type, **changes)
    before = torch.get_rng_state()
    refuse_other_losses(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_head_without_a_base_model_is_refused() -> None:
    sizes = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = language_model("bert", sizes)
    with pytest.raises(ValueError, match="what its head gets is not what its base model returns"):
        refuse_other_losses(model)


def rows() -> Any:
    """Four batches."""
    return torch.utils.data.DataLoader([{"input_ids": row} for row in TOKENS.repeat(4, 1)], batch_size=3)  # type: ignore[arg-type,var-annotated]


def module(**options: Any) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(model_type="llama", model_config=TINY, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"strategy": "hift"}, {"strategy": "hift", "precision": "bf16-true"}, {"precision": "bf16-mixed"}],
    ids=str,
)
def test_training_and_validation_are_those_without_chunks(options: dict[str, Any]) -> None:
    def losses(**arguments: Any) -> tuple[float, float]:
        callbacks = [as_published()] if "strategy" in options else []
        fitted = trainer(callbacks=callbacks, **options)
        fitted.fit(module(**arguments), rows(), rows())
        return float(fitted.callback_metrics["train_loss"]), float(fitted.callback_metrics["val_loss"])

    # After 4 steps. In 16 bits a rounding of the gradient, 2**-8 of it, moves the loss by no more than that.
    tolerance = 1e-5 if not options.get("precision") else 2**-8
    assert losses(loss_chunk_tokens=5) == pytest.approx(losses(), rel=tolerance)


def test_activation_budget_and_chunks_go_together() -> None:
    def loss(**arguments: Any) -> float:
        fitted = trainer(strategy=HiFTStrategy(**arguments))
        fitted.fit(module(loss_chunk_tokens=5), rows())
        return float(fitted.callback_metrics["train_loss"])

    assert loss(activation_budget="40KB") == pytest.approx(loss(), rel=1e-6)


def test_a_budget_does_not_count_what_the_backward_pass_saves_for_itself() -> None:
    def smallest_budget(chunk_tokens: int) -> str:
        fitted = trainer(strategy=HiFTStrategy(activation_budget="1KB"))
        with pytest.raises(ValueError, match=r"holds \d+ bytes") as caught:
            fitted.fit(module(loss_chunk_tokens=chunk_tokens), rows())
        return re.search(r"holds (\d+) bytes", str(caught.value)).group(1)  # type: ignore[union-attr]

    assert len({smallest_budget(tokens) for tokens in (1, 5, 16)}) == 1


def test_the_model_is_tried_once_in_each_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr("lightning_hift.tasks.causal_lm.refuse_other_losses", lambda net: tried.append(net.training))
    trainer(max_epochs=2).fit(module(loss_chunk_tokens=5), rows(), rows())
    assert sorted(tried) == [False, True]


def test_chunks_must_be_at_least_one_token() -> None:
    with pytest.raises(ValueError, match="Got loss_chunk_tokens=0; it must be at least 1"):
        module(loss_chunk_tokens=0)


def test_the_planner_knows_of_chunks() -> None:
    def activations(chunk_tokens: int | None) -> int:
        model = CausalLM(model_type="llama", model_config={**TINY, "vocab_size": 4096}, loss_chunk_tokens=chunk_tokens)
        model.configure_model()
        plan = make_plan(model, Setup(batch_size=4, sequence_length=32), compare=False)
        return max(group.activations or 0 for group in plan.forecast.groups.values())

    assert activations(None) - activations(16) > 0.7 * 4 * 2**20


def test_the_sum_is_in_32_bits_under_another_default_dtype() -> None:
    model = network(torch.bfloat16)
    expected = model(input_ids=TOKENS, labels=LABELS).loss
    torch.set_default_dtype(torch.bfloat16)  # as Lightning's true half precision does
    try:
        found = chunked_loss(model, {"input_ids": TOKENS}, LABELS, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
