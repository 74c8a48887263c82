# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The synthetic series that all parts read: one phantom as DICOM and, thinned, as NIfTI, and a tree of small ones."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from pydicom.uid import RLELossless

from demo.dataset import Options, Patient, make_patient, write_dataset
from demo.dicom import write_series


@dataclass(frozen=True)
class Sizes:
    """What is made.

    Args:
        size: pixels along each side of an image.
        dicom_slices: of the DICOM series.
        nifti_slices: of the same volume as NIfTI.
        epoch: volumes of the epoch that measures how long training waits for data: more than the loader's workers
            fetch ahead, which is two batches each.
        tree: series of the small tree that is indexed.
    """

    size: int = 512
    dicom_slices: int = 300
    nifti_slices: int = 120
    epoch: int = 12
    tree: int = 200


SMOKE = Sizes(size=64, dicom_slices=24, nifti_slices=24, epoch=2, tree=3)
TREE_OPTIONS = Options(size=32, slices=8, series_per_patient=1.0, segmentations=0.0)
SEED = 0


def _patient(size: int, slices: int) -> Patient:
    """One patient with one series of exactly this many slices, which cover what the drawn ones do."""
    patient = make_patient(SEED, 0, Options(size=size, slices=slices, series_per_patient=1.0))
    scan = patient.scans[0]
    exact = replace(scan, depth=slices, spacing=scan.spacing * scan.depth / slices)
    return replace(patient, scans=(exact,), segmented=(False,))


def compress(source: Path, folder: Path) -> None:
    """The DICOM files of a folder with RLE-compressed pixels."""
    folder.mkdir()
    for file in source.glob("*.dcm"):
        ds = pydicom.dcmread(file)
        ds.compress(RLELossless, generate_instance_uid=False)
        ds.save_as(folder / file.name)


def make(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Write everything below a folder.

    Returns:
        ``dicom``, ``rle`` and ``tree`` (folders), ``nii`` and ``nii_gz`` (files), ``epoch`` (a folder of as
        many links to the ``.nii``), and the sizes.
    """
    patient = _patient(sizes.size, sizes.dicom_slices)
    volume = patient.render(0)
    write_series(folder / "dicom", volume.hu, volume.scan, SEED, (patient.patient_id, patient.series_id(0), 1))
    compress(folder / "dicom", folder / "rle")
    taken = np.arange(sizes.nifti_slices) * sizes.dicom_slices // sizes.nifti_slices
    affine = volume.affine
    affine[:3, 2] *= sizes.dicom_slices / sizes.nifti_slices
    image = nib.Nifti1Image(volume.hu[taken].transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm")
    files = {name: folder / name / f"volume.{name.replace('_', '.')}" for name in ("nii", "nii_gz")}
    for file in files.values():
        file.parent.mkdir()
        nib.save(image, file)
    (folder / "epoch").mkdir()
    for number in range(sizes.epoch):
        os.link(files["nii"], folder / "epoch" / f"volume{number}.nii")
    write_dataset(folder / "tree", patients=sizes.tree, options=TREE_OPTIONS, workers=1, progress=False)
    places = {name: folder / name for name in ("dicom", "rle", "tree", "epoch")} | files
    return {name: str(path) for name, path in places.items()} | {"sizes": asdict(sizes)}
