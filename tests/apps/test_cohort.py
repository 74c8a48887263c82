# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What is trained on: folds that never move, labels with gaps, and what a request may change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apps.monailabel.lib.bundles import use_bundle

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "bundles" / "rsna_cnn_lstm"
use_bundle(BUNDLE)  # as the app does before it imports the modules below

from workflow.datalist import read_folds  # noqa: E402

from apps.monailabel.lib.cohort import deal_folds, labelled_entries, parts_of, unlabelled_entries  # noqa: E402
from apps.monailabel.lib.comparison import Score, decide, read_score  # noqa: E402
from apps.monailabel.lib.errors import Conflict, NotFound, Unusable, few, quoted  # noqa: E402
from apps.monailabel.lib.training_params import check_parameters, fixed_by_inference, open_parameters  # noqa: E402
from scripts.labels import LabelTable  # noqa: E402

TABLE = LabelTable.from_file(BUNDLE / "configs" / "labels.json")
HEALTHY = {group.name: "healthy" for group in TABLE.groups}
CONFIGS = {name: json.loads((ROOT / "bundles" / name / "configs" / "train.json").read_text())
           for name in ("rsna_cnn_lstm", "voco2d_pretrain")}  # fmt: skip
FIXED = {name: fixed_by_inference(ROOT / "bundles" / name) for name in CONFIGS}


def entry(patient: str, series: int = 0, **groups: str) -> dict[str, str]:
    return {"image": f"{patient}/{series}.nii.gz", "patient_id": patient, "series_id": f"{patient}/{series}", **groups}


def cohort(number: int, injured_each: int = 3) -> list[dict[str, str]]:
    """Patients with one or two series, each third of them injured."""
    return [
        entry(f"p{i:03d}", series, **{**HEALTHY, "liver": "high" if i % injured_each == 0 else "healthy"})
        for i in range(number)
        for series in range(1 + i % 2)
    ]


# folds
def test_a_patient_never_moves_as_labels_grow(tmp_path: Path) -> None:
    path, everyone = tmp_path / "out" / "folds.csv", cohort(60)
    known: dict[str, str] = {}
    for number in (9, 10, 14, 31, 90):
        entries = everyone[-number:]  # later patients first, so that the order is not that of the names
        folds = deal_folds(path, entries, TABLE, 5)
        assert {patient: folds[patient] for patient in known} == known
        assert folds == read_folds(path)
        known = folds
    sizes = [list(known.values()).count(str(fold)) for fold in range(5)]
    assert max(sizes) - min(sizes) <= 2
    injured = [sum(fold == str(n) and int(patient[1:]) % 3 == 0 for patient, fold in known.items()) for n in range(5)]
    assert max(injured) - min(injured) <= 2


def test_labels_that_come_one_by_one_are_spread(tmp_path: Path) -> None:
    everyone = cohort(30)
    for number in range(10, len(everyone) + 1):
        folds = deal_folds(tmp_path / "folds.csv", everyone[:number], TABLE, 5)
    sizes = [list(folds.values()).count(str(fold)) for fold in range(5)]
    assert max(sizes) - min(sizes) <= 2
    injured = {fold for patient, fold in folds.items() if int(patient[1:]) % 3 == 0}
    assert injured == set("01234")


def test_the_same_labels_give_the_same_folds(tmp_path: Path) -> None:
    folds = [deal_folds(tmp_path / name, cohort(20), TABLE, 5) for name in ("a.csv", "b.csv")]
    assert folds[0] == folds[1]


def test_a_corrected_or_removed_label_moves_nobody(tmp_path: Path) -> None:
    entries = cohort(12)
    folds = deal_folds(tmp_path / "folds.csv", entries, TABLE, 5)
    corrected = [{**item, "spleen": "high"} for item in entries[4:]]
    assert deal_folds(tmp_path / "folds.csv", corrected, TABLE, 5) == folds


def test_both_sides_get_patients(tmp_path: Path) -> None:
    for number in (5, 6, 11):
        entries = cohort(number)
        folds = deal_folds(tmp_path / f"{number}.csv", entries, TABLE, 5)
        training, held_out = parts_of(entries, folds, 0)
        assert training >= 1
        assert held_out >= 1
        assert training + held_out == number


def test_too_few_labels_say_how_many_are_needed(tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="final labels of at least 5 patients, found 4"):
        deal_folds(tmp_path / "folds.csv", cohort(4), TABLE, 5)
    with pytest.raises(Conflict, match="final labels of at least 5 patients, found 0"):
        deal_folds(tmp_path / "folds.csv", [], TABLE, 5)
    assert not (tmp_path / "folds.csv").exists()


def test_an_empty_side_is_said(tmp_path: Path) -> None:
    entries = cohort(10)
    folds = deal_folds(tmp_path / "folds.csv", entries, TABLE, 5)
    left = [item for item in entries if folds[item["patient_id"]] != "0"]
    with pytest.raises(Conflict, match=r"of 8 patients with final labels 0 are in the part that is held out"):
        parts_of(left, folds, 0)


