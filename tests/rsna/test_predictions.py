# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Prediction handlers on MONAI's own evaluator."""

from __future__ import annotations

import json
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import pandas as pd
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from workflow.privacy import pseudonym

from bundles.rsna_cnn_lstm.scripts.calibration import Calibration, GroupCalibration
from bundles.rsna_cnn_lstm.scripts.datalist import datalist_solution
from bundles.rsna_cnn_lstm.scripts.labels import LabelTable
from bundles.rsna_cnn_lstm.scripts.predictions import PatientScore, PredictionWriter, SeriesPredictions
from bundles.rsna_cnn_lstm.scripts.score import combine_series, frequency_baseline, rsna_score
from bundles.rsna_cnn_lstm.scripts.submission import kaggle_submission

ROOT = Path(__file__).parents[2]
LABELS_FILE = ROOT / "bundles/rsna_cnn_lstm/configs/labels.json"
TABLE = LabelTable.from_file(LABELS_FILE)
COLUMNS = list(TABLE.columns)


def _items(labelled: bool = True, n: int = 9) -> list[dict]:
    """Series whose "image" is their logits: two series for every third patient, in an order that is not sorted."""
    rng = np.random.default_rng(0)
    items = []
    for number in range(n):
        item = {
            "image": rng.normal(size=11).astype(np.float32),
            "patient_id": f"{100 - number - (number % 3 == 1)}",
            "series_id": f"1.2.{number}",
        }
        if labelled:
            label = [rng.integers(len(group.classes)) for group in TABLE.groups]
            item["label"] = np.array(label) if number % 3 != 2 else items[-1]["label"]
        items.append(item)
    return items


def _evaluator(items: list[dict], handlers: list, batch_size: int = 4, **options: object) -> SupervisedEvaluator:
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(items), batch_size=batch_size),
        network=torch.nn.Identity(),
        val_handlers=handlers,
        **options,
    )


def _expected_series(items: list[dict]) -> pd.DataFrame:
    logits = torch.tensor(np.stack([item["image"] for item in items])).double()
    frame = pd.DataFrame(TABLE.probabilities(logits).numpy(), columns=COLUMNS)
    frame.insert(0, "series_id", [item["series_id"] for item in items])
    frame.insert(0, "patient_id", [item["patient_id"] for item in items])
    return frame.sort_values(["patient_id", "series_id"], ignore_index=True)


def test_inference_writes_predictions_of_every_series_and_patient(tmp_path):
    items = _items(labelled=False)
    _evaluator(items, [PredictionWriter(tmp_path / "out", LABELS_FILE)]).run()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "predictions.csv",
        "series",
        "series_predictions.csv",
        "submission.csv",
    ]
    series = pd.read_csv(tmp_path / "out/series_predictions.csv", dtype={"patient_id": str})
    pd.testing.assert_frame_equal(series.drop(columns="json_file"), _expected_series(items), check_dtype=False)
    patients = pd.read_csv(tmp_path / "out/predictions.csv", dtype={"patient_id": str})
    assert list(patients.columns) == ["patient_id", *COLUMNS]
    assert patients["patient_id"].nunique() == len(patients) == 6
    pd.testing.assert_frame_equal(patients, combine_series(_expected_series(items), TABLE), check_dtype=False)
    for part in TABLE.column_slices.values():
        np.testing.assert_allclose(patients[COLUMNS[part]].sum(axis=1), 1, atol=1e-12)


def test_json_of_each_series(tmp_path):
    items = _items()
    _evaluator(items, [PredictionWriter(tmp_path, LABELS_FILE, n_resamples=0)]).run()
    series = pd.read_csv(tmp_path / "series_predictions.csv", dtype=str)
    assert series["json_file"].tolist() == [f"series/{k:06d}.json" for k in range(1, 10)]
    labels = {item["series_id"]: item["label"] for item in items}
    for row in series.to_dict("records"):
        content = json.loads((tmp_path / row["json_file"]).read_text(encoding="utf-8"))
        assert (content["patient_id"], content["series_id"]) == (row["patient_id"], row["series_id"])
        healthy = []
        for group, index in zip(TABLE.groups, labels[row["series_id"]], strict=True):
            values = content["probabilities"][group.name]
            assert sum(values.values()) == pytest.approx(1)
            assert values == {c.name: float(row[f"{group.name}_{c.name}"]) for c in group.classes}
            assert content["truth"][group.name] == group.classes[index].name
            healthy.append(values["healthy"])
        assert content["any_injury"] == 1 - min(healthy)


