# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Data list of RSNA's layout: what it reads and what it refuses."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from monai.data import list_data_collate

from bundles.rsna_cnn_lstm.scripts.datalist import datalist_solution, read_labels, rsna_datalist
from bundles.rsna_cnn_lstm.scripts.labels import LabelTable

LABELS_FILE = Path(__file__).parents[2] / "bundles/rsna_cnn_lstm/configs/labels.json"
TABLE = LabelTable.from_file(LABELS_FILE)
CLASSES = {"007": [0, 0, 0, 0, 0], "12": [1, 0, 2, 0, 1], "9": [0, 1, 0, 1, 0]}
SERIES = [("007", "70"), ("12", "100"), ("12", "20"), ("9", "5")]


@pytest.fixture
def tree(tmp_path) -> Path:
    """Three patients, four series, in a folder whose name has a space and an umlaut."""
    root = tmp_path / "RSNA trée"
    for patient, series in SERIES:
        folder = root / "train_images" / patient / series
        folder.mkdir(parents=True)
        (folder / "1.dcm").touch()
    _labels(CLASSES).to_csv(root / "train.csv", index=False)
    return root


def _labels(classes: dict[str, list[int]]) -> pd.DataFrame:
    frame = pd.DataFrame(TABLE.one_hot(np.array(list(classes.values()))).astype(int), columns=list(TABLE.columns))
    frame.insert(0, "patient_id", list(classes))
    return frame.assign(any_injury=[int(any(row)) for row in classes.values()])


def test_reads_the_tree(tree):
    items = rsna_datalist(tree, LABELS_FILE)
    assert [(item["patient_id"], item["series_id"]) for item in items] == SERIES
    assert items[1]["image"] == str(tree / "train_images" / "12" / "100")
    assert set(items[0]) == {"image", "patient_id", "series_id", "label"}
    for item in items:
        assert item["label"].dtype == np.int64
        assert item["label"].tolist() == CLASSES[item["patient_id"]]
    assert list_data_collate(items)["label"].shape == (4, 5)


def test_labels_of_series_are_their_own(tree):
    items = rsna_datalist(tree, TABLE)
    items[1]["label"][:] = 0
    assert items[2]["label"].tolist() == CLASSES["12"]


def test_series_table_is_read_where_present(tree):
    meta = [("007", "70", 210.5, 1), ("12", "100", 90, 0), ("12", "20", None, None)]
    frame = pd.DataFrame(meta, columns=["patient_id", "series_id", "aortic_hu", "incomplete_organ"])
    frame.to_csv(tree / "train_series_meta.csv", index=False)
    items = rsna_datalist(tree, LABELS_FILE)
    assert [item["incomplete_organ"] for item in items] == [1, 0, -1, -1]
    np.testing.assert_array_equal([item["aortic_hu"] for item in items], [210.5, 90, np.nan, np.nan])
    frame.loc[0, "series_id"] = "71"
    frame.to_csv(tree / "train_series_meta.csv", index=False)
    with pytest.raises(ValueError, match="1 series of the series table without images: 007/71"):
        rsna_datalist(tree, LABELS_FILE)


def test_test_split_needs_no_labels(tree):
    (tree / "train_images").rename(tree / "test_images")
    items = rsna_datalist(tree, LABELS_FILE, split="test")
    assert len(items) == 4
    assert "label" not in items[0]
    with pytest.raises(ValueError, match=r"nowhere.csv: no such file"):
        rsna_datalist(tree, LABELS_FILE, labels_csv=tree / "nowhere.csv", split="test")


def test_labels_elsewhere_and_missing_groups(tree, tmp_path):
    columns = [c for c in TABLE.columns if c.startswith("liver")]
    frame = _labels(CLASSES)[["patient_id", *columns]].astype(dict.fromkeys(columns, float))
    frame.loc[0, columns] = np.nan
    frame.to_csv(tmp_path / "own.csv", index=False)
    items = rsna_datalist(tree, LABELS_FILE, labels_csv=tmp_path / "own.csv")
    assert [item["label"].tolist() for item in items] == [[-1] * 5, *[[-1, -1, -1, 0, -1]] * 2, [-1, -1, -1, 1, -1]]


