# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Volume contrast (VoCo): cut random and base crops from slices and label how they overlap.

Source: Wu, Zhuang and Chen, "VoCo", CVPR 2024 (arXiv 2402.17300), section 3.2, and its two-dimensional form, Chiu and
Chen, "2D-VoCo", 2026 (arXiv 2601.14593). A grid of base crops covers the slice without overlap; a random crop of the
same size is labelled with the share of its area that lies in each base crop. The number of spatial dimensions follows
the input, so the same transform cuts slices (2D) and sub-volumes (3D).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable, Transform
from monai.utils import TransformBackends, ensure_tuple, ensure_tuple_rep

from .meta import with_meta
from .seeding import SeededInPlace

__all__ = ["RandVoCoCrop", "RandVoCoCropd", "VoCoCrops", "overlap_labels"]


class VoCoCrops(NamedTuple):
    """What `RandVoCoCrop` returns, for n spatial dimensions, S slices and C channels."""

    random_crops: MetaTensor  # [R, S, C, *crop_size]
    base_crops: MetaTensor  # [*grid_size, S, C, *crop_size], a view of the image unless crops are resized
    overlap: torch.Tensor  # [R, prod(grid_size)] float32, row-major over the spatial axes


def overlap_labels(windows: np.ndarray, grid_size: Sequence[int], crop_size: Sequence[int]) -> torch.Tensor:
    """Share of each window's area (volume) that lies in each base crop of the grid.

    Along one axis a window that starts at s shares `max(c - |s - k c|, 0)` of its c pixels with base crop k. The area
    is the product over the axes: all but the last division is integer arithmetic, so that the labels are exact.

    Args:
        windows: [R, n] integer starts in pixels, one column for each spatial axis.
        grid_size: number of base crops along each of the n axes.
        crop_size: size of every crop along each of the n axes, in pixels.

    Returns:
        [R, prod(grid_size)] float32, row-major; a row sums to 1 where the window lies inside the grid.
    """
    shared = np.ones((len(windows), 1), dtype=np.int64)
    for axis, (grid, crop) in enumerate(zip(grid_size, crop_size, strict=True)):
        distance = np.abs(windows[:, axis, None] - crop * np.arange(grid))  # [R, grid]
        along = np.maximum(crop - distance, 0)
        shared = (shared[:, :, None] * along[:, None, :]).reshape(len(windows), -1)
    return torch.from_numpy((shared / math.prod(crop_size)).astype(np.float32))


