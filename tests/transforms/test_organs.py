# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Crop to organ masks: on any grid, in any orientation, and never a mask that is not the image's."""

from __future__ import annotations

import logging
import pickle
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from transforms import CropBodyd, CropSeriesd, LoadOrganMask, LoadSeries, SeriesError

CODES = ["RAS", "LPS", "LAS", "RPI", "ASL"]


def image(shape: tuple[int, int, int] = (40, 36, 12), spacing: tuple[float, ...] = (2.0, 2.0, 5.0)) -> MetaTensor:
    """A body of soft tissue in air, [1, X, Y, Z]."""
    data = torch.full((1, *shape), -1000, dtype=torch.int16)
    data[:, 4:-4, 4:-4] = 40
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-40, -35, 100]
    return MetaTensor(data, affine=torch.from_numpy(affine), meta={"filename_or_obj": "the series"})


def save(path: Path, values: np.ndarray, affine: np.ndarray, code: str = "RAS") -> Path:
    """Write RAS `values` as stored in another orientation."""
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(code))
    stored = apply_orientation(values, turn)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(stored, affine @ inv_ornt_aff(turn, values.shape)), path)
    return path


def mask_of(volume: MetaTensor, start: tuple[int, ...], stop: tuple[int, ...], label: int = 1) -> np.ndarray:
    values = np.zeros(volume.shape[1:], np.uint8)
    values[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = label
    return values


def world_box(volume: MetaTensor) -> tuple[np.ndarray, np.ndarray]:
    """RAS mm of the outer borders of an axis-aligned volume."""
    affine = np.asarray(volume.affine)
    ends = [affine[:3, :3] @ (np.array(v) - 0.5) + affine[:3, 3] for v in ((0, 0, 0), volume.shape[1:])]
    return ends[0], ends[1]


@settings(deadline=None, max_examples=40)
@given(
    code=st.sampled_from(CODES),
    grid=st.tuples(st.floats(1.0, 4), st.floats(1.0, 4), st.floats(1.5, 7)),
    shift=st.tuples(*[st.floats(-6, 6)] * 3),
    margin=st.sampled_from([0.0, 3.0, 11.0]),
    seed=st.integers(0, 2**31),
)
def test_the_box_is_that_of_the_organs_on_any_grid(
    tmp_path_factory: pytest.TempPathFactory,
    code: str,
    grid: tuple[float, ...],
    shift: tuple[float, ...],
    margin: float,
    seed: int,
) -> None:
    """A mask of boxes on another grid, larger than the image: in mm the crop is their box with its margin."""
    rng = np.random.default_rng(seed)
    volume = image()
    affine = np.diag([*grid, 1.0])
    affine[:3, 3] = np.array([-46, -41, 90]) + shift
    shape = np.ceil(np.array([96, 86, 90]) / grid).astype(int)
    size = np.maximum(np.ceil(12 / np.array(grid)).astype(int), 2)  # larger than a voxel of the image
    values = np.zeros(shape, np.uint8)
    lows, highs = [], []
    for label in (1, 2):
        start = (np.array([16, 14, 22]) / grid + rng.random(3) * (np.array([40, 32, 20]) / grid)).astype(int)
        values[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = label
        lows.append(affine[:3, :3] @ (start - 0.5) + affine[:3, 3])
        highs.append(affine[:3, :3] @ (start + size - 0.5) + affine[:3, 3])
    path = save(tmp_path_factory.mktemp("m") / "mask.nii", values, affine, code)
    crop = CropSeriesd("image", crop="organs", organ_margin=margin)
    low, high = world_box(crop({"image": volume, "mask": str(path)})["image"])
    first, last = world_box(volume)
    voxel = np.array([2.0, 2.0, 5.0]) * (1 + 1e-6)
    wanted_low, wanted_high = np.min(lows, axis=0) - margin, np.max(highs, axis=0) + margin
    # the nearest voxel: half a voxel either way; the margin is rounded up to whole voxels
    assert (low <= np.maximum(wanted_low + 0.5 * voxel, first)).all()
    assert (high >= np.minimum(wanted_high - 0.5 * voxel, last)).all()
    assert (low >= np.maximum(wanted_low - 1.5 * voxel, first)).all()
    assert (high <= np.minimum(wanted_high + 1.5 * voxel, last)).all()


@settings(deadline=None, max_examples=20)
@given(code=st.sampled_from(CODES), seed=st.integers(0, 2**31))
def test_on_the_same_grid_the_mask_is_the_file_s_whatever_its_orientation(
    tmp_path_factory: pytest.TempPathFactory, code: str, seed: int
) -> None:
    volume = image((9, 8, 7))
    values = np.random.default_rng(seed).integers(0, 6, volume.shape[1:]).astype(np.int16)
    path = save(tmp_path_factory.mktemp("m") / "mask.nii.gz", values, np.asarray(volume.affine), code)
    assert np.array_equal(LoadOrganMask()(path, volume)[0], values > 0)
    chosen = LoadOrganMask(labels=[2, 5])(path, volume)
    assert np.array_equal(chosen[0], np.isin(values, [2, 5]))
    assert torch.equal(chosen.affine, volume.affine)


def test_another_grid_is_sampled_at_the_nearest_voxel(tmp_path: Path) -> None:
    volume = image((9, 8, 7))
    rng = np.random.default_rng(0)
    grid = np.diag([1.3, 1.7, 3.1, 1.0])
    grid[:3, 3] = [-41, -36, 99]
    values = rng.integers(0, 2, (17, 13, 14)).astype(np.uint8)
    found = LoadOrganMask()(save(tmp_path / "m.nii", values, grid), volume)[0].numpy()
    for index in np.ndindex(found.shape):  # slow and obvious
        place = np.linalg.inv(grid) @ np.asarray(volume.affine) @ np.array([*index, 1.0])
        near = np.round(place[:3]).astype(int)
        assert (near >= 0).all()
        assert (near < values.shape).all()
        assert found[index] == values[tuple(near)]


def test_a_folder_of_organs_is_their_union(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    volume = image()
    affine = np.asarray(volume.affine)
    parts = {
        "liver": (8, 12),
        "kidney_left": (20, 22),
        "small_bowel": (14, 15),
        "femur_left": (0, 40),
        "mybowel": (0, 40),
    }
    for name, (start, stop) in parts.items():
        save(tmp_path / f"{name}.nii.gz", mask_of(volume, (start, 10, 3), (stop, 20, 6)), affine)
    with caplog.at_level(logging.WARNING):
        mask = LoadOrganMask(labels=[9])(tmp_path, volume)  # labels are for files of many organs
    assert np.flatnonzero(mask[0].numpy().any(axis=(1, 2))).tolist() == [*range(8, 12), 14, 20, 21]
    assert "HU" not in caplog.text  # a mask is not a volume in HU
    cropped = CropSeriesd("image", crop="organs", organ_margin=0)({"image": volume, "mask": str(tmp_path)})
    assert cropped["image"].shape == (1, 14, 10, 3)
    assert cropped["mask"] == str(tmp_path)


def test_what_is_no_mask_of_the_image_is_refused(tmp_path: Path) -> None:
    volume = image()
    affine = np.asarray(volume.affine)
    load = LoadOrganMask()
    with pytest.raises(SeriesError, match=r"gone\.nii: expected a NIfTI mask or a folder of them, found nothing"):
        load(tmp_path / "gone.nii", volume)
    with pytest.raises(SeriesError, match=r"expected NIfTI masks named liver, .*, found none"):
        load(tmp_path, volume)
    values = mask_of(volume, (8, 8, 3), (20, 20, 6), 4)
    path = save(tmp_path / "mask.nii", values, affine)
    with pytest.raises(SeriesError, match=r"mask\.nii: expected a mask that holds the labels \[5\], found it empty"):
        LoadOrganMask(labels=5)(path, volume)
    away = affine.copy()
    away[2, 3] += 500
    with pytest.raises(SeriesError, match="expected a mask in the space of its image, found 0% of the organs inside"):
        load(save(tmp_path / "away.nii", values, away), volume)
    half = affine.copy()
    half[2, 3] += 5 * 7  # of slices 3 to 5 two are left
    found = load(save(tmp_path / "half.nii", values, half), volume)
    assert np.flatnonzero(found[0].numpy().any(axis=(0, 1))).tolist() == [10, 11]
    (tmp_path / "broken.nii").write_bytes((tmp_path / "mask.nii").read_bytes()[:400])
    with pytest.raises(SeriesError, match=r"broken\.nii: expected a readable NIfTI file"):
        load(tmp_path / "broken.nii", volume)


@pytest.mark.parametrize("item", [{}, {"mask": ""}, {"mask": None}])
def test_a_series_without_a_mask_is_an_error_or_its_body_as_asked(item: dict) -> None:
    volume = image()
    with pytest.raises(SeriesError, match="the series: expected a mask to crop to the organs, found none"):
        CropSeriesd("image", crop="organs")({"image": volume, **item})
    fallen_back = CropSeriesd("image", crop="organs", missing="body")({"image": volume, **item})["image"]
    assert fallen_back.shape == CropBodyd("image")({"image": volume})["image"].shape


def test_body_is_the_crop_as_ever_whatever_mask_there_is(tmp_path: Path) -> None:
    volume = image()
    path = save(tmp_path / "m.nii", mask_of(volume, (8, 8, 3), (20, 20, 6)), np.asarray(volume.affine))
    plain = CropBodyd("image")({"image": volume})["image"]
    found = CropSeriesd("image")({"image": volume, "mask": str(path)})["image"]
    assert torch.equal(found.as_tensor(), plain.as_tensor())
    assert torch.equal(found.affine, plain.affine)


def test_a_bad_mask_never_falls_back_to_the_body(tmp_path: Path) -> None:
    volume = image()
    path = save(tmp_path / "m.nii", np.zeros(volume.shape[1:], np.uint8), np.asarray(volume.affine))
    crop = pickle.loads(pickle.dumps(CropSeriesd("image", crop="organs", missing="body")))
    with pytest.raises(SeriesError, match="found it empty"):
        crop({"image": volume, "mask": str(path)})


def test_the_crop_is_undone_by_its_inverse(tmp_path: Path) -> None:
    volume = image()
    path = save(tmp_path / "m.nii", mask_of(volume, (8, 8, 3), (20, 20, 6)), np.asarray(volume.affine))
    crop = CropSeriesd("image", crop="organs")
    restored = crop.inverse(crop({"image": volume, "mask": str(path)}))["image"]
    assert restored.shape == volume.shape
    torch.testing.assert_close(restored.affine, volume.affine)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"crop": "organ"}, "crop"), ({"missing": "skip"}, "missing"), ({"organ_margin": -1}, "organ_margin")],
)
def test_guards(options: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be"):
        CropSeriesd("image", **options)


@pytest.mark.parametrize("labels", [[], [0], [1.5]])
def test_labels_are_checked(labels: list) -> None:
    with pytest.raises(ValueError, match="labels must be integers above 0"):
        LoadOrganMask(labels=labels)


def test_real_labels_of_totalsegmentator(data_dir: Path, tmp_path: Path) -> None:
    """Spleen, kidneys and liver of a real scan: between the body's borders, and the same from a folder of organs."""
    volume = LoadSeries()(data_dir / "lidc_idri_0001.nii.gz")
    path = data_dir / "lidc_idri_0001_organs.nii.gz"
    mask = LoadOrganMask(labels=[1, 2, 3, 5])(path, volume)
    stored = nib.load(path)
    values = np.asarray(stored.dataobj)
    assert int(mask.sum()) == int(np.isin(values, [1, 2, 3, 5]).sum()) > 1000
    for label, name in {1: "spleen", 2: "kidney_right", 3: "kidney_left", 5: "liver"}.items():
        nib.save(nib.Nifti1Image((values == label).astype(np.uint8), stored.affine), tmp_path / f"{name}.nii.gz")
    assert torch.equal(LoadOrganMask()(tmp_path, volume).as_tensor(), mask.as_tensor())
    organs = CropSeriesd("image", crop="organs", organ_labels=[1, 2, 3, 5])({"image": volume, "mask": str(path)})
    body = CropBodyd("image")({"image": volume})
    assert organs["image"].numel() < 0.5 * body["image"].numel()
    assert (organs["image"].as_tensor().float() > -200).float().mean() > 0.7


def test_segmentations_of_the_phantoms(phantoms: Path, tmp_path: Path) -> None:
    """Stored from the left to the right and from the front to the back, as no image is: the box holds every organ."""
    masks = sorted((phantoms / "segmentations").iterdir())
    assert masks
    for path in masks:
        series = next((phantoms / "train_images").glob(f"*/{path.stem}"))
        volume = LoadSeries()(series)
        stored = nib.load(path)
        assert nib.aff2axcodes(stored.affine) == ("L", "P", "S")
        organs = np.argwhere(np.asarray(stored.dataobj) > 0)
        corners = nib.affines.apply_affine(stored.affine, organs)
        cropped = CropSeriesd("image", crop="organs", organ_margin=5.0)({"image": volume, "mask": str(path)})["image"]
        low, high = world_box(cropped)
        first, last = world_box(volume)
        assert (low <= corners.min(axis=0)).all()
        assert (high >= corners.max(axis=0)).all()
        voxel = np.asarray(volume.pixdim)
        assert (low >= np.maximum(corners.min(axis=0) - 5 - 2 * voxel, first - 1e-6)).all()
        assert (high <= np.minimum(corners.max(axis=0) + 5 + 2 * voxel, last + 1e-6)).all()
        assert cropped.numel() < CropBodyd("image")({"image": volume})["image"].numel()
    other = next(s for s in (phantoms / "train_images").glob("*/*") if s.name != masks[0].stem)
    shutil.copy(masks[0], tmp_path / "copy.nii")
    image_of_other = LoadSeries()(other)
    image_of_other.affine[2, 3] += 2000
    with pytest.raises(SeriesError, match="in the space of its image"):
        LoadOrganMask()(tmp_path / "copy.nii", image_of_other)
