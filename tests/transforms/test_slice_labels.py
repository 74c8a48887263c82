# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Labels of single images reach the slices that show them, whatever lies between."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import CenterSpatialCropd, Compose, Flipd, Resize
from transforms import ExtractSlices, ExtractSlicesd, LoadSeries, SeriesError, SliceLabels, SliceLabelsd, slice_affines
from workflow.cache import SlabCache

WriteSeries = Callable[..., Path]
EDGE = 0.02  # mm; the slow version below draws no conclusion this close to a border


def source(depth: int, step: float, numbers: np.ndarray) -> MetaTensor:
    """A volume of `depth` images `step` mm apart, whose k-th image from the feet has the InstanceNumber numbers[k]."""
    turn = np.array([[0.8, 0.6, 0], [-0.6, 0.8, 0], [0, 0, 1]]) @ np.diag([0.7, 0.9, step])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn, [-30, 10, 500]
    places = [(affine @ [2.5, 2.5, k, 1])[:3].tolist() for k in range(depth)]
    listed = [[int(number), *place] for number, place in zip(numbers, places, strict=True)]
    data = torch.rand(1, 6, 6, depth)
    return MetaTensor(data, affine=torch.from_numpy(affine), meta={"source_slices": json.dumps(listed)})


def slow_labels(slices: MetaTensor, positives: list[float], images: list[float]) -> list[float | None]:
    """Slice by slice in mm above the feet; None too close to a border to say."""
    heights = [float((a @ torch.tensor([2.5, 2.5, 0, 1]).double())[2]) for a in slice_affines(slices)]
    distinct = sorted(set(np.round(heights, 6).tolist()))
    result: list[float | None] = []
    for height in np.round(heights, 6).tolist():
        place = distinct.index(height)
        below = distinct[place] - distinct[place - 1] if place > 0 else None
        above = distinct[place + 1] - distinct[place] if place + 1 < len(distinct) else None
        if below is None and above is None:
            below = above = float(slices.affine[2, 2])
        low = height - (below if below is not None else above) / 2
        high = height + (above if above is not None else below) / 2
        nearest = min(abs(image - height) for image in images)
        unsure = any(abs(p - low) < EDGE or abs(p - high) < EDGE for p in positives)
        unsure |= any(0 < abs(abs(image - height) - nearest) < EDGE for image in images if image in positives)
        inside = any(low <= p <= high for p in positives)
        closest = any(abs(p - height) <= nearest for p in positives)
        result.append(None if unsure else float(inside or closest))
    return result


