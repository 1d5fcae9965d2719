"""Whether a network keeps the documents of a packed row apart, tried on the network itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LENGTHS = (5, 4)  # of the two documents of a row
_ROUNDINGS = 16  # of the largest logit that may differ where only the order of sums does, as among experts
_SHARE = 1 / 16  # likewise, of what changes where the first document is seen; in 16 bits, this is the sharper one


def is_packed(position_ids: Tensor) -> bool:
    """Whether a row of ``position_ids``, shape (batch, length), holds several documents. Waits for the device."""
    return bool((position_ids.diff() != 1).any())


def refuse_contamination(network: Any, num_rows: int) -> None:
    """Try whether the second document of a row depends on the first, on a tiny random batch.

    Twice it goes through the network, in the mode (training or evaluation) in which it is, with the same dropout but
    another first document. A third and a fourth time as one document tell rounding from influence, where there is any
    difference. Random generators are left as they were.

    Args:
        network: A causal language model of transformers.
        num_rows: Rows of the batch; flash attention packs batches of one row only.

    Raises:
        ValueError: It depends on it, or the network takes no ``position_ids``.
    """
    reason = _reason(network, num_rows)
    if reason is None:
        return
    single = " With batch_size=1 it keeps them apart." if num_rows > 1 and _reason(network, 1) is None else ""
    kind = getattr(getattr(network, "config", None), "_attn_implementation", None)
    raise ValueError(
        f"Got packed rows, whose documents must not see each other, but {reason} in {type(network).__name__} with"
        f" attn_implementation={kind!r}.{single} Use packing=False, another attn_implementation, or, if a document may"
        " see those before it in its row, contamination='allow' of the data module."
    )


def _reason(network: Any, num_rows: int) -> str | None:
    weight = next(network.parameters())
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        vocabulary = network.get_input_embeddings().weight.shape[0]
        first, second = _LENGTHS
        tokens = torch.randint(vocabulary, (num_rows, first + second))
        others = tokens.clone()
        others[:, :first] = (tokens[:, :first] + 1 + torch.randint(vocabulary - 1, (num_rows, first))) % vocabulary
        packed = torch.cat([torch.arange(first), torch.arange(second)]).expand(num_rows, -1)
        try:
            change, rounding = _change(network, tokens, others, packed)
        except TypeError as error:
            return f"the network does not take position_ids ({error})"
        if change == 0:
            return None
        in_one_document = torch.arange(first + second).expand(num_rows, -1)
        if change > _ROUNDINGS * rounding or change > _SHARE * _change(network, tokens, others, in_one_document)[0]:
            return "the second one's logits change with the first"
    return None


def _change(network: Any, tokens: Tensor, others: Tensor, positions: Tensor) -> tuple[float, float]:
    """How much the logits of the second document differ, and one rounding of the largest of them."""
    device = next(network.parameters()).device
    found: list[Tensor] = []
    for batch in (tokens, others):
        torch.manual_seed(0)  # of dropout
        output = network(input_ids=batch.to(device), position_ids=positions.to(device))
        found.append(output.logits[:, _LENGTHS[0] :])
    rounding = float(found[0].abs().max()) * torch.finfo(found[0].dtype).eps
    return float((found[0].float() - found[1].float()).abs().max()), rounding