def test_names_of_files_come_from_no_id(tmp_path):
    items = _items(labelled=False, n=2)
    items[0].update(patient_id="../../etc/Doe^John", series_id="a/b\\c")
    _evaluator(items, [PredictionWriter(tmp_path / "out", LABELS_FILE)]).run()
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        "out/predictions.csv",
        "out/series_predictions.csv",
        "out/series/000001.json",
        "out/series/000002.json",
        "out/submission.csv",
    }


@pytest.mark.parametrize("combine", ["max", "mean"])
def test_evaluation_writes_metrics(tmp_path, combine):
    items = _items()
    writer = PredictionWriter(tmp_path, LABELS_FILE, combine=combine, n_resamples=20, train_datalist=_items(n=4))
    _evaluator(items, [writer]).run()
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert metrics == writer.metrics
    solution = datalist_solution(items, TABLE)
    expected = rsna_score(solution, combine_series(_expected_series(items), TABLE, combine), TABLE)
    assert metrics["score"]["value"] == pytest.approx(expected["score"])
    train = datalist_solution(_items(n=4), TABLE)
    base = rsna_score(solution, frequency_baseline(train, solution["patient_id"], TABLE), TABLE)
    assert metrics["baseline"]["score"] == pytest.approx(base["score"])


# the header of Kaggle's sample_submission.csv
SAMPLE = (
    "patient_id,bowel_healthy,bowel_injury,extravasation_healthy,extravasation_injury,kidney_healthy,kidney_low,"
    "kidney_high,liver_healthy,liver_low,liver_high,spleen_healthy,spleen_low,spleen_high"
)


