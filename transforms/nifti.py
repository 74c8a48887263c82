# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""NIfTI file -> HU volume, slice by slice. `LoadSeries` is the way in."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path
from typing import IO

import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from .errors import DAMAGED, SeriesError
from .geometry import RASBuffer, check_size, to_dtype

__all__ = ["is_nifti", "load_nifti"]

logger = logging.getLogger(__name__)

UNREADABLE = (*DAMAGED, ImageFileError, HeaderDataError, WrapStructError)
MAX_CORNER_SHIFT = 0.5  # in voxels: qform is stored as a float32 quaternion, whose rounding stays far below this
MAX_SKEW = 0.01  # cosine between two axes, 0.6 degrees


def is_nifti(path: Path) -> bool:
    """Whether the name says NIfTI (.nii, .nii.gz)."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def load_nifti(
    path: Path, *, dtype: np.dtype, eight_bit_window: tuple[float, float] | None, source: str, labels: bool = False
) -> MetaTensor:
    """The HU volume, or with `labels` the mask, in a .nii or .nii.gz file; a SeriesError where there is none.

    The stream is read once, in the order of the file and to its end, so that a damaged .gz fails its checksum.
    """
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
            image = _open_image(path, stream)
            slope_is_set = image.dataobj.slope != 1 or image.dataobj.inter != 0
            windowed = _needs_window(path, image, eight_bit_window) if not (slope_is_set or labels) else False
            volume = RASBuffer.allocate(image.shape, _checked_affine(path, image), dtype)
            lowest = np.inf
            for k in range(image.shape[2]):
                plane = np.asarray(image.dataobj[..., k])
                if not np.isfinite(plane).all():
                    raise SeriesError(f"{path}: expected finite values, found NaN or infinity in slice {k}.")
                if windowed and eight_bit_window is not None:
                    low, high = eight_bit_window
                    plane = low + plane.astype(np.float32) * ((high - low) / 255)
                lowest = min(lowest, plane.min())
                volume.stored[..., k] = to_dtype(plane, dtype)
            stream.read(1)  # past the last voxel: makes gzip compare the checksum
    except SeriesError:
        raise
    except UNREADABLE as error:
        raise SeriesError(
            f"{path}: expected a readable NIfTI file, found a damaged or foreign one ({type(error).__name__}: {error})."
        ) from error
    if lowest >= 0 and not labels:
        logger.warning("%s: no value is below 0; air would be -1000 HU. Is this a volume in HU?", path)
    return volume.tensor(source)


def _open_image(path: Path, stream: IO[bytes]) -> nib.Nifti1Image:
    """Header of the file, checked to describe one real, scalar volume; voxels stay in the stream."""
    size = stream.read(4)
    stream.seek(0)
    if not size:
        raise SeriesError(f"{path}: expected a NIfTI file, found an empty one.")
    nifti2 = 540 in (int.from_bytes(size, "little"), int.from_bytes(size, "big"))
    image = (nib.Nifti2Image if nifti2 else nib.Nifti1Image).from_stream(stream)
    if len(image.shape) != 3:
        raise SeriesError(f"{path}: expected 3 dimensions, found {len(image.shape)}: {image.shape}.")
    if image.get_data_dtype().kind not in "iuf":
        raise SeriesError(f"{path}: expected one real number a voxel, found the type {image.get_data_dtype()}.")
    units = image.header.get_xyzt_units()[0]
    if units not in ("mm", "unknown"):
        raise SeriesError(f"{path}: expected lengths in mm, found the unit {units}.")
    check_size(path, image.shape)
    return image


def _needs_window(path: Path, image: nib.Nifti1Image, window: tuple[float, float] | None) -> bool:
    """Whether voxels are 8-bit grey values of a window; which window it was cannot be guessed."""
    eight_bit = image.get_data_dtype() == np.uint8
    if eight_bit and window is None:
        raise SeriesError(
            f"{path}: expected HU, found 8-bit values 0..255 without scaling, which were windowed once. Say which HU"
            " window they hold with eight_bit_window=(low, high)."
        )
    return eight_bit


def _checked_affine(path: Path, image: nib.Nifti1Image) -> np.ndarray:
    """Voxel-to-RAS affine, if the header holds exactly one and its axes are orthogonal."""
    header = image.header
    sform, sform_code = header.get_sform(coded=True)
    qform, qform_code = header.get_qform(coded=True)
    if not sform_code and not qform_code:
        raise SeriesError(f"{path}: expected an orientation, found sform_code and qform_code 0 (unknown).")
    affine = np.asarray(sform if sform_code else qform, dtype=np.float64)
    sizes = nib.affines.voxel_sizes(affine)
    if not np.isfinite(affine).all() or (sizes <= 0).any():
        raise SeriesError(f"{path}: expected an invertible affine, found {affine.tolist()}.")
    if sform_code and qform_code:
        ends = np.array([[0, n - 1] for n in image.shape])
        corners = np.stack(np.meshgrid(*ends), axis=-1).reshape(-1, 3)
        moved = nib.affines.apply_affine(sform, corners) - nib.affines.apply_affine(qform, corners)
        shift = np.linalg.norm(moved, axis=1).max()
        if shift > MAX_CORNER_SHIFT * sizes.min():
            raise SeriesError(f"{path}: expected sform and qform to agree, found corners {shift:.2f} mm apart.")
    axes = affine[:3, :3] / sizes
    skew = np.abs(axes.T @ axes - np.eye(3)).max()
    if skew > MAX_SKEW:
        raise SeriesError(
            f"{path}: expected orthogonal axes, found {90 - np.degrees(np.arccos(min(skew, 1.0))):.1f} degrees of skew"
            " (a gantry tilt?)."
        )
    return affine