@settings(deadline=None, max_examples=60)
@given(
    depth=st.integers(2, 40),
    resized=st.integers(1, 50),
    crop=st.tuples(st.floats(0, 0.4), st.floats(0.6, 1)),
    num_slices=st.integers(1, 24),
    mode=st.sampled_from(["equal", "jitter"]),
    step=st.floats(0.6, 8),
    seed=st.integers(0, 2**31),
)
def test_labels_are_those_of_a_slow_and_obvious_version(
    depth: int, resized: int, crop: tuple[float, float], num_slices: int, mode: str, step: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    numbers = rng.permutation(np.arange(depth) + rng.integers(1, 100))  # feet first, head first or shuffled
    volume = source(depth, step, numbers)
    low, high = int(crop[0] * depth), max(int(crop[1] * depth), int(crop[0] * depth) + 1)
    cropped = MetaTensor(volume[..., low:high].as_tensor(), meta=volume.meta)
    cropped.affine[:3, 3] += low * cropped.affine[:3, 2]
    prepared = Resize((6, 6, resized))(cropped)
    slices = ExtractSlices(num_slices=num_slices, mode=mode).set_random_state(seed)(prepared)
    positive = rng.random(depth) < rng.choice([0.1, 0.5])
    found = SliceLabels(groups=["b", "unknown", "healthy"])(
        slices, {"b": numbers[positive].tolist(), "healthy": [], "unknown": None}
    )
    assert found.shape == (num_slices, 3)
    assert (found[:, 1] == -1).all()
    assert (found[:, 2] == 0).all()
    images = [500 + step * k for k in range(depth)]
    expected = slow_labels(slices, [z for z, p in zip(images, positive, strict=True) if p], images)
    sure = [k for k, value in enumerate(expected) if value is not None]
    assume(sure)
    assert found[sure, 0].tolist() == [expected[k] for k in sure]


@pytest.mark.parametrize("order", ["head first", "feet first", "shuffled"])
@pytest.mark.parametrize("prone", [False, True])
def test_dicom_images_are_found_by_their_number_and_place(write_series: WriteSeries, order: str, prone: bool) -> None:
    orders = {"feet first": [1, 2, 3, 4, 5, 6], "head first": [9, 8, 7, 6, 5, 4], "shuffled": [5, 30, 2, 41, 8, 3]}
    numbers = orders[order]

    def edit(k: int, ds: object) -> None:
        ds.InstanceNumber = numbers[k]
        if prone:  # rows to the left, columns to anterior: the normal points to the feet
            ds.ImageOrientationPatient = [1, 0, 0, 0, -1, 0]

    volume = LoadSeries()(write_series(edit))
    heights = {int(number): z for number, _, _, z in json.loads(volume.meta["source_slices"])}
    assert heights == {number: pytest.approx(100 + 5 * k) for k, number in enumerate(numbers)}
    slices = ExtractSlices(num_slices=6)(volume)
    labels = SliceLabels(groups=["g"])(slices, {"g": [numbers[1], numbers[4]]})
    assert labels[:, 0].tolist() == [0, 1, 0, 0, 1, 0]


def test_centres_are_those_of_the_voxels(write_series: WriteSeries) -> None:
    volume = LoadSeries()(write_series())
    middle = volume.affine @ torch.tensor([15.5, 15.5, 2, 1]).double()
    place = {int(n): xyz for n, *xyz in json.loads(volume.meta["source_slices"])}[3]
    np.testing.assert_allclose(place, middle[:3], atol=1e-3)


@pytest.mark.parametrize("value", [None, ""])
def test_images_without_a_number_are_loaded_and_have_no_labels(write_series: WriteSeries, value: str | None) -> None:
    def edit(k: int, ds: object) -> None:
        if value is None:
            del ds.InstanceNumber
        else:
            ds.InstanceNumber = value

    slices = ExtractSlices(num_slices=6)(LoadSeries()(write_series(edit)))
    assert slices.meta["source_slices"] == "[]"
    assert SliceLabels(groups=["g"])(slices, {"g": []}).tolist() == [[0.0]] * 6
    with pytest.raises(
        SeriesError, match=r"series: expected images with the InstanceNumbers \[3\] .* found 0 numbered"
    ):
        SliceLabels(groups=["g"])(slices, {"g": [3]})


def test_nifti_has_no_instance_numbers(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.full((4, 4, 5), -5, np.int16), np.eye(4)), tmp_path / "a.nii")
    assert LoadSeries()(tmp_path / "a.nii").meta["source_slices"] == "[]"


def test_an_image_between_two_slices_counts_for_both_and_repeated_slices_agree() -> None:
    volume = source(4, 2.0, np.array([4, 3, 2, 1]))
    slices = ExtractSlices(num_slices=8)(volume)  # each slice twice
    assert SliceLabels(groups=["g"])(slices, {"g": [3]})[:, 0].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    few = MetaTensor(volume[..., ::2].as_tensor(), meta=volume.meta)
    few.affine[:3, 2] *= 2
    assert SliceLabels(groups=["g"])(ExtractSlices(num_slices=2)(few), {"g": [3]})[:, 0].tolist() == [1, 1]


def test_dictionary_version_takes_the_findings_away_and_pickles() -> None:
    take = ExtractSlicesd(keys="image", num_slices=4)
    label = pickle.loads(pickle.dumps(SliceLabelsd(groups=("a", "b"))))
    item = take({"image": source(4, 2.0, np.arange(4)), "findings": {"b": [2]}})
    done = label(item)
    assert set(done) == {"image", "slice_label"}
    assert "findings" in item
    assert done["slice_label"].tolist() == [[-1, 0], [-1, 0], [-1, 1], [-1, 0]]
    assert done["slice_label"].dtype == torch.float32


@pytest.mark.parametrize("groups", ["bowel", [], None])
def test_guards(groups: object) -> None:
    with pytest.raises(ValueError, match="groups must be a list"):
        SliceLabels(groups=groups)


