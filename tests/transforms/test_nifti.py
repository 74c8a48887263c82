# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""NIfTI files: any stored orientation and type comes out as HU in RAS; what is ambiguous or damaged is refused."""

from __future__ import annotations

import gzip
import logging
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transforms import LoadSeries, SeriesError

RNG = np.random.default_rng(0)
HU = RNG.integers(-1024, 2000, (9, 8, 7)).astype(np.int16)


def write(path: Path, data: np.ndarray, affine: np.ndarray | None = None, **header: object) -> Path:
    """A NIfTI file; header fields are set in the file, past nibabel's care for consistency."""
    nib.save(nib.Nifti1Image(data, np.diag([0.7, 0.8, 2.5, 1.0]) if affine is None else affine), path)
    if header:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            raw = file.read()
        fields = nib.Nifti1Header(raw[:348], check=False)
        for name, value in header.items():
            fields[name] = value
        with opener(path, "wb") as file:
            file.write(fields.binaryblock + raw[348:])
    return path


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    axes=st.permutations(range(3)),
    signs=st.lists(st.sampled_from([-1, 1]), min_size=3, max_size=3),
    angle=st.floats(-20, 20),
    dtype=st.sampled_from([np.int16, np.uint16, np.int32, np.float32, np.float64, np.int8]),
    suffix=st.sampled_from([".nii", ".nii.gz"]),
)
def test_agrees_with_nibabel(
    tmp_path: Path, axes: list[int], signs: list[int], angle: float, dtype: type, suffix: str
) -> None:
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    affine = np.eye(4)
    affine[:3, :3] = (np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag([0.7, 0.8, 2.5]) * signs)[:, axes]
    affine[:3, 3] = [-20, 30, 1000.5]
    info = np.iinfo(dtype) if np.issubdtype(dtype, np.integer) else np.finfo(dtype)
    path = write(
        tmp_path / f"volume{suffix}", np.clip(HU, max(info.min, -2000), min(info.max, 2000)).astype(dtype), affine
    )
    expected = nib.as_closest_canonical(nib.load(path))
    volume = LoadSeries(dtype="float32")(path)
    np.testing.assert_array_equal(volume[0].numpy(), expected.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-9)
    assert nib.aff2axcodes(volume.affine.numpy()) == ("R", "A", "S")
    assert volume.as_tensor().permute(0, 3, 2, 1).is_contiguous()
    assert LoadSeries()(path).dtype == torch.int16


def test_scaling_is_applied_and_rounded(tmp_path: Path) -> None:
    path = write(tmp_path / "scaled.nii", HU, scl_slope=0.3, scl_inter=-5)
    np.testing.assert_allclose(LoadSeries(dtype="float32")(path)[0], HU * 0.3 - 5, atol=1e-3)
    np.testing.assert_array_equal(LoadSeries()(path)[0], np.rint(HU * np.float64(np.float32(0.3)) - 5))


def test_nifti2(tmp_path: Path) -> None:
    nib.save(nib.Nifti2Image(HU, np.eye(4)), tmp_path / "two.nii.gz")
    np.testing.assert_array_equal(LoadSeries()(tmp_path / "two.nii.gz")[0], HU)


def test_int16_saturates(tmp_path: Path) -> None:
    path = write(tmp_path / "wide.nii", np.full((3, 3, 3), 1e6, dtype=np.float32))
    assert LoadSeries()(path).unique().tolist() == [32767]


