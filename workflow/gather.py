# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What the processes of a distributed run know together. In one process each function gives back what it gets.

Rank r of W has the items r, r + W, r + 2W, ... of a common order (see `workflow.sampler`), so its j-th item stands at
position j * W + r. torch.distributed is asked at each call, not Ignite, which remembers a group that has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["barrier", "in_rank_order", "is_first", "of_each", "of_first", "ranks", "rows_of_all", "sum_over_ranks"]

Item = TypeVar("Item")


def ranks() -> tuple[int, int]:
    """Rank of this process and number of processes, (0, 1) outside a process group."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return ranks()[0] == 0


def barrier() -> None:
    """Wait until all processes are here."""
    if ranks()[1] > 1:
        dist.barrier()


def of_each(own: Item) -> list[Item]:
    """What each process has, by rank; plain types."""
    _, size = ranks()
    found: list[Any] = [own] * size
    if size > 1:
        dist.all_gather_object(found, own)
    return found


def of_first(own: Item) -> Item:
    """What the first process has; plain types."""
    found = [own]
    if ranks()[1] > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]


def in_rank_order(own: Sequence[Item]) -> list[Item]:
    """The items of all processes in their common order. A process may have none; tensors should be on the CPU."""
    shares = of_each(list(own))
    longest = max(len(share) for share in shares)
    return [share[j] for j in range(longest) for share in shares if j < len(share)]


class _Sum(torch.autograd.Function):
    # torch.distributed.nn.functional.all_reduce is the same, and deprecated in favour of a private module
    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient)


def sum_over_ranks(own: Tensor) -> Tensor:
    """Sum of the processes' tensors of one shape. Its gradient is that of the sum of the processes' losses."""
    return own if ranks()[1] == 1 else _Sum.apply(own)


def rows_of_all(own: Tensor) -> Tensor:
    """[n, ...] of each process -> [N, ...] of all in their common order, gradients as in `sum_over_ranks`.

    Raises:
        ValueError: the numbers of rows are not those of an order that is dealt out in turn.
    """
    rank, size = ranks()
    if size == 1:
        return own
    total = int(sum_over_ranks(torch.tensor(len(own), device=own.device)))
    positions = torch.arange(rank, total, size, device=own.device)
    if len(positions) != len(own):
        raise ValueError(f"rank {rank} of {size}: expected {len(positions)} of {total} rows, got {len(own)}")
    # each row into its place among zeros: unlike all_gather this takes rows of any number, on any backend
    return sum_over_ranks(own.new_zeros(total, *own.shape[1:]).index_copy(0, positions, own))
