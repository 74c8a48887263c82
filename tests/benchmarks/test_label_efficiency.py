# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The label-efficiency study: its data are the bundles', pretexts are paired, runs resume, the test is read once."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from scipy import stats
from sklearn.metrics import average_precision_score

from benchmarks.label_efficiency import (
    classify,
    data,
    decisions,
    figures,
    health,
    pretexts,
    read_test,
    report,
    training,
    verdicts,
)
from benchmarks.label_efficiency import work as work_module
from benchmarks.label_efficiency.plan import Task, is_main, load_plan, tasks
from benchmarks.label_efficiency.pretexts import CONTROL, CropBatches, InstanceContrast, pretext_settings, pretrain
from benchmarks.label_efficiency.state import Study
from benchmarks.label_efficiency.status import status
from benchmarks.label_efficiency.work import label_table, work
from demo.dataset import GROUPS, make_patient

SMOKE = load_plan(smoke=True)


@pytest.fixture(scope="module")
def volumes() -> np.ndarray:
    """[N, Z, X, Y]"""
    return np.random.default_rng(0).integers(0, 256, (5, 8, 48, 48), dtype=np.uint8)


def test_every_task_is_named_once_and_comes_after_what_it_needs() -> None:
    for plan in (SMOKE, load_plan()):
        done: set[str] = set()
        for task in tasks(plan):
            assert set(task.needs) <= done
            assert not set(task.names) & done
            done |= set(task.names)


def test_main_runs_at_the_first_level_come_first() -> None:
    places = {True: [], False: []}
    for place, task in enumerate(tasks(load_plan())):
        if task.kind == "fine_tune" and task.level == "plain":
            places[is_main(load_plan(), task)].append(place)
    assert max(places[True]) < min(places[False])


def test_splits_have_seeds_of_their_own() -> None:
    plan = load_plan()
    assert len({split["seed"] for split in plan["data"]["splits"].values()}) == 3
    assert plan["data"]["labelled"] <= plan["data"]["splits"]["pool"]["patients"]


def test_prepared_volumes_are_those_of_the_bundle(tmp_path: Path, root: Path) -> None:
    volume = make_patient(5, 0, data.options(SMOKE, "plain")).render()
    nib.save(nib.Nifti1Image(volume.hu.transpose(2, 1, 0), volume.affine), tmp_path / "series.nii")
    parser = ConfigParser()
    parser.read_config(root / "bundles/voco2d_pretrain/configs/train.json")
    parser["volume_size"] = [48, 48, 8]
    wanted = parser.get_parsed_content("prepare")({"image": str(tmp_path / "series.nii")})["image"]
    found, present = data.prepare(volume, 48, 8)
    np.testing.assert_array_equal(found, wanted.as_tensor()[0].permute(2, 0, 1).numpy())
    assert present.shape == (8, 5)
    assert present.any(axis=0).all()


def test_organs_are_regridded_as_the_volume_is() -> None:
    rng = np.random.default_rng(0)
    for count, depth in ((7, 3), (8, 8), (20, 24), (28, 24)):
        present = rng.random((count, 2)) < 0.4
        for k, row in enumerate(data.regrid_presence(present, depth)):
            inside = [z for z in range(count) if z + 1 > k * count / depth and z < (k + 1) * count / depth]
            np.testing.assert_array_equal(row, present[inside].any(axis=0))


def test_classes_are_those_of_the_bundles_table() -> None:
    assert label_table().group_names == tuple(GROUPS)
    for index in range(5):
        labels = make_patient(1, index).labels
        np.testing.assert_array_equal(label_table().class_index(labels), data.class_indices(labels))


def test_each_round_of_batches_sees_every_index_once() -> None:
    batches = list(training.index_batches(7, 3, 7, np.random.default_rng(0)))
    flat = np.concatenate(batches)
    assert [len(batch) for batch in batches] == [3] * 7
    for start in range(0, 21, 7):
        assert sorted(flat[start : start + 7]) == list(range(7))


def test_subsets_are_nested_and_of_the_seed() -> None:
    subsets = [set(classify.labelled_subset(240, rate, 1)) for rate in (10, 25, 50, 100)]
    assert [len(subset) for subset in subsets] == [24, 60, 120, 240]
    assert all(small < large for small, large in itertools.pairwise(subsets))
    assert subsets[0] != set(classify.labelled_subset(240, 10, 2))


