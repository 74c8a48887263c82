# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What is in a DICOM folder, and the header of each CT slice, read without pixels and checked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.config import IGNORE, disable_value_validation
from pydicom.errors import InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.uid import UID, CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage

from .dicom_pixels import missing_pixels
from .errors import DAMAGED, SeriesError
from .pseudonym import pseudonym

__all__ = ["SliceHeader", "image_types", "list_reasons", "read_series"]

NO_SLICE = ("LOCALIZER", "SCREEN SAVE")  # by Image Type
CT_CLASSES = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
# Defined terms of Rescale Type (DICOM PS3.3 C.11.1.1.2) that are other quantities than HU, such as spectral CT maps.
# HU, US (unspecified), none and free text ("Houndsfield Unit" occurs) are taken as HU, which the CT IOD implies.
NOT_HU = {"OD", "HU_MOD", "MGML", "PCT", "Z_EFF", "ED", "EDW", "IR", "IU"}
DICOM_NAMES = (".dcm", ".dicom")
COLOUR = ("RGB", "YBR", "PALETTE", "HSV", "ARGB", "CMYK", "XYB")
# Only these are parsed: it is faster, and no name, identifier or date of a patient is ever in memory.
HEADER_TAGS = [
    "SOPClassUID", "ImageType", "Modality", "SeriesInstanceUID", "FrameOfReferenceUID", "NumberOfFrames",
    "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored",
    "PixelRepresentation", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope",
    "RescaleIntercept", "RescaleType", "SeriesNumber", "SliceThickness", "InstanceNumber",
]  # fmt: skip


@dataclass(frozen=True)
class SliceHeader:
    """Geometry and value scale of one slice; lengths in mm, directions in DICOM's patient coordinates (LPS)."""

    path: Path
    transfer_syntax: UID
    frame_of_reference: str  # "" where missing
    matrix: np.ndarray  # [2] rows, columns
    spacing: np.ndarray  # [2] between rows, between columns
    orientation: np.ndarray  # [6] direction of a row, of a column
    position: np.ndarray  # [3] centre of the first pixel
    slope: float
    intercept: float
    missing_pixels: str  # what is found instead of a whole image; empty where it is whole
    instance_number: int | None = None  # what slice labels refer to; geometry never rests on it

    @property
    def centre(self) -> np.ndarray:
        """[3] middle of the image in LPS mm."""
        rows, columns = (self.matrix - 1) / 2
        along_row, along_column = self.orientation[:3], self.orientation[3:]
        return self.position + columns * self.spacing[1] * along_row + rows * self.spacing[0] * along_column


def list_reasons(skipped: Counter[str], form: str = "{}") -> str:
    """``2 x a localizer, 1 x not DICOM`` put into `form`; empty where nothing was skipped."""
    return form.format(", ".join(f"{n} x {reason}" for reason, n in sorted(skipped.items()))) if skipped else ""


def read_series(path: Path, series_uid: str | None) -> tuple[list[SliceHeader], Counter[str]]:
    """Headers of the one CT series in a folder (in no order), and how many files were skipped for which reason.

    A file instead of a folder chooses its own series out of its folder. A file that is no DICOM (and not named like
    one), no CT image, a localizer or a colour capture is skipped and counted; several series are refused unless
    `series_uid`, a UID or its pseudonym, picks one.
    """
    folder = path if path.is_dir() else path.parent
    skipped: Counter[str] = Counter()
    series: dict[str, list[tuple[Path, pydicom.Dataset]]] = {}
    for file in sorted(p for p in folder.iterdir() if p.is_file()):
        dataset = _read_header(file)
        if dataset is None and file.suffix.lower() in DICOM_NAMES and not file.name.startswith("."):
            # a download that was interrupted: skipped at either end of a series, a slice would be lost without a gap
            found = "0 bytes" if file.stat().st_size == 0 else "none"
            raise SeriesError(f"{file}: expected a DICOM file, found {found}: is it damaged?")
        reason = "not DICOM" if dataset is None else _not_a_ct_slice(file, dataset)
        if reason:
            skipped[reason] += 1
            if file == path:
                raise SeriesError(f"{path}: expected a CT image or a NIfTI file, found one that is {reason}.")
        else:
            uid = str(dataset.get("SeriesInstanceUID") or "")
            if not uid:
                raise SeriesError(f"{file}: expected a SeriesInstanceUID, found none: which series is it of?")
            series.setdefault(uid, []).append((file, dataset))
            if file == path and series_uid is None:
                series_uid = uid
    chosen = _choose(folder, series, series_uid, skipped)
    return [_parse(file, dataset) for file, dataset in chosen], skipped


