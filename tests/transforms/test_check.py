# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Checking a source and loading it never disagree, and checking decodes nothing."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import transforms.dicom
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless
from transforms import LoadSeries, SeriesError

from .ct_factory import ct_slice, hu_slice, save, set_stored
from .test_dicom_faults import FAULTS

WriteSeries = Callable[..., Path]
DELETED = (
    "SamplesPerPixel", "PhotometricInterpretation", "BitsStored", "HighBit", "PixelRepresentation", "Modality",
    "ImageType", "InstanceNumber", "RescaleType", "Rows", "Columns", "BitsAllocated", "PixelSpacing",
)  # fmt: skip


def outcome(action: Any, path: Path) -> str:
    """The message of the refusal; empty if there was none."""
    try:
        action(path)
    except SeriesError as error:
        return str(error)
    return ""


def agree(path: Path) -> str:
    """What both say."""
    checked, loaded = outcome(LoadSeries().check, path), outcome(LoadSeries(), path)
    assert checked == loaded
    return checked


@pytest.mark.parametrize("fault", sorted(set(FAULTS) - {"damaged JPEG"}))  # which only decoding can find
def test_what_loading_refuses_checking_refuses(write_series: WriteSeries, fault: str) -> None:
    assert agree(write_series(FAULTS[fault][0]))


@pytest.mark.parametrize("tag", DELETED)
def test_a_tag_less(write_series: WriteSeries, tag: str) -> None:
    agree(write_series(lambda k, ds: delattr(ds, tag) if k == 2 else None))


@pytest.mark.parametrize(("tag", "value"), [("BitsStored", 17), ("BitsStored", 0), ("PixelRepresentation", 2)])
def test_impossible_values(write_series: WriteSeries, tag: str, value: int) -> None:
    assert f"expected a {tag} of" in agree(write_series(lambda k, ds: setattr(ds, tag, value)))


def transcode(ds: Dataset, syntax: str | None) -> None:
    if syntax in (RLELossless, JPEG2000Lossless):
        ds.compress(syntax, generate_instance_uid=False)
    elif syntax == ExplicitVRBigEndian:
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
    if syntax is not None:
        ds.file_meta.TransferSyntaxUID = syntax


@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, JPEG2000Lossless])
def test_a_file_cut_anywhere_in_its_pixels_is_found_without_decoding(
    write_series: WriteSeries, syntax: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_series(lambda k, ds: transcode(ds, syntax))
    whole = LoadSeries().check(folder)
    assert whole.shape == (32, 32, 6)
    np.testing.assert_allclose(whole.affine, LoadSeries()(folder).meta["original_affine"])
    victim = folder / "005.dcm"
    content = victim.read_bytes()
    with victim.open("rb") as stream:
        pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=["Rows"])
        start = stream.tell()
    for cut in {start + 1, start + 7, start + 13, start + 25, (start + len(content)) // 2, len(content) - 12}:
        victim.write_bytes(content[:cut])
        assert "005.dcm: expected pixel data" in agree(folder)
        with monkeypatch.context() as patch:
            patch.setattr(transforms.dicom, "pixel_array", None)
            assert "005.dcm: expected pixel data" in outcome(LoadSeries().check, folder)


@given(cut=st.integers(0, 3000))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("syntax", [None, RLELossless])
def test_a_file_cut_anywhere(tmp_path: Path, syntax: str | None, cut: int) -> None:
    """Of noise, which fills the file to its end: whatever the cut, both say the same."""
    for k in range(3):
        ds = ct_slice(k)
        set_stored(ds, np.random.default_rng(k).integers(0, 4096, (32, 32)))
        transcode(ds, syntax)
        save(ds, tmp_path / f"{k}.dcm")
    victim = tmp_path / "2.dcm"
    size = victim.stat().st_size
    os.truncate(victim, min(cut, size))
    found = agree(tmp_path)
    assert found or cut > size - 12 or cut < 400  # no mark of DICOM or no whole SOP class: skipped, and counted


def test_only_duplicates_are_decoded(write_series: WriteSeries, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_series()
    copy = ct_slice(3)
    save(copy, folder / "copy.dcm")
    decoded = []
    original = transforms.dicom.pixel_array
    monkeypatch.setattr(transforms.dicom, "pixel_array", lambda path: decoded.append(path.name) or original(path))
    found = LoadSeries().check(folder)
    assert (found.shape, found.dropped_duplicates, found.skipped_files) == ((32, 32, 6), 1, 0)
    assert sorted(decoded) == ["003.dcm", "copy.dcm"]
    set_stored(copy, hu_slice(4) + 1024)
    save(copy, folder / "copy.dcm")
    assert "another than" in agree(folder)


def nifti(path: Path) -> Path:
    image = nib.Nifti1Image(np.full((6, 5, 4), -500, dtype=np.int16), np.diag([1.0, 2, 3, 1]))
    nib.save(image, path)
    return path


def test_nifti(tmp_path: Path) -> None:
    for name in ("a.nii", "a.nii.gz"):
        path = nifti(tmp_path / name)
        assert agree(path) == ""
        found = LoadSeries().check(path)
        assert found.shape == (6, 5, 4)
        assert found.spacing == (1, 2, 3)
    plain = tmp_path / "a.nii"
    os.truncate(plain, plain.stat().st_size - 1)
    assert "it is cut off" in agree(plain)
    packed = tmp_path / "a.nii.gz"
    packed.write_bytes(gzip.compress(b""))
    assert "found an empty one" in agree(packed)
    packed.write_bytes(b"no gzip")
    assert "found a damaged or foreign one" in agree(packed)
    assert "found nothing there" in agree(tmp_path / "nowhere")