def test_patients_marked_test_by_hand_are_on_neither_side(tmp_path: Path) -> None:
    entries = cohort(10)
    (tmp_path / "folds.csv").write_text("patient_id,fold\np000,test\np001,test\n")
    folds = deal_folds(tmp_path / "folds.csv", entries, TABLE, 5)
    assert (folds["p000"], folds["p001"]) == ("test", "test")
    assert sum(parts_of(entries, folds, 0)) == 8


def test_a_damaged_fold_file_is_said_and_left(tmp_path: Path) -> None:
    path = tmp_path / "folds.csv"
    path.write_text("patient_id,fold\np000,first\n")
    with pytest.raises(Conflict, match=r"folds_file folds.csv: expected a number or 'test'") as raised:
        deal_folds(path, cohort(10), TABLE, 5)
    assert str(tmp_path) not in str(raised.value)
    assert path.read_text().endswith("first\n")


def test_only_labels_of_the_trained_groups_count(tmp_path: Path) -> None:
    entries = [entry(f"p{i}", liver="low") for i in range(3)] + [entry(f"q{i}", spleen="low") for i in range(4)]
    with pytest.raises(Conflict, match="at least 5 patients, found 4"):
        deal_folds(tmp_path / "folds.csv", entries, TABLE.select(["spleen"]), 5)


# entries
def test_a_group_that_the_label_does_not_name_stays_unknown(tmp_path: Path) -> None:
    label = tmp_path / "label.json"
    label.write_text(json.dumps({"groups": {"liver": "low"}, "comment": "segment 7", "reader": "A. B."}))
    item = {
        "id": "a b/c",
        "image": str(tmp_path / "a b" / "c"),
        "label": str(label),
        "patient_id": " 7",
        "series_id": "",
    }
    [found] = labelled_entries([item], tmp_path)
    assert found == {"image": "a b/c", "patient_id": " 7", "series_id": "a b/c", "liver": "low"}


def test_an_image_elsewhere_keeps_its_path(tmp_path: Path) -> None:
    label = tmp_path / "label.json"
    label.write_text('{"groups": {"liver": "low"}}')
    item = {"id": "1.2.3", "image": "/cache/1.2.3", "label": str(label), "patient_id": "7", "series_id": "1.2.3"}
    assert labelled_entries([item], tmp_path)[0]["image"] == "/cache/1.2.3"


def test_a_label_that_went_is_left_out_and_a_damaged_one_is_said(tmp_path: Path) -> None:
    item = {"id": "a", "image": str(tmp_path / "a"), "label": str(tmp_path / "gone.json")}
    assert labelled_entries([item], tmp_path) == []
    (tmp_path / "gone.json").write_text("{")
    with pytest.raises(Conflict, match="final label of a cannot be read"):
        labelled_entries([item], tmp_path)


def test_all_images_are_pretrained_on(tmp_path: Path) -> None:
    class Store:
        def items(self) -> list[dict[str, str]]:
            return [{"id": name, "patient_id": name, "series_id": name} for name in ("a", "gone", "b")]

        def get_image_uri(self, image_id: str) -> str:
            if image_id == "gone":
                raise NotFound("gone")
            return str(tmp_path / image_id)

    assert [item["image"] for item in unlabelled_entries(Store(), tmp_path)] == ["a", "b"]


# parameters of a request
def test_numbers_switches_and_words_may_be_changed() -> None:
    given = {"max_epochs": 3, "learning_rate": 1e-3, "device": "cuda:1", "loss_weighting": False, "amp": None,
             "freeze_blocks": "all", "backbone_lr": 1e-5, "early_stopping": 4}  # fmt: skip
    assert check_parameters(given, CONFIGS["rsna_cnn_lstm"], FIXED["rsna_cnn_lstm"]) == given


def test_what_monai_label_adds_is_passed_over() -> None:
    request = {"model": "rsna_cnn_lstm", "gpus": "all", "local_rank": 0, "multi_gpu": True, "max_epochs": 1,
               "voco2d_pretrain": {"max_epochs": 2}}  # fmt: skip
    assert check_parameters(request, CONFIGS["rsna_cnn_lstm"], FIXED["rsna_cnn_lstm"]) == {"max_epochs": 1}


