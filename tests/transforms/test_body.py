# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Body crop: never cuts the body, leaves the table, keeps voxels where they were in the patient."""

from __future__ import annotations

import math
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Compose, Resized
from transforms import CropBody, CropBodyd, LoadSeries, SeriesError

SPACING = (1.5, 1.5, 5.0)


def phantom(
    shape: tuple[int, int, int] = (200, 180, 12),
    centre: tuple[float, float] = (100, 100),
    radii: tuple[float, float] = (70, 50),
    spacing: tuple[float, float, float] = SPACING,
    table: bool = True,
) -> MetaTensor:
    """An elliptic body of fat under a skin in air, on a table of two thin shells, with a cable: [1, X, Y, Z]."""
    x, y = np.indices(shape[:2])
    radius = np.hypot((x - centre[0]) / radii[0], (y - centre[1]) / radii[1])
    plane = np.full(shape[:2], -1000, np.int16)
    plane[radius <= 1] = -100
    plane[(radius <= 1) & (radius > 0.97)] = 30
    plane[radius <= 0.7] = 50
    if table:
        plane[5:-5, int(centre[1] - radii[1]) - 2 :][:, :2] = 200  # touches the back
        plane[20:-20, 10:13] = 200
        plane[10:14, -20:] = 3000
    volume = np.repeat(plane[:, :, None], shape[2], axis=2)
    volume[:, :, -2:] = -1000
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-120, -90, 400]
    return MetaTensor(torch.from_numpy(volume)[None], affine=torch.from_numpy(affine))


def box_of(mask: np.ndarray) -> tuple[list[int], list[int]]:
    where = np.argwhere(mask)
    return where.min(0).tolist(), (where.max(0) + 1).tolist()


@settings(deadline=None, max_examples=30)
@given(
    centre=st.tuples(st.floats(80, 120), st.floats(80, 110)),
    radii=st.tuples(st.floats(30, 75), st.floats(25, 60)),
    # pixels are square in CT, or nearly: how far the opening flattens one tip depends on the spacing across it
    spacing=st.tuples(st.floats(0.5, 3), st.floats(0.9, 1.1), st.floats(0.6, 8)).map(
        lambda s: (s[0], s[0] * s[1], s[2])
    ),
)
def test_holds_the_body_and_not_the_table(
    centre: tuple[float, float], radii: tuple[float, float], spacing: tuple[float, float, float]
) -> None:
    start, end = CropBody().bounding_box(phantom(centre=centre, radii=radii, spacing=spacing))
    body_start, body_end = box_of((phantom(centre=centre, radii=radii, table=False)[0] > -250).numpy())
    steps = [max(int(sample / s), 1) for sample, s in zip((3, 3, 5), spacing, strict=True)]
    flattened = 12 / spacing[0]  # the tips of the ellipse that the opening takes
    for axis in range(3):
        slack = 2 * steps[axis] + (flattened if axis < 2 else 0)
        tips = math.ceil(12 / spacing[axis]) if axis < 2 else 0
        assert body_start[axis] - slack <= start[axis] <= body_start[axis] + tips
        assert body_end[axis] - tips <= end[axis] <= body_end[axis] + slack
    assert start[1] > 13  # above the table's lower shell


def test_crop_keeps_the_world() -> None:
    volume = phantom()
    cropped = CropBody()(volume)
    start, end = CropBody().bounding_box(volume)
    assert isinstance(cropped, MetaTensor)
    assert torch.equal(cropped[0], volume[0][tuple(slice(a, b) for a, b in zip(start, end, strict=True))])
    corner = torch.tensor([*start, 1]).double()
    torch.testing.assert_close(cropped.affine @ torch.tensor([0, 0, 0, 1]).double(), volume.affine @ corner)
    assert cropped.untyped_storage().data_ptr() == volume.untyped_storage().data_ptr()  # no copy


def test_tight_where_the_body_ends_sharply() -> None:
    volume = MetaTensor(torch.full((1, 100, 90, 20), -1000, dtype=torch.int16), affine=torch.eye(4))
    volume[0, 20:70, 30:80, 3:15] = 40
    start, end = CropBody().bounding_box(volume)
    # steps of 3, 3 and 5 voxels: the box may be up to a step less one larger on each side
    assert all(true - 4 <= found <= true for found, true in zip(start, (20, 30, 3), strict=True))
    assert all(true <= found <= true + 4 for found, true in zip(end, (70, 80, 15), strict=True))


def test_body_cut_off_by_the_field_of_view() -> None:
    volume = MetaTensor(
        torch.full((1, 120, 100, 4), 40, dtype=torch.int16), affine=torch.diag(torch.tensor([2.0, 2, 5, 1]))
    )
    assert CropBody().bounding_box(volume) == ((0, 0, 0), (120, 100, 4))


def test_margin_stops_at_the_volume() -> None:
    volume = phantom()
    (start, end), (wide_start, wide_end) = (CropBody(margin_mm=m).bounding_box(volume) for m in (0, 15))
    assert wide_start == (start[0] - 10, start[1] - 10, 0)
    assert wide_end == (end[0] + 10, end[1] + 10, 12)


