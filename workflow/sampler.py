# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The order of a run's items, a pure function of (seed, epoch): the same for any number of workers, and after a
resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from .gather import ranks

__all__ = ["EpochSampler"]


class EpochSampler(Sampler[int]):
    """Yields ``epoch * num_items + index`` in an order that depends on the seed and the epoch alone.

    `SlabDataset` takes index and random seed of an item from that number. Rank r of W processes takes the positions r,
    r + W, r + 2W, ... of the one order, so that step s of all of them together has the items of step s of one process
    with W times the batch size. The last step may give some ranks one item less. Only where it has fewer items than
    there are ranks is the order filled up from its start, as every rank must take part in every step.

    Args:
        num_items: length of the dataset.
        seed: of the order.
        shuffle: False for the given order.
        weights: [num_items] how often each item is drawn, up to a factor; an epoch then draws as many items as there
            are, with replacement, and each draw has a number of its own, so that a repeated item is augmented anew.
        batch_size: items a step of one process.
        fill: False for evaluation, where each item counts once: the order is never filled up, a rank may have no item.
        rank, world_size: of this process; default from torch.distributed where that is initialised.
    """

    def __init__(
        self,
        num_items: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        weights: Sequence[float] | np.ndarray | None = None,
        batch_size: int = 1,
        fill: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        own_rank, size = ranks()
        self.rank = own_rank if rank is None else rank
        self.world_size = size if world_size is None else world_size
        self.batch_size, self.fill = batch_size, fill
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
        return iter(self._share(self._order()))

    def _order(self) -> np.ndarray:
        """The numbers of the whole epoch, the same on every rank."""
        generator = np.random.default_rng([self.seed, self.epoch])
        if self.weights is not None:
            items = generator.choice(self.num_items, self.num_items, p=self.weights / self.weights.sum())
            draws = self.epoch * self.num_items + np.arange(self.num_items)
            return draws * self.num_items + items
        items = generator.permutation(self.num_items) if self.shuffle else np.arange(self.num_items)
        return self.epoch * self.num_items + items

    def _share(self, order: np.ndarray) -> list[int]:
        """This rank's part of what is left of an order, in turn."""
        left = order[self.skip :]
        left = np.concatenate([left, np.resize(order, self._missing(len(left)))])
        return left[self.rank :: self.world_size].tolist()

    def _missing(self, number: int) -> int:
        """How many of `number` items are to be taken twice so that no rank goes without in the last step."""
        last = number % (self.batch_size * self.world_size)
        return self.world_size - last if self.fill and 0 < last < self.world_size else 0

    def __len__(self) -> int:
        return len(range(self.rank, self.num_items + self._missing(self.num_items), self.world_size))