def test_pretexts_start_from_the_same_weights(volumes: np.ndarray, monkeypatch) -> None:
    plan = copy.deepcopy(SMOKE)
    plan |= {key: load_plan()[key] for key in ("pretexts", "variants")}
    began: list[list[torch.Tensor]] = []

    def remember(parameters: list, losses: object, *_: object) -> list[float]:
        next(losses)  # what the first batch's forward pass may change is not a weight
        began.append([one.detach().clone() for one in parameters])
        return []

    monkeypatch.setattr(pretexts, "descend", remember)
    names = [name for name in (*plan["pretexts"], *plan["variants"]) if name != "scratch"]
    networks = [pretrain(plan, name, 3, volumes)[0] for name in names]
    assert len(began) == len(names) == 9
    first = began[0]
    assert len(first) == len(list(networks[0].student.parameters()))
    for other in began[1:]:
        torch.testing.assert_close(other[: len(first)], first, rtol=0, atol=0)
    scratch = list(pretrain(plan, "scratch", 3, volumes)[0].student.parameters())
    torch.testing.assert_close([one.detach() for one in scratch], first, rtol=0, atol=0)
    pretrain(plan, "v2", 4, volumes)
    assert not all(torch.equal(a, b) for a, b in zip(began[-1], first, strict=True))


def test_pretexts_see_the_same_crops(volumes: np.ndarray) -> None:
    plan = copy.deepcopy(SMOKE)
    plan["pretexts"] = load_plan()["pretexts"]
    crops = {}
    for name in ("v1", "v2", CONTROL):
        settings = pretext_settings(plan, name)
        crops[name] = next(iter(CropBatches(volumes, settings, 0)))[0]
        assert crops[name].shape == (2, 11, 2, 1, 16, 16)
        torch.testing.assert_close(crops[name], crops["v1"], rtol=0, atol=0)


def test_a_loss_that_is_not_finite_ends_training() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    losses = (weight.sum() * factor for factor in (1.0, float("nan"), 1.0))
    settings = SMOKE["fine_tuning"]
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2 of 3"):
        training.descend([weight], losses, 3, settings)
    assert torch.isfinite(weight).all()


def test_no_patient_is_in_two_splits(tmp_path: Path) -> None:
    plan = copy.deepcopy(SMOKE)
    for split in plan["data"]["splits"].values():
        split["patients"] = 3
    plan["data"]["labelled"] = 2
    for level in plan["levels"]:
        for split in plan["data"]["splits"]:
            data.write_patients(plan, level, split, tmp_path)
    _check_disjoint(plan, tmp_path)


def _check_disjoint(plan: dict, folder: Path) -> None:
    for level in plan["levels"]:
        hashed = {
            split: {
                hashlib.sha256(volume.tobytes()).hexdigest()
                for volume in data.load_patients(folder, level, split).volumes
            }
            for split in plan["data"]["splits"]
        }
        assert all(len(hashed[split]) == data.number(plan, level, split) for split in hashed)
        for one, other in itertools.combinations(hashed, 2):
            assert not hashed[one] & hashed[other], (level, one, other)


def test_baselines_are_of_the_windows_that_networks_were_asked(monkeypatch) -> None:
    plan = copy.deepcopy(SMOKE)
    plan["data"]["splits"]["validation"]["patients"] = 5  # by twos: one is left over
    asked = []

    class Recorder:
        def __call__(self, _: object, overlap: torch.Tensor) -> None:
            asked.append(overlap)

        def aggregate(self) -> float:
            return 0.0

    monkeypatch.setattr(health, "PositionAccuracy", Recorder)
    monkeypatch.setattr(health, "EmbeddingSpread", Recorder)
    volumes = np.zeros((5, 8, 48, 48), np.uint8)
    network = pretrain(plan, "scratch", 0, volumes)[0]
    patients = data.Patients(volumes, np.zeros((5, 5)), np.zeros((5, 8, 5), bool))
    health.position_figures(plan, network, patients, "v2")
    np.testing.assert_array_equal(torch.cat(asked[::2]).numpy(), health.window_overlaps(plan))


