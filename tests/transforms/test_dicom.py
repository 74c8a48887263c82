# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""DICOM series: right values and geometry, every transfer syntax, bounded memory."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor, list_data_collate
from pydicom.dataset import Dataset
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless
from transforms import LoadSeries, LoadSeriesd, SeriesError
from workflow.privacy import pseudonym

from tests.transforms.ct_factory import PRIVATE, compress_jpeg_lossless, hu_slice, load_slowly, set_stored

WriteSeries = Callable[..., Path]


def ras(slices: int = 6, size: int = 32) -> np.ndarray:
    """What the factory's series is in RAS: [X, Y, Z]."""
    volume = np.stack([hu_slice(k, size) for k in range(slices)])  # [Z, rows, columns], rows to posterior, columns left
    return volume[:, ::-1, ::-1].transpose(2, 1, 0)


def test_values_axes_and_affine(write_series: WriteSeries) -> None:
    volume = LoadSeries()(write_series())
    assert isinstance(volume, MetaTensor)
    assert volume.shape == (1, 32, 32, 6)
    assert volume.dtype == torch.int16
    np.testing.assert_array_equal(volume[0].numpy(), ras())
    # position [-11, -12, 100] in LPS, 31 columns of 0.7 mm and 31 rows of 0.8 mm from the far corner
    expected = np.diag([0.7, 0.8, 5.0, 1.0])
    expected[:3, 3] = [11 - 31 * 0.7, 12 - 31 * 0.8, 100]
    np.testing.assert_allclose(volume.affine, expected, atol=1e-12)
    assert volume.affine.dtype == torch.float64


def test_memory_is_slice_major(write_series: WriteSeries) -> None:
    volume = LoadSeries()(write_series())
    assert volume.as_tensor().permute(0, 3, 2, 1).is_contiguous()


def test_meta_describes_the_source_and_nobody(write_series: WriteSeries) -> None:
    folder = write_series()
    meta = LoadSeries()(folder).meta
    assert meta["filename_or_obj"] == str(folder)
    assert meta["spatial_shape"].tolist() == [32, 32, 6]
    np.testing.assert_allclose(meta["original_spacing"], [0.7, 0.8, 5.0])
    np.testing.assert_allclose(
        meta["original_affine"], [[-0.7, 0, 0, 11], [0, -0.8, 0, 12], [0, 0, 5, 100], [0, 0, 0, 1]]
    )
    assert not any(secret in repr(meta) for secret in PRIVATE)


def test_float32_holds_the_same_hu(write_series: WriteSeries) -> None:
    volume = LoadSeries(dtype="float32")(write_series())
    assert volume.dtype == torch.float32
    np.testing.assert_array_equal(volume[0].numpy(), ras())


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    orientation=st.sampled_from([[1, 0, 0, 0, 1, 0], [-1, 0, 0, 0, -1, 0], [-1, 0, 0, 0, 1, 0], [1, 0, 0, 0, -1, 0]]),
    angle=st.floats(-25, 25),
    order=st.permutations(range(5)),
    step=st.floats(0.4, 10),
)
def test_agrees_with_highdicom(
    write_series: WriteSeries, orientation: list[int], angle: float, order: list[int], step: float
) -> None:
    """Head or feet first, supine or prone, oblique, files in any order: as highdicom and nibabel have it."""
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    turn = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    row, column = turn @ orientation[:3], turn @ orientation[3:]

    def edit(k: int, ds: Dataset) -> None:
        ds.ImageOrientationPatient = [f"{v:.9f}" for v in (*row, *column)]
        ds.ImagePositionPatient = [
            f"{v:.9f}" for v in np.array([5.0, -7.0, 30.0]) + order[k] * step * np.cross(row, column)
        ]

    folder = write_series(edit, slices=5)
    expected, volume = load_slowly(folder), LoadSeries(dtype="float32")(folder)
    np.testing.assert_array_equal(volume[0].numpy(), expected.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-6)


def test_order_comes_from_positions_alone(write_series: WriteSeries) -> None:
    def shuffle(k: int, ds: Dataset) -> None:
        ds.InstanceNumber = (k * 5) % 6
        if k == 2:
            del ds.InstanceNumber

    np.testing.assert_array_equal(LoadSeries()(write_series(shuffle))[0].numpy(), ras())


def test_slope_and_intercept_are_each_slice_s_own(write_series: WriteSeries) -> None:
    def edit(k: int, ds: Dataset) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = 0.5 + 0.25 * k, f"{-1024.25 + k}"

    folder = write_series(edit)
    expected = load_slowly(folder).get_fdata(dtype=np.float32)
    np.testing.assert_allclose(LoadSeries(dtype="float32")(folder)[0].numpy(), expected, atol=1e-3)
    np.testing.assert_array_equal(LoadSeries()(folder)[0].numpy(), np.rint(expected.astype(np.float64)))


