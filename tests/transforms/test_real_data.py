# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Real CT through the whole chain: the samples in tests/data everywhere, whole series where ../shared is present."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from monai.transforms import Compose, LoadImaged, Orientationd, Resized, ScaleIntensityRanged, SelectItemsd, Transposed
from scipy.ndimage import map_coordinates
from transforms import CropBodyd, ExtractSlicesd, LoadSeries, LoadSeriesd, RandVoCoCropd, SeriesError, slice_affines

from tests.transforms.ct_factory import load_slowly

# shape z, y, x; spacing z, y, x in mm; HU range: the table in ../shared/data/README.md
ABDOMEN = {
    "crlm_ct_1004": ((41, 512, 512), (5.0, 0.797, 0.797), (-3024, 1377)),
    "cptac_pda_c3l_00189": ((35, 512, 512), (5.0, 0.859, 0.859), (-3024, 3071)),
    "acrin_flt_breast_001": ((99, 512, 512), (4.25, 0.977, 0.977), (-3024, 1288)),
    "lidc_idri_0001/cxr.nii.gz": ((133, 512, 512), (2.5, 0.703, 0.703), (-2048, 3071)),
}


def check(volume: torch.Tensor, shape: tuple[int, ...], spacing: tuple[float, ...], hu: tuple[int, int]) -> None:
    assert volume.shape == (1, *shape[::-1])
    np.testing.assert_allclose(volume.pixdim, spacing[::-1], atol=1e-3)
    assert (int(volume.min()), int(volume.max())) == hu
    assert nib.aff2axcodes(volume.affine.numpy()) == ("R", "A", "S")


def test_dicom_sample(data_dir: Path) -> None:
    folder = data_dir / "crlm_ct_1004"
    volume = LoadSeries(dtype="float32")(folder)
    check(volume, (8, 512, 512), (5.0, 0.797, 0.797), (-3024, int(volume.max())))
    expected = load_slowly(folder)
    np.testing.assert_array_equal(volume[0].numpy(), expected.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-6)


def test_liver_is_where_it_belongs(data_dir: Path) -> None:
    """Right side of the patient, above the kidneys, at the HU of contrast-enhanced liver: no axis is flipped."""
    hu = LoadSeries()(data_dir / "lidc_idri_0001.nii.gz")
    load = Compose([LoadImaged("mask", ensure_channel_first=True), Orientationd("mask", "RAS", labels=None)])
    mask = load({"mask": data_dir / "lidc_idri_0001_organs.nii.gz"})["mask"]
    torch.testing.assert_close(mask.affine, hu.affine, atol=1e-3, rtol=0)
    centres = {name: np.argwhere(mask[0].numpy() == label).mean(0) for name, label in (("spleen", 1), ("liver", 5))}
    assert centres["liver"][0] > centres["spleen"][0] + 20  # x grows to the right
    assert 60 < np.median(hu[mask == 5].numpy()) < 160
    spine = np.argwhere(hu[0, :, :, 5].numpy() > 400).mean(0)
    assert spine[1] < centres["liver"][1]  # y grows to anterior
    liver = CropBodyd("image", mask_key="mask", mask_labels=5)({"image": hu, "mask": mask})["image"]
    assert (liver.shape[1:] == np.ptp(np.argwhere(mask[0].numpy() == 5), axis=0) + 1).all()


@pytest.mark.parametrize("source", ["crlm_ct_1004", "acrin_flt_breast_001.nii.gz", "cptac_pda_c3l_00189.nii.gz"])
def test_whole_chain(data_dir: Path, source: str) -> None:
    chain = Compose(
        [
            LoadSeriesd("image"),
            CropBodyd("image"),
            ScaleIntensityRanged("image", a_min=-175, a_max=250, b_min=0, b_max=1, clip=True),
            Resized("image", spatial_size=(96, 96, -1)),
            ExtractSlicesd("image", num_slices=8, neighbours=1),
            Transposed("image", indices=(3, 0, 1, 2)),
            RandVoCoCropd("image", grid_size=3, crop_size=32),
            SelectItemsd(["random_crops", "base_crops", "overlap"]),
        ]
    ).set_random_state(0)
    out = chain({"image": data_dir / source})
    assert out["base_crops"].shape == (3, 3, 8, 3, 32, 32)
    assert out["random_crops"].shape == (2, 8, 3, 32, 32)
    assert out["base_crops"].min() >= 0
    assert out["base_crops"].max() <= 1
    # the middle of a cropped abdomen is tissue, its corners are not
    assert out["base_crops"][1, 1, :, 1].mean() > 1.5 * out["base_crops"][0, 0, :, 1].mean()


