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

from benchmarks.real_ct import parts, probes, report
from benchmarks.real_ct.__main__ import finished, main, result_file, trainings
from benchmarks.real_ct.data import find_real
from benchmarks.real_ct.parts import batch_items, presence, seen_series, slice_brightness, slice_heights
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


def test_the_penalty_is_chosen_by_whole_blocks() -> None:
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(3)
    heights = np.arange(32) * 5.0
    features = np.repeat(rng.normal(size=(8, 20)), 4, axis=0) + 0.05 * rng.normal(size=(32, 20))
    features[:, 0] += heights / 40  # all else is alike within a block, and so favours a small penalty by single slices
    blocks, predicted = np.arange(32) // 4, np.empty(32)

    def fit(alpha: float, learn: np.ndarray, test: np.ndarray) -> np.ndarray:
        scaler = StandardScaler().fit(features[learn])
        return (
            Ridge(alpha)
            .fit(scaler.transform(features[learn]), heights[learn])
            .predict(scaler.transform(features[test]))
        )

    for held_out in (0, 1):
        errors = []
        for alpha in probes.ALPHAS:
            each = []
            for block in range(1 - held_out, 8, 2):
                learn = (blocks % 2 != held_out) & (blocks != block)
                each.append(np.abs(fit(alpha, learn, blocks == block) - heights[blocks == block]).mean())
            errors.append(np.mean(each))
        best = probes.ALPHAS[int(np.argmin(errors))]
        predicted[blocks % 2 == held_out] = fit(best, blocks % 2 != held_out, blocks % 2 == held_out)
    slow = np.abs(predicted.clip(heights.min(), heights.max()) - heights).mean()
    assert height_errors(features, heights)[0] == pytest.approx(slow)


def test_brightness_and_area_of_a_slice() -> None:
    import torch
    from monai.data import MetaTensor

    pixels = torch.zeros(1, 4, 4, 2, dtype=torch.uint8)
    pixels[0, :2, 0, 1] = 80
    volume = MetaTensor(pixels, affine=torch.diag(torch.tensor([2.0, 3.0, 5.0, 1.0])))
    np.testing.assert_allclose(slice_brightness(volume), [[0, 0], [10, 2 * 6]])


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


def test_a_training_never_sees_the_patient_left_out(monkeypatch) -> None:
    real = {"a": "/a", "b": "/b", "c": "/c"}
    assert seen_series(real, "b") == ["/a", "/c"]
    assert seen_series(real, None) == []
    with pytest.raises(KeyError):
        seen_series(real, "unknown")
    told: list[tuple[list[str], list[str]]] = []
    monkeypatch.setattr(parts, "Pretraining", lambda *_: None)
    monkeypatch.setattr(parts, "phantom_series", lambda _: ["/p", "/q"])
    monkeypatch.setattr(parts, "_train", lambda _, seen, phantoms, *__: told.append((seen, phantoms)) or [])
    monkeypatch.setattr(parts, "_measure", lambda _, patients, *__: patients)
    task = {"settings": {}, "sizes": {"steps": 1, "phantoms": 1}, "real": real, "phantoms": "x"}
    for training in trainings([*real], 1):
        measured = parts._train_and_measure(task, training)["patients"]
        seen, phantoms = told.pop()
        assert not {real[patient] for patient in measured} & set(seen)
        assert phantoms == ["/p"]
        assert len(seen) == (2 if training["network"] == report.OURS else 0)


def test_figures_of_other_settings_are_not_taken(tmp_path) -> None:
    training = trainings(["a"], 1)[2]
    file = result_file(tmp_path, training)
    assert file.name == "phantoms_and_patients-a-seed0.json"
    training["file"] = str(file)
    kind = {"settings": {"x": 1}, "sizes": {}, "revision": "abc"}
    assert finished(training, kind) is None
    file.write_text(json.dumps({**kind, "seconds": 1}))
    assert finished(training, kind) == {**kind, "seconds": 1}
    assert finished(training, {**kind, "settings": {"x": 2}}) is None
    assert finished(training, {**kind, "revision": "def"}) is None
    file.write_text(json.dumps({"settings": {"x": 1}, "sizes": {}}))  # before revisions were kept
    assert finished(training, kind) is None


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


def test_a_verdict_is_of_these_patients() -> None:
    assert report.verdict(0.1, 0.2, True) == "above 0 over seeds, on these patients: better"
    assert report.verdict(0.1, 0.2, False) == "above 0 over seeds, on these patients: worse"
    assert report.verdict(-0.2, -0.1, False) == "below 0 over seeds, on these patients: better"
    assert report.verdict(-0.1, 0.2, True) == "0 is inside"


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
            assert found["height_mm_brightness"] > 0
        assert training["revision"] == results["revision"]
    assert results["machine"]["threads"] == "1 in each of 1 processes"
    assert report.of_patients(results, report.OURS, "position_accuracy").shape == (len(names), results["seeds"])
    text = report.section(results)
    mean = report.of_patients(results, report.OURS, "height_mm").mean()
    assert f"{mean:.1f} (" in text
    assert "liver (" in text
    assert f"of {len(names)} patients |" in text
    assert "organs of one patient |" in text
    assert f"always the centre {report.position_baseline(results)['centre']:.2f}" in text
    assert f"`{results['revision']}` ({len(results['trainings'])})" in text
    assert str(root) not in file.read_text()
    assert str(len(names)) in report.headline(results)
    report.plots(results, tmp_path / "plots")
    assert 1000 < (tmp_path / "plots" / "real_ct.png").stat().st_size < 60_000
