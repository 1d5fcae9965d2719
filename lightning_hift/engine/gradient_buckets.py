"""Which gradients share a bucket when they are sent to other processes: small ones are sent together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20  # as in DistributedDataParallel


@dataclass
class Bucket:
    """Parameters whose gradients are sent together, and their gradients on the way."""

    parameters: list[nn.Parameter]
    nbytes: int = 0
    waits_for: set[nn.Parameter] = field(default_factory=set)
    sent: Tensor | None = None  # flat, or the only gradient itself
    work: Any = None


def in_buckets(parameters: Sequence[Any], most: int) -> list[Bucket]:
    """The gradients of ``parameters``, or of other tensors, in buckets, in about the order in which they become ready.

    Args:
        parameters: In the order of the model. Those of a bucket have one dtype and one device.
        most: Bytes of a bucket, unless a single gradient is larger.
    """
    buckets: list[Bucket] = []
    for p in reversed(parameters):  # about as they become ready
        if not buckets or _is_full(buckets[-1], p, most):
            buckets.append(Bucket([]))
        buckets[-1].parameters.append(p)
        buckets[-1].nbytes += p.nbytes
    return buckets


def copied_bytes(gradients: Sequence[Tensor], bucket_bytes: int = BUCKET_BYTES) -> int:
    """Bytes of the copies that are sent, until the backward pass has ended: of all gradients that share a bucket.

    Args:
        gradients: Or tensors of their shapes and dtypes, such as those on "meta", in the order of the parameters.
        bucket_bytes: See ``GradientSync``.
    """
    return sum(b.nbytes for b in in_buckets(gradients, bucket_bytes) if len(b.parameters) > 1)


def _is_full(bucket: Bucket, p: nn.Parameter, most: int) -> bool:
    last = bucket.parameters[-1]
    return bucket.nbytes + p.nbytes > most or last.dtype != p.dtype or last.device != p.device
