"""Averages gradients over processes, those of the parameters that train now and no others.

torch's DistributedDataParallel fixes its parameters once and makes buckets for all of them. Here they change from step
to step, so that a step sends only the active group's gradients. Buckets are sent while the backward pass still computes
the others, always in the same order: collective calls must come in the same order in all processes, but gradients may
become ready in another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import record_function

from lightning_hift.engine.gradient_buckets import BUCKET_BYTES, Bucket, in_buckets


class GradientSync:
    """Averages the gradients of some parameters over the processes of a group.

    A parameter without gradient counts as one with a gradient of zeros, unless it has none in any process: then it
    keeps none, as in one process.

    Args:
        parameters: All that may ever train, the same ones in the same order in all processes.
        group: The processes; default: all.
        bucket_bytes: Gradients are sent in pieces of about this size.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        group: dist.ProcessGroup | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.sent_bytes = 0
        """What this process has handed over to be summed up since ``begin``."""
        self._group = group
        self._bucket_bytes = bucket_bytes
        self._buckets: list[Bucket] = []
        self._bucket_of: dict[nn.Parameter, Bucket] = {}
        self._queue: list[Bucket] = []  # of the backward pass under way
        self._next = 0  # in the queue: the first one that was not sent
        self._is_open = False  # a backward pass is under way whose gradients are to be sent
        self._blocked = False
        self._hooks = [cast(Any, p).register_post_accumulate_grad_hook(self._on_gradient) for p in parameters]

    def begin(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gradients of ``parameters`` are averaged from now on: those that train at this step, in any order."""
        self._buckets = in_buckets(parameters, self._bucket_bytes)
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.parameters}
        self.sent_bytes = 0

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Gradients of backward passes in this context stay where they are, to be averaged with those of later ones."""
        before, self._blocked = self._blocked, True
        try:
            yield
        finally:
            self._blocked = before

    @contextmanager
    def backward_pass(self) -> Iterator[None]:
        """Around a backward pass: afterwards the gradients are averages."""
        if self._blocked:
            yield
            return
        self._queue = []
        for bucket in self._buckets:
            bucket.waits_for = {p for p in bucket.parameters if p.requires_grad}
            if bucket.waits_for:  # else it is another optimizer's turn
                self._queue.append(bucket)
        self._next, self._is_open = 0, bool(self._queue)
        try:
            yield
            if self._is_open:
                with record_function("HiFT::wait_for_gradients"):
                    self._finish()
        finally:
            self._is_open = False

    def close(self) -> None:
        """Leave the parameters alone."""
        for hook in self._hooks:
            hook.remove()

    def _on_gradient(self, p: nn.Parameter) -> None:
        bucket = self._bucket_of.get(p)
        if not self._is_open or bucket is None:
            return
        bucket.waits_for.discard(p)
        while self._next < len(self._queue) and not self._queue[self._next].waits_for:
            self._send(self._queue[self._next])
            self._next += 1

    def _send(self, bucket: Bucket) -> None:
        gradients = [p.grad for p in bucket.parameters]
        sparse = next((p for p in bucket.parameters if p.grad is not None and p.grad.is_sparse), None)
        if sparse is not None:
            raise RuntimeError(
                f"A parameter of shape {tuple(sparse.shape)} has a sparse gradient, which cannot be averaged over"
                " processes. Use a dense one (sparse=False)."
            )
        if len(gradients) == 1 and gradients[0] is not None and gradients[0].is_contiguous():
            bucket.sent = gradients[0]  # a large one, not copied
        else:
            pairs = zip(bucket.parameters, gradients, strict=True)
            bucket.sent = torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in pairs])
        bucket.sent.div_(dist.get_world_size(self._group))  # before the sum, which might overflow
        self.sent_bytes += bucket.sent.numel() * bucket.sent.element_size()
        bucket.work = dist.all_reduce(bucket.sent, group=self._group, async_op=True)

    def _finish(self) -> None:
        for bucket in self._queue[self._next :]:
            self._send(bucket)
        parameters = [p for bucket in self._queue for p in bucket.parameters]
        here = [p.grad is not None for p in parameters]
        somewhere = dict(zip(parameters, anywhere(here, parameters[0].device, self._group), strict=True))
        for bucket in self._queue:
            bucket.work.wait()
            assert bucket.sent is not None
            if bucket.sent is bucket.parameters[0].grad:
                continue
            parts = cast(Any, bucket.sent).split([p.numel() for p in bucket.parameters])
            for p, part in zip(bucket.parameters, parts, strict=True):
                if p.grad is not None:
                    p.grad.copy_(part.view_as(p))
                elif somewhere[p]:
                    p.grad = part.view_as(p).clone()
        for bucket in self._queue:
            bucket.sent = bucket.work = None


def anywhere(here: Sequence[bool], device: torch.device, group: dist.ProcessGroup | None = None) -> list[bool]:
    """Which of some facts hold in any process.

    Args:
        here: Whether they hold in this one, in the same order in all of them.
        device: Of a kind that the processes can send from.
        group: The processes; default: all.
    """
    flags = torch.tensor(here, dtype=torch.uint8).to(device, non_blocking=True)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    # Read only where it matters: on a GPU, reading waits.
    return list(here) if all(here) else [bool(flag) for flag in flags.tolist()]