REFUSED = [
    ({"max_epoch": 3}, r"unknown parameter 'max_epoch': did you mean max_epochs"),
    ({"frobnicate": 3}, r"unknown parameter 'frobnicate': expected one of .*max_epochs"),
    ({"train#trainer#max_epochs": 3}, r"unknown parameter 'train#trainer#max_epochs'"),
    ({"_desc_": "x"}, r"unknown parameter '_desc_'"),
    ({"device": "$import os"}, r"device: expected a plain word"),
    ({"device": "@bundle_root"}, r"device: expected a plain word"),
    ({"device": "/dev/null"}, r"device: expected a plain word"),
    ({"device": "%train.json"}, r"device: expected a plain word"),
    ({"learning_rate": "$1e-3"}, r"learning_rate: expected a number"),
    ({"max_epochs": "3"}, r"max_epochs: expected a number"),
    ({"max_epochs": 1.5}, r"max_epochs: expected a whole number"),
    ({"max_epochs": True}, r"max_epochs: expected a whole number"),
    ({"max_epochs": [3]}, r"max_epochs: expected a whole number"),
    ({"max_epochs": {"_target_": "os.system"}}, r"max_epochs: expected a whole number"),
    ({"max_epochs": None}, r"max_epochs: expected a value"),
    ({"learning_rate": float("nan")}, r"learning_rate: expected a finite number"),
    ({"device": {"_target_": "os.system"}}, r"device: expected a value"),
    ({"loss_weighting": "yes"}, r"loss_weighting: expected"),
    ({"loss_weighting": 1}, r"loss_weighting: expected true or false"),
    ({"volume_size": [64, 64, 16]}, r"'volume_size' belongs to the network"),
    ({"backbone_name": "resnet18"}, r"'backbone_name' belongs to the network"),
    ({"hidden_size": 8}, r"'hidden_size' belongs to the network"),
    ({"run": ["$print(1)"]}, r"'run' is the server's"),
    ({"network_def": {"_target_": "os.system"}}, r"'network_def' is the server's"),
    ({"max_epoch": 3, "device": "$x"}, r"max_epoch.*; device"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "message"), REFUSED, ids=[str(request)[:40] for request, _ in REFUSED])
def test_what_a_request_may_not_say(request_: dict[str, object], message: str) -> None:
    with pytest.raises(Unusable, match=message):
        check_parameters(request_, CONFIGS["rsna_cnn_lstm"], FIXED["rsna_cnn_lstm"])


PLACES = ["bundle_root", "dataset_dir", "datalist", "folds_file", "fold", "output_root", "run_name", "cache_dir",
          "pretrained_path", "resume", "tracking_uri", "guard"]  # fmt: skip


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("value", ["models", "../elsewhere", "/etc/passwd", 0, None])
def test_no_request_sets_a_path(model: str, name: str, value: object) -> None:
    with pytest.raises(Unusable, match=f"'{name}' is the server's"):
        check_parameters({name: value}, CONFIGS[model], FIXED[model])


@pytest.mark.parametrize("model", CONFIGS)
def test_nothing_that_is_open_names_a_place(model: str) -> None:
    """A later setting of a bundle is open by itself only if its description speaks of no file or folder."""
    for name in open_parameters(CONFIGS[model], FIXED[model]):
        description = CONFIGS[model]["_desc_"][name]
        assert not any(word in f" {description} " for word in (" file", "folder", " path", ".csv", ".json")), name


# the comparison of two versions
def score(value: float, **more: object) -> Score:
    return Score(value, 4, **more)


@pytest.mark.parametrize(
    ("new", "current", "chosen", "why"),
    [
        (0.5, 0.6, True, "better: score 0.5000 on 4 patients held out (lower is better), version 0001 has 0.6000"),
        (0.6, 0.5, False, "not chosen: score 0.6000 on 4 patients held out (lower is better), version 0001 has 0.5000"),
        (0.5, 0.5, False, "no better than version 0001, which has the same"),
        (0.5, None, False, "version 0001 could not be scored"),
    ],
)
def test_the_lower_score_is_used(new: float, current: float | None, chosen: bool, why: str) -> None:
    found, reason = decide(score(new), None if current is None else score(current), "0001")
    assert found is chosen
    assert why in reason


def test_the_first_weights_are_used() -> None:
    found, reason = decide(score(9.0), None, None)
    assert found is True
    assert reason.startswith("the first weights: score 9.0000")


def test_what_a_score_does_not_cover_is_said() -> None:
    _, reason = decide(score(0.5, undefined=("any_injury",), absent=("liver_high",)), score(0.6), "shipped", "a note")
    assert "a note; not scored for want of labels: any_injury; nobody held out has liver_high" in reason


def test_a_score_is_read_from_the_evaluation(tmp_path: Path) -> None:
    terms = {"bowel": {"value": 0.7}, "any_injury": {"value": None}}
    counts = {"bowel_injury": (3, 1), "liver_low": (3, 0), "spleen_low": (0, 0)}
    classes = {name: {"labelled": labelled, "positives": found} for name, (labelled, found) in counts.items()}
    figures = {"score": {"value": 0.7}, "patients": 3, "score_terms": terms, "classes": classes}
    (tmp_path / "metrics.json").write_text(json.dumps(figures))
    assert read_score(tmp_path) == Score(0.7, 3, ("any_injury",), ("liver_low",))


def test_a_score_that_is_not_defined_is_said(tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="no patient that is held out has a label"):
        read_score(tmp_path)
    (tmp_path / "metrics.json").write_text('{"score": {"value": null}}')
    with pytest.raises(Conflict, match="not defined by the labels"):
        read_score(tmp_path)


def test_a_message_names_a_few_and_counts_the_others() -> None:
    assert few(["a", "b"], most=2) == "a, b"
    assert few(["a", "b", "c"], most=2) == "a, b and 1 more"
    assert few(["a" * 100], show=quoted) == "'" + "a" * 59