def test_one_error_names_every_problem(tree):
    (tree / "train_images/9/5/1.dcm").unlink()
    (tree / "train_images/55/1").mkdir(parents=True)
    (tree / "train_images/55/1/1.dcm").touch()
    with pytest.raises(ValueError, match="--strict False") as error:
        rsna_datalist(tree, LABELS_FILE)
    message = str(error.value)
    assert str(tree) in message
    assert "1 series folders without files: 9/5" in message
    assert "1 patients with a label but without images: 9" in message
    assert "1 patients with images but without a label: 55" in message


def test_not_strict_keeps_what_is_whole(tree, caplog):
    (tree / "train_images/9/5/1.dcm").unlink()
    with caplog.at_level(logging.WARNING):
        items = rsna_datalist(tree, LABELS_FILE, strict=False)
    assert [item["patient_id"] for item in items] == ["007", "12", "12"]
    assert "1 patients with a label but without images left out" in caplog.text


def test_counts_and_shortens_long_lists(tree):
    many = {**CLASSES, **{f"x{k}": [0] * 5 for k in range(40)}}
    _labels(many).to_csv(tree / "train.csv", index=False)
    with pytest.raises(ValueError, match=r"40 patients with a label but without images: x0, x1, x2, x3, x4, \.\.\."):
        rsna_datalist(tree, LABELS_FILE)


def test_hidden_folders_and_stray_files_are_no_patients(tree):
    (tree / "train_images/.cache/1").mkdir(parents=True)
    (tree / "train_images/readme.txt").touch()
    assert len(rsna_datalist(tree, LABELS_FILE)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: pd.concat([f, f[:1]]), r"train.csv: 1 patient_id in more than one row: 007"),
        (lambda f: f.assign(liver_low=1), r"train.csv: group 'liver': 2 of 3 rows .*must sum to 1.*: 007, 12;"),
        (lambda f: f.drop(columns="liver_low"), "'liver' lacks the columns liver_low"),
        (lambda f: f.rename(columns={"patient_id": "patient"}), "lacks the columns patient_id; it has patient, bowel"),
        (lambda f: f.assign(patient_id=["1", None, "3"]), "1 rows without patient_id, the first is row 3"),
        (lambda f: f[:0], "has no rows"),
        (lambda f: f[["patient_id"]], "none of the class columns"),
    ],
)
def test_refuses_labels(tree, change, message):
    change(_labels(CLASSES)).to_csv(tree / "train.csv", index=False)
    with pytest.raises(ValueError, match=message):
        rsna_datalist(tree, LABELS_FILE)


def test_refuses_folders_and_files(tree, tmp_path):
    with pytest.raises(ValueError, match=r"valid_images: no such folder; expected valid_images/<patient_id>"):
        rsna_datalist(tree, LABELS_FILE, split="valid")
    (tmp_path / "train_images").mkdir()
    with pytest.raises(ValueError, match="holds no series"):
        rsna_datalist(tmp_path, LABELS_FILE)
    (tree / "train.csv").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train.csv: not a readable CSV"):
        rsna_datalist(tree, LABELS_FILE)
    (tree / "train.csv").unlink()
    with pytest.raises(ValueError, match=r"train.csv: no such file"):
        rsna_datalist(tree, LABELS_FILE)
    _labels({"other": [0] * 5}).to_csv(tree / "train.csv", index=False)
    with pytest.raises(ValueError, match="no series of train_images has both"):
        rsna_datalist(tree, LABELS_FILE, strict=False)


def test_read_labels_keeps_ids_as_text(tree):
    assert list(read_labels(tree / "train.csv", TABLE)) == ["007", "12", "9"]


def test_solution_has_one_row_a_patient(tree):
    solution = datalist_solution(rsna_datalist(tree, LABELS_FILE), TABLE)
    expected = _labels(CLASSES)[["patient_id", *TABLE.columns]]
    pd.testing.assert_frame_equal(solution, expected, check_dtype=False)


def test_solution_of_differing_series_is_the_most_severe():
    items = [{"patient_id": 1, "label": [0, -1, 1, -1, 2]}, {"patient_id": 1, "label": [-1, -1, 2, 0, 1]}]
    assert TABLE.class_indices(datalist_solution(items, TABLE)).tolist() == [[0, -1, 2, 0, 2]]
    assert datalist_solution([], TABLE).empty
