# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""One fault at a time in a DICOM series: refused with a reason, or repaired and reported; never guessed.

Where each fault that is known from real data is tested (here: `test_refused[...]`, unless another name is given):

| fault | test |
|---|---|
| slices missing | two or one slice missing; test_resample.test_what_no_slice_shows_is_not_made_up |
| duplicate slice, identical or different | test_duplicates |
| InstanceNumber shuffled or missing | test_dicom.test_order_comes_from_positions_alone |
| several series in a folder | two series, test_dicom.test_file_in_the_folder_stands_for_its_series |
| mixed spacing, orientation, matrix, frame of reference | mixed ... |
| gantry tilt, uneven steps | tilted gantry, slight tilt, uneven steps, and when asked: test_resample |
| MONOCHROME1, windows | test_dicom.test_presentation_plays_no_part |
| pixels or header cut off | pixels missing, test_dicom_files.test_truncated_file, ..._header |
| FrameOfReferenceUID missing | test_frame_of_reference_may_be_missing |
| 0 bytes or no DICOM by the name of one | test_dicom_files.test_a_slice_that_is_no_dicom_is_refused |
| no DICOM, localizer, dose report, capture | test_dicom_files.test_what_is_no_slice_is_skipped_and_counted |
| empty folder, subfolders, nothing there | test_dicom_files.test_folder_without_ct |
| RLE, JPEG lossless, JPEG-LS, JPEG 2000, 12 of 16 bits | test_dicom.test_compressed_syntaxes, test_dcmtk |
| no decoder | no decoder, test_decoder_not_installed |
| padding of -2000, -3024 | test_dicom.test_padding_is_kept |
| slope or intercept missing, or of each slice | test_dicom.test_slope_and_intercept_are_each_slice_s_own |
| 8 bits, colour, other quantities | 8 bits, three samples, no HU |
| multi-frame, coronal, sagittal | multi-frame, enhanced CT, coronal, sagittal |
| feet first, prone, oblique | test_dicom.test_agrees_with_highdicom |
| one slice, 1,500 slices, no abdomen | one slice, test_dicom_files.test_many_slices_without_an_abdomen |
| absurd Rows and Columns | absurd rows, no rows, too short for its rows, test_absurd_number_of_voxels |
| all air | test_body.test_air_is_refused |
| any of a header at random | test_mutated_headers |
| NIfTI: 8 bits, NaN, damaged, sform unlike qform, 4D | test_nifti |
| smaller than the crop grid | test_voco.test_errors |
| real files | test_real_data |
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import MPEG2MPML, EnhancedCTImageStorage, JPEG2000Lossless, JPEGExtended12Bit
from transforms import LoadSeries, SeriesError
from workflow.privacy import pseudonym

from tests.transforms.ct_factory import PRIVATE, SERIES, ct_slice, hu_slice, save, set_stored

WriteSeries = Callable[..., Path]


def on(slice_index: int | None = None, /, **tags: object) -> Callable[[int, Dataset], None]:
    """Set tags on one slice (or all); None deletes a tag."""

    def edit(k: int, ds: Dataset) -> None:
        if slice_index in (None, k):
            for tag, value in tags.items():
                if value is None:
                    delattr(ds, tag)
                else:
                    setattr(ds, tag, value)

    return edit


def moved(positions: dict[int, list[float]] | Callable[[int], list[float]]) -> Callable[[int, Dataset], None]:
    """Put slices elsewhere."""

    def edit(k: int, ds: Dataset) -> None:
        position = positions(k) if callable(positions) else positions.get(k)
        if position is not None:
            ds.ImagePositionPatient = position

    return edit


def smaller(k: int, ds: Dataset) -> None:
    if k == 3:
        set_stored(ds, hu_slice(k, 16) + 1024)


def eight_bits(k: int, ds: Dataset) -> None:
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.PixelData = bytes(32 * 32)


def three_samples(k: int, ds: Dataset) -> None:
    ds.SamplesPerPixel, ds.PlanarConfiguration, ds.PixelData = 3, 0, 3 * ds.PixelData


def turned(row: list[float], column: list[float]) -> Callable[[int, Dataset], None]:
    """All slices in another plane, stacked along its normal."""

    def edit(k: int, ds: Dataset) -> None:
        ds.ImageOrientationPatient = [*row, *column]
        ds.ImagePositionPatient = (5.0 * k * np.cross(row, column)).tolist()

    return edit