def _read_header(file: Path) -> pydicom.Dataset | None:
    """Header tags of a file, all of them converted; None where it is no DICOM.

    pydicom's messages are not passed on, nor its warnings about values: they quote what stands in the header.
    """
    try:
        with disable_value_validation(), file.open("rb") as stream:
            dataset = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=HEADER_TAGS)
            for _ in (*dataset.file_meta, *dataset):
                pass
            dataset.missing_pixels = missing_pixels(stream, dataset)
            return dataset
    except InvalidDicomError:
        return None
    except DAMAGED as error:
        raise SeriesError(
            f"{file}: expected a readable DICOM header, found a damaged one ({type(error).__name__})."
        ) from error


def image_types(dataset: pydicom.Dataset) -> set[str]:
    """The values of Image Type, one or several of whatever kind, in capitals."""
    value = dataset.get("ImageType")
    values = value if isinstance(value, MultiValue) else () if value is None else (value,)
    return {str(one).strip().upper() for one in values}


def _not_a_ct_slice(file: Path, dataset: pydicom.Dataset) -> str:
    """Why a DICOM object is not part of a CT volume; empty where it is."""
    # Two copies of the class: where they differ or both are missing the header is cut off, and a slice would be lost.
    copies = dataset.get("SOPClassUID"), dataset.file_meta.get("MediaStorageSOPClassUID")
    sop_classes = {UID(str(uid), IGNORE) for uid in copies if uid}
    if not sop_classes or (len(sop_classes) > 1 and sop_classes.intersection(CT_CLASSES)):
        found = " and ".join(sorted(map(_class_name, sop_classes))) or "none"
        raise SeriesError(f"{file}: expected a SOP class, found {found}: the header is damaged.")
    sop_class = sop_classes.pop()
    if sop_class not in CT_CLASSES:
        return _class_name(sop_class)
    image_type = image_types(dataset)
    for kind in NO_SLICE:
        if kind in image_type:
            return f"a {kind.lower()}"
    photometric = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2")
    if photometric.startswith(COLOUR):
        return "a colour capture"
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):  # cut off, as "MONOCH": a slice would be lost
        raise SeriesError(f"{file}: expected a known PhotometricInterpretation: the header is damaged.")
    return ""


def _class_name(uid: UID) -> str:
    """A registered SOP class by its name; others are not quoted, in a damaged header they may be any UID."""
    return uid.name if uid.name != uid else "an unknown SOP class"


def _choose(
    folder: Path, series: dict[str, list[tuple[Path, pydicom.Dataset]]], series_uid: str | None, skipped: Counter[str]
) -> list[tuple[Path, pydicom.Dataset]]:
    """The slices of the one series meant."""
    if not series:
        found = list_reasons(skipped) or "no file"
        subfolders = sum(p.is_dir() for p in folder.iterdir())
        hint = f" ({subfolders} subfolders, which are not searched)" if subfolders else ""
        raise SeriesError(f"{folder}: expected CT images in this folder, found none: {found}{hint}.")
    listed = "; ".join(f"{pseudonym(uid)} ({_describe(files)})" for uid, files in series.items())
    if series_uid is not None:
        chosen = [uid for uid in series if series_uid in (uid, pseudonym(uid))]
        if not chosen:
            raise SeriesError(f"{folder}: expected the series that series_uid names, found {listed}.")
        return series[chosen[0]]
    if len(series) > 1:
        raise SeriesError(
            f"{folder}: expected one series, found {len(series)}; choose one with series_uid, its UID or its name here:"
            f" {listed}."
        )
    return next(iter(series.values()))


