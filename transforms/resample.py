# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A stack of slices under a tilted gantry, or unevenly spaced -> a regular grid along the axes of the body."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import grid_sample

from .dicom_geometry import LPS_TO_RAS, SliceStack
from .geometry import RASBuffer, check_size, to_dtype

__all__ = ["resample_stack"]

AIR = -1024.0  # HU of what no slice shows
TOLERANCE = 1e-3  # in voxels: a grid point on the border of the source is inside


def resample_stack(folder: Path, source: np.ndarray, stack: SliceStack, dtype: np.dtype) -> RASBuffer:
    """Linear interpolation of `source`, whose slices keep their own positions, on the smallest grid around all of it.

    A grid point lies between two neighbouring slices, s and s + 1, a fraction t of the way along their normal. The
    origin of a slice at that height is (1 - t) p_s + t p_(s+1), and the point's column and row are counted from there:
    between the slices values are interpolated along the direction in which they were stacked, which takes out the
    shear, and what is linear in space is exact.

    Args:
        folder: named in errors.
        source: HU [columns, rows, slices] in the stack's order.
        stack: positions of the slices.

    Returns:
        Buffer whose voxels are the finer pixel spacing along x and y, and about the median distance of the slices along
        z; voxels outside every slice hold -1024 HU. Its `source_affine` has the mean step between slices.
    Raises:
        SeriesError: the grid would be absurdly large.
    """
    flip = np.diag(LPS_TO_RAS)[:3]
    positions = stack.positions * flip  # [slices, 3]
    pixel = np.linalg.norm(stack.affine[:3, :2], axis=0)  # between columns, between rows
    in_plane = stack.affine[:3, :2] / pixel  # [3, 2] directions of a row, of a column
    normal = stack.normal * flip
    distances = (positions - positions[0]) @ normal
    last = np.array(source.shape[:2]) - 1
    corners = positions[:, None] + np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) * last * pixel @ in_plane.T
    low, high = corners.min(axis=(0, 1)), corners.max(axis=(0, 1))
    wanted = np.array([pixel.min(), pixel.min(), np.quantile(np.diff(distances), 0.5, method="lower")])
    steps = np.maximum(np.round((high - low) / wanted), 1)
    shape = (steps + 1).astype(int).tolist()
    check_size(folder, shape)
    affine = np.diag([*((high - low) / steps), 1.0])
    affine[:3, 3] = low
    volume = RASBuffer.allocate(shape, affine, dtype)
    limits = np.array(source.shape)[:, None, None] - 1
    x, y = np.meshgrid(*(low[a] + affine[a, a] * np.arange(shape[a]) for a in (0, 1)), indexing="ij")
    for k in range(shape[2]):
        point = np.stack([x, y, np.full_like(x, low[2] + affine[2, 2] * k)], axis=-1)  # [X, Y, 3]
        height = (point - positions[0]) @ normal
        origin = np.stack([np.interp(height, distances, p) for p in positions.T], axis=-1)
        slice_ = np.interp(height, distances, np.arange(len(distances)))
        slice_ += (height - np.clip(height, 0, distances[-1])) / affine[2, 2]  # beyond the first or last slice
        index = np.stack([*np.moveaxis((point - origin) @ in_plane / pixel, -1, 0), slice_])  # [3, X, Y]
        clipped = np.clip(index, 0, limits)
        plane = _interpolate(source, clipped)
        plane[(np.abs(index - clipped) > TOLERANCE).any(axis=0)] = AIR
        volume.stored[..., k] = to_dtype(plane, dtype)
    return replace(volume, source_affine=stack.affine, source_shape=source.shape)


def _interpolate(source: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Linear interpolation of `source` [I, J, K] at `index` [3, X, Y] inside it: [X, Y] float32."""
    first = min(int(index[2].min()), source.shape[2] - 2)  # only the slices that are needed become float32
    slab = source[..., first : int(index[2].max()) + 2].astype(np.float32)
    ends = np.maximum(np.array(slab.shape) - 1, 1)[:, None, None]
    grid = (
        2 * (index - np.array([0, 0, first])[:, None, None]) / ends - 1
    )  # -1 is the first voxel's centre, 1 the last's
    grid = torch.from_numpy(np.moveaxis(grid[::-1], 0, -1).astype(np.float32))  # torch counts the last axis first
    sampled = grid_sample(
        torch.from_numpy(slab)[None, None], grid[None, None], mode="bilinear", padding_mode="border", align_corners=True
    )
    return sampled[0, 0, 0].numpy()
