# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""NIfTI file -> HU volume, slice by slice. `LoadSeries` is the way in."""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from .errors import DAMAGED, SeriesError
from .geometry import RASBuffer, SeriesSummary, check_size, to_dtype

__all__ = ["check_nifti", "is_nifti", "load_nifti"]

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
    with _readable(path) as stream:
        image, affine = _checked_header(path, stream)
        volume = RASBuffer.allocate(image.shape, affine, dtype)
        eight_bit = _fill(path, image, volume, dtype)
        stream.read(1)  # past the last voxel: makes gzip compare the checksum
    if labels:
        return volume.tensor(source)
    if eight_bit:
        _undo_window(path, volume, eight_bit_window, dtype)
    elif volume.buffer.min() >= 0:
        logger.warning("%s: no value is below 0; air would be -1000 HU. Is this a volume in HU?", path)
    return volume.tensor(source)


def check_nifti(path: Path, *, eight_bit_window: tuple[float, float] | None) -> SeriesSummary:
    """All that loading checks before it reads voxels."""
    with _readable(path) as stream:
        image, affine = _checked_header(path, stream)
        scaled = image.dataobj.slope != 1 or image.dataobj.inter != 0
    if image.get_data_dtype() == np.uint8 and not scaled and eight_bit_window is None:
        raise _eight_bit(path)
    return SeriesSummary(tuple(image.shape), affine)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked; whatever goes wrong with them is a SeriesError."""
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
            yield stream
    except SeriesError:
        raise
    except UNREADABLE as error:
        raise SeriesError(
            f"{path}: expected a readable NIfTI file, found a damaged or foreign one ({type(error).__name__}: {error})."
        ) from error


def _checked_header(path: Path, stream: IO[bytes]) -> tuple[nib.Nifti1Image, np.ndarray]:
    """The image (voxels stay in the stream, where they must all be unless it is packed) and its affine."""
    image = _open_image(path, stream)
    data, size = image.dataobj, path.stat().st_size
    end = data.offset + data.dtype.itemsize * int(np.prod(image.shape))
    if isinstance(stream, io.BufferedReader) and size < end:
        raise SeriesError(f"{path}: expected a readable NIfTI file of {end} bytes, found {size}: it is cut off.")
    return image, _checked_affine(path, image)


def _fill(path: Path, image: nib.Nifti1Image, volume: RASBuffer, dtype: np.dtype) -> bool:
    """Read the voxels to their places, slice by slice; whether all of them are grey values 0..255 and one is 0.

    No CT is like that, whose air is negative; an 8-bit picture or a label map is, also where it is stored as int16.
    """
    lowest, whole = np.inf, True
    for k in range(image.shape[2]):
        plane = np.asarray(image.dataobj[..., k])
        if not np.isfinite(plane).all():
            raise SeriesError(f"{path}: expected finite values, found NaN or infinity in slice {k}.")
        lowest = min(lowest, plane.min())
        whole = whole and lowest >= 0 and plane.max() <= 255 and (plane.dtype.kind != "f" or (plane % 1 == 0).all())
        volume.stored[..., k] = to_dtype(plane, dtype)
    return bool(whole and (lowest == 0 or image.get_data_dtype() == np.uint8))


def _eight_bit(path: Path) -> SeriesError:
    return SeriesError(
        f"{path}: expected HU, found 8-bit values 0..255, which were windowed once (or are labels). Say which HU"
        " window they hold with eight_bit_window=(low, high)."
    )


def _undo_window(path: Path, volume: RASBuffer, window: tuple[float, float] | None, dtype: np.dtype) -> None:
    """Grey values 0..255 back to HU, in place. Which window they were made with cannot be guessed."""
    if window is None:
        raise _eight_bit(path)
    low, high = window
    for plane in volume.buffer:
        plane[:] = to_dtype(low + plane.astype(np.float32) * ((high - low) / 255), dtype)


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
