# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Slices: which ones, in what memory, and where they lie in the patient."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import CenterSpatialCropd, Compose, Flipd, Resized, Transposed
from transforms import ExtractSlices, ExtractSlicesd, SliceAffinesd, slice_affines


def volume(depth: int, channels: int = 1, *, slice_major: bool = True) -> MetaTensor:
    """A volume whose voxels are all different, oblique in the patient."""
    data = torch.arange(channels * depth * 20, dtype=torch.int32).reshape(channels, depth, 4, 5).permute(0, 3, 2, 1)
    turn = np.array([[0.8, 0.6, 0], [-0.6, 0.8, 0], [0, 0, 1]]) @ np.diag([0.7, 0.9, 2.5])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn, [-30, 10, 500]
    return MetaTensor(data if slice_major else data.contiguous(), affine=torch.from_numpy(affine))


def assert_in_place(slices: MetaTensor, source: MetaTensor, index: np.ndarray) -> None:
    """Pixels of slice k lie where the source's slice index[k] lay."""
    affines = slice_affines(slices)
    assert affines.shape == (len(index), 4, 4)
    for affine, z in zip(affines, index.tolist(), strict=True):
        for x, y in ((0, 0), (4, 3)):
            pixel, voxel = torch.tensor([x, y, 0, 1.0]).double(), torch.tensor([x, y, z, 1.0]).double()
            torch.testing.assert_close(affine @ pixel, source.affine @ voxel)


@settings(deadline=None, max_examples=80)
@given(
    depth=st.integers(1, 40),
    num_slices=st.integers(1, 30),
    mode=st.sampled_from(["equal", "centre", "jitter"]),
    neighbours=st.integers(0, 2),
    channels=st.integers(1, 2),
    slice_major=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_properties(
    depth: int, num_slices: int, mode: str, neighbours: int, channels: int, slice_major: bool, seed: int
) -> None:
    source = volume(depth, channels, slice_major=slice_major)
    transform = ExtractSlices(num_slices=num_slices, mode=mode, neighbours=neighbours).set_random_state(seed)
    slices = transform(source)
    index = transform.slice_indices(depth)
    assert slices.shape == (channels * (2 * neighbours + 1), 5, 4, num_slices)
    assert (np.diff(index) >= 0).all()
    for k, z in enumerate(index.tolist()):  # slow and obvious
        for c in range(channels):
            for offset in range(-neighbours, neighbours + 1):
                channel = slices[c * (2 * neighbours + 1) + neighbours + offset, :, :, k]
                assert torch.equal(channel, source[c, :, :, min(max(z + offset, 0), depth - 1)])
    assert_in_place(slices, source, index)
    assert slices.stride(3) == slices.as_tensor().numel() // num_slices  # slice-major
    assert torch.linalg.det(slices.affine) > 0
    if num_slices <= depth:
        assert len(np.unique(index)) == num_slices
    if num_slices == depth:
        assert index.tolist() == list(range(depth))


def test_equal_spacing() -> None:
    assert ExtractSlices(num_slices=32).slice_indices(64).tolist() == list(range(1, 64, 2))
    assert ExtractSlices(num_slices=3).slice_indices(10).tolist() == [1, 5, 8]
    assert ExtractSlices(num_slices=6).slice_indices(3).tolist() == [0, 0, 1, 1, 2, 2]
    assert ExtractSlices(num_slices=5).slice_indices(1).tolist() == [0] * 5


def test_centre_is_consecutive() -> None:
    assert ExtractSlices(num_slices=4, mode="centre").slice_indices(10).tolist() == [3, 4, 5, 6]
    assert ExtractSlices(num_slices=6, mode="centre").slice_indices(3).tolist() == [0, 0, 0, 1, 2, 2]


@settings(deadline=None, max_examples=50)
@given(depth=st.integers(1, 200), num_slices=st.integers(1, 60), seed=st.integers(0, 2**31))
def test_jitter_stays_in_its_stratum(depth: int, num_slices: int, seed: int) -> None:
    transform = ExtractSlices(num_slices=num_slices, mode="jitter").set_random_state(seed)
    transform.randomize()
    strata = np.arange(num_slices + 1) * depth / num_slices
    index = transform.slice_indices(depth)
    assert (index >= np.floor(strata[:-1])).all()
    assert (index < np.ceil(strata[1:])).all()


def test_jitter_varies_and_reproduces() -> None:
    source = {"a": volume(40), "b": volume(40)}
    transform = ExtractSlicesd(["a", "b"], num_slices=4, mode="jitter").set_random_state(7)
    first, second = transform(source), transform(source)
    assert torch.equal(first["a"], first["b"])  # image and mask stay together
    assert not torch.equal(first["a"], second["a"])
    again = pickle.loads(pickle.dumps(transform)).set_random_state(7)
    assert torch.equal(again(source)["a"], first["a"])
    again.extractor.positions = np.zeros(4)
    assert torch.equal(again(source, randomize=False)["a"], source["a"][..., ::10])


def test_random_state_is_untouched_unless_jittered() -> None:
    transform = ExtractSlicesd("a", num_slices=4).set_random_state(7)
    transform({"a": volume(40)})
    assert transform.extractor.R.random_sample() == np.random.RandomState(7).random_sample()


def test_offsets_after_in_plane_transforms() -> None:
    source = volume(23)
    chain = Compose(
        [
            ExtractSlicesd("image", num_slices=5, mode="jitter"),
            Flipd("image", spatial_axis=0),
            CenterSpatialCropd("image", roi_size=(3, 2, -1)),
        ]
    ).set_random_state(1)
    slices = chain({"image": source})["image"]
    index = chain.transforms[0].extractor.slice_indices(23)
    for affine, z in zip(slice_affines(slices), index.tolist(), strict=True):
        expected = source.affine @ torch.tensor([3, 1, z, 1]).double()  # x flipped (4 -> 0), one pixel cropped off
        torch.testing.assert_close(affine @ torch.tensor([0, 0, 0, 1]).double(), expected)


def test_mean_step_in_the_affine() -> None:
    slices = ExtractSlices(num_slices=3)(volume(10))  # slices 1, 5, 8
    assert slices.pixdim[2].item() == pytest.approx(2.5 * 3.5)
    assert slices.meta["slice_offsets"].tolist() == pytest.approx([0, 4 / 3.5, 2])


def test_source_is_left_alone() -> None:
    source = volume(10)
    affine = source.affine.clone()
    ExtractSlices(num_slices=3)(source)
    assert torch.equal(source.affine, affine)
    assert "slice_offsets" not in source.meta


def test_to_slice_major_without_a_copy() -> None:
    slices = ExtractSlices(num_slices=4)(volume(10))
    slab = Transposed("a", indices=(3, 0, 1, 2))({"a": slices})["a"]
    assert slab.shape == (4, 1, 5, 4)
    assert slab.untyped_storage().data_ptr() == slices.untyped_storage().data_ptr()


def test_resize_keeps_the_offsets() -> None:
    slices = Resized("a", spatial_size=(10, 8, -1))({"a": ExtractSlices(num_slices=3)(volume(10))})["a"]
    steps = slice_affines(slices)[:, :3, 3].diff(dim=0).norm(dim=1)
    torch.testing.assert_close(steps, torch.tensor([4 * 2.5, 3 * 2.5], dtype=torch.float64))


def test_plain_tensor() -> None:
    assert isinstance(ExtractSlices(num_slices=2)(torch.zeros(1, 3, 3, 8)), MetaTensor)
    assert ExtractSlicesd("a", num_slices=2, allow_missing_keys=True)({}) == {}


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"\[channels, X, Y, Z\]"):
        ExtractSlices(num_slices=2)(torch.zeros(3, 3, 8))
    with pytest.raises(ValueError, match="not empty"):
        ExtractSlices(num_slices=2)(torch.zeros(1, 3, 3, 0))
    with pytest.raises(ValueError, match="slice_offsets"):
        slice_affines(volume(3))
    transform = ExtractSlices(num_slices=2, mode="jitter")
    transform.positions = np.array([0.5, 1.0])
    with pytest.raises(ValueError, match="2 numbers in"):
        transform(volume(3), randomize=False)


