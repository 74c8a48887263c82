# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""DICOM CT series -> HU volume, slice by slice. `LoadSeries` is the way in."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from monai.data import MetaTensor
from pydicom.config import disable_value_validation
from pydicom.pixels import get_decoder, pixel_array

from .dicom_geometry import LPS_TO_RAS, SliceStack, stack_slices
from .dicom_headers import SliceHeader, list_reasons, read_series
from .errors import DAMAGED, SeriesError
from .geometry import RASBuffer, to_dtype
from .resample import resample_stack

__all__ = ["check_dicom", "load_dicom"]

logger = logging.getLogger(__name__)


def load_dicom(path: Path, *, dtype: np.dtype, series_uid: str | None, resample: bool, source: str) -> MetaTensor:
    """The HU volume of the one CT series in a folder, or of a DICOM file's own series.

    Headers are read and the geometry is checked before any pixel is decoded. Stored values become HU by each slice's
    own RescaleSlope and RescaleIntercept; presentation (window, MONOCHROME1) plays no part. Both tags are required,
    type 1 in the CT IOD: without them a stored 1000 may be bone or water, and nothing is guessed.
    """
    stack, skipped = check_dicom(path, series_uid=series_uid, resample=resample)
    folder = stack.slices[0].path.parent
    if stack.irregular:
        stored = np.empty(stack.shape[::-1], dtype=dtype).transpose(2, 1, 0)
        _decode_stack(stack, stored, dtype)
        volume = resample_stack(folder, stored, stack, dtype)
        logger.warning(
            "%s: %s, resampled to %s voxels.", folder, stack.irregular, " x ".join(map(str, volume.stored.shape))
        )
    else:
        volume = RASBuffer.allocate(stack.shape, stack.affine, dtype)
        _decode_stack(stack, volume.stored, dtype)
    if skipped or stack.duplicates:
        logger.warning(
            "%s: %d slices; %d files skipped that are no CT slice%s, %d identical duplicates dropped.",
            folder, len(stack.slices), skipped.total(), list_reasons(skipped, " ({})"), len(stack.duplicates),
        )  # fmt: skip
    return volume.tensor(
        source,
        skipped_files=skipped.total(),
        dropped_duplicates=len(stack.duplicates),
        resampled=bool(stack.irregular),
        source_slices=_source_slices([*stack.slices, *(header for _, header in stack.duplicates)]),
    )


def _decode_stack(stack: SliceStack, stored: np.ndarray, dtype: np.dtype) -> None:
    """Decode each slice to its place in `stored` [columns, rows, slices]."""
    for k, header in enumerate(stack.slices):
        stored[..., k] = to_dtype(_decode(header), dtype).T


def check_dicom(path: Path, *, series_uid: str | None, resample: bool) -> tuple[SliceStack, Counter[str]]:
    """All that loading checks before it decodes: the slices in order, and how many files were skipped for which reason.

    Pixels are decoded only of images at one position, which must be the same.
    """
    headers, skipped = read_series(path, series_uid)
    folder = headers[0].path.parent
    stack = stack_slices(folder, headers, resample=resample)
    _check_decoders(folder, headers)
    for header in headers:
        if header.missing_pixels:
            raise _damaged(header, header.missing_pixels)
    _check_duplicates(stack)
    return stack, skipped


def _source_slices(headers: Iterable[SliceHeader]) -> str:
    """JSON [[InstanceNumber, x, y, z], ...]: where each numbered image has its centre, in RAS mm.

    Text, so that volumes of any number of slices batch. Images that were dropped as duplicates are there: labels may
    name either.
    """
    numbered = [header for header in headers if header.instance_number is not None]
    places = [(LPS_TO_RAS[:3, :3] @ header.centre).round(3).tolist() for header in numbered]
    return json.dumps([[header.instance_number, *place] for header, place in zip(numbered, places, strict=True)])


def _check_decoders(folder: Path, slices: Iterable[SliceHeader]) -> None:
    """Refuse transfer syntaxes without a decoder before any slice is decoded."""
    for syntax in {header.transfer_syntax for header in slices}:
        try:
            decoder = get_decoder(syntax)
        except NotImplementedError as error:
            raise SeriesError(
                f"{folder}: expected pixel data that pydicom can decode, found the transfer syntax"
                f" {syntax.name or 'none'}."
            ) from error
        if not decoder.is_available:
            missing = "; ".join(decoder.missing_dependencies)
            raise SeriesError(f"{folder}: no decoder installed for the transfer syntax {syntax.name}: {missing}.")


def _decode(header: SliceHeader) -> np.ndarray:
    """HU of one slice, [rows, columns] int32 or float64."""
    try:
        with disable_value_validation():  # its warnings quote values
            stored = pixel_array(header.path)
    except DAMAGED as error:
        raise _damaged(header, f"{type(error).__name__}: {error}") from error
    if stored.shape != tuple(header.matrix):
        raise SeriesError(f"{header.path}: expected {tuple(header.matrix.tolist())} pixels, found {stored.shape}.")
    if header.slope == 1 and header.intercept.is_integer():
        return stored.astype(np.int32) + int(header.intercept)
    return stored * header.slope + header.intercept


def _damaged(header: SliceHeader, found: str) -> SeriesError:
    syntax = header.transfer_syntax.name
    return SeriesError(f"{header.path}: expected pixel data ({syntax}), found it truncated or damaged ({found}).")


def _check_duplicates(stack: SliceStack) -> None:
    """Refuse two different images at one position: which of them belongs to the volume is unknown."""
    for k, header in stack.duplicates:
        if not np.array_equal(_decode(header), _decode(stack.slices[k])):
            raise SeriesError(
                f"{header.path}: expected one image at each position, found another than"
                f" {stack.slices[k].path.name} at the same place."
            )
