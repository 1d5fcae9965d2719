"""The loss of a causal language model without all of its logits at once.

With a vocabulary of 128k, the logits of 4096 tokens, their float32 copy and the gradients of both take several GB,
more than anything else near the head. Here head and cross-entropy run over a chunk of tokens at a time, in the forward
pass and again in the backward pass, so that only one chunk's logits exist.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, pad

IGNORED_LABEL = -100  # as in transformers
_TOKENS = (2, 7)  # of the batch with which a model is tried: small, and of a length that nothing is tuned to


def chunked_loss(network: Any, inputs: Mapping[str, Any], labels: Tensor, chunk_tokens: int) -> Tensor:
    """Mean cross-entropy per predicted token in nats, a scalar; as ``network(**inputs, labels=labels).loss``.

    The head must not be random, as its second run would draw other numbers. Its gradient is summed over the chunks in
    its own dtype. It is called outside of autograd: it must be a module whose parameters are all that it needs.

    Args:
        network: A causal language model of transformers for which ``refuse_other_losses`` has nothing to say.
        inputs: What its base model takes, without labels; ``input_ids`` of shape (batch, length).
        labels: Of shape (batch, length); -100 leaves a token out. With nothing but that, the loss is NaN.
        chunk_tokens: Most tokens whose logits exist at a time.

    Raises:
        ValueError: ``inputs`` contain what the base model does not take.
    """
    base, head = _base_of(network), _head_of(network)
    taken = inspect.signature(base.forward).parameters
    foreign = [name for name in inputs if name not in taken]
    if foreign:
        raise ValueError(
            f"Got {foreign} in a batch, which {type(base).__name__} does not take, so loss_chunk_tokens would leave it"
            f" out. It takes {', '.join(taken)}. Take it out of the batch, or do without loss_chunk_tokens."
        )
    hidden = base(**inputs)[0].flatten(0, 1)
    targets = pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:].flatten().to(hidden.device)
    trained = [p for p in head.parameters() if p.requires_grad]
    apply: Callable[..., Tensor] = _SumOfLosses.apply
    total = apply(head, chunk_tokens, hidden, targets, *trained)
    return total / (targets != IGNORED_LABEL).sum()


class _SumOfLosses(torch.autograd.Function):
    """Sum of the losses of all tokens, of which the backward pass computes each chunk again.

    As with activation checkpointing of each chunk, but gradients of the head are added in place: for autograd, a sum
    over chunks would be up to three tensors of the head's size.
    """

    @staticmethod
    def forward(
        ctx: Any, head: nn.Module, chunk_tokens: int, hidden: Tensor, targets: Tensor, *trained: nn.Parameter
    ) -> Tensor:
        ctx.head, ctx.chunk_tokens, ctx.trained = head, chunk_tokens, trained
        ctx.casts = _casts_of_now(hidden.device.type)
        ctx.save_for_backward(hidden, targets)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)  # whatever the default dtype
        for tokens, wanted in _chunks(chunk_tokens, hidden, targets):
            total += _sum_of_losses(head, tokens, wanted)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[2] else None
        of_trained: list[Tensor] = []
        outputs = [of_hidden] if of_hidden is not None else []
        for tokens, wanted, *output in _chunks(ctx.chunk_tokens, hidden, targets, *outputs):
            tokens = tokens.detach().requires_grad_(of_hidden is not None)
            inputs = [*([tokens] if output else []), *ctx.trained]
            with torch.enable_grad(), ctx.casts:
                loss = _sum_of_losses(ctx.head, tokens, wanted)
            found = list(torch.autograd.grad(loss, inputs, gradient))
            if output:
                output[0].copy_(found.pop(0))
            if of_trained:
                for total in of_trained:
                    total += found.pop(0)
            else:
                of_trained = found
        return None, None, of_hidden, None, *of_trained


def _chunks(chunk_tokens: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(tensor, chunk_tokens) for tensor in tensors), strict=True)


def _casts_of_now(device_type: str) -> torch.autocast:
    return torch.autocast(
        device_type, torch.get_autocast_dtype(device_type), enabled=torch.is_autocast_enabled(device_type)
    )


def _sum_of_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(head(hidden).float(), targets, ignore_index=IGNORED_LABEL, reduction="sum")


def _base_of(network: Any) -> nn.Module:
    base = network.get_decoder() if hasattr(network, "get_decoder") else None
    if not isinstance(base, nn.Module) or base is network:
        raise _refusal(network, "get_decoder() returns no module apart from it")
    return base


def _head_of(network: Any) -> nn.Module:
    head = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise _refusal(network, "get_output_embeddings() returns no module")
    return head


def refuse_other_losses(network: Any) -> None:
    """Try whether the loss of ``network`` is the cross-entropy of what its head makes of its base model's output.

    Twice a tiny random batch goes through the whole model, in the mode (training or evaluation) in which it is, with
    values put in the place of the head's output. Zeros show what is added to the cross-entropy; large values show what
    is done to the logits: caps and scales that at small logits would drown in rounding. Random generators are left as
    they were.

    Raises:
        ValueError: It is something else, which would be left out of a chunked loss.
    """
    base, head = _base_of(network), _head_of(network)
    weight = next(network.parameters())
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        vocabulary = network.get_input_embeddings().weight.shape[0]
        tokens = torch.randint(vocabulary, _TOKENS).to(weight.device)
        labels = tokens.clone()
        labels[0, 2] = IGNORED_LABEL
        for scale in (0.0, 100.0):
            with _replaced_logits(base, head, scale) as seen:
                found = network(input_ids=tokens, labels=labels).loss
            _compare(network, seen, labels, found)


@contextmanager
def _replaced_logits(base: nn.Module, head: nn.Module, scale: float) -> Iterator[dict[str, list[Any]]]:
    seen: dict[str, list[Any]] = {"base": [], "given": [], "logits": []}

    def replace(_: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        seen["given"].append(args[0])
        seen["logits"].append(scale * torch.randn_like(logits))
        return seen["logits"][-1]  # type: ignore[no-any-return]

    hooks = [
        base.register_forward_hook(lambda _, args, output: seen["base"].append(output[0])),
        head.register_forward_hook(replace),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _compare(network: nn.Module, seen: Mapping[str, list[Any]], labels: Tensor, found: Tensor) -> None:
    if [len(calls) for calls in seen.values()] != [1, 1, 1]:
        raise _refusal(network, "its forward does not call its base model and its head once each, as modules")
    (hidden,), (given,), (logits,) = seen["base"], seen["given"], seen["logits"]
    if hidden.shape != given.shape or not torch.equal(hidden.to(given.dtype), given):
        raise _refusal(network, "what its head gets is not what its base model returns")
    expected = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL)
    # The same float32 numbers, added up in any order: a few roundings of 2**-24 each.
    if not torch.allclose(found.float(), expected, rtol=1e-5, atol=0):
        raise _refusal(
            network,
            f"its loss is {float(found):.6g} where the cross-entropy of its head's output is {float(expected):.6g}: it"
            " caps or scales the logits, or adds an auxiliary loss",
        )


def _refusal(network: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"Got loss_chunk_tokens for {type(network).__name__}, but {reason}. A loss in chunks would train something"
        " else. Do without loss_chunk_tokens, or switch that off in model_config."
    )