@pytest.mark.parametrize("name", [*load_plan()["pretexts"], *load_plan()["variants"]])
def test_every_pretext_trains_and_repeats(volumes: np.ndarray, name: str) -> None:
    plan = copy.deepcopy(SMOKE)
    plan |= {key: load_plan()[key] for key in ("pretexts", "variants")}
    untrained = {**plan, "pretraining": plan["pretraining"] | {"steps": 0}}
    before = pretrain(untrained, name, 0, volumes)[0].student.state_dict()
    runs = [pretrain(plan, name, 0, volumes) for _ in range(2)]
    torch.testing.assert_close(runs[0][0].state_dict(), runs[1][0].state_dict(), rtol=0, atol=0)
    assert runs[0][1] == runs[1][1]
    key = "backbone.model.conv_stem.weight"
    assert torch.equal(before[key], runs[0][0].student.state_dict()[key]) == (name == "scratch")


def test_the_control_wants_crops_of_a_volume_alike() -> None:
    volume = torch.randn(3, 1, 8)
    alike, apart = volume.expand(3, 6, 8), torch.randn(3, 6, 8)
    assert InstanceContrast(0.1, 0)(alike) < 0.1 < InstanceContrast(0.1, 0)(apart)


def test_batch_norm_is_measured_again(volumes: np.ndarray) -> None:
    backbone = pretrain(SMOKE, "scratch", 0, volumes)[0].student.backbone
    training.recalibrate(backbone, volumes, 2, batch_size=5)
    slices = training.equal_slices(8, 2)
    images = training.as_input(volumes[:, slices]).flatten(0, 1)[:, None]
    after_stem = backbone.model.conv_stem(images)
    torch.testing.assert_close(backbone.model.bn1.running_mean, after_stem.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert backbone.model.bn1.momentum == pytest.approx(0.1)


def test_frozen_features_give_what_the_whole_network_gives(volumes: np.ndarray) -> None:
    backbone = pretrain(SMOKE, "scratch", 0, volumes)[0].student.backbone
    training.recalibrate(backbone, volumes, 2)
    whole = classify.make_classifier(SMOKE, label_table(), "frozen", 4, backbone.state_dict())
    head = classify.make_classifier(SMOKE, label_table(), "frozen", 4, None)
    features = classify.frozen_features(backbone, volumes)
    assert features.shape == (5, 8, 256)
    predicted = [
        classify.predict(SMOKE, label_table(), network, images)
        for network, images in ((whole, volumes), (head, features))
    ]
    assert predicted[0].shape == (5, 13)
    np.testing.assert_allclose(predicted[0], predicted[1], atol=1e-5)
    assert not any(p.requires_grad for p in whole.backbone.parameters())


def test_modes_train_what_they_say(volumes: np.ndarray) -> None:
    weights = pretrain(SMOKE, "scratch", 0, volumes)[0].student.backbone.state_dict()
    classes = np.random.default_rng(1).integers(0, 2, (5, 5))
    for mode, moves in (("full", {"conv_stem", "conv_head"}), ("last", {"conv_head"})):
        network = classify.make_classifier(SMOKE, label_table(), mode, 0, weights)
        classify.fine_tune(SMOKE, label_table(), network, volumes, classes, 0, 2)
        after = network.backbone.state_dict()
        names = ("conv_stem", "conv_head")
        moved = {n for n in names if not torch.equal(after[f"model.{n}.weight"], weights[f"model.{n}.weight"])}
        assert moved == moves


def _predictions(seed: int, number: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    classes = np.stack([rng.integers(0, len(group.classes), number) for group in label_table().groups], axis=1)
    return classes, label_table().probabilities(torch.from_numpy(rng.normal(size=(number, 11)))).numpy()


def test_resampled_map_is_that_of_the_drawn_patients() -> None:
    classes, probabilities = _predictions(0)
    assert figures.resampled_map(label_table(), classes, probabilities, np.ones((1, 40)))[0] == pytest.approx(
        figures.point_figures(label_table(), classes, probabilities)["mAP"]
    )
    drawn = np.random.default_rng(1).integers(0, 40, 40)
    counts = np.bincount(drawn, minlength=40)[None].astype(float)
    truth, values = label_table().one_hot(classes)[drawn], probabilities[drawn]
    columns = [i for i, name in enumerate(label_table().columns) if not name.endswith("_healthy")]
    healthy = [i for i, name in enumerate(label_table().columns) if name.endswith("_healthy")]
    parts = [average_precision_score(truth[:, i], values[:, i]) for i in columns]
    parts.append(average_precision_score((classes[drawn] > 0).any(axis=1), (1 - values[:, healthy]).max(axis=1)))
    found = figures.resampled_map(label_table(), classes, probabilities, counts)[0]
    assert found == pytest.approx(np.mean(parts))


def test_a_difference_of_equal_predictions_is_nothing() -> None:
    classes, probabilities = _predictions(0)
    other = _predictions(1)[1]
    pairs = [(["a"], ["b"]), (["a", "c"], ["b", "c"]), (["c"], ["a"])]
    predictions = {"a": probabilities, "b": probabilities, "c": other}
    found = figures.bootstrap_differences(label_table(), classes, predictions, pairs, 100)
    assert found[0] == found[1] == (0.0, 0.0)
    assert found[2][0] < found[2][1]


def test_figures_over_seeds_are_students() -> None:
    one, two = [0.50, 0.54, 0.52], [0.49, 0.50, 0.50]
    found, wanted = figures.paired_over_seeds(one, two), stats.ttest_rel(one, two)
    interval = wanted.confidence_interval(0.95)
    assert (found["low"], found["high"], found["p"]) == pytest.approx((interval.low, interval.high, wanted.pvalue))
    assert found["values"] == pytest.approx([0.01, 0.04, 0.02])
    assert figures.over_seeds([0.5])["low"] is None


def test_features_that_show_an_organ_have_a_perfect_probe() -> None:
    rng = np.random.default_rng(0)
    present = rng.random((10, 6, 2)) < 0.5
    noise = torch.from_numpy(rng.normal(size=(10, 6, 3))).float()
    told = torch.cat([torch.from_numpy(present).float(), noise], dim=-1)
    assert health.organ_auc(told, present) > 0.99
    assert health.organ_auc(noise, present) < 0.75
    with_an_organ_that_is_everywhere = np.concatenate([present, np.ones((10, 6, 1), bool)], axis=-1)
    assert health.organ_auc(told, with_an_organ_that_is_everywhere) == pytest.approx(health.organ_auc(told, present))


def test_a_variant_passes_by_both_sets_only() -> None:
    def comparison(validation: list[float], test: list[float]) -> dict:
        where = {"level": "plain", "mode": "full", "rate": 100, "one": "slice_height", "two": "v2"}
        both = {"validation_mAP": {"values": validation}, "test_mAP": {"values": test, "low": 0.01, "high": 0.2}}
        return where | both | {"patients": [-0.1, 0.2]}

    def judged(*values: list[float]) -> bool:
        return decisions.judge_variants({"plan": SMOKE, "comparisons": [comparison(*values)]})[0]["passes"]

    clear, unclear = [0.03, 0.04, 0.05], [-0.02, 0.01, 0.04]
    assert judged(clear, [0.01, 0.0, 0.01])
    assert not judged(clear, [-0.01, 0.0, -0.01])
    assert not judged(unclear, clear)
    assert not decisions.judge_variants({"plan": SMOKE, "comparisons": []})
    assert decisions.helps(comparison(clear, clear)) == {"seeds": True, "patients": False}
    assert decisions.hurts(comparison(clear, clear)) == {"seeds": False, "patients": False}


def test_a_variant_is_judged_by_the_mean_over_the_rates() -> None:
    values = {25: ([0.01, 0.05, 0.03], [0.02, -0.05, 0.00]), 100: ([0.03, 0.03, -0.01], [0.01, 0.01, 0.04])}
    comparisons = [
        {"level": "plain", "mode": "full", "rate": rate, "one": "slice_height", "two": "v2"}
        | {"validation_mAP": {"values": validation}, "test_mAP": {"values": test}}
        for rate, (validation, test) in values.items()
    ]
    plan = SMOKE | {"variant_rates": [25, 100]}
    (found,) = decisions.judge_variants({"plan": plan, "comparisons": comparisons})
    # by seed (0.01 + 0.03) / 2, (0.05 + 0.03) / 2, (0.03 - 0.01) / 2 = 0.02, 0.04, 0.01: mean 0.07 / 3, and squares
    # of the distances to it (1, 25, 16) / 90000, over 2
    assert found["validation"] == pytest.approx(0.07 / 3)
    assert found["spread"] == pytest.approx((42 / 90000 / 2) ** 0.5)
    assert found["test"] == pytest.approx((0.015 - 0.02 + 0.02) / 3)
    assert found["passes"]
    assert not decisions.judge_variants({"plan": plan, "comparisons": comparisons[:1]})  # one rate is not there


def test_each_interval_can_say_yes() -> None:
    def of(low: float | None, high: float | None, patients: list[float]) -> dict:
        return {"test_mAP": {"low": low, "high": high}, "patients": patients}

    above, below = of(0.01, 0.02, [0.01, 0.02]), of(-0.02, -0.01, [-0.02, -0.01])
    assert decisions.helps(above) == decisions.hurts(below) == {"seeds": True, "patients": True}
    assert decisions.helps(below) == decisions.hurts(above) == {"seeds": False, "patients": False}
    assert decisions.helps(of(None, None, [0.01, 0.02])) == {"seeds": False, "patients": True}
    assert decisions.hurts(of(-0.02, -0.01, [-0.01, 0.02])) == {"seeds": True, "patients": False}


def test_odds_of_chance() -> None:
    gains = np.random.default_rng(0).normal(size=(200_000, 3))
    simulated = (gains.mean(axis=1) > gains.std(axis=1, ddof=1)).mean()
    assert decisions.odds_of_a_null_variant(3) == pytest.approx(simulated, abs=0.003)
    assert decisions.odds_of_a_null_variant(3) == pytest.approx(0.113, abs=0.001)
    assert decisions.above_by_chance(60) == pytest.approx(1.5)


def _cell(one: str, two: str, rate: int, mean: float, half: float | None = 0.01, patients: float = 0.01) -> dict:
    low, high = (None, None) if half is None else (mean - half, mean + half)
    where = {"level": "plain", "mode": "full", "rate": rate, "one": one, "two": two}
    return where | {
        "test_mAP": {"mean": mean, "low": low, "high": high},
        "patients": [mean - patients, mean + patients],
    }


def test_verdicts_name_cells_and_which_interval() -> None:
    cells = [
        _cell("v2", "scratch", 25, 0.02), _cell("v2", "scratch", 100, 0.02, half=0.03),
        _cell("v2", "scratch", 50, -0.02),
        _cell("v2", CONTROL, 25, 0.05), _cell("v2", CONTROL, 100, 0.05),
        _cell(CONTROL, "scratch", 25, -0.03), _cell(CONTROL, "scratch", 100, 0.0),
    ]  # fmt: skip
    results = {"plan": load_plan(), "comparisons": cells}
    text = verdicts.pair_verdict(results, "v2", "scratch")
    assert "better in 2 of 3 means" in text
    assert "above 0 over seeds: plain, all weights, 25 %; over patients only: plain, all weights, 100 %" in text
    assert "below 0 over seeds: plain, all weights, 50 %; over patients only: none" in text
    # at 25 % the control is worse than scratch: what is gained over it shows nothing of the position task
    assert verdicts.ascription(results, "v2").endswith(
        "position task in: plain, all weights, 100 %; not in: plain, all weights, 25 %."
    )
    whole = verdicts.verdict(results)
    assert "of these 7 comparisons about 0.2 would lie above 0" in whole
    assert "say nothing of another seed" in whole.replace("\n", " ")


def test_a_folder_belongs_to_its_plan(tmp_path: Path) -> None:
    Study(tmp_path, SMOKE)
    Study(tmp_path, SMOKE)
    with pytest.raises(ValueError, match="another plan"):
        Study(tmp_path, {**SMOKE, "seeds": [7]})


def test_a_task_has_one_worker_and_one_result(tmp_path: Path) -> None:
    study, task = Study(tmp_path, SMOKE), Task("data", "plain", "pool")
    with study.claim(task) as mine:
        assert mine
        with Study(tmp_path, SMOKE).claim(task) as theirs:
            assert not theirs
    with study.claim(task) as mine:
        assert mine
        study.record(task.names[0], {"seconds": 1.0})
    with study.claim(task) as mine:
        assert not mine
    assert task not in study.open_tasks()


def test_a_killed_worker_leaves_its_task_to_others(tmp_path: Path, root: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from benchmarks.label_efficiency.plan import *;"
        "from benchmarks.label_efficiency.state import Study; study = Study(Path(sys.argv[1]), load_plan(True))\n"
        "with study.claim(Task('data', 'plain', 'pool')) as mine: print(mine, flush=True); time.sleep(600)"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        with Study(tmp_path, SMOKE).claim(Task("data", "plain", "pool")) as mine:
            assert not mine
        process.kill()
    with Study(tmp_path, SMOKE).claim(Task("data", "plain", "pool")) as mine:
        assert mine


def test_nobody_reads_the_test_early_or_trains_after_it(tmp_path: Path) -> None:
    study = Study(tmp_path, SMOKE)
    with pytest.raises(RuntimeError, match="planned runs are missing"):
        read_test.read_test(study)
    study.record_test({"found": 1})
    assert read_test.read_test(study) == {"found": 1}
    with pytest.raises(RuntimeError, match="was read"):
        work(study)


def test_a_variant_is_left_out_by_name_only(tmp_path: Path) -> None:
    study = Study(tmp_path, SMOKE)
    for task in tasks(SMOKE):
        for name in task.names:
            if task.pretext != "slice_height":
                study.record(name, {})
    missing = read_test.missing_pieces(study)
    assert missing == ["pretrain-slice_height-s0", "plain-slice_height-s0-full-100"]
    with pytest.raises(RuntimeError, match="2 planned runs are missing, such as pretrain-slice_height-s0"):
        read_test.read_test(study)
    assert read_test.missing_pieces(study, ["slice_height"]) == []
    read_test.check_left_out(study, ["slice_height"])
    for wrong in ("v2", "unknown"):
        with pytest.raises(ValueError, match="expected variants with missing runs"):
            read_test.check_left_out(study, [wrong])
    for name in missing:
        study.record(name, {})
    with pytest.raises(ValueError, match="expected variants with missing runs"):
        read_test.check_left_out(study, ["slice_height"])  # all there: may not be dropped for what it found


def test_a_task_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch) -> None:
    study, done = Study(tmp_path, SMOKE), []

    def make(study: Study, task: Task, _: object) -> None:
        if task.names[0] == broken:
            raise ValueError("no good")
        done.extend(task.names)
        for name in task.names:
            study.record(name, {"seconds": 1.0, "rate": 1, "validation": {"mAP": 0.5}, "health": {"x": 1.0}})

    broken = "pretrain-v2-s0"
    for action in ("make_data", "make_weights", "make_classifiers"):
        monkeypatch.setattr(work_module, action, make)
    with pytest.raises(RuntimeError, match=r"^pretrain-v2-s0 failed"):
        work(study)
    every = {name: task for task in tasks(SMOKE) for name in task.names}
    assert set(done) == {name for name, task in every.items() if task.pretext != "v2"}
    assert "ValueError: no good" in study.failures()[broken]
    assert "failed: pretrain-v2-s0: ValueError: no good" in status(study, 2)
    study.forget_failures()
    broken = ""
    work(study)
    assert sorted(done) == sorted(every)


def test_status_of_a_folder_without_runs(tmp_path: Path) -> None:
    assert f"0 of {sum(len(task.names) for task in tasks(SMOKE))} pieces done" in status(Study(tmp_path, SMOKE), 2)


@pytest.mark.slow
def test_it_runs_resumes_and_is_told(tmp_path: Path, root: Path) -> None:
    work_folder, out = tmp_path / "work", tmp_path / "out.json"
    words = [sys.executable, "-m", "benchmarks.label_efficiency", "--smoke", "--work", str(work_folder)]
    subprocess.run([*words, "--workers", "2"], cwd=root, check=True)
    runs = {path.name: path.read_bytes() for path in (work_folder / "runs").iterdir()}
    lost = "plain-v2-s0-full-100"
    for suffix in ("json", "npz"):
        (work_folder / "runs" / f"{lost}.{suffix}").unlink()
    subprocess.run([*words, "--workers", "1"], cwd=root, check=True)
    again = {path.name: path.read_bytes() for path in (work_folder / "runs").iterdir()}
    assert again[f"{lost}.npz"] == runs[f"{lost}.npz"]  # a piece depends on its seed alone
    assert {name for name in runs if again[name] != runs[name]} == {f"{lost}.json"}  # its seconds
    assert b"test" not in again[f"{lost}.json"]
    subprocess.run([*words, "--read-test", "--out", str(out)], cwd=root, check=True)
    results = json.loads(out.read_text(encoding="utf-8"))
    _check_results(results, work_folder)
    text = report.section(results)
    report.plots(results, tmp_path / "benchmarks")
    for level in results["plan"]["levels"]:
        picture = tmp_path / "benchmarks" / f"label_efficiency_{level}.png"
        assert f"(benchmarks/{picture.name})" in text
        assert picture.stat().st_size < 60_000
    cells = [
        f"{run['test']['mAP']:.3f}"
        for run in results["runs"]
        if (run["level"], run["mode"], run["rate"]) == ("plain", "full", 100) and run["pretext"] != "slice_height"
    ]
    assert f"| all weights | 8 (100 %) | {' | '.join(cells)} |" in text
    assert "Synthetic patients" in text
    assert report.headline(results) is None  # the smoke plan has no 25 %
    _check_told(results, text)


def _check_told(results: dict, text: str) -> None:
    pieces = sum(len(task.names) for task in tasks(results["plan"]))
    (revision,) = results["revisions"]
    assert results["revisions"] == {revision: pieces}
    assert f"`{revision}` ({pieces})" in text
    assert results["machine"]["threads"].startswith("1 in each worker")
    assert f"always the centre {results['position_baselines']['centre']:.2f}" in text
    assert "0.500 is what a constant scores with 2 slices" in text
    assert "at 0.6 nobody learnt" in text
    assert "passes the plan's rule" in text or "does not pass" in text


def _check_results(results: dict, folder: Path) -> None:
    _check_disjoint(results["plan"], folder / "data")
    table, plan = label_table(), results["plan"]
    assert results["smoke"]
    assert plan == SMOKE
    names = [name for task in tasks(plan) if task.kind == "fine_tune" for name in task.names]
    assert [run["name"] for run in results["runs"]] == names
    for run in results["runs"][:3]:
        classes = data.load_patients(folder / "data", run["level"], "test").classes
        values = np.load(folder / "runs" / f"{run['name']}.npz")["test"]
        assert run["test"] == figures.point_figures(table, classes, values.astype(np.float64))
    assert len(results["comparisons"]) == 3 * 6 + 1
    assert set(results["health"]) == {*plan["pretexts"], *plan["variants"]}


def test_the_headline_says_what_was_found() -> None:
    plan = load_plan()
    gains = {"frozen": (0.12, 0.13, -0.03), "full": (0.02, -0.05, 0.04)}
    comparisons = [
        {"level": "plain", "mode": mode, "rate": rate, "one": one, "two": "scratch"}
        | {"test_mAP": {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}}
        for mode, means in gains.items()
        for one, mean in zip(("v1", "v2", CONTROL), means, strict=True)
        for rate in (25, 100)
    ]
    runs = [
        {"level": "plain", "mode": mode, "rate": rate, "pretext": "scratch", "labels": labels, "seed": seed}
        | {"test": {"mAP": value}}
        for mode in gains
        for rate, labels in ((25, 60), (100, 240))
        for seed, value in enumerate((0.3, 0.4))
    ]
    results = {"plan": plan, "comparisons": comparisons, "runs": runs, "frequencies": {"plain": {"mAP": 0.3}}}
    results["machine"] = {"cpu": "a processor"}
    text = report.headline(results)
    assert text is not None
    for word in ("synthetic", "a processor", "3 seeds", "(conspicuity 1.0)", "chance 0.300"):
        assert word in text
    cells = "| 0.350 | +0.120 (+0.110 to +0.130) | +0.130 (+0.120 to +0.140) | -0.030 (-0.040 to -0.020) |"
    for labels in (60, 240):
        assert f"\n| frozen backbone, {labels} labels {cells}\n" in text
        assert f"\n| all weights, {labels} labels | 0.350 | +0.020 (+0.010 to +0.030) | -0.050 (" in text
    for comparison in comparisons:  # of one seed there is none
        comparison["test_mAP"] |= {"low": None, "high": None}
    text = report.headline(results)
    assert text is not None
    assert "| 0.350 | +0.120 | +0.130 | -0.030 |" in text
    assert report.headline({**results, "comparisons": comparisons[:-1]}) is None
    assert report.headline({**results, "runs": []}) is None
