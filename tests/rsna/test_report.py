# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The report as a file: what stands on it, what does not, and what happens when a part fails."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from torch.utils.tensorboard import SummaryWriter

from bundles.rsna_cnn_lstm.scripts import report_facts, report_sections
from bundles.rsna_cnn_lstm.scripts.calibration import Calibration, GroupCalibration
from bundles.rsna_cnn_lstm.scripts.labels import LabelTable
from bundles.rsna_cnn_lstm.scripts.report import ReportError, write_report
from bundles.rsna_cnn_lstm.scripts.results import Results, with_marked_interval
from tests.rsna.report_runs import LABELS_FILE, TABLE, Page, draw, volumes, write_run

UID = "1.2.840.113619.2.55.3.604688119.971.1762583153.102"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Run folder with a report of synthetic data: earlier runs beside it, a training's events, volumes."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "weaker", skill=0.5)
    write_run(root / "of others", seed=9)
    folder = write_run(root / "now")
    weights = root / "training" / "model.pt"
    with SummaryWriter(weights.parent / "tensorboard") as events:
        for epoch in range(1, 4):
            events.add_scalar("loss", 9.0 - epoch, epoch)
            for step in range(10 * epoch - 9, 10 * epoch + 1):
                events.add_scalar("train_loss", 9.5 - step / 10, step)
            events.add_scalar("negative_score", -0.9 + 0.1 * epoch, epoch)
    (root / "data").mkdir()
    (root / "data" / "README.txt").write_text("SYNTHETIC phantoms", encoding="utf-8")
    patients = pd.read_csv(folder / "predictions.csv")["patient_id"].tolist()
    path = write_report(folder, TABLE, dataset_dir=root / "data", dataset=volumes(patients), weights=weights)
    assert path == folder / "report.html"
    return folder, json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(made) -> Page:
    return Page(made[0] / "report.html")


def test_every_figure_of_the_metrics_is_in_a_table(page, made):
    _, metrics = made

    def shown(value: dict, positives: int = 5) -> str:
        text = f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
        return f"{text} *" if positives < 5 or value["resamples"] < 0.95 * 50 else text

    rows = {row[0]: row[1:] for row in page.tables["Score and terms"]}
    assert rows["score"] == [shown(metrics["score"]), f"{metrics['baseline']['score']:.3f}"]
    for name, value in metrics["score_terms"].items():
        assert rows[name.replace("_", " ")] == [shown(value), f"{metrics['baseline']['score_terms'][name]:.3f}"]
    areas = {row[0]: row[-1] for row in page.tables["AUC by group"][1:]}
    assert areas == {name.replace("_", " "): shown(value) for name, value in metrics["auc"].items()}
    precision = {row[0]: row[-1] for row in page.tables["Average precision by group"][1:]}
    assert precision["bowel"] == shown(metrics["average_precision"]["bowel_injury"])
    assert precision["any injury"] == shown(metrics["average_precision"]["any_injury"])
    classes = {row[0]: row[1:] for row in page.tables["Classes"][1:]}
    for name, value in metrics["classes"].items():
        row = classes[name.replace("_", " ")]
        assert row[:2] == [str(value["positives"]), str(value["called"])]
        assert row[2:5] == [shown(metrics[key][name], value["positives"]) for key in ("precision", "recall", "f1")]
    groups = {row[0]: row[1:] for row in page.tables["Injured or healthy"][1:]}
    assert list(groups) == ["bowel", "extravasation", "kidney", "liver", "spleen", "any injury"]
    for name, row in groups.items():
        assert row[2:5] == [shown(metrics[key][name.replace(" ", "_")], int(row[0]))
                            for key in ("precision", "recall", "f1")]  # fmt: skip
    assert classes["mean of the defined"][-1] == shown(metrics["mAP"])
    assert all(shown(metrics[name]).split(" [")[0] in page.text for name in ("score", "mAP"))


def test_confusion_counts_are_those_of_the_tables(page, made):
    solution = pd.read_csv(made[0] / "solution.csv")
    predictions = pd.read_csv(made[0] / "predictions.csv")
    counts = {tuple(row[:3]): int(row[3]) for row in page.tables["Counts"][1:]}
    for group in TABLE.groups:
        names = [item.name for item in group.classes]
        true = solution[list(group.columns)].to_numpy().argmax(axis=1)
        called = predictions[list(group.columns)].to_numpy().argmax(axis=1)
        for i, one in enumerate(names):
            for j, other in enumerate(names):
                assert counts[group.name, one, other] == int(((true == i) & (called == j)).sum())


def test_calibration_points_hold_every_patient(page):
    points = page.tables["Points of the curves"][1:]
    for name in (*TABLE.group_names, "any injury"):
        assert sum(int(row[1]) for row in points if row[0] == name) == 40


def test_runs_of_the_same_patients_stand_beside_this_one(page, made):
    rows = page.tables["Runs"]
    assert [row[0] for row in rows[1:]] == ["now (this run)", "weaker", "weighted class frequencies"]
    weaker = json.loads((made[0].parent / "weaker" / "metrics.json").read_text(encoding="utf-8"))
    assert rows[2][1].startswith(f"{weaker['score']['value']:.3f} [")
    assert "of other patients or labels: 1 (of others)" in page.text


