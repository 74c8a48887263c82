# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Small CT slices as DICOM datasets, and a slow and obvious way to load a series."""

from __future__ import annotations

import struct
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGLosslessSV1, generate_uid

STUDY = generate_uid(entropy_srcs=["study"])
SERIES = generate_uid(entropy_srcs=["series"])
FRAME = generate_uid(entropy_srcs=["frame of reference"])
PRIVATE = ("Nobody^Private", "secret-id", "19000101")  # no message and no meta data may hold any of these


def hu_slice(k: int, size: int = 32) -> np.ndarray:
    """HU [rows, columns] of slice k: unlike any other slice and unlike itself flipped or transposed."""
    row, column = np.indices((size, size))
    return (row * 20 + column * 3 + k * 50 - 1000).astype(np.int32)


def ct_slice(k: int, *, step: float = 5.0, size: int = 32) -> Dataset:
    """Slice k of a head-first supine series of 0.8 x 0.7 mm pixels (between rows, between columns)."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid(entropy_srcs=["slice", str(k)])
    ds.PatientName, ds.PatientID, ds.StudyDate = PRIVATE
    ds.Modality, ds.ImageType, ds.InstanceNumber = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"], k + 1
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = STUDY, SERIES, FRAME
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [-11.0, -12.0, 100.0 + step * k], [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing, ds.SliceThickness = [0.8, 0.7], step
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, -1024, "HU"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = size, size, 1, "MONOCHROME2"
    set_stored(ds, hu_slice(k, size) + 1024)
    return ds


def set_stored(ds: Dataset, stored: np.ndarray, *, bits: int = 16, signed: bool = True) -> None:
    """Write stored values [rows, columns], `bits` of 16; bits above are zero, as some scanners leave them."""
    ds.Rows, ds.Columns = stored.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, bits, bits - 1, int(signed)
    ds.PixelData = (stored.astype(np.int64) & (2**bits - 1)).astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"


def save(ds: Dataset, path: Path) -> Path:
    """Write a dataset as a DICOM file."""
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, ds, enforce_file_format=True)
    return path


def compress_jpeg_lossless(ds: Dataset) -> None:
    """Transcode a slice to JPEG lossless (process 14, first-order prediction), for which pydicom has no encoder."""
    ds.PixelData = encapsulate([_jpeg_lossless(ds.pixel_array.astype(np.int64) & 0xFFFF)])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1


def _jpeg_lossless(values: np.ndarray) -> bytes:
    """ISO 10918-1 annex H with predictor 1 and one Huffman table in which each of the 17 categories has 5 bits."""
    rows, columns = values.shape
    predicted = np.empty_like(values)
    predicted[:, 1:] = values[:, :-1]
    predicted[1:, 0] = values[:-1, 0]
    predicted[0, 0] = 1 << 15
    bits = []
    for difference in ((values - predicted + 2**15) % 2**16 - 2**15).ravel().tolist():
        category = abs(difference).bit_length()
        bits.append(f"{category:05b}")
        if 0 < category < 16:
            extra = difference if difference > 0 else difference + 2**category - 1
            bits.append(f"{extra:0{category}b}")
    coded = "".join(bits)
    coded += "1" * (-len(coded) % 8)
    scan = int(coded, 2).to_bytes(len(coded) // 8, "big").replace(b"\xff", b"\xff\x00")
    frame = b"\xff\xc3" + struct.pack(">HBHHBBBB", 11, 16, rows, columns, 1, 1, 0x11, 0)
    table = b"\xff\xc4" + struct.pack(">HB", 36, 0) + bytes([0, 0, 0, 0, 17, *[0] * 11]) + bytes(range(17))
    start = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 1, 0, 0)
    return b"\xff\xd8" + frame + table + start + scan + b"\xff\xd9"


def load_slowly(folder: Path) -> nib.Nifti1Image:
    """The series through highdicom's own volume reader, in RAS by nibabel: HU float32 [X, Y, Z]."""
    datasets = [pydicom.dcmread(f) for f in sorted(folder.glob("*.dcm"))]
    volume = hd.get_volume_from_series(datasets, apply_presentation_lut=False, dtype=np.float32)
    lps_to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    return nib.as_closest_canonical(nib.Nifti1Image(volume.array, lps_to_ras @ volume.affine))
