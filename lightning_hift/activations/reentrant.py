"""Reentrant activation checkpointing cuts the graph below a frozen layer. It is found and refused in words."""

from __future__ import annotations

from torch import Tensor, nn

_NODE = "CheckpointFunctionBackward"
_REMEDY = (
    "HiFT freezes what lies below the active group, and a reentrant checkpoint over frozen inputs cuts the graph: the"
    " group would get no gradient. Only non-reentrant checkpointing works: pass use_reentrant=False, in transformers"
    " model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False}), or give an"
    " activation_budget instead."
)


def refuse_reentrant_modules(model: nn.Module) -> None:
    """Refuse reentrant checkpointing that can be seen in the modules: of transformers, and of torch's wrappers.

    Raises:
        ValueError: There is some.
    """
    for path, module in model.named_modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        of_transformers = _is_on(module) and getattr(function, "keywords", {}).get("use_reentrant") is True
        of_torch = getattr(getattr(module, "checkpoint_impl", None), "name", None) == "REENTRANT"
        if of_transformers or of_torch:
            raise ValueError(
                f"Got activation checkpointing with use_reentrant=True in {path or type(model).__name__}. {_REMEDY}"
            )


def refuse_reentrant_graph(loss: Tensor, limit: int = 20_000) -> None:
    """Refuse a loss whose graph contains a reentrant checkpoint, whoever made it.

    Args:
        loss: The tensor that backward is called on; nothing in its graph is changed.
        limit: The most nodes looked at. 20,000 are a model of hundreds of blocks, and take some milliseconds.

    Raises:
        RuntimeError: There is one.
    """
    waiting = [loss.grad_fn]
    seen = set(waiting)
    while waiting and len(seen) < limit:
        node = waiting.pop()
        if node is None:
            continue
        if node.name() == _NODE:
            raise RuntimeError(f"Got activation checkpointing with use_reentrant=True in the forward pass. {_REMEDY}")
        following = {inner for inner, _ in node.next_functions} - seen
        seen |= following
        waiting += following


def own_checkpointing(model: nn.Module) -> str | None:
    """Path of the first module that checkpoints its activations by a switch of transformers, if there is any."""
    return next((path or type(model).__name__ for path, module in model.named_modules() if _is_on(module)), None)


def _is_on(module: nn.Module) -> bool:
    return getattr(module, "gradient_checkpointing", False) is True
