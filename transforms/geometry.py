# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What DICOM and NIfTI loading share: the RAS buffer that slices are decoded into, and its limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from .errors import SeriesError

__all__ = ["RASBuffer", "SeriesSummary", "check_size", "to_dtype"]

MAX_SIDE = 4096  # pixels; CT matrices end at 2048
MAX_VOXELS = 2**31  # 4 GB of int16; 1,500 slices of 1024 x 1024 fit
MIN_SLICES = 2  # one slice has no spacing and no direction


def check_size(source: Path, shape: Sequence[int]) -> None:
    """Refuse a volume [columns, rows, slices] that is no volume or absurdly large, before memory is asked for."""
    if any(n < 1 for n in shape[:2]) or any(n > MAX_SIDE for n in shape) or np.prod(shape, dtype=float) > MAX_VOXELS:
        raise SeriesError(
            f"{source}: expected at most {MAX_SIDE} voxels along an axis and {MAX_VOXELS} in all, found"
            f" {' x '.join(map(str, shape))}."
        )
    if shape[2] < MIN_SLICES:
        raise SeriesError(f"{source}: expected a volume of at least {MIN_SLICES} slices, found {shape[2]}.")


def to_dtype(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """HU as `dtype`; integers are rounded and saturate at the ends of int16 instead of wrapping."""
    if dtype.kind == "f" or values.dtype == dtype:
        return values
    info = np.iinfo(dtype)
    if values.dtype.kind == "f":
        values = np.rint(values)
    return np.clip(values, info.min, info.max)


@dataclass(frozen=True)
class SeriesSummary:
    """What is known of a usable series before its voxels are read."""

    shape: tuple[int, int, int]  # columns, rows, slices as stored
    affine: np.ndarray  # stored voxel (i, j, k) -> RAS mm, [4, 4] float64
    skipped_files: int = 0
    dropped_duplicates: int = 0
    resampled: bool = False  # loading puts it on another grid than this one

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm between columns, rows and slices."""
        x, y, z = nib.affines.voxel_sizes(self.affine).tolist()
        return x, y, z


@dataclass
class RASBuffer:
    """A [Z, Y, X] array seen in the order in which the source stores its voxels.

    `stored[..., k] = slice` writes slice k of the source straight to its place in RAS, flipped and permuted on the way,
    so that the volume is never held twice. torch has no negative strides: the flips have to happen here.
    """

    buffer: np.ndarray  # [Z, Y, X], C-contiguous
    stored: np.ndarray  # view of `buffer` in the source's axes [i, j, k]
    affine: np.ndarray  # RAS voxel (x, y, z) -> mm, [4, 4] float64
    source_affine: np.ndarray  # voxel (i, j, k) of the source -> RAS mm, [4, 4] float64
    source_shape: tuple[int, ...]  # that of `stored`, unless the source was resampled

    @classmethod
    def allocate(cls, shape: Sequence[int], source_affine: np.ndarray, dtype: np.dtype) -> RASBuffer:
        """Buffer for a source of `shape` [i, j, k] whose voxels map to RAS mm by `source_affine`."""
        to_ras = io_orientation(source_affine)
        ras_shape = [0, 0, 0]
        for stored_axis, ras_axis in enumerate(to_ras[:, 0].astype(int)):
            ras_shape[ras_axis] = int(shape[stored_axis])
        buffer = np.empty(ras_shape[::-1], dtype=dtype)
        stored = apply_orientation(buffer.transpose(2, 1, 0), ornt_transform(axcodes2ornt("RAS"), to_ras))
        affine = source_affine @ inv_ornt_aff(to_ras, tuple(shape))
        return cls(buffer, stored, affine, source_affine, stored.shape)

    def tensor(
        self,
        source: str,
        *,
        skipped_files: int = 0,
        dropped_duplicates: int = 0,
        resampled: bool = False,
        source_slices: str = "[]",
    ) -> MetaTensor:
        """[1, X, Y, Z] MetaTensor over the same memory. All sources carry the same meta keys, so that they batch."""
        meta = {
            "affine": torch.from_numpy(self.affine),
            "original_affine": torch.from_numpy(self.source_affine),
            "spatial_shape": torch.tensor(self.source_shape),
            "original_spacing": torch.from_numpy(nib.affines.voxel_sizes(self.source_affine)),
            "filename_or_obj": source,
            "skipped_files": skipped_files,
            "dropped_duplicates": dropped_duplicates,
            "resampled": int(resampled),
            "source_slices": source_slices,
        }
        return MetaTensor(torch.from_numpy(self.buffer).permute(2, 1, 0)[None], meta=meta)