class RandVoCoCrop(SeededInPlace, Transform):
    """Cut base crops and random crops from the slices of one volume and label their overlap.

    Args:
        grid_size: base crops along each spatial axis; an integer is taken for every axis.
        crop_size: size of a crop along each spatial axis in pixels; an integer is taken for every axis.
        num_random_crops: R, windows drawn anywhere inside the image; a window is the same in all slices.
        output_size: size that crops are averaged to ("area"), for variants such as 96-pixel crops seen at 64 pixels;
            None keeps crops as they are (and base crops a view).

    The image is slice-major, [S, C, *spatial] (`Transposed(indices=(3, 0, 1, 2))` of what `ExtractSlices` returns), of
    any real dtype; a volume for the 3D form is [1, C, X, Y, Z]. Its spatial size must be exactly `grid_size *
    crop_size`. `randomize` records `windows` ([R, n] integer starts); set it and call with `randomize=False` to inject
    windows.

    Example::

        >>> crops = RandVoCoCrop(grid_size=3, crop_size=64)(torch.zeros(32, 1, 192, 192))
        >>> crops.random_crops.shape, crops.base_crops.shape, crops.overlap.shape
        (torch.Size([2, 32, 1, 64, 64]), torch.Size([3, 3, 32, 1, 64, 64]), torch.Size([2, 9]))
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self,
        *,
        grid_size: Sequence[int] | int = (3, 3),
        crop_size: Sequence[int] | int = (64, 64),
        num_random_crops: int = 2,
        output_size: Sequence[int] | int | None = None,
    ) -> None:
        for name, value in (("grid_size", grid_size), ("crop_size", crop_size), ("output_size", output_size)):
            if value is not None and not all(isinstance(n, int) and n >= 1 for n in ensure_tuple(value)):
                raise ValueError(f"{name} must hold integers of at least 1, got {value!r}.")
        if not isinstance(num_random_crops, int) or num_random_crops < 1:
            raise ValueError(f"num_random_crops must be an integer of at least 1, got {num_random_crops!r}.")
        self.grid_size = grid_size
        self.crop_size = crop_size
        self.num_random_crops = num_random_crops
        self.output_size = output_size
        self.windows: np.ndarray | None = None

    def randomize(self, spatial_size: Sequence[int]) -> None:
        """Draw `windows`, uniform over every start at which a crop lies inside the image of `spatial_size`."""
        _, crop, _ = self._layout(spatial_size)
        starts = np.asarray(spatial_size) - np.asarray(crop) + 1
        self.windows = self.R.randint(0, starts, size=(self.num_random_crops, len(crop)), dtype=np.int64)

    def __call__(self, img: torch.Tensor, randomize: bool = True) -> VoCoCrops:
        """Crop `img` [S, C, *spatial].

        Raises:
            ValueError: if grid and crop size do not make up the image, or the windows set are not inside it.
        """
        # Plain tensors inside: MetaTensor bookkeeping on each view would cost more than the crops themselves.
        pixels = img.as_tensor() if isinstance(img, MetaTensor) else torch.as_tensor(img)
        if pixels.ndim < 3:
            raise ValueError(f"The image must be [slices, channels, *spatial], got the shape {tuple(pixels.shape)}.")
        spatial = tuple(pixels.shape[2:])
        grid, crop, out = self._layout(spatial)
        if randomize:
            self.randomize(spatial)
        windows = self._checked_windows(spatial, crop)
        base = _base_crops(pixels, crop)
        random = torch.stack([_window(pixels, start, crop) for start in windows.tolist()])
        if out is not None and out != crop:
            base, random = _resize(base, out), _resize(random, out)
        base_starts = np.indices(grid).reshape(len(grid), -1).T * np.asarray(crop)
        return VoCoCrops(
            _with_windows(random, img, windows.copy()),
            _with_windows(base, img, base_starts),
            overlap_labels(windows, grid, crop),
        )

    def _layout(self, spatial: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]:
        """Grid, crop and output size for this many spatial dimensions; a ValueError where they do not fit the image."""
        try:
            grid = ensure_tuple_rep(self.grid_size, len(spatial))
            crop = ensure_tuple_rep(self.crop_size, len(spatial))
            out = None if self.output_size is None else ensure_tuple_rep(self.output_size, len(spatial))
        except ValueError as error:
            raise ValueError(
                f"grid_size {self.grid_size}, crop_size {self.crop_size} and output_size {self.output_size} do not all"
                f" have the {len(spatial)} spatial dimensions of the image, whose spatial size is {tuple(spatial)}."
            ) from error
        expected = tuple(g * c for g, c in zip(grid, crop, strict=True))
        if expected != tuple(spatial):
            raise ValueError(
                f"A grid of {grid} crops of {crop} pixels covers {expected} pixels, but the image has {tuple(spatial)}."
            )
        return grid, crop, out

    def _checked_windows(self, spatial: Sequence[int], crop: Sequence[int]) -> np.ndarray:
        """`windows` as [R, n] int64, checked to lie inside the image."""
        if self.windows is None:
            raise ValueError("No windows: call randomize() or set `windows` before calling with randomize=False.")
        windows = np.asarray(self.windows)
        if windows.ndim != 2 or windows.shape[1] != len(crop) or not np.issubdtype(windows.dtype, np.integer):
            raise ValueError(f"windows must be [R, {len(crop)}] integers, got {windows.dtype} {windows.shape}.")
        if (windows < 0).any() or (windows > np.subtract(spatial, crop)).any():
            raise ValueError(
                f"windows of {tuple(crop)} pixels must lie inside {tuple(spatial)} pixels, got {windows.tolist()}."
            )
        return windows.astype(np.int64, copy=False)


class RandVoCoCropd(Randomizable, MapTransform):
    """Dictionary version of `RandVoCoCrop`: reads the one key given, adds `random_crops`, `base_crops`, `overlap`.

    The image itself stays in the dictionary; drop it with MONAI's `DeleteItemsd` or `SelectItemsd` before batching.
    """

    backend = RandVoCoCrop.backend

    def __init__(
        self,
        keys: KeysCollection,
        *,
        grid_size: Sequence[int] | int = (3, 3),
        crop_size: Sequence[int] | int = (64, 64),
        num_random_crops: int = 2,
        output_size: Sequence[int] | int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        if len(self.keys) != 1:
            raise ValueError(f"RandVoCoCropd writes fixed keys and so reads exactly one, got {self.keys}.")
        self.cropper = RandVoCoCrop(
            grid_size=grid_size, crop_size=crop_size, num_random_crops=num_random_crops, output_size=output_size
        )

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandVoCoCropd:
        """Seed the array transform, which draws all that is random; a generator of its own would only take time."""
        self.cropper.set_random_state(seed, state)
        return self

    def randomize(self, spatial_size: Sequence[int]) -> None:
        """Draw the windows, recorded in `cropper.windows`."""
        self.cropper.randomize(spatial_size)

    def __call__(self, data: Mapping[Hashable, torch.Tensor], randomize: bool = True) -> dict[Hashable, torch.Tensor]:
        """Add the crops of `data[key]` and their labels to a copy of `data`."""
        d = dict(data)
        for key in self.key_iterator(d):
            d.update(self.cropper(d[key], randomize=randomize)._asdict())
        return d


def _with_windows(crops: torch.Tensor, img: torch.Tensor, windows: np.ndarray) -> MetaTensor:
    """`crops` with the image's meta data and their windows, in a dictionary of their own: later transforms write into
    the meta data of what they are given."""
    return with_meta(crops, {**(img.meta if isinstance(img, MetaTensor) else {}), "windows": torch.from_numpy(windows)})


def _base_crops(pixels: torch.Tensor, crop: Sequence[int]) -> torch.Tensor:
    """[S, C, *spatial] -> the grid of crops [*grid, S, C, *crop], a view."""
    ndim = len(crop)
    for axis, size in enumerate(crop):
        pixels = pixels.unfold(axis + 2, size, size)  # appends the crop's axis, leaves the grid's in place
    return pixels.permute(*range(2, 2 + ndim), 0, 1, *range(2 + ndim, 2 + 2 * ndim))


def _window(pixels: torch.Tensor, start: Sequence[int], crop: Sequence[int]) -> torch.Tensor:
    """The window of all slices that starts at `start`: [S, C, *crop], a view."""
    return pixels[(..., *(slice(s, s + c) for s, c in zip(start, crop, strict=True)))]


def _resize(crops: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Average the trailing axes to `size`; integers are rounded back to their own dtype."""
    lead = crops.shape[: -len(size)]
    flat = crops.reshape(1, -1, *crops.shape[-len(size) :])
    out = F.interpolate(flat if flat.is_floating_point() else flat.float(), size=tuple(size), mode="area")
    if not crops.is_floating_point():
        out = out.round_()
    return out.to(crops.dtype).reshape(*lead, *size)