def test_eight_bit_needs_its_window(tmp_path: Path) -> None:
    grey = RNG.integers(0, 256, (5, 5, 5)).astype(np.uint8)
    path = write(tmp_path / "grey.nii.gz", grey)
    with pytest.raises(SeriesError, match=r"found 8-bit values 0\.\.255, .* eight_bit_window=\(low, high\)"):
        LoadSeries()(path)
    volume = LoadSeries(dtype="float32", eight_bit_window=(-175, 250))(path)
    np.testing.assert_allclose(volume[0], -175 + grey / 255 * 425, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_eight_bit_values_in_a_wider_type(tmp_path: Path, dtype: type) -> None:
    """Grey values and label maps are told from HU by their values: CT has negative ones."""
    grey = RNG.integers(0, 256, (5, 5, 5)).astype(dtype)
    grey[0, 0, 0] = 0
    path = write(tmp_path / "grey.nii.gz", grey)
    with pytest.raises(SeriesError, match=r"grey\.nii\.gz: expected HU, found 8-bit values 0\.\.255"):
        LoadSeries()(path)
    volume = LoadSeries(eight_bit_window=(-175, 250))(path)
    np.testing.assert_array_equal(volume[0], np.rint(np.float32(-175) + grey.astype(np.float32) * (425 / 255)))
    for changed in (-1, 256, 0.5) if dtype is np.float32 else (-1, 256):
        grey[1, 1, 1] = changed
        assert LoadSeries(dtype="float32")(write(tmp_path / "hu.nii", grey))[0, 1, 1, 1] == changed


def test_window_leaves_hu_sources_alone(tmp_path: Path) -> None:
    """So that HU and 8-bit volumes can be mixed in one run."""
    load = LoadSeries(eight_bit_window=(-175, 250))
    np.testing.assert_array_equal(load(write(tmp_path / "hu.nii", HU))[0], HU)
    grey = RNG.integers(0, 256, (5, 5, 5)).astype(np.uint8)
    path = write(tmp_path / "scaled.nii", grey, scl_slope=10, scl_inter=-1000)
    np.testing.assert_array_equal(load(path)[0], grey * 10.0 - 1000)


def test_values_without_air_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        LoadSeries()(write(tmp_path / "positive.nii", np.abs(HU)))
    assert "Is this a volume in HU?" in caplog.text


SHEARED = np.array([[1, 0, 0, 0], [0, 1, 0.2, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
REFUSED = {
    "four dimensions": ({"data": np.zeros((4, 4, 4, 2), np.int16)}, r"3 dimensions, found 4: \(4, 4, 4, 2\)"),
    "two dimensions": ({"data": np.zeros((4, 4), np.int16)}, "3 dimensions, found 2"),
    "one slice": ({"data": np.zeros((4, 4, 1), np.int16)}, "at least 2 slices, found 1"),
    "too large": ({"data": np.zeros((5000, 2, 2), np.int8)}, "4096 voxels along an axis .* found 5000 x 2 x 2"),
    "colour": ({"data": np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])}, "one real number a voxel"),
    "complex": ({"data": np.zeros((4, 4, 4), np.complex64)}, "one real number a voxel"),
    "NaN": ({"data": np.where(np.arange(7) == 3, np.nan, HU).astype(np.float32)}, "found NaN or infinity in slice 3"),
    "infinity": ({"data": np.full((3, 3, 3), np.inf, np.float32)}, "found NaN or infinity in slice 0"),
    "no orientation": ({"data": HU, "sform_code": 0, "qform_code": 0}, "sform_code and qform_code 0"),
    "shear": ({"data": HU, "affine": SHEARED}, r"orthogonal axes, found 11\.3 degrees of skew"),
    "singular": ({"data": HU, "srow_z": 0}, "invertible affine"),
    "metres": ({"data": HU, "xyzt_units": 1}, "lengths in mm, found the unit meter"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refused(tmp_path: Path, fault: str) -> None:
    content, expected = REFUSED[fault]
    path = write(tmp_path / "volume.nii.gz", **content)
    with pytest.raises(SeriesError, match=expected) as refused:
        LoadSeries()(path)
    assert str(path) in str(refused.value)


def test_sform_and_qform_must_agree(tmp_path: Path) -> None:
    image = nib.Nifti1Image(HU, np.eye(4))
    image.set_sform(np.eye(4), 1)
    image.set_qform(np.diag([-1.0, -1.0, 1.0, 1.0]), 1)
    nib.save(image, tmp_path / "two.nii")
    with pytest.raises(SeriesError, match=r"sform and qform to agree, found corners .* mm apart"):
        LoadSeries()(tmp_path / "two.nii")
    image.set_qform(np.eye(4) + 1e-3 * np.eye(4, k=3)[:, ::1], 1)  # 1 micrometre, as rounding leaves it
    nib.save(image, tmp_path / "two.nii")
    assert LoadSeries()(tmp_path / "two.nii").shape == (1, 9, 8, 7)


def test_qform_alone(tmp_path: Path) -> None:
    image = nib.Nifti1Image(HU, None)
    image.set_qform(np.diag([-1.0, 2.0, 3.0, 1.0]), 1)
    image.set_sform(None, 0)
    nib.save(image, tmp_path / "q.nii")
    assert LoadSeries()(tmp_path / "q.nii").pixdim.tolist() == [1, 2, 3]


@pytest.mark.parametrize("damage", ["empty", "empty gz", "cut", "cut header", "text", "header only", "bit", "checksum"])
def test_damaged_file(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "volume.nii.gz", RNG.integers(-1000, 1000, (32, 32, 16)).astype(np.int16))
    raw = bytearray(path.read_bytes())
    if damage == "bit":
        raw[len(raw) // 2] ^= 0x10
    elif damage == "checksum":
        raw[-6] ^= 1
    content = {
        "empty": b"",
        "empty gz": gzip.compress(b""),
        "cut": raw[: len(raw) // 2],
        "cut header": raw[:60],
        "text": b"no volume",
        "header only": gzip.compress(gzip.decompress(bytes(raw))[:352]) if damage == "header only" else b"",
    }
    path.write_bytes(content.get(damage, raw))
    with pytest.raises(SeriesError, match=r"volume\.nii\.gz: expected"):
        LoadSeries()(path)


def test_uncompressed_file_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "volume.nii", HU)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(SeriesError, match=r"volume\.nii: expected a readable NIfTI file"):
        LoadSeries()(path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_peak_memory(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"volume{suffix}", np.zeros((256, 256, 24), np.float64) - 3)
    tracemalloc.start()
    volume = LoadSeries()(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * volume.numel() * 2  # a float64 source, a quarter of whose size is the limit