def test_int16_saturates_instead_of_wrapping(write_series: WriteSeries) -> None:
    def edit(k: int, ds: Dataset) -> None:
        set_stored(ds, np.full((32, 32), 65535), signed=False)

    folder = write_series(edit)
    assert LoadSeries()(folder).unique().tolist() == [32767]
    assert LoadSeries(dtype="float32")(folder).unique().tolist() == [65535 - 1024]


def test_presentation_plays_no_part(write_series: WriteSeries) -> None:
    def edit(k: int, ds: Dataset) -> None:
        ds.PhotometricInterpretation, ds.PresentationLUTShape = "MONOCHROME1", "INVERSE"
        ds.WindowCenter, ds.WindowWidth = [40, -600], [400, 1500]

    np.testing.assert_array_equal(LoadSeries()(write_series(edit))[0].numpy(), ras())


def test_padding_is_kept(write_series: WriteSeries) -> None:
    def edit(k: int, ds: Dataset) -> None:
        stored = hu_slice(k) + 1024
        stored[0, 0] = ds.PixelPaddingValue = -2000
        set_stored(ds, stored)
        ds["PixelPaddingValue"].VR = "SS"

    assert LoadSeries()(write_series(edit)).min() == -3024


@pytest.mark.parametrize("signed_bits", [(True, 16), (True, 12), (False, 12)], ids=["s16", "s12", "u12"])
@pytest.mark.parametrize(
    "syntax",
    [None, RLELossless, JPEG2000Lossless, JPEGLSLossless, "JPEG lossless"],
    ids=["native", "rle", "jpeg2000", "jpeg-ls", "jpeg-lossless"],
)
def test_compressed_syntaxes(write_series: WriteSeries, syntax: str | None, signed_bits: tuple[bool, int]) -> None:
    signed, bits = signed_bits
    offset = 0 if signed else 1024

    def edit(k: int, ds: Dataset) -> None:
        ds.RescaleIntercept = -offset
        set_stored(ds, hu_slice(k) + offset, bits=bits, signed=signed)
        if syntax == "JPEG lossless":
            compress_jpeg_lossless(ds)
        elif syntax is not None:
            ds.compress(syntax, generate_instance_uid=False)

    np.testing.assert_array_equal(LoadSeries()(write_series(edit))[0].numpy(), ras())


def test_file_in_the_folder_stands_for_its_series(write_series: WriteSeries) -> None:
    def other(k: int, ds: Dataset) -> None:
        ds.SeriesInstanceUID = "1.2.3"
        ds.RescaleIntercept = 0

    folder = write_series()
    for file in write_series(other, name="other").iterdir():
        file.rename(folder / f"other_{file.name}")
    np.testing.assert_array_equal(LoadSeries()(folder / "000.dcm")[0].numpy(), ras())
    np.testing.assert_array_equal(LoadSeries()(folder / "other_003.dcm")[0].numpy(), ras() + 1024)
    np.testing.assert_array_equal(LoadSeries(series_uid="1.2.3")(folder)[0].numpy(), ras() + 1024)
    np.testing.assert_array_equal(LoadSeries(series_uid=pseudonym("1.2.3"))(folder)[0].numpy(), ras() + 1024)
    with pytest.raises(SeriesError, match=rf"series_uid names, found .*; {pseudonym('1.2.3')} \(6 files, 5 mm\)\."):
        LoadSeries(series_uid="9.9")(folder)


@pytest.mark.parametrize(("dtype", "limit"), [("int16", 2.0), ("float32", 3.0)])
def test_peak_memory(write_series: WriteSeries, dtype: str, limit: float) -> None:
    folder = write_series(slices=24, size=256)
    LoadSeries()(folder)  # imports of decoders and the like
    tracemalloc.start()
    volume = LoadSeries(dtype=dtype)(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < limit * volume.numel() * 2  # int16 volume


def test_dictionary_version_pickles_and_batches(write_series: WriteSeries, tmp_path: Path) -> None:
    folder = write_series()
    nifti = tmp_path / "same.nii"
    nib.save(nib.Nifti1Image(ras().astype(np.int16), np.eye(4)), nifti)
    load = pickle.loads(pickle.dumps(LoadSeriesd(keys="image")))
    items = [load({"image": str(folder), "label": 1}), load({"image": nifti, "label": 2})]
    assert [item["label"] for item in items] == [1, 2]
    batch = list_data_collate(items)  # both kinds of source carry the same meta keys
    assert batch["image"].shape == (2, 1, 32, 32, 6)
    assert torch.equal(batch["image"][0], batch["image"][1])
    assert "absent" not in LoadSeriesd(keys="absent", allow_missing_keys=True)({"image": folder})


@pytest.mark.parametrize(
    "options", [{"dtype": "float64"}, {"eight_bit_window": (250, -175)}, {"eight_bit_window": (1,)}]
)
def test_guards(options: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        LoadSeries(**options)
