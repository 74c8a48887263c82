# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Files of a DICOM folder: damaged ones, no slices, many, oddly named. The table of faults is in test_dicom_faults."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    BasicTextSRStorage,
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)
from transforms import LoadSeries, SeriesError
from transforms.dicom_headers import image_types

from tests.transforms.ct_factory import SERIES, ct_slice, save, set_stored

WriteSeries = Callable[..., Path]


@pytest.mark.parametrize("syntax", [None, RLELossless, JPEG2000Lossless, DeflatedExplicitVRLittleEndian])
@pytest.mark.parametrize("kept", [0.5, 0.95])
def test_truncated_file(write_series: WriteSeries, syntax: str | None, kept: float) -> None:
    def edit(k: int, ds: Dataset) -> None:
        set_stored(ds, np.random.default_rng(k).integers(0, 4096, (64, 64)))  # noise, so that pixels fill the file
        if syntax == DeflatedExplicitVRLittleEndian:
            ds.file_meta.TransferSyntaxUID = syntax
        elif syntax is not None:
            ds.compress(syntax, generate_instance_uid=False)

    folder = write_series(edit)
    victim = folder / "002.dcm"
    os.truncate(victim, int(kept * victim.stat().st_size))
    with pytest.raises(SeriesError, match=r"002\.dcm"):
        LoadSeries()(folder)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (200, r"005\.dcm: expected a SeriesInstanceUID, found none"),
        (400, r"005\.dcm: expected a SOP class, found"),
        (700, "one series, found 2"),  # the UID itself is cut
        (900, r"005\.dcm: expected .* number"),
    ],
)
def test_truncated_header(write_series: WriteSeries, size: int, expected: str) -> None:
    """Of the last slice, which no gap would betray."""
    folder = write_series()
    os.truncate(folder / "005.dcm", size)
    with pytest.raises(SeriesError, match=expected):
        LoadSeries()(folder)


def test_unreadable_number(write_series: WriteSeries) -> None:
    folder = write_series()
    file = folder / "001.dcm"
    file.write_bytes(file.read_bytes().replace(b"-11.0\\-12.0\\105.0", b"-11.0\\-1x.0\\105.0"))
    with pytest.raises(SeriesError, match=r"001.dcm: expected 3 number\(s\) in ImagePositionPatient"):
        LoadSeries()(folder)


def test_many_slices_without_an_abdomen(tmp_path: Path) -> None:
    """The reader has no opinion on the body part: an empty scan of 1,500 slices is a volume."""

    ds = ct_slice(0, size=8)
    ds.BodyPartExamined, ds.ImagePositionPatient = "HEAD", "0\\0\\10000.00"
    set_stored(ds, np.full((8, 8), 24))
    content = save(ds, tmp_path / "0.dcm").read_bytes()
    for k in range(1500):
        (tmp_path / f"{k}.dcm").write_bytes(content.replace(b"10000.00", f"{10000 + 0.6 * k:.2f}".encode()))
    volume = LoadSeries()(tmp_path)
    assert volume.shape == (1, 8, 8, 1500)
    assert volume.unique().tolist() == [-1000]


def test_odd_values_of_a_header_are_not_quoted(
    write_series: WriteSeries, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """pydicom warns of an invalid UID, and quotes it."""
    folder = write_series()
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes().replace(SERIES.encode(), b"0" + SERIES[1:-3].encode() + b".07"))
    recwarn.clear()
    LoadSeries()(folder)
    said = caplog.text + "".join(str(warning.message) for warning in recwarn)
    assert SERIES[2:-3] not in said


def test_what_is_no_slice_is_skipped_and_counted(write_series: WriteSeries, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_series()
    expected = LoadSeries()(folder)
    (folder / "notes.txt").write_text("not DICOM")
    (folder / "empty").touch()
    (folder / "._001.dcm").write_text("a Mac's notes of a file")
    (folder / "nested").mkdir()
    for name, tags in {
        "scout": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "ImageOrientationPatient": [1, 0, 0, 0, 0, -1]},
        "screen": {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]},
        "colour": {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3},
        "report": {"SOPClassUID": BasicTextSRStorage, "SeriesInstanceUID": "1.2"},
        "capture": {"SOPClassUID": SecondaryCaptureImageStorage},
    }.items():
        ds = ct_slice(0)
        for tag, value in tags.items():
            setattr(ds, tag, value)
        save(ds, folder / f"{name}.dcm")
    with caplog.at_level(logging.WARNING):
        volume = LoadSeries()(folder)
    assert (volume == expected).all()
    assert volume.meta["skipped_files"] == 8
    assert "8 files skipped" in caplog.text
    for name, reason in {"scout": "a localizer", "report": "Basic Text SR Storage"}.items():
        with pytest.raises(
            SeriesError, match=f"{name}.dcm: expected a CT image or a NIfTI file, found one that is {reason}"
        ):
            LoadSeries()(folder / f"{name}.dcm")
    with pytest.raises(SeriesError, match="empty: expected a CT image or a NIfTI file, found one that is not DICOM"):
        LoadSeries()(folder / "empty")


@pytest.mark.parametrize(("name", "content", "found"), [("000.dcm", b"", "0 bytes"), ("005.dcm", b"<html>", "none"),
                                                        ("more.DICOM", b"", "0 bytes")])  # fmt: skip
def test_a_slice_that_is_no_dicom_is_refused(write_series: WriteSeries, name: str, content: bytes, found: str) -> None:
    """At either end of a series no gap would show that it is missing."""
    folder = write_series()
    (folder / name).write_bytes(content)
    with pytest.raises(SeriesError, match=f"{name}: expected a DICOM file, found {found}"):
        LoadSeries()(folder)


def test_folder_without_ct(tmp_path: Path) -> None:
    with pytest.raises(SeriesError, match="found none: no file"):
        LoadSeries()(tmp_path)
    (tmp_path / "sub").mkdir()
    with pytest.raises(SeriesError, match=r"1 subfolders, which are not searched"):
        LoadSeries()(tmp_path)
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(SeriesError, match="1 x not DICOM"):
        LoadSeries()(tmp_path)
    with pytest.raises(SeriesError, match="found nothing there"):
        LoadSeries()(tmp_path / "absent")


def test_sop_class_only_in_the_file_meta(write_series: WriteSeries) -> None:
    folder = write_series()
    file = folder / "002.dcm"
    ds = pydicom.dcmread(file)
    del ds.SOPClassUID
    ds.save_as(file)
    assert LoadSeries()(folder).shape == (1, 32, 32, 6)


def test_folder_with_spaces_and_letters(write_series: WriteSeries) -> None:
    assert LoadSeries()(write_series(name="Änderung 1 é")).shape == (1, 32, 32, 6)


@pytest.mark.parametrize(
    ("vr", "value", "expected"),
    [
        ("CS", ["ORIGINAL", "localizer "], {"ORIGINAL", "LOCALIZER"}),
        ("CS", "LOCALIZER", {"LOCALIZER"}),
        ("DS", 1e308, {"1E308"}),
        ("CS", None, set()),
    ],
)
def test_image_types_of_whatever_is_there(vr: str, value: object, expected: set[str]) -> None:
    header = pydicom.Dataset()
    header.add(pydicom.DataElement(0x00080008, vr, value))
    assert {kind.replace("+", "") for kind in image_types(header)} == expected
    assert image_types(pydicom.Dataset()) == set()
