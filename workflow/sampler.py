# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The order of a run's items, a pure function of (seed, epoch): the same for any number of workers, and after a
resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

__all__ = ["EpochSampler"]


class EpochSampler(Sampler[int]):
    """Yields ``epoch * num_items + index`` in an order that depends on the seed and the epoch alone.

    `SlabDataset` takes index and random seed of an item from that number. Every process of a distributed run takes each
    ``world_size``-th item of the same order; the order is filled up from its start so that all get the same number.

    Args:
        num_items: length of the dataset.
        seed: of the order.
        shuffle: False for the given order.
        weights: [num_items] how often each item is drawn, up to a factor; an epoch then draws as many items as there
            are, with replacement, and each draw has a number of its own, so that a repeated item is augmented anew.
        rank, world_size: of this process; default from torch.distributed where that is initialised.
    """

    def __init__(
        self,
        num_items: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        weights: Sequence[float] | np.ndarray | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = rank if rank is not None else torch.distributed.get_rank() if distributed else 0
        self.world_size = (
            world_size if world_size is not None else torch.distributed.get_world_size() if distributed else 1
        )
        if num_items < 1:
            raise ValueError(f"num_items: expected at least one item, got {num_items}")
        self.num_items, self.seed, self.shuffle = num_items, seed, shuffle
        self.epoch, self.skip = 0, 0
        self.weights = None if weights is None else np.asarray(weights, dtype=np.float64)
        if self.weights is not None and (
            self.weights.shape != (num_items,) or not np.isfinite(self.weights).all() or self.weights.min() <= 0
        ):
            raise ValueError(f"weights: expected {num_items} positive numbers, got {self.weights}")

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """The epoch to come; its first `skip` items, of all processes together, are left out: a run that goes on in the
        middle of an epoch has seen them. The length stays that of a whole epoch."""
        self.epoch, self.skip = epoch, skip

    def __iter__(self) -> Iterator[int]:
        if self.weights is not None:
            return iter(self._draw(self.weights))
        order = np.arange(self.num_items)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_items)
        order = np.resize(order, len(self) * self.world_size)
        order = order[self.skip :][self.rank :: self.world_size]
        return iter((self.epoch * self.num_items + order).tolist())

    def _draw(self, weights: np.ndarray) -> list[int]:
        total = len(self) * self.world_size
        items = np.random.default_rng([self.seed, self.epoch]).choice(self.num_items, total, p=weights / weights.sum())
        numbers = (self.epoch * total + np.arange(total)) * self.num_items + items
        return numbers[self.skip :][self.rank :: self.world_size].tolist()

    def __len__(self) -> int:
        return -(-self.num_items // self.world_size)