def test_what_does_not_come_from_extract_slices_is_refused() -> None:
    with pytest.raises(ValueError, match="does not come from ExtractSlices"):
        SliceLabels(groups=["g"])(source(4, 1.0, np.arange(4)), {"g": []})
    with pytest.raises(ValueError, match="keys must be one key"):
        SliceLabelsd(keys=["a", "b"], groups=["g"])


def test_in_plane_transforms_change_no_label() -> None:
    plain = ExtractSlices(num_slices=5)(source(9, 2.0, np.arange(9)))
    turned = Compose([Flipd("image", 0), Flipd("image", 1), CenterSpatialCropd("image", (4, 4, -1))])({"image": plain})
    labels = SliceLabels(groups=["g"])
    assert torch.equal(labels(plain, {"g": [2, 3]}), labels(turned["image"], {"g": [2, 3]}))


def test_training_keeps_the_order_of_the_slices(root: Path) -> None:
    """Labels are made right after the slices are taken: nothing in the config may move a slice later on."""
    parser = ConfigParser()
    parser.read_config(str(root / "bundles" / "rsna_cnn_lstm" / "configs" / "train.json"))
    parser.update({"num_slices": 12, "image_size": [24, 24], "augment_prob": 1.0, "slice_loss_weight": 1.0})
    parser.update({"bundle_root": str(root / "bundles" / "rsna_cnn_lstm")})
    parser["labels#_target_"] = "bundles.rsna_cnn_lstm.scripts.labels.LabelTable.from_file"
    transform = parser.get_parsed_content("train#preprocessing")
    numbers = np.arange(12)
    for seed in range(5):
        volume = source(12, 2.0, numbers)
        data = (torch.arange(12.0) * 20).expand(1, 32, 32, 12).clone()
        item = {"image": MetaTensor(data, meta=volume.meta), "findings": {"bowel": [3, 4], "extravasation": None}}
        transform.set_random_state(seed)
        done = transform(item)
        brightest = done["image"].as_tensor().amax(dim=(0, 1, 2))
        assert (brightest.diff() >= -1e-6).all()
        assert brightest[-1] > brightest[0] + 0.2
        assert done["slice_label"][:, 0].nonzero().flatten().tolist() == [3, 4]
        assert (done["slice_label"][:, 1] == -1).all()


def test_phantoms_fresh_and_from_their_slabs(phantoms: Path, root: Path, tmp_path: Path) -> None:
    """The generator knows at which height each image lies: labels are where an injury was painted, not elsewhere."""
    from demo.dataset import Options, make_patient

    rows = pd.read_csv(phantoms / "image_level_labels.csv")
    rows = rows[rows["injury_name"] == "Bowel"]
    parser = ConfigParser()
    parser.read_config(str(root / "bundles" / "rsna_cnn_lstm" / "configs" / "train.json"))
    parser["volume_size"] = [32, 32, 19]
    cache = SlabCache(parser.get_parsed_content("prepare"), tmp_path)
    directions = set()
    for (patient_id, series_id), series in list(rows.groupby(["patient_id", "series_id"]))[:6]:
        patient = make_patient(7, patient_id - 10001, Options(size=96, slices=24))
        scan = patient.scans[series_id - patient.series_id(0)]
        directions.add(scan.head_first)
        injured = [scan.lowest + scan.spacing * k for k in range(scan.depth)
                   if scan.instance_number(k) in set(series["instance_number"])]  # fmt: skip
        item = {"image": str(phantoms / "train_images" / str(patient_id) / str(series_id))}
        for _ in range(2):  # prepared, then read back
            slices = ExtractSlices(num_slices=9)(cache.load(item))
            found = SliceLabels(groups=["bowel"])(slices, {"bowel": series["instance_number"].tolist()})[:, 0]
            images = [scan.lowest + scan.spacing * k for k in range(scan.depth)]
            expected = slow_labels(slices, injured, images)
            sure = [k for k, value in enumerate(expected) if value is not None]
            assert len(sure) >= 5
            assert found[sure].tolist() == [expected[k] for k in sure]
            assert 0 < found.sum() < 9
    assert directions == {True, False}