FAULTS = {
    "two slices missing": (
        lambda k, ds: k not in (2, 3),
        r"5\.00 mm apart with 2 missing between 001.dcm and 004.dcm \(a gap of 15\.00 mm\)",
    ),
    "one slice missing": (lambda k, ds: k != 4, r"1 missing between 003.dcm and 005.dcm"),
    "one slice": (lambda k, ds: k == 0, "at least 2 slices, found 1"),
    "uneven steps": (moved({5: [-11, -12, 123.0]}), r"steps from 3\.00 to 5\.00 mm"),
    "tilted gantry": (
        moved(lambda k: [-11, -12 + k * 1.0, 100 + k * 5]),
        r"gantry tilt of 11\.3 degrees, 5\.0 mm sideways",
    ),
    "slight tilt": (moved(lambda k: [-11, -12 + k * 0.1, 100 + k * 5]), r"gantry tilt of 1\.1 degrees"),
    "one slice sideways": (moved({3: [-10, -12, 115]}), r"1\.0 mm sideways"),
    "two at one height": (moved({3: [-51, -12, 110]}), r"002.dcm and 003.dcm beside each other, 40\.0 mm apart"),
    "all at one place": (on(ImagePositionPatient=[0, 0, 0]), "all 6 at the same one"),
    "mixed pixel spacing": (
        on(4, PixelSpacing=[0.9, 0.7]),
        r"004.dcm: expected the pixel spacing in mm of the series, \[0\.8, 0\.7\], found \[0\.9, 0\.7\]",
    ),
    "mixed orientation": (
        on(1, ImageOrientationPatient=[1, 0, 0, 0, 0.99, -0.1411]),
        r"001.dcm: expected the orientation .* \(1 of 6 slices",
    ),
    "mixed matrix": (smaller, r"003.dcm: expected the rows and columns of the series, \[32\.0, 32\.0\], found \[16"),
    "mixed frame of reference": (on(1, FrameOfReferenceUID="1.2"), "one FrameOfReferenceUID, found 2"),
    "coronal": (turned([1, 0, 0], [0, 0, -1]), "found coronal ones, 90 degrees"),
    "sagittal": (turned([0, 1, 0], [0, 0, -1]), "found sagittal ones, 90 degrees"),
    "strongly oblique": (turned([1, 0, 0], [0, 0.8, -0.6]), "found strongly oblique ones, 37 degrees"),
    "no directions": (on(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "two orthogonal unit directions"),
    "position missing": (
        on(2, ImagePositionPatient=None),
        r"002.dcm: expected 3 finite number\(s\) in ImagePositionPatient, found none",
    ),
    "position incomplete": (on(2, ImagePositionPatient=[1, 2]), r"found \[1\.0, 2\.0\]"),
    "orientation missing": (on(2, ImageOrientationPatient=None), "ImageOrientationPatient, found none"),
    "spacing missing": (on(2, PixelSpacing=None), "PixelSpacing, found none"),
    "spacing zero": (on(2, PixelSpacing=[0, 0]), "positive PixelSpacing"),
    "slope missing": (on(3, RescaleSlope=None), "003.dcm: expected 1 finite number.* in RescaleSlope, found none"),
    "intercept missing": (on(3, RescaleIntercept=None), "RescaleIntercept, found none"),
    "slope zero": (on(3, RescaleSlope=0), "RescaleSlope other than 0"),
    "no HU": (on(RescaleType="Z_EFF"), "values in HU, found Rescale Type Z_EFF"),
    "8 bits": (eight_bits, "16 bits, found 8 bits allocated"),
    "three samples": (three_samples, r"000.dcm: expected"),
    "multi-frame": (on(NumberOfFrames=4), "000.dcm: expected single-frame CT images, found a multi-frame object of 4"),
    "enhanced CT": (on(SOPClassUID=EnhancedCTImageStorage, NumberOfFrames=6), "a multi-frame object of 6"),
    "absurd rows": (on(Rows=60000), "at most 4096 voxels along an axis .* found 32 x 60000 x 6"),
    "too short for its rows": (
        on(Rows=4096),
        r"000.dcm: expected pixel data .* found it truncated or damaged \(2048 of 262144 bytes\)",
    ),
    "no rows": (on(Rows=0), "found 32 x 0 x 6"),
    "two series": (
        on(3, SeriesInstanceUID="1.2.3"),
        rf"one series, found 2; choose one with series_uid, .*: {pseudonym(SERIES)} \(5 files, 5 mm\);"
        rf" {pseudonym('1.2.3')} \(1 files, 5 mm\)",
    ),
    "series UID missing": (on(3, SeriesInstanceUID=None), "003.dcm: expected a SeriesInstanceUID, found none"),
    "no decoder": (
        lambda k, ds: setattr(ds.file_meta, "TransferSyntaxUID", MPEG2MPML) or _encapsulate(ds),
        r"can decode, found the transfer syntax MPEG2 Main Profile / Main Level",
    ),
    "pixels missing": (on(3, PixelData=None), "003.dcm: expected pixel data .*truncated or damaged"),
    "damaged JPEG": (
        lambda k, ds: setattr(ds.file_meta, "TransferSyntaxUID", JPEGExtended12Bit) or _encapsulate(ds),
        r"000.dcm: expected pixel data \(JPEG Extended .*truncated or damaged",
    ),
}  # fmt: skip


def _encapsulate(ds: Dataset) -> None:
    ds.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True


def test_the_table_above_names_what_exists() -> None:
    tests = {path.stem: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")}
    names = re.findall(r"(?:(test_\w+)\.)?(test_\w+)", __doc__ or "")
    assert len(names) > 20
    for module, name in names:
        assert name in tests or f"def {name}(" in tests[module or Path(__file__).stem], name


@pytest.mark.parametrize("fault", FAULTS)
def test_refused(write_series: WriteSeries, fault: str) -> None:
    edit, expected = FAULTS[fault]
    folder = write_series(edit)
    with pytest.raises(SeriesError, match=expected) as refused:
        LoadSeries()(folder)
    assert str(folder) in str(refused.value)
    assert not any(secret in str(refused.value) for secret in PRIVATE)


def test_absurd_number_of_voxels(write_series: WriteSeries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transforms.geometry.MAX_VOXELS", 6000)
    with pytest.raises(SeriesError, match="6000 in all, found 32 x 32 x 6"):
        LoadSeries()(write_series())


def test_decoder_not_installed(write_series: WriteSeries, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = pydicom.pixels.get_decoder(JPEG2000Lossless)
    monkeypatch.setattr(decoder, "_available", {})
    folder = write_series(lambda k, ds: ds.compress(JPEG2000Lossless, generate_instance_uid=False))
    with pytest.raises(SeriesError, match="no decoder installed for the transfer syntax JPEG 2000 Image Compression"):
        LoadSeries()(folder)


def test_pixels_of_another_shape_than_the_header(write_series: WriteSeries) -> None:
    """A codestream has a size of its own."""

    def edit(k: int, ds: Dataset) -> None:
        set_stored(ds, hu_slice(k, 64) + 1024)
        ds.compress(JPEG2000Lossless, generate_instance_uid=False)
        ds.Rows = ds.Columns = 32

    with pytest.raises(SeriesError, match=r"000\.dcm"):
        LoadSeries()(write_series(edit))


def test_duplicates(write_series: WriteSeries, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_series()
    expected = LoadSeries()(folder)
    copy = ct_slice(3)
    copy.SOPInstanceUID = "1.2.3.4"
    save(copy, folder / "copy.dcm")
    with caplog.at_level(logging.WARNING):
        volume = LoadSeries()(folder)
    assert (volume == expected).all()
    assert volume.meta["dropped_duplicates"] == 1
    assert "1 identical duplicates dropped" in caplog.text
    copy.RescaleIntercept = -1023
    save(copy, folder / "copy.dcm")
    with pytest.raises(SeriesError, match=r"another than .* at the same place"):
        LoadSeries()(folder)


def test_small_scatter_of_positions_is_rounding(write_series: WriteSeries) -> None:
    """Positions written with one decimal: 0.625 mm slices at 0.6, 1.2 (sic), 1.9, ... are one regular volume."""
    folder = write_series(moved(lambda k: [-11, -12, round(100 + 0.625 * k, 1)]), slices=9)
    volume = LoadSeries()(folder)
    assert volume.pixdim[2] == pytest.approx(0.625, abs=0.01)


def test_frame_of_reference_may_be_missing(write_series: WriteSeries) -> None:
    for slices in (on(FrameOfReferenceUID=None), on(2, FrameOfReferenceUID=None)):
        assert LoadSeries()(write_series(slices)).shape == (1, 32, 32, 6)


def test_free_text_rescale_type(write_series: WriteSeries) -> None:
    assert LoadSeries()(write_series(on(RescaleType="Houndsfield Unit"))).shape == (1, 32, 32, 6)
