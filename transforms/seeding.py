# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Random transforms that are seeded anew for every item, as ours are, so that an item is a function of its seed."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from monai.transforms import Randomizable
from monai.utils import MAX_SEED

__all__ = ["SeededInPlace"]

Own = TypeVar("Own", bound="SeededInPlace")


class SeededInPlace(Randomizable):
    """Seeds the generator that it made at the first seed, instead of making one each time: the same numbers, and at
    5 instead of more than 100 microseconds no part of what an item costs. A generator that was given is left alone."""

    _own: np.random.RandomState | None = None

    def set_random_state(self: Own, seed: int | None = None, state: np.random.RandomState | None = None) -> Own:
        """As MONAI's: draw from a generator of `seed`, from `state`, or from an arbitrary one."""
        if seed is not None and self._own is not None and self.R is self._own:
            self.R.seed(int(seed) % MAX_SEED)
            return self
        super().set_random_state(seed, state)
        self._own = self.R if seed is not None else None
        return self
