# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Who is whose partner in the inter-volume term: the next volume, of this process's batch or of all processes'."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from workflow.gather import ranks, rows_of_all

__all__ = ["next_across_ranks", "next_in_batch", "partner_rule"]


def next_in_batch(base: Tensor) -> Tensor | None:
    """Embeddings of each volume's base crops -> those of its partner, both [B, K, D]; None if it is alone."""
    return base.roll(-1, dims=0) if len(base) > 1 else None


def next_across_ranks(base: Tensor) -> Tensor | None:
    """`next_in_batch` where the batch is that of all processes, in the order in which one process would have it."""
    rank, size = ranks()
    partners = next_in_batch(rows_of_all(base))
    return None if partners is None else partners[rank::size]


def partner_rule(across_ranks: bool) -> Callable[[Tensor], Tensor | None]:
    return next_across_ranks if across_ranks else next_in_batch