def test_threshold_of_the_method_ends_at_the_muscles() -> None:
    volume = phantom()
    assert CropBody(threshold_hu=-47.5)(volume).shape[1] < CropBody()(volume).shape[1]


def test_plain_tensor_counts_as_one_mm() -> None:
    plain = CropBody()(phantom().as_tensor())
    assert plain.shape == CropBody()(phantom(spacing=(1, 1, 1))).shape


def test_organ_mask() -> None:
    volume = phantom()
    mask = MetaTensor(torch.zeros(1, 200, 180, 12, dtype=torch.uint8), affine=volume.affine)
    mask[0, 50:60, 70:90, 2:5] = 1
    mask[0, 100:101, 70:90, 2:5] = 5
    data = {"image": volume, "mask": mask, "other": volume}
    out = CropBodyd(["image", "mask"], mask_key="mask", mask_labels=1)(data)
    assert out["image"].shape == out["mask"].shape == (1, 10, 20, 3)
    assert out["other"].shape == volume.shape
    assert CropBodyd("image", mask_key="mask")(data)["image"].shape == (1, 51, 20, 3)
    assert CropBodyd("image", mask_key="mask", mask_labels=(1, 5), margin_mm=4.5)(data)["image"].shape == (1, 57, 26, 5)
    with pytest.raises(SeriesError, match=r"holds the labels \(7,\), found it empty"):
        CropBodyd("image", mask_key="mask", mask_labels=7)(data)
    with pytest.raises(SeriesError, match="volume: expected a mask that holds any label"):
        CropBody()(volume, torch.zeros_like(mask))
    with pytest.raises(ValueError, match=r"\(9, 9, 9\) are not the image's \(200, 180, 12\)"):
        CropBody()(volume, torch.zeros(1, 9, 9, 9))
    with pytest.raises(ValueError, match="affine differs"):
        CropBody()(volume, MetaTensor(mask.as_tensor(), affine=torch.eye(4)))


@pytest.mark.parametrize("value", [-1000, -3024])
def test_air_is_refused(value: int) -> None:
    volume = MetaTensor(torch.full((1, 64, 64, 8), value, dtype=torch.int16), meta={"filename_or_obj": "case 7"})
    with pytest.raises(SeriesError, match=r"case 7: expected a body above -250\.0 HU, found none thicker than 12"):
        CropBody()(volume)


def test_thin_things_are_no_body() -> None:
    volume = MetaTensor(torch.full((1, 64, 64, 8), -1000, dtype=torch.int16))
    volume[0, :, 30:34] = 100
    with pytest.raises(SeriesError, match="none thicker than"):
        CropBody()(volume)


def test_shape_guard() -> None:
    with pytest.raises(ValueError, match=r"\[channels, X, Y, Z\]"):
        CropBody()(torch.zeros(64, 64, 8))


@pytest.mark.parametrize("options", [{"margin_mm": -1}, {"margin_mm": math.inf}, {"threshold_hu": math.nan}])
def test_guards(options: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        CropBody(**options)


def test_dictionary_version_one_box_inverse_and_pickle() -> None:
    transform = pickle.loads(pickle.dumps(CropBodyd(["image", "grey"], source_key="image")))
    volume = phantom()
    data = transform({"image": volume, "grey": MetaTensor(volume.float() / 2, affine=volume.affine)})
    assert torch.equal(data["grey"].as_tensor(), data["image"].as_tensor() / 2)
    back = transform.inverse(data)["image"]
    assert back.shape == volume.shape
    torch.testing.assert_close(back.affine, volume.affine)
    assert CropBody().requires_current_data


def test_in_lazy_and_eager_pipelines() -> None:
    chain = [Resized("image", (100, 90, 12)), CropBodyd("image"), Resized("image", (48, 48, 8))]
    eager, lazy = (Compose(chain, lazy=lazy)({"image": phantom().float()})["image"] for lazy in (False, True))
    assert eager.shape == lazy.shape == (1, 48, 48, 8)
    torch.testing.assert_close(eager.affine, lazy.affine)


def test_real_bodies(data_dir: Path) -> None:
    """Boxes read off the images: x and y ends of skin (in mm from the first voxel), measured by eye to about 10 mm."""
    for name, (width, height) in {
        "acrin_flt_breast_001": (400, 297),
        "cptac_pda_c3l_00189": (415, 303),
        "lidc_idri_0001": (360, 267),
    }.items():
        volume = LoadSeries()(data_dir / f"{name}.nii.gz")
        cropped = CropBody()(volume)
        size = np.array(cropped.shape[1:]) * np.asarray(cropped.pixdim)
        assert cropped.shape[3] == volume.shape[3]
        assert size[0] == pytest.approx(width, abs=15), name
        assert size[1] == pytest.approx(height, abs=15), name


def test_speed() -> None:
    volume = MetaTensor(torch.full((1, 300, 512, 512), -1000, dtype=torch.int16).permute(0, 3, 2, 1))
    volume.affine = torch.diag(torch.tensor([0.8, 0.8, 1.0, 1.0]))
    volume[0, 100:400, 150:400] = 40
    times = []
    for _ in range(3):
        start = time.perf_counter()
        CropBody()(volume)
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0  # 0.06 s on an idle core