def test_learning_curves_are_those_of_the_training_beside_the_weights(page):
    assert page.tables["Values by epoch"][1:] == [["1", "8.000", "0.800"], ["2", "7.000", "0.700"],
                                                  ["3", "6.000", "0.600"]]  # fmt: skip
    assert "Training run training" in page.text


def test_worst_patients_come_first_and_add_up(page, made):
    results = Results.from_folder(made[0], TABLE)
    parts = results.contributions()
    assert parts.sum() == pytest.approx(made[1]["score"]["value"])
    order = np.argsort(-parts.sum(axis=1))
    rows = page.tables["Largest contributions"][1:]
    assert [row[0] for row in rows] == [results.patients.ids[k] for k in order[:10]]
    assert [row[1] for row in rows] == [f"{parts[k].sum():.4f}" for k in order[:10]]
    shown = re.findall(r"Patient (p\d+)\n", page.text)
    assert shown == [row[0] for row in rows[:5]]


def test_figures_are_on_the_page_and_beside_it(page, made):
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    names = {path.stem for path in (made[0] / "report").iterdir()}
    assert len(pictures) == len(names) == 7 + 2 * 5
    assert {"score", "runs", "roc", "precision_recall", "confusion", "calibration", "learning"} < names
    assert all(re.match(r"data:image/(svg\+xml|png);base64,", source) for source in pictures)
    assert all((path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n") for path in (made[0] / "report").iterdir())
    texts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert all(texts)
    assert len(texts) == len(pictures)


def test_page_needs_nothing_from_elsewhere(page, made):
    addresses = [value for _, name, value in page.attributes if name in ("src", "href", "action", "srcset")]
    assert all(value.startswith(("data:", "#")) for value in addresses)
    targets = {value for _, name, value in page.attributes if name == "id"}
    assert all(value[1:] in targets for value in addresses if value.startswith("#"))
    text = (made[0] / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|javascript:|\son\w+=|@import|url\(", text)
    policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def test_head_of_the_page(page):
    assert "SYNTHETIC DATA" in page.text
    assert "Research software, not for diagnosis" in page.text
    for name, value in (("Date", "2026-01-02 03:04:05"), ("Patients", "40"), ("Series", "40")):
        assert re.search(rf"{name}\s*{value}", page.text)
    assert "monai 1.6.1" in page.text


def test_page_of_files_alone_with_names_that_must_not_be_shown(tmp_path):
    """No dataset, no weights, markup in a name, UIDs as patients, a group without labels and one without injury."""
    solution, predictions = draw(TABLE, 12, seed=1)
    for frame in (solution, predictions):
        frame["patient_id"] = [f"{UID}{number}" for number in range(12)]
    solution[[column for column in TABLE.columns if column.startswith("liver_")]] = np.nan
    solution[["bowel_healthy", "bowel_injury"]] = [1.0, 0.0]
    folder = write_run(tmp_path / "<b>&name", frames=(solution, predictions), n_resamples=10)
    path = write_report(folder, TABLE, dataset_dir=None)
    text, page = path.read_text(encoding="utf-8"), Page(path)
    assert UID not in text
    assert page.tables["Largest contributions"][1][0].startswith("uid-")
    assert "<b>" not in text
    assert "<b>&name" in page.text
    assert "SYNTHETIC" not in text
    areas = {row[0]: row[1:] for row in page.tables["AUC by group"][1:]}
    assert areas["bowel"] == ["0 of 12", "undefined"]
    assert areas["liver"] == ["0 of 0", "undefined"]
    assert "liver" not in {row[0] for row in page.tables["Counts"]}
    assert "There is no earlier evaluation" in page.text
    assert "no single training" in page.text


def test_single_group_without_any_injury_and_one_patient(tmp_path):
    table = LabelTable.from_file(LABELS_FILE, ["spleen"])
    page = Page(write_report(write_run(tmp_path / "one", table, patients=1), table, dataset_dir=tmp_path))
    assert [row[0] for row in page.tables["Score and terms"][1:]] == ["score", "spleen"]
    assert "AUC of spleen" in page.text
    assert "No TensorBoard" not in page.text


def test_parts_that_fail_leave_the_others(tmp_path, monkeypatch):
    def fails(_results: Results) -> None:
        raise OSError(f"no such series {UID}")

    monkeypatch.setattr(report_sections, "calibration", fails)
    folder = write_run(tmp_path / "run", patients=8, n_resamples=5)
    message = (
        r"lacks 'Calibration' \(OSError: no such series uid-\w+\), 'Worst-scored patients' \(ValueError: the dataset"
    )
    with pytest.raises(ReportError, match=message):
        write_report(folder, TABLE, dataset_dir=None, dataset=volumes(["someone else"]))
    page = Page(folder / "report.html")
    assert "This part could not be made. ValueError: the dataset holds no series of patient" in page.text
    assert {"Score and terms", "AUC by group", "Counts"} <= set(page.tables)


def test_folders_that_hold_no_results_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"needs predictions\.csv, solution\.csv, metrics\.json"):
        write_report(tmp_path, TABLE, dataset_dir=None)
    folder = write_run(tmp_path / "run", patients=8, n_resamples=0)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    (folder / "metrics.json").write_text(json.dumps({**metrics, "patients": 9}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.json is of 9 patients, the tables of 8"):
        write_report(folder, TABLE, dataset_dir=None)


def calibrated(folder: Path, weighting: str) -> None:
    """Leaves what an evaluation with a calibration leaves beside its figures."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    groups = {group.name: GroupCalibration((1.0,) * len(group.classes)) for group in TABLE.groups}
    content = Calibration(TABLE, "vector", "max", groups, weighting).to_dict()
    (folder / "calibration.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps({**metrics, "calibration": "vector"}), encoding="utf-8")


def test_head_says_what_was_evaluated_and_what_was_left_out(tmp_path):
    folder = write_run(tmp_path / "calibrated", patients=8, n_resamples=5)
    config = {"weights": ["$@x"], "part": "test", "fold": 2, "combine": "mean", "tta": ["x", "y"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    calibrated(folder, "none")
    lost = [("d/lost", "bad"), ("d/1", "bad"), (str(folder / "report.html"), "a part failed")]
    pd.DataFrame(lost, columns=["image", "reason"]).to_csv(folder / "failed.csv", index=False)
    head = dict(report_facts.facts(Results.from_folder(folder, TABLE)))
    expected = {"Part": "test", "Fold": "2", "Series to patient": "mean", "Flips": "x, y", "Calibration": "vector",
                "Left out": "2 series"}  # fmt: skip
    assert expected.items() <= head.items()
    assert "Weights" not in head  # an expression
    for weights, shown in (("/o/train/model.pt", "train/model.pt"), (["a/1.pt", "b/1.pt"], "ensemble of 2")):
        (folder / "config.json").write_text(json.dumps({"weights": weights}), encoding="utf-8")
        assert dict(report_facts.facts(Results.from_folder(folder, TABLE)))["Weights"] == shown
    dataset = volumes(["p000"])
    dataset.failed, dataset.lost_patients = [("d/lost", "bad")], 1
    head = dict(report_facts.facts(Results.from_folder(folder, TABLE), dataset))
    assert (head["Left out"], head["Patients without a readable series"]) == ("1 series", "1")
    page = Page(write_report(folder, TABLE, dataset_dir=None))
    assert page.tables["Runs"][1][0] == "calibrated (this run) (calibrated)"
    assert "ensemble of 2" in page.text
    series = pd.read_csv(folder / "series_predictions.csv").assign(fold=[0, 1] * 4)
    series.to_csv(folder / "series_predictions.csv", index=False)
    pooled = dict(report_facts.facts(Results.from_folder(folder, TABLE), failed=[]))
    assert pooled["Predictions"].startswith("pooled over 2 folds")
    assert not {"Weights", "Fold", "Left out"} & set(pooled)


def test_intervals_of_few_positives_are_marked(tmp_path):
    solution, predictions = draw(TABLE, 40, seed=0)
    injured = np.arange(40) < 2
    solution["bowel_injury"], solution["bowel_healthy"] = injured.astype(float), 1.0 - injured
    folder = write_run(tmp_path / "run", frames=(solution, predictions))
    page = Page(write_report(folder, TABLE, dataset_dir=None))
    rows = {row[0]: row[1:] for row in page.tables["Classes"][1:]}
    groups = {row[0]: row[1:] for row in page.tables["Injured or healthy"][1:]}
    areas = {row[0]: row[-1] for row in page.tables["AUC by group"][1:]}
    assert rows["bowel injury"][0] == groups["bowel"][0] == "2"
    assert all(cell.endswith("] *") for cell in [*rows["bowel injury"][3:], *groups["bowel"][3:], areas["bowel"]])
    assert not any(cell.endswith("*") for cell in [*groups["kidney"], areas["kidney"]])
    assert "few positives: the interval is unreliable" in page.text
    assert with_marked_interval({"value": 0.5, "low": 0.4, "high": 0.6, "resamples": 94}, 9, 100).endswith("] *")
    assert with_marked_interval({"value": 0.5, "low": 0.4, "high": 0.6, "resamples": 95}, 9, 100).endswith("0.600]")
    assert with_marked_interval({"value": None, "low": None, "high": None, "resamples": 0}, 0, 100) == "undefined"


@pytest.mark.parametrize(("weighting", "words"), [
    (None, "are uncalibrated"), ("none", "calibrated to mean what they say"),
    ("score", "calibrated for the weighted score"),
])  # fmt: skip
def test_calibration_says_what_the_probabilities_mean(weighting, words, tmp_path):
    folder = write_run(tmp_path / "run", patients=8, n_resamples=0)
    if weighting is not None:
        calibrated(folder, weighting)
    text = " ".join(report_sections.calibration(Results.from_folder(folder, TABLE)).text)
    assert words in text
    assert ("exceed the observed shares" in text) == (weighting != "none")
