# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""MONAI transforms of the 2D-VoCo bundles: load a CT series, crop it to the body or
its organs, take slices, label them, cut VoCo crops."""

from __future__ import annotations

from .body import CropBody, CropBodyd
from .errors import SeriesError
from .organs import CropSeriesd, LoadOrganMask
from .series import LoadSeries, LoadSeriesd
from .slice_labels import SliceLabels, SliceLabelsd
from .slices import ExtractSlices, ExtractSlicesd, SliceAffinesd, slice_affines
from .voco import RandVoCoCrop, RandVoCoCropd, VoCoCrops, overlap_labels

__version__ = "0.3.0"

__all__ = [
    "CropBody",
    "CropBodyd",
    "CropSeriesd",
    "ExtractSlices",
    "ExtractSlicesd",
    "LoadOrganMask",
    "LoadSeries",
    "LoadSeriesd",
    "RandVoCoCrop",
    "RandVoCoCropd",
    "SeriesError",
    "SliceAffinesd",
    "SliceLabels",
    "SliceLabelsd",
    "VoCoCrops",
    "overlap_labels",
    "slice_affines",
]
