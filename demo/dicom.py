# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes a phantom's series as CT Image Storage, one file a slice; every file says that it is synthetic."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from .scanner import PADDING_HU, Scan

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_OID, "2D-VoCo bundles synthetic phantom")
INTERCEPT = -1024
KERNELS = ("SYNTH-SMOOTH", "SYNTH-STANDARD", "SYNTH-SHARP")


def make_uid(*parts: object) -> str:
    """A UID under the UUID root 2.25, the same for the same parts (DICOM PS3.5, B.2)."""
    return f"2.25.{uuid.uuid5(NAMESPACE, '/'.join(map(str, parts))).int}"


def series_template(scan: Scan, seed: int, patient_id: int, series_id: int, series_number: int) -> Dataset:
    """The elements that all slices of a series share, with the modules of the CT Image IOD (PS3.3, A.3).

    Args:
        scan: the acquisition.
        seed: seed of the data set; part of every UID.
        patient_id: as in ``train.csv``.
        series_id: as in ``train_series_meta.csv``.
        series_number: 1 or 2.
    """
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.ImplementationClassUID = make_uid("implementation")
    ds.file_meta.ImplementationVersionName = "SYNTHETIC"
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.ImageType = ["DERIVED", "PRIMARY", "AXIAL"]
    ds.SOPClassUID = CTImageStorage
    ds.StudyDate = ds.SeriesDate = ds.ContentDate = "20000101"
    ds.StudyTime = ds.SeriesTime = ds.ContentTime = "120000"
    ds.AccessionNumber = ""
    ds.Modality = "CT"
    ds.Manufacturer = "SYNTHETIC"
    ds.ManufacturerModelName = "SYNTHETIC PHANTOM GENERATOR"
    ds.ReferringPhysicianName = ""
    ds.StudyDescription = "SYNTHETIC abdominal trauma phantom"
    ds.SeriesDescription = f"SYNTHETIC {scan.phase}"
    ds.PatientName = "SYNTHETIC^PHANTOM"
    ds.PatientID = str(patient_id)
    ds.PatientBirthDate = ds.PatientSex = ""
    ds.PatientIdentityRemoved = "YES"
    ds.DeidentificationMethod = "SYNTHETIC: computed, no patient involved"
    ds.ContrastBolusAgent = "SYNTHETIC"
    ds.BodyPartExamined = "ABDOMEN"
    ds.SliceThickness = _decimal(scan.thickness)
    ds.KVP = str(scan.kvp)
    ds.ReconstructionDiameter = _decimal(scan.pixel * scan.size)
    ds.ConvolutionKernel = KERNELS[scan.kernel]
    ds.PatientPosition = "HFS" if scan.head_first else "FFS"
    ds.StudyInstanceUID = make_uid(seed, patient_id)
    ds.SeriesInstanceUID = make_uid(seed, patient_id, series_id)
    ds.FrameOfReferenceUID = make_uid(seed, patient_id, "frame")
    ds.StudyID = str(patient_id)
    ds.SeriesNumber = str(series_number)
    ds.AcquisitionNumber = "1"
    ds.PositionReferenceIndicator = ""
    ds.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    ds.ImageComments = "SYNTHETIC PHANTOM - not a patient, not for clinical use"
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows = ds.Columns = scan.size
    ds.PixelSpacing = [_decimal(scan.pixel)] * 2
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit = 15
    ds.PixelRepresentation = int(scan.padded)
    if scan.padded:
        ds.PixelPaddingValue = PADDING_HU - INTERCEPT
    ds.WindowCenter, ds.WindowWidth = "50", "400"
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = str(INTERCEPT), "1", "HU"
    return ds


def write_series(folder: Path, hu: np.ndarray, scan: Scan, seed: int, ids: tuple[int, int, int]) -> None:
    """Write one series, uncompressed, as ``folder/<instance_number>.dcm``.

    Args:
        folder: is created.
        hu: [Z, Y, X] int16 HU, feet first.
        scan: its geometry and headers.
        seed: seed of the data set.
        ids: patient id, series id, series number.
    """
    folder.mkdir(parents=True)
    ds = series_template(scan, seed, *ids)
    series_uid = ds.SeriesInstanceUID
    stored = (hu.astype(np.int32) - INTERCEPT).astype("<i2" if scan.padded else "<u2")
    x, y = (_decimal(v) for v in scan.first_pixel)
    for k, image in enumerate(stored):
        number = scan.instance_number(k)
        height = _decimal(scan.lowest + k * scan.spacing)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = make_uid(series_uid, number)
        ds.InstanceNumber = str(number)
        ds.ImagePositionPatient = [x, y, height]
        ds.SliceLocation = height
        ds.PixelData = image.tobytes()
        ds.save_as(folder / f"{number}.dcm", enforce_file_format=True)


def _decimal(value: float) -> str:
    """A decimal string (VR DS, at most 16 characters)."""
    return f"{value:.6f}".rstrip("0").rstrip(".")
