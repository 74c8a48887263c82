# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""VoCo crops: labels against the original's, a slow obvious version, and the properties they must have."""

from __future__ import annotations

import itertools
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose, SelectItemsd
from transforms import RandVoCoCrop, RandVoCoCropd, overlap_labels

GOLDEN = Path(__file__).parents[1] / "golden"
NDIM = st.integers(2, 3)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Grid and crop size in 2 or 3 dimensions."""
    n = draw(NDIM)
    grid = draw(st.lists(st.integers(1, 3), min_size=n, max_size=n))
    crop = draw(st.lists(st.integers(1, 5), min_size=n, max_size=n))
    return tuple(grid), tuple(crop)


def image_for(grid: tuple[int, ...], crop: tuple[int, ...], slices: int = 2, channels: int = 1) -> torch.Tensor:
    shape = (slices, channels, *(g * c for g, c in zip(grid, crop, strict=True)))
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


def slow_labels(windows: np.ndarray, grid: tuple[int, ...], crop: tuple[int, ...]) -> np.ndarray:
    """Count pixels."""
    labels = []
    for start in windows:
        inside = np.zeros([g * c for g, c in zip(grid, crop, strict=True)])
        inside[tuple(slice(s, s + c) for s, c in zip(start, crop, strict=True))] = 1
        row = []
        for place in itertools.product(*map(range, grid)):
            base = tuple(slice(k * c, (k + 1) * c) for k, c in zip(place, crop, strict=True))
            row.append(inside[base].sum() / math.prod(crop))
        labels.append(row)
    return np.array(labels)


@pytest.mark.parametrize(("name", "grid", "crop"), [("3x3", 3, 64), ("4x4", 4, 96)])
def test_labels_agree_with_the_original(name: str, grid: int, crop: int) -> None:
    golden = np.load(GOLDEN / f"overlap_{name}.npz", allow_pickle=False)
    labels = overlap_labels(golden["centres"] - crop // 2, (grid, grid), (crop, crop))
    np.testing.assert_allclose(labels, golden["labels"], atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(layouts(), st.integers(1, 3), st.integers(0, 2**31))
def test_labels_and_crops_agree_with_a_slow_version(
    layout: tuple[tuple[int, ...], tuple[int, ...]], num_random: int, seed: int
) -> None:
    grid, crop = layout
    image = image_for(grid, crop, channels=2)
    cutter = RandVoCoCrop(grid_size=grid, crop_size=crop, num_random_crops=num_random).set_random_state(seed)
    random, base, overlap = cutter(image)
    np.testing.assert_allclose(overlap, slow_labels(cutter.windows, grid, crop), atol=1e-6)
    np.testing.assert_allclose(overlap.sum(1), 1, atol=1e-6)
    assert overlap.dtype == torch.float32
    assert random.shape == (num_random, 2, 2, *crop)
    assert base.shape == (*grid, 2, 2, *crop)
    for crops, starts in ((random, random.meta["windows"]), (base.flatten(0, len(grid) - 1), base.meta["windows"])):
        for one, start in zip(crops, starts.tolist(), strict=True):
            window = tuple(slice(s, s + c) for s, c in zip(start, crop, strict=True))
            assert torch.equal(one.as_tensor(), image[(..., *window)])


def test_injected_windows() -> None:
    cutter = RandVoCoCrop(grid_size=3, crop_size=4, num_random_crops=1)
    cutter.windows = np.array([[4, 8], [2, 4], [0, 0]])  # how many is the test's choice
    random, base, overlap = cutter(image_for((3, 3), (4, 4)), randomize=False)
    assert torch.equal(random[0], base[1, 2])  # a window on a base crop is that crop
    assert overlap[0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert overlap[1].tolist() == [0, 0.5, 0, 0, 0.5, 0, 0, 0, 0]  # row-major over (first, second axis)
    assert torch.equal(random[2], base[0, 0])


def test_windows_reach_both_ends() -> None:
    cutter = RandVoCoCrop(grid_size=2, crop_size=2, num_random_crops=500).set_random_state(0)
    cutter.randomize((4, 4))
    assert np.unique(cutter.windows[:, 0]).tolist() == [0, 1, 2]
    assert np.unique(cutter.windows[:, 1]).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32])
def test_base_crops_are_a_view(dtype: torch.dtype) -> None:
    volume = image_for((3, 3), (4, 4), slices=5).to(dtype).permute(1, 2, 3, 0)  # [C, X, Y, S]
    image = MetaTensor(volume).permute(3, 0, 1, 2)
    crops = RandVoCoCrop(grid_size=3, crop_size=4)(image)
    assert crops.base_crops.untyped_storage().data_ptr() == image.untyped_storage().data_ptr()
    assert crops.base_crops.dtype == crops.random_crops.dtype == dtype
    assert isinstance(crops.base_crops, MetaTensor)
    assert isinstance(crops.random_crops, MetaTensor)


def test_meta_is_carried_over_and_not_shared() -> None:
    affine = torch.diag(torch.tensor([0.8, 0.8, 5.0, 1.0], dtype=torch.float64))
    image = MetaTensor(image_for((3, 3), (4, 4)), affine=affine, meta={"filename_or_obj": "x"})
    random, base, _ = RandVoCoCrop(grid_size=3, crop_size=4)(image)
    assert torch.equal(random.affine, affine)
    assert random.meta["filename_or_obj"] == base.meta["filename_or_obj"] == "x"
    assert "windows" not in image.meta


@pytest.mark.parametrize("affine", [None, torch.eye(4, dtype=torch.float64) * 2, torch.eye(4), torch.eye(3).double()])
@pytest.mark.parametrize("spatial", [(6,), (6, 6), (6, 6, 6)])
def test_crops_are_what_the_constructor_of_meta_tensors_gives(affine: torch.Tensor | None, spatial: tuple) -> None:
    """They are made without it, for speed: every attribute is the same, and none is shared with the image."""
    plain = torch.rand(2, 1, *spatial)
    image = MetaTensor(plain, affine=affine, meta={"a": 1}, applied_operations=[{"class": "Some"}])
    crops = RandVoCoCrop(grid_size=3, crop_size=2)(image)
    for found in (crops.random_crops, crops.base_crops):
        data = found.as_tensor()
        expected = MetaTensor(data, meta={**image.meta, "windows": found.meta["windows"]})
        ours, theirs = dict(vars(found)), dict(vars(expected))
        meta, wanted = ours.pop("_meta"), theirs.pop("_meta")
        assert ours == theirs
        assert list(meta) == list(wanted)
        assert torch.equal(meta.pop("affine"), wanted.pop("affine"))
        assert meta == wanted
        assert type(found) is MetaTensor
        assert found.data_ptr() == data.data_ptr()
        again = pickle.loads(pickle.dumps(found))
        assert torch.equal(again.as_tensor(), data)
        assert again.spatial_ndim == expected.spatial_ndim
    crops.random_crops.applied_operations.append({})
    assert (len(image.applied_operations), crops.base_crops.applied_operations) == (1, [])


def test_seed_reproduces() -> None:
    image = image_for((3, 3), (16, 16))
    draws = [RandVoCoCropd("image", crop_size=16).set_random_state(seed)({"image": image}) for seed in (1, 1, 2)]
    assert torch.equal(draws[0]["random_crops"], draws[1]["random_crops"])
    assert not torch.equal(draws[0]["random_crops"], draws[2]["random_crops"])
    again = RandVoCoCropd("image", crop_size=16)
    again.set_random_state(1).randomize((48, 48))
    assert torch.equal(again({"image": image}, randomize=False)["random_crops"], draws[0]["random_crops"])


def test_dictionary_version_pickles_and_batches() -> None:
    cutter = pickle.loads(pickle.dumps(RandVoCoCropd("image", crop_size=8)))
    chain = Compose([cutter, SelectItemsd(["random_crops", "base_crops", "overlap"])]).set_random_state(3)
    data = [{"image": MetaTensor(image_for((3, 3), (8, 8)) + k)} for k in range(4)]
    batch = next(iter(DataLoader(Dataset(data, chain), batch_size=4, num_workers=2)))
    assert batch["random_crops"].shape == (4, 2, 2, 1, 8, 8)
    assert batch["base_crops"].shape == (4, 3, 3, 2, 1, 8, 8)
    assert batch["overlap"].shape == (4, 2, 9)
    assert "image" not in batch


def test_missing_key() -> None:
    assert RandVoCoCropd("image", allow_missing_keys=True)({"label": 1}) == {"label": 1}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_output_size_averages(dtype: torch.dtype) -> None:
    image = torch.randint(0, 256, (2, 1, 12, 12), generator=torch.Generator().manual_seed(0)).to(dtype)
    plain = RandVoCoCrop(grid_size=3, crop_size=4)
    small = RandVoCoCrop(grid_size=3, crop_size=4, output_size=2)
    small.windows = plain.windows = np.array([[1, 2], [8, 0]])
    crops, halved = plain(image, randomize=False), small(image, randomize=False)
    for before, after in ((crops.random_crops, halved.random_crops), (crops.base_crops, halved.base_crops)):
        means = before.float().unflatten(-1, (2, 2)).unflatten(-3, (2, 2)).mean((-3, -1))
        assert torch.equal(after.as_tensor(), (means.round() if dtype == torch.uint8 else means).to(dtype).as_tensor())
    assert torch.equal(crops.overlap, halved.overlap)
    cube = RandVoCoCrop(grid_size=(4, 4, 1), crop_size=6, output_size=4)(torch.zeros(1, 1, 24, 24, 6))
    assert cube.random_crops.shape == (2, 1, 1, 4, 4, 4)
    same = RandVoCoCrop(grid_size=3, crop_size=4, output_size=4)(image)
    assert same.base_crops.untyped_storage().data_ptr() == image.untyped_storage().data_ptr()


def test_errors() -> None:
    cutter = RandVoCoCrop(grid_size=(3, 3), crop_size=(64, 64))
    with pytest.raises(
        ValueError, match=r"\(3, 3\) crops of \(64, 64\) pixels covers \(192, 192\) .* has \(192, 191\)"
    ):
        cutter(torch.zeros(2, 1, 192, 191))
    with pytest.raises(ValueError, match=r"3 spatial dimensions of the image, whose spatial size is \(192, 192, 64\)"):
        cutter(torch.zeros(2, 1, 192, 192, 64))
    with pytest.raises(ValueError, match=r"must be \[slices, channels, \*spatial\]"):
        cutter(torch.zeros(192, 192))
    image = torch.zeros(2, 1, 192, 192)
    with pytest.raises(ValueError, match="No windows"):
        cutter(image, randomize=False)
    for windows, expected in (
        ([[0, 129]], r"must lie inside \(192, 192\)"),
        ([[-1, 0]], "must lie inside"),
        ([0, 0], r"\[R, 2\] integers"),
        ([[0, 0, 0]], r"\[R, 2\] integers"),
        ([[0.5, 0]], "integers"),
    ):
        cutter.windows = np.array(windows)
        with pytest.raises(ValueError, match=expected):
            cutter(image, randomize=False)


@pytest.mark.parametrize(
    "options",
    [
        {"grid_size": 0},
        {"crop_size": (64, 0)},
        {"output_size": 2.5},
        {"num_random_crops": 0},
        {"num_random_crops": 1.5},
    ],
)
def test_guards(options: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must"):
        RandVoCoCrop(**options)
    with pytest.raises(ValueError, match=f"{next(iter(options))} must"):
        RandVoCoCropd("image", **options)


def test_one_key_only() -> None:
    with pytest.raises(ValueError, match="reads exactly one"):
        RandVoCoCropd(["a", "b"])
