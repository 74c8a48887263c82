# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Real CT, one patient left out: probes beside slow obvious ones, who sees whom, and the whole benchmark at its
smallest."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.real_ct import report
from benchmarks.real_ct.__main__ import finished, main, result_file, trainings
from benchmarks.real_ct.data import find_real
from benchmarks.real_ct.parts import batch_items, presence, slice_heights
from benchmarks.real_ct.probes import alternating_blocks, height_errors, organ_aucs


def test_blocks_alternate() -> None:
    assert alternating_blocks(10, 4).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]


def test_a_height_that_the_features_tell_is_found_in_mm() -> None:
    heights = np.arange(32) * 7.5
    features = np.stack([heights, np.random.default_rng(0).normal(size=32)], axis=1)
    error, constant = height_errors(features, heights)
    assert error < 1.0
    half = np.arange(32) // 4 % 2
    slow = [abs(heights[half != half[k]].mean() - heights[k]) for k in range(32)]
    assert constant == pytest.approx(np.mean(slow))
    noise, _ = height_errors(np.random.default_rng(1).normal(size=(32, 2)), heights)
    assert noise > 0.8 * constant


def test_organ_probe_learns_on_one_set_and_is_asked_on_another() -> None:
    rng = np.random.default_rng(0)
    seen, other = rng.integers(0, 2, 200), rng.integers(0, 2, 100)
    features, others = (
        np.stack([y + 0.1 * rng.normal(size=len(y)), rng.normal(size=len(y))], 1) for y in (seen, other)
    )
    found = organ_aucs(features, {"liver": seen, "spleen": seen}, others, {"liver": other, "spleen": np.ones(100)})
    assert found == {"liver": 1.0}  # the spleen is in every slice: nothing to tell apart
    assert organ_aucs(features, {"liver": seen}, others, {"liver": 1 - other})["liver"] == 0.0


def test_a_step_sees_half_real_patients_and_none_twice() -> None:
    items = [batch_items(np.random.default_rng(seed), 3, 60, 6) for seed in range(50)]
    assert all(sorted(one)[:3] == [0, 1, 2] and len(set(one)) == 6 for one in items)
    assert {item for one in items for item in one if item >= 3} <= set(range(3, 63))
    assert all(min(one) >= 0 and len(set(one)) == 6 for one in [batch_items(np.random.default_rng(0), 0, 6, 6)])


def test_a_network_is_measured_on_patients_that_it_has_not_seen() -> None:
    plan = trainings(["a", "b"], 2)
    assert len(plan) == 2 * (2 + 2)
    assert [one["left_out"] for one in plan if one["network"] == report.OURS] == ["a", "b"] * 2
    assert {one["left_out"] for one in plan if one["network"] != report.OURS} == {None}


def test_figures_of_other_settings_are_not_taken(tmp_path) -> None:
    training = trainings(["a"], 1)[2]
    file = result_file(tmp_path, training)
    assert file.name == "phantoms_and_patients-a-seed0.json"
    training["file"] = str(file)
    kind = {"settings": {"x": 1}, "sizes": {}}
    assert finished(training, kind) is None
    file.write_text(json.dumps({**kind, "seconds": 1}))
    assert finished(training, kind) == {**kind, "seconds": 1}
    assert finished(training, {**kind, "settings": {"x": 2}}) is None


def test_a_missing_series_is_one_clear_error(tmp_path, capsys) -> None:
    (tmp_path / "crlm_ct_1004").mkdir()
    with pytest.raises(SystemExit):
        main(["--data", str(tmp_path), "--work", str(tmp_path / "work")])
    message = capsys.readouterr().err
    assert "found no cptac_pda_c3l_00189, acrin_flt_breast_001, lidc_idri_0001/cxr.nii.gz" in message
    assert "crlm_ct_1004" not in message


def test_organs_lie_where_the_mask_has_them(data_dir) -> None:
    import nibabel as nib
    import torch
    from monai.data import MetaTensor

    mask = nib.load(data_dir / "lidc_idri_0001_organs.nii.gz")
    volume = MetaTensor(torch.zeros(1, *mask.shape), affine=torch.tensor(mask.affine))
    found = presence(volume, str(find_real(None).mask), [5, 1, 3, 2])
    labels = np.asarray(mask.dataobj)
    pixel = np.prod(mask.header.get_zooms()[:2])
    for organ, label in {"liver": 5, "spleen": 1, "left kidney": 3, "right kidney": 2}.items():
        slow = [int((labels[:, :, z] == label).sum() * pixel >= 100) for z in range(mask.shape[2])]
        assert found[organ].tolist() == slow
    assert 0 < found["liver"].sum() < mask.shape[2]
    assert np.diff(slice_heights(volume)) == pytest.approx(mask.header.get_zooms()[2])


def test_an_interval_is_students() -> None:
    from scipy import stats

    sample = [0.1, 0.2, 0.4]
    assert report.interval(sample)[1:] == pytest.approx(stats.ttest_1samp(sample, 0).confidence_interval(0.95))
    with pytest.raises(ValueError, match="two seeds"):
        report.interval([1.0])


@pytest.mark.slow
def test_it_runs_and_the_document_shows_it(tmp_path, root) -> None:
    file = tmp_path / "results.json"
    subprocess.run([sys.executable, "-m", "benchmarks.real_ct", "--smoke", "--out", file], cwd=root, check=True)
    results = json.loads(file.read_text())
    assert results["smoke"] is True
    names = report.patients(results)
    for training in results["trainings"]:
        left_out = training["left_out"]
        assert [*training["patients"]] == ([left_out] if left_out else names)
        assert len(training["losses"]) == (0 if training["network"] == "untrained" else 2)
        for found in training["patients"].values():
            assert 0 <= found["position_accuracy"] <= 1
            assert found["height_mm_constant"] > 0
    assert report.of_patients(results, report.OURS, "position_accuracy").shape == (len(names), results["seeds"])
    text = report.section(results)
    mean = report.of_patients(results, report.OURS, "height_mm").mean()
    assert f"{mean:.1f} (" in text
    assert "liver (" in text
    assert str(root) not in file.read_text()
    assert str(len(names)) in report.headline(results)
    report.plots(results, tmp_path / "plots")
    assert 1000 < (tmp_path / "plots" / "real_ct.png").stat().st_size < 60_000