@pytest.mark.parametrize(
    "options", [{"num_slices": 0}, {"num_slices": 2, "mode": "all"}, {"num_slices": 2, "neighbours": -1}]
)
def test_guards(options: dict) -> None:
    name = list(options)[-1]
    with pytest.raises(ValueError, match=f"{name} must be"):
        ExtractSlices(**options)


@settings(deadline=None, max_examples=20)
@given(depth=st.integers(2, 30), num_slices=st.integers(1, 12))
def test_affines_are_kept_as_a_plain_tensor(depth: int, num_slices: int) -> None:
    crop = CenterSpatialCropd("image", roi_size=[3, 2, -1])
    extract = ExtractSlicesd("image", num_slices=num_slices)
    source = volume(depth)
    d = Compose([extract, crop, SliceAffinesd("image", affine_keys="place")])({"image": source})
    assert type(d["place"]) is torch.Tensor
    assert torch.equal(d["place"], slice_affines(d["image"]))
    index = extract.extractor.slice_indices(depth)
    first = source.affine @ torch.tensor([1, 1, int(index[0]), 1.0]).double()  # the crop starts at pixel 1, 1
    torch.testing.assert_close(d["place"][0, :3, 3], first[:3])


def test_each_image_needs_a_key_for_its_affines() -> None:
    with pytest.raises(ValueError, match="affine_keys: expected one for each of"):
        SliceAffinesd(["a", "b"], affine_keys="slice_affine")
    assert SliceAffinesd("a", allow_missing_keys=True)({}) == {}


def test_a_seed_draws_the_same_in_both_versions() -> None:
    volume = torch.rand(1, 2, 2, 40)
    array, mapped = ExtractSlices(num_slices=8, mode="jitter"), ExtractSlicesd("image", num_slices=8, mode="jitter")
    for seed in range(3):
        expected = array.set_random_state(seed)(volume)
        assert torch.equal(mapped.set_random_state(seed)({"image": volume})["image"], expected)
    state = np.random.RandomState(1)
    assert mapped.set_random_state(state=state).extractor.R is state
