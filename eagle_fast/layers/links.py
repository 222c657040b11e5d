"""What the ranks of a model exchange in a forward: sums, the best of all, what rank 0 tells all, what all tell rank 0.

n ranks, S parts, R rows, H hidden size, V vocabulary, k candidates of a row.

Here is the reference, for ranks on a CPU: one rank after the other up to each exchange, which is a sum in rank order.
`peer_links` has the same between GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from eagle_fast_kernels.exchange import exchange_add_rms_norm_ref, own_sum_ref
from eagle_fast_kernels.exchange_best import exchange_best_ref
from torch import Tensor


class OutOfStepError(RuntimeError):
    """A rank waited in vain for another one: the round's tokens are lost, and the model is usable again."""


class Proposed(NamedTuple):
    """The best tokens after rows, of one rank's part of a vocabulary: see `lm_head_topk`."""

    scores: Tensor  # [R, k] before they are normalised
    tokens: Tensor  # [R, k]
    sums: Tensor  # [R, 2]


class Links:
    """Between ranks on these devices, in rank order."""

    def __init__(self, devices: Sequence[torch.device]):
        self.devices = list(devices)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """The exchanges in this block are those of one forward."""
        yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        """In this block something is launched on all ranks, or on none."""
        yield

    def add_rms_norm(
        self, products: Sequence[Tensor], residuals: Sequence[Tensor], weights: Sequence[Tensor], eps: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(normed, total), each [R, H] on every rank: total is the sum of all ranks' products and the residual.

        products: of each rank [R, H], or parts, fp32 [S, R, H]. residuals [R, H] and weights [H] are the same on all.
        """
        sums = [own_sum_ref(product, residual.dtype) for product, residual in zip(products, residuals, strict=True)]
        results = [
            exchange_add_rms_norm_ref([each.to(device) for each in sums], residual, weight, eps)
            for device, residual, weight in zip(self.devices, residuals, weights, strict=True)
        ]
        return [normed for normed, _ in results], [total for _, total in results]

    def best(self, proposals: Sequence[Proposed]) -> list[tuple[Tensor, Tensor]]:
        """(log-probabilities, tokens) [R, k], the best of all ranks' on every rank."""
        return [
            exchange_best_ref([tuple(part.to(device) for part in each) for each in proposals])  # type: ignore[misc]
            for device in self.devices
        ]

    def send(self, name: str, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Integer tensors of rank 0 on every rank. name: of what is sent; until the next of that name it stays."""
        return [tuple(each.to(device) for each in tensors) for device in self.devices]

    def gather(self, name: str, columns: Sequence[Tensor]) -> Tensor:
        """[R, V] on rank 0 of columns of every rank. name: as in `send`."""
        return torch.cat([each.to(self.devices[0]) for each in columns], -1)

    def settle(self) -> None:
        """Before more is launched: where an exchange was broken off, let the ranks begin anew."""

    def check(self) -> None:
        """After a round was read: OutOfStepError where a wait ran out."""
