# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A CT series, as DICOM folder or NIfTI file -> one checked volume in HU.

Stricter than MONAI's readers on purpose: where a source is no regular volume (a slice missing, two series, a tilted
gantry, ...) they return something plausible; this raises a `SeriesError` that says what is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from monai.config import KeysCollection, PathLike
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends

from .dicom import check_dicom, load_dicom
from .errors import SeriesError
from .geometry import SeriesSummary
from .nifti import check_nifti, is_nifti, load_nifti

__all__ = ["LoadSeries", "LoadSeriesd"]


class LoadSeries(Transform):
    """Load a folder with one DICOM CT series, the series of a DICOM file, or a NIfTI file.

    Args:
        dtype: "int16" (HU rounded, saturating) or "float32".
        eight_bit_window: HU window (low, high) that 8-bit NIfTI files hold as 0..255, whatever type they are stored in;
            they are mapped back to HU linearly. None refuses such files.
        series_uid: SeriesInstanceUID of the series to take where a folder holds several, or the name that the message
            about them gives it (`transforms.pseudonym.pseudonym` of the UID).
        resample: put a DICOM series with a tilted gantry or uneven steps on a regular grid along the axes of the body,
            by linear interpolation, instead of refusing it. Missing slices are refused all the same.

    Returns:
        MetaTensor [1, X, Y, Z] in HU, RAS (x to the right, y to anterior, z to superior), over a [Z, Y, X] buffer, so
        that axial slices are contiguous. `meta`: `affine`, and of the source as stored `original_affine`,
        `spatial_shape`, `original_spacing`; `filename_or_obj` (the path given), `skipped_files`, `dropped_duplicates`,
        `resampled`; `source_slices` (JSON text [[InstanceNumber, x, y, z], ...]: the centre of each DICOM image in RAS
        mm).

    Raises:
        SeriesError: the source is not exactly one regular axial volume; nothing is guessed.

    Peak memory is the volume plus a few slices, or twice the volume where it is resampled: the geometry is checked on
    headers alone, then each slice is decoded straight to its place.
    """

    backend = [TransformBackends.NUMPY]

    def __init__(
        self,
        *,
        dtype: Literal["int16", "float32"] = "int16",
        eight_bit_window: Sequence[float] | None = None,
        series_uid: str | None = None,
        resample: bool = False,
    ) -> None:
        if dtype not in ("int16", "float32"):
            raise ValueError(f'dtype must be "int16" or "float32", got {dtype!r}.')
        if eight_bit_window is not None and (len(eight_bit_window) != 2 or eight_bit_window[0] >= eight_bit_window[1]):
            raise ValueError(f"eight_bit_window must be (low, high) in HU with low < high, got {eight_bit_window!r}.")
        self.dtype = dtype
        self.eight_bit_window = None if eight_bit_window is None else tuple(float(v) for v in eight_bit_window)
        self.series_uid = series_uid
        self.resample = resample

    def __call__(self, path: PathLike) -> MetaTensor:
        """Load the volume at `path`."""
        source = os.fspath(path)
        where = self._existing(source)
        dtype = np.dtype(self.dtype)
        if where.is_file() and is_nifti(where):
            return load_nifti(where, dtype=dtype, eight_bit_window=self.eight_bit_window, source=source)
        return load_dicom(where, dtype=dtype, series_uid=self.series_uid, resample=self.resample, source=source)

    def check(self, path: PathLike) -> SeriesSummary:
        """Everything that can be said of the source at `path` without decoding its voxels.

        Loading begins with the same checks: what they refuse, loading refuses with the same SeriesError. What they let
        pass can still fail in loading for its voxels: damage within compressed data, NaN or grey values in NIfTI.
        """
        where = self._existing(os.fspath(path))
        if where.is_file() and is_nifti(where):
            return check_nifti(where, eight_bit_window=self.eight_bit_window)
        stack, skipped = check_dicom(where, series_uid=self.series_uid, resample=self.resample)
        return SeriesSummary(stack.shape, stack.affine, skipped.total(), len(stack.duplicates), bool(stack.irregular))

    @staticmethod
    def _existing(source: str) -> Path:
        where = Path(source)
        if not where.exists():
            raise SeriesError(f"{where}: expected a DICOM folder, a DICOM file or a NIfTI file, found nothing there.")
        return where


class LoadSeriesd(MapTransform):
    """Dictionary version of `LoadSeries`: replaces the path under each key by its volume."""

    backend = LoadSeries.backend

    def __init__(
        self,
        keys: KeysCollection,
        *,
        dtype: Literal["int16", "float32"] = "int16",
        eight_bit_window: Sequence[float] | None = None,
        series_uid: str | None = None,
        resample: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.loader = LoadSeries(
            dtype=dtype, eight_bit_window=eight_bit_window, series_uid=series_uid, resample=resample
        )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Load every key of a copy of `data`."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.loader(d[key])
        return d
