# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""DICOM against an implementation of its own: DCMTK compresses what we read, and checks what the demo writes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pydicom
import pytest
import torch
from transforms import LoadSeries

pytestmark = pytest.mark.debian
COMPRESSORS = {
    "RLE": ["dcmcrle"],
    "JPEG lossless, selection value 1": ["dcmcjpeg", "+e1"],
    "JPEG lossless": ["dcmcjpeg", "+el"],
    "JPEG-LS lossless": ["dcmcjpls", "+el"],
}


@pytest.fixture(scope="module")
def plain(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real series of the project, decompressed."""
    folder = tmp_path_factory.mktemp("plain")
    for file in (data_dir / "crlm_ct_1004").glob("*.dcm"):
        dataset = pydicom.dcmread(file)
        dataset.decompress()
        dataset.save_as(folder / file.name)
    return folder


@pytest.mark.parametrize("syntax", COMPRESSORS)
def test_a_series_compressed_by_dcmtk_comes_out_in_the_same_hu(plain, tmp_path, syntax):
    expected = LoadSeries()(plain)
    for file in plain.iterdir():
        subprocess.run([*COMPRESSORS[syntax], file, tmp_path / file.name], check=True)
    written = pydicom.dcmread(next(tmp_path.iterdir()), stop_before_pixels=True)
    assert written.file_meta.TransferSyntaxUID.is_compressed
    loaded = LoadSeries()(tmp_path)
    assert torch.equal(loaded.as_tensor(), expected.as_tensor())
    assert torch.equal(loaded.affine, expected.affine)


def test_the_phantoms_are_dicom_files(phantoms):
    files = sorted(phantoms.glob("train_images/*/*/*.dcm"))[:40]
    done = subprocess.run(["dcmftest", *files], capture_output=True, text=True, check=True)
    assert done.stdout.count("yes: ") == len(files)