def _describe(files: list[tuple[Path, pydicom.Dataset]]) -> str:
    """What tells one series from another without naming a person: number of files, SeriesNumber, SliceThickness."""
    parts = [f"{len(files)} files"]
    for tag, form in (("SeriesNumber", "series number {:g}"), ("SliceThickness", "{:g} mm")):
        try:
            numbers = _numbers(files[0][0], files[0][1], tag, 1)
        except SeriesError:  # missing or no number: both tags are only there to help
            continue
        parts.append(form.format(numbers[0]))
    return ", ".join(parts)


def _parse(file: Path, dataset: pydicom.Dataset) -> SliceHeader:
    """Checked header of one CT slice."""
    frames = _numbers(file, dataset, "NumberOfFrames", 1)[0] if dataset.get("NumberOfFrames") else 1
    if dataset.get("SOPClassUID") in CT_CLASSES[1:] or frames != 1:
        raise SeriesError(f"{file}: expected single-frame CT images, found a multi-frame object of {frames:g} frames.")
    bits = _numbers(file, dataset, "BitsAllocated", 1)[0]
    if bits != 16:
        raise SeriesError(f"{file}: expected CT values of 16 bits, found {bits:g} bits allocated; 8 bits hold no HU.")
    for tag, possible in (("SamplesPerPixel", [1]), ("BitsStored", range(1, 17)), ("PixelRepresentation", [0, 1])):
        found = _numbers(file, dataset, tag, 1)[0]
        if found not in possible:
            raise SeriesError(f"{file}: expected a {tag} of {possible[0]} to {possible[-1]}, found {found:g}.")
    if not dataset.get("PhotometricInterpretation"):
        raise SeriesError(f"{file}: expected a PhotometricInterpretation, found none.")
    rescale_type = str(dataset.get("RescaleType") or "HU").strip().upper()
    if rescale_type in NOT_HU:
        raise SeriesError(f"{file}: expected values in HU, found Rescale Type {rescale_type}.")
    spacing = _numbers(file, dataset, "PixelSpacing", 2)
    slope = _numbers(file, dataset, "RescaleSlope", 1)[0]
    if (spacing <= 0).any() or slope == 0:
        raise SeriesError(
            f"{file}: expected a positive PixelSpacing and a RescaleSlope other than 0, found {spacing} and {slope:g}."
        )
    return SliceHeader(
        path=file,
        transfer_syntax=UID(str(dataset.file_meta.get("TransferSyntaxUID") or ""), IGNORE),
        frame_of_reference=str(dataset.get("FrameOfReferenceUID") or ""),
        matrix=_matrix(file, dataset),
        spacing=spacing,
        orientation=_numbers(file, dataset, "ImageOrientationPatient", 6),
        position=_numbers(file, dataset, "ImagePositionPatient", 3),
        slope=slope,
        intercept=_numbers(file, dataset, "RescaleIntercept", 1)[0],
        missing_pixels=dataset.missing_pixels,
        instance_number=_instance_number(dataset),
    )


def _instance_number(dataset: pydicom.Dataset) -> int | None:
    """A slice's number in its series; None where it is missing or none, which harms nothing but slice labels."""
    try:
        return int(dataset.get("InstanceNumber"))
    except DAMAGED:
        return None


def _matrix(file: Path, dataset: pydicom.Dataset) -> np.ndarray:
    """Rows and columns, [2] int."""
    numbers = np.concatenate([_numbers(file, dataset, tag, 1) for tag in ("Rows", "Columns")])
    if ((numbers % 1 != 0) | (numbers < 0) | (numbers > 65535)).any():
        raise SeriesError(f"{file}: expected Rows and Columns of 16 bits, found {numbers.tolist()}.")
    return numbers.astype(int)


def _numbers(file: Path, dataset: pydicom.Dataset, tag: str, count: int) -> np.ndarray:
    """A tag's value as `count` finite float64; none of the tags asked for may be missing."""
    try:
        value = dataset.get(tag)
        numbers = np.atleast_1d(np.asarray([] if value in (None, "") else value, dtype=np.float64))
    except (ValueError, TypeError) as error:
        raise SeriesError(f"{file}: expected {count} number(s) in {tag}, found what is none.") from error
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        found = "none" if numbers.size == 0 else numbers.tolist()
        raise SeriesError(f"{file}: expected {count} finite number(s) in {tag}, found {found}.")
    return numbers