def test_slices_of_a_real_series_keep_their_height(data_dir: Path) -> None:
    volume = LoadSeries()(data_dir / "crlm_ct_1004")
    slices = ExtractSlicesd("image", num_slices=4)({"image": volume})["image"]
    heights = slice_affines(slices)[:, 2, 3]
    torch.testing.assert_close(heights, volume.affine[2, 3] + 5 * torch.tensor([1, 3, 5, 7]).double())


@pytest.mark.parametrize("name", ABDOMEN)
def test_shared_abdomen(shared_dir: Path, name: str) -> None:
    path = shared_dir / "data" / "abdomen" / name
    volume = LoadSeries()(path)
    check(volume, *ABDOMEN[name])
    expected = load_slowly(path) if path.is_dir() else nib.as_closest_canonical(nib.load(path))
    np.testing.assert_array_equal(volume[0].numpy(), np.asarray(expected.dataobj))
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-6)


SHARED_REFUSED = {
    "data/odd/truncated": r"1-084_TRUNCATED\.dcm: expected pixel data",
    "data/odd/duplicate_positions": r"found steps from 7\.50 to 115\.00 mm, the widest between CT29.dcm and CT24.dcm",
    "data/odd/series_geometry/gantrytilting/001": r"gantry tilt of 14\.0 degrees",
    "data/odd/series_geometry/notavolume/001": "found all 4 at the same one",
    "data/odd/series_geometry/sliceincrement/001": "1 missing between IM-0001-0009-0001.dcm and IM-0001-0010-0001.dcm",
    "data/odd/series_geometry/sliceincrement/002": "1 missing between IM-0001-0003.dcm and IM-0001-0005.dcm",
    "data/slices/covid_ny_sbu_axial": "one series, found 20",
    "data/slices/covid_ny_sbu_coronal/A002304_19001231-076.dcm": "expected axial slices, found coronal ones",
    "data/slices/other/PANCREAS_0001_j2k_explicit_VR-UN.dcm": "at least 2 slices, found 1",
    "data/abdomen/lidc_idri_0001/mask.nii.gz": "found 8-bit values",
    "data/abdomen": "4 subfolders, which are not searched",
}


@pytest.mark.parametrize("name", SHARED_REFUSED)
def test_shared_odd(shared_dir: Path, name: str) -> None:
    with pytest.raises(SeriesError, match=SHARED_REFUSED[name]):
        LoadSeries()(shared_dir / name)


def test_shared_odd_is_complete(shared_dir: Path) -> None:
    """Every folder of odd files is above."""
    odd = {path.parent.relative_to(shared_dir).as_posix() for path in (shared_dir / "data" / "odd").rglob("*.dcm")}
    assert odd == {name for name in SHARED_REFUSED if name.startswith("data/odd/")}


def test_shared_odd_resampled(shared_dir: Path) -> None:
    """When asked a tilted gantry is straightened; what misses slices or has no order stays refused."""
    load = LoadSeries(resample=True)
    for name in (name for name in SHARED_REFUSED if name.startswith("data/odd/") and "gantry" not in name):
        with pytest.raises(SeriesError, match=SHARED_REFUSED[name]):
            load(shared_dir / name)
    folder = shared_dir / "data" / "odd" / "series_geometry" / "gantrytilting" / "001"
    volume = load(folder)
    assert volume.meta["resampled"] == 1
    assert nib.aff2axcodes(volume.affine.numpy()) == ("R", "A", "S")
    for file in sorted(folder.iterdir())[1:-1]:  # pixels of the slices are where their headers say
        ds = pydicom.dcmread(file)
        row, column = np.reshape(np.array(ds.ImageOrientationPatient, dtype=float), (2, 3))
        v, u = np.indices(ds.pixel_array.shape)[:, 40:-40:25, 40:-40:25].reshape(2, -1, 1)
        points = np.array(ds.ImagePositionPatient, dtype=float) + u * ds.PixelSpacing[1] * row
        points = (points + v * ds.PixelSpacing[0] * column) * [-1, -1, 1]
        index = nib.affines.apply_affine(np.linalg.inv(volume.affine.numpy()), points)
        found = map_coordinates(volume[0].numpy().astype(float), index.T, order=1)
        expected = ds.pixel_array[v, u][:, 0] * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        assert np.corrcoef(found, expected)[0, 1] > 0.8  # noise is smoothed by interpolating twice
