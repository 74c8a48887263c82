# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""MONAI transforms of the 2D-VoCo bundles: load a CT series, crop it to the body, take slices, cut VoCo crops."""

from __future__ import annotations

from .body import CropBody, CropBodyd
from .errors import SeriesError
from .series import LoadSeries, LoadSeriesd
from .slices import ExtractSlices, ExtractSlicesd, SliceAffinesd, slice_affines
from .voco import RandVoCoCrop, RandVoCoCropd, VoCoCrops, overlap_labels

__version__ = "0.1.0"

__all__ = [
    "CropBody",
    "CropBodyd",
    "ExtractSlices",
    "ExtractSlicesd",
    "LoadSeries",
    "LoadSeriesd",
    "RandVoCoCrop",
    "RandVoCoCropd",
    "SeriesError",
    "SliceAffinesd",
    "VoCoCrops",
    "overlap_labels",
    "slice_affines",
]
