# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The second baseline of the data path: MONAI's `PersistentDataset` and `CacheDataset`, used well.

All that is deterministic is cached as our own cache holds it: without meta data, as uint8, slice after slice. Slices
and crops are drawn after the cache and cut out of plain uint8 tensors, which become float at the end, with all labels
computed at once. A gain over these is a gain over good practice, not over the original's habits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, MetaTensor, PersistentDataset
from monai.transforms import Compose, Randomizable, Transform
from torch import Tensor

from .reference import preparation

__all__ = ["RandCrops", "ToSlab", "in_memory", "on_disk"]


class ToSlab(Transform):
    """Float volume [1, X, Y, Z] in [0, 1] -> plain uint8 slab [Z, 1, X, Y], its slices in a piece each."""

    def __call__(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        image = data["image"]
        volume = image.as_tensor() if isinstance(image, MetaTensor) else image
        return {"image": (255 * volume).round().to(torch.uint8).permute(3, 0, 1, 2).contiguous()}


class RandCrops(Randomizable, Transform):
    """Prepared slab [Z, 1, X, Y] uint8 -> crops [R+K, S, 1, *crop] float32, random ones first, and overlaps [R, K].

    Crops are in [0, 1]. A random slice of each of S equal parts of the volume, as in the bundle's training.
    """

    def __init__(self, num_slices: int, grid: Sequence[int], crop: Sequence[int], num_random_crops: int = 2) -> None:
        self.num_slices, self.grid, self.size, self.number = num_slices, tuple(grid), tuple(crop), num_random_crops
        self.base = np.stack([np.array(cell) * self.size for cell in np.ndindex(*self.grid)])  # [K, 2]

    def randomize(self, shape: Sequence[int]) -> None:
        """Draw slices and windows for a slab [Z, 1, X, Y]."""
        edges = np.arange(self.num_slices + 1) * shape[0] // self.num_slices
        self.index = self.R.randint(edges[:-1], edges[1:])
        self.windows = self.R.randint(0, np.subtract(shape[2:], self.size) + 1, size=(self.number, 2))

    def __call__(self, data: Mapping[str, Tensor]) -> dict[str, Any]:
        slab = data["image"]
        self.randomize(slab.shape)
        slices = slab[torch.from_numpy(self.index)]  # [S, 1, X, Y], one copy
        starts = np.concatenate([self.windows, self.base]).tolist()
        width, height = self.size
        crops = torch.stack([slices[:, :, x : x + width, y : y + height] for x, y in starts])
        distance = np.abs(self.windows[:, None] - self.base[None])  # [R, K, 2]
        shared = np.maximum(np.array(self.size) - distance, 0).prod(axis=-1) / np.prod(self.size)
        return {"crops": crops.float().div_(255), "overlap": torch.from_numpy(shared.astype(np.float32))}


def _chain(volume_size: Sequence[int], crops: RandCrops) -> Compose:
    return Compose([*preparation(volume_size).transforms, ToSlab(), crops])


def on_disk(files: Sequence[str], folder: Path, volume_size: Sequence[int], crops: RandCrops) -> PersistentDataset:
    """Prepared volumes in files, read at each access."""
    items = [{"image": file} for file in files]
    return PersistentDataset(items, _chain(volume_size, crops), cache_dir=folder, track_meta=False, weights_only=True)


def in_memory(files: Sequence[str], volume_size: Sequence[int], crops: RandCrops) -> CacheDataset:
    """Prepared volumes in memory, for cohorts that fit there (2.4 MB a volume of 192 x 192 x 64)."""
    items = [{"image": file} for file in files]
    return CacheDataset(items, _chain(volume_size, crops), progress=False, copy_cache=False, num_workers=None)