@pytest.mark.parametrize("labelled", [True, False])
def test_submission_is_kaggles(tmp_path, labelled):
    items = [{**item, "patient_id": f"{9 + number}"} for number, item in enumerate(_items(labelled))]
    _evaluator(items, [PredictionWriter(tmp_path, LABELS_FILE, n_resamples=0)]).run()
    lines = (tmp_path / "submission.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == SAMPLE
    assert [line.split(",")[0] for line in lines[1:]] == [str(9 + k) for k in range(9)]  # as numbers: 9 before 10
    submission = pd.read_csv(tmp_path / "submission.csv", index_col=0)
    predictions = pd.read_csv(tmp_path / "predictions.csv", index_col=0)
    pd.testing.assert_frame_equal(submission, predictions.sort_index(), check_exact=True)


def test_submission_of_another_table_of_labels():
    """RSNA's columns in another order are put right; other classes have no submission."""
    turned = LabelTable(TABLE.groups[::-1])
    rows = pd.DataFrame(np.arange(26).reshape(2, 13) + 1.0, columns=list(turned.columns))
    rows.insert(0, "patient_id", ["b10", "a9"])
    found = kaggle_submission(rows, turned)
    assert ",".join(found.columns) == SAMPLE
    assert found["patient_id"].tolist() == ["a9", "b10"]  # no numbers: as text
    assert found.loc[0, "spleen_healthy"] == 14
    assert kaggle_submission(rows, TABLE.select(["liver"])) is None


def test_series_that_fail_get_no_row(tmp_path, caplog):
    items = [{**item, "failed": "", "source": ""} for item in _items(labelled=False, n=3)]
    items[1].update(failed="no volume in it", source="/data/b", patient_id="7")
    writer = PredictionWriter(tmp_path, LABELS_FILE)
    _evaluator(items, [writer]).run()
    assert writer.failed == [("/data/b", "no volume in it")]
    for name in ("submission.csv", "predictions.csv"):
        ids = pd.read_csv(tmp_path / name, dtype=str)["patient_id"].tolist()
        assert sorted(ids) == sorted({items[0]["patient_id"], items[2]["patient_id"]})
    assert "no row for a patient none of whose series could be read" in caplog.text


def _calibration_file(path: Path, table: LabelTable = TABLE, combine: str = "max") -> Path:
    groups = {
        group.name: GroupCalibration((1.0, *[2.0] * (len(group.classes) - 1)), 1.5, "for the test")
        for group in table.groups
    }
    path.write_text(json.dumps(Calibration(table, "vector", combine, groups).to_dict()), encoding="utf-8")
    return path


def test_calibration_is_applied_to_series_and_recorded(tmp_path):
    items, file = _items(), _calibration_file(tmp_path / "calibration.json")
    out = tmp_path / "out"
    writer = PredictionWriter(out, LABELS_FILE, n_resamples=0, calibration=file)
    _evaluator(items, [writer]).run()
    expected = Calibration.from_file(file, TABLE).apply(_expected_series(items))
    series = pd.read_csv(out / "series_predictions.csv", dtype={"patient_id": str})
    pd.testing.assert_frame_equal(series.drop(columns="json_file"), expected, check_dtype=False)
    pd.testing.assert_frame_equal(writer.series, expected, check_dtype=False)  # what evidence and DICOM SR quote
    patients = pd.read_csv(out / "predictions.csv", dtype={"patient_id": str})
    pd.testing.assert_frame_equal(patients, combine_series(expected, TABLE), check_dtype=False)
    assert json.loads((out / "calibration.json").read_text()) == json.loads(file.read_text())
    assert json.loads((out / "metrics.json").read_text())["calibration"] == "vector"
    content = json.loads((out / "series/000001.json").read_text())
    assert content["calibration"] == "vector"
    assert content["probabilities"]["bowel"]["injury"] == pytest.approx(expected.loc[0, "bowel_injury"])


def test_calibration_of_something_else_is_refused(tmp_path):
    liver = _calibration_file(tmp_path / "liver.json", TABLE.select(["liver"]))
    with pytest.raises(ValueError, match=r"liver\.json: fitted for liver, the label table has bowel"):
        PredictionWriter(tmp_path, LABELS_FILE, calibration=liver)
    mean = _calibration_file(tmp_path / "mean.json", combine="mean")
    with pytest.raises(ValueError, match=r"mean\.json: fitted for combine 'mean', this run has 'max'"):
        PredictionWriter(tmp_path, LABELS_FILE, calibration=mean)


def test_anonymised_results_are_the_same_under_pseudonyms(tmp_path):
    items = _items()
    for name, anonymise in (("plain", False), ("hidden", True)):
        writer = PredictionWriter(tmp_path / name, LABELS_FILE, n_resamples=20, anonymise=anonymise)
        _evaluator(items, [writer]).run()
    text = "".join(p.read_text() for p in (tmp_path / "hidden").rglob("*") if p.is_file())
    assert not [item["series_id"] for item in items if item["series_id"] in text]
    for name in ("predictions.csv", "series_predictions.csv", "solution.csv"):
        plain, hidden = (
            pd.read_csv(tmp_path / folder / name, dtype={"patient_id": str}) for folder in ("plain", "hidden")
        )
        keys = [key for key in ("patient_id", "series_id") if key in plain]
        for key in keys:
            plain[key] = plain[key].map(pseudonym)
        plain = plain.sort_values(keys, ignore_index=True)
        pd.testing.assert_frame_equal(
            hidden.drop(columns="json_file", errors="ignore"), plain.drop(columns="json_file", errors="ignore")
        )
    figures = [json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("plain", "hidden")]
    assert figures[0]["score"]["value"] == pytest.approx(figures[1]["score"]["value"])
    of_series = pd.read_csv(tmp_path / "hidden/series_predictions.csv", dtype=str).set_index("json_file")
    # files of other handlers are numbered by it
    assert [pseudonym(name) for name in writer.series["series_id"]] == of_series["series_id"].tolist()
    labels = {pseudonym(item["series_id"]): item["label"] for item in items}
    for file, row in of_series.iterrows():
        content = json.loads((tmp_path / "hidden" / file).read_text())
        assert (content["patient_id"], content["series_id"]) == (row["patient_id"], row["series_id"])
        truth = [group.classes[k].name for group, k in zip(TABLE.groups, labels[row["series_id"]], strict=True)]
        assert list(content["truth"].values()) == truth
    assert not (tmp_path / "hidden" / "submission.csv").exists()


def test_second_run_starts_afresh(tmp_path):
    writer = PredictionWriter(tmp_path, LABELS_FILE)
    evaluator = _evaluator(_items(labelled=False), [writer])
    evaluator.run()
    first = (tmp_path / "predictions.csv").read_bytes()
    evaluator.run()
    assert (tmp_path / "predictions.csv").read_bytes() == first


def test_batches_that_are_not_decollated(tmp_path):
    for decollate in (True, False):
        writer = PredictionWriter(tmp_path / str(decollate), LABELS_FILE, n_resamples=0)
        _evaluator(_items(), [writer], decollate=decollate).run()
    files = [(tmp_path / name / "series_predictions.csv").read_bytes() for name in ("True", "False")]
    assert files[0] == files[1]


def test_killed_write_leaves_the_old_file(tmp_path, monkeypatch):
    writer = PredictionWriter(tmp_path, LABELS_FILE)
    (tmp_path / "predictions.csv").write_text("old", encoding="utf-8")

    def full_disk(*_args: object, **_options: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    evaluator = _evaluator(_items(labelled=False), [writer])
    evaluator.logger.disabled = True
    with pytest.raises(OSError, match="no space left"):
        evaluator.run()
    assert (tmp_path / "predictions.csv").read_text(encoding="utf-8") == "old"
    assert not list(tmp_path.rglob("*.tmp"))


def _fails(handlers: list, items: list[dict], message: str) -> None:
    evaluator = _evaluator(items, handlers)
    evaluator.logger.disabled = True
    with pytest.raises(ValueError, match=message):
        evaluator.run()


def test_refuses(tmp_path):
    without_id = [{key: value for key, value in item.items() if key != "series_id"} for item in _items()]
    _fails([PredictionWriter(tmp_path, LABELS_FILE)], without_id, "lacks series_id; the data list must give patient_id")
    _fails([PredictionWriter(tmp_path, LABELS_FILE)], _items() * 2, "9 series were predicted more than once")
    short = [{**item, "image": item["image"][:7]} for item in _items()]
    _fails([PredictionWriter(tmp_path, LABELS_FILE)], short, r"expected \(11, 5\) logits and labels .*got \(7, 5\)")
    broken = [{**item, "image": item["image"] * np.nan} for item in _items()]
    _fails([PredictionWriter(tmp_path, LABELS_FILE)], broken, "NaN")
    _fails([PredictionWriter(tmp_path, LABELS_FILE, save_rank=1)], _items(), "save_rank 1 does not exist")
    with pytest.raises(ValueError, match="combine must be"):
        PredictionWriter(tmp_path, LABELS_FILE, combine="median")
    with pytest.raises(ValueError, match="data list is empty"):
        SeriesPredictions(LABELS_FILE).gather()
    assert not list(tmp_path.iterdir())


def test_patient_score_as_key_metric():
    items = _items()
    options = {"key_val_metric": {"val_score": PatientScore(LABELS_FILE, negate=True)}}
    options["additional_metrics"] = {"val_liver": PatientScore(LABELS_FILE, term="liver")}
    evaluator = _evaluator(items, [], **options)
    evaluator.run()
    solution = datalist_solution(items, TABLE)
    expected = rsna_score(solution, combine_series(_expected_series(items), TABLE), TABLE)
    assert evaluator.state.metrics["val_score"] == pytest.approx(-expected["score"])
    assert evaluator.state.best_metric == evaluator.state.metrics["val_score"]
    assert evaluator.state.metrics["val_liver"] == pytest.approx(expected["liver"])
    evaluator.run()  # the epoch starts afresh
    assert evaluator.state.metrics["val_score"] == pytest.approx(-expected["score"])


def test_patient_score_that_is_not_defined():
    items = [{**item, "label": np.array([0, 0, 0, -1, 0])} for item in _items()]
    evaluator = _evaluator(items, [], key_val_metric={"val": PatientScore(LABELS_FILE, term="liver")})
    evaluator.logger.disabled = True
    with pytest.raises(ValueError, match="'liver' is not defined"):
        evaluator.run()


def _one_process(rank: int, output_dir: str) -> None:
    """Nine series over two processes; then one of them in both, which is an error as in one process."""
    items = _items()
    _evaluator(items[rank::2], [PredictionWriter(output_dir, LABELS_FILE, n_resamples=10)], batch_size=2).run()
    _fails([PredictionWriter(output_dir, LABELS_FILE)], items[:1], "1 series were predicted more than once")


def test_two_processes_equal_one(tmp_path):
    _evaluator(_items(), [PredictionWriter(tmp_path / "one", LABELS_FILE, n_resamples=10)]).run()
    idist.spawn("gloo", _one_process, (str(tmp_path / "two"),), nproc_per_node=2)
    for name in ("predictions.csv", "series_predictions.csv", "solution.csv", "metrics.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
