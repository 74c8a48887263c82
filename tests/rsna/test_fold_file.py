# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""One fold file for both bundles: nobody is on two sides."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workflow.datalist import DatalistError, unlabelled_datalist
from workflow.folds import make_folds

from bundles.rsna_cnn_lstm.scripts.cohort import labelled_series
from bundles.rsna_cnn_lstm.scripts.fold_file import FoldFile, class_counts
from bundles.rsna_cnn_lstm.scripts.labels import LabelTable

ROOT = Path(__file__).resolve().parents[2]
TABLE = LabelTable.from_file(ROOT / "bundles/rsna_cnn_lstm/configs/labels.json")


def write_tree(top: Path, series: list[int], seed: int) -> None:
    """RSNA's layout with so many series of each patient, and the same cohort as own.csv."""
    rng = np.random.default_rng(seed)
    classes = np.stack([rng.integers(0, len(group.classes), len(series)) for group in TABLE.groups], axis=1)
    frame = pd.DataFrame(TABLE.one_hot(classes).astype(int), columns=list(TABLE.columns))
    frame.insert(0, "patient_id", [f"{i:03d}" for i in range(len(series))])
    frame.to_csv(top / "train.csv", index=False)
    for patient, count in zip(frame["patient_id"], series, strict=True):
        for number in range(count):
            file = top / "train_images" / patient / f"{patient}{number}" / "1.dcm"
            file.parent.mkdir(parents=True)
            file.touch()
    frame.insert(0, "image", "train_images/" + frame["patient_id"])
    frame.to_csv(top / "own.csv", index=False)


@given(
    series=st.lists(st.integers(1, 3), min_size=8, max_size=16),
    seed=st.integers(0, 1000),
    num_folds=st.integers(2, 4),
    test_fraction=st.sampled_from([0.0, 0.3]),
    source=st.sampled_from(["tree", "csv"]),
)
@settings(deadline=None, max_examples=12)
def test_no_patient_is_on_two_sides_in_either_bundle(series, seed, num_folds, test_fraction, source):
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        write_tree(top, series, seed)
        datalist = str(top / "own.csv") if source == "csv" else None
        path = top / "folds.csv"
        FoldFile(path, folder, TABLE, datalist, num_folds=num_folds, seed=seed, test_fraction=test_fraction).run()
        everyone = {f"{i:03d}" for i in range(len(series))}
        validated: list[str] = []
        for fold in range(num_folds):
            options = {"folds_file": str(path), "fold": fold}
            sides = {"training": set(), "validation": set(), "test": set()}
            for part in sides if test_fraction else ("training", "validation"):
                classifier = labelled_series(folder, TABLE, datalist, part=part, **options)
                pretraining = unlabelled_datalist(folder, datalist, part=part, exclude=["*.csv"], **options)
                assert {i["image"] for i in classifier} == {i["image"] for i in pretraining}
                sides[part] = {i["patient_id"] for i in classifier}
                assert sides[part] == {i["patient_id"] for i in pretraining}
                assert len(classifier) == sum(series[int(patient)] for patient in sides[part])
            assert sum(map(len, sides.values())) == len(set().union(*sides.values()))
            assert set().union(*sides.values()) == everyone
            validated += sorted(sides["validation"])
        assert sorted(validated) == sorted(everyone - sides["test"])


def test_the_log_shows_the_classes_of_each_fold(tmp_path, caplog):
    write_tree(tmp_path, [1, 2] * 10, seed=0)
    caplog.set_level("INFO")
    file = FoldFile(tmp_path / "new" / "folds.csv", str(tmp_path), TABLE, num_folds=4, test_fraction=0.2)
    file.run()
    lines = [line.split() for line in caplog.text.splitlines()]
    rows = {words[0]: words[1:] for words in lines if len(words) == 6}
    assert rows["fold"] == ["0", "1", "2", "3", "test"]
    assert rows["patients"] == ["4"] * 5
    assert sum(map(int, rows["series"])) == 30
    truth = pd.read_csv(tmp_path / "train.csv")
    assert all(sum(map(int, rows[column])) == truth[column].sum() for column in TABLE.columns)
    with pytest.raises(DatalistError, match="exists already"):
        file.run()


def test_counts_are_those_of_the_labels():
    labels = [[0, 0, 0, 0, 0], [1, 0, 0, 2, -1], [0, -1, 0, 2, 0], [0, 0, 0, 0, 0]]
    items = [
        {"patient_id": str(i), "label": np.asarray(label)} for i, label in enumerate(labels) for _ in range(1 + i % 2)
    ]
    folds = pd.DataFrame({"patient_id": list("0123"), "fold": [0, 0, 1, 1]})
    counts = class_counts(items, folds, TABLE)
    assert counts.loc["patients"].tolist() == [2, 2]
    assert counts.loc["series"].tolist() == [3, 3]
    assert counts.loc["injured"].tolist() == [1, 1]
    assert counts.loc["bowel_injury"].tolist() == [1, 0]
    assert counts.loc["liver_high"].tolist() == [1, 1]
    assert counts.loc["spleen_healthy"].tolist() == [1, 2]
    assert counts.loc["extravasation_healthy"].tolist() == [2, 1]


def test_a_datalist_with_parts_of_its_own_is_refused(tmp_path):
    (tmp_path / "list.json").write_text('{"training": [], "validation": []}')
    with pytest.raises(DatalistError, match="has its own parts"):
        FoldFile(tmp_path / "folds.csv", None, TABLE, str(tmp_path / "list.json")).run()
    assert not (tmp_path / "folds.csv").exists()


def test_a_fold_file_of_other_patients_is_refused(tmp_path):
    write_tree(tmp_path, [1] * 6, seed=0)
    others = [{"patient_id": f"x{i}", "label": np.zeros(5, dtype=int)} for i in range(6)]
    make_folds(others, 2).to_csv(tmp_path / "folds.csv", index=False)
    options = {"folds_file": str(tmp_path / "folds.csv"), "fold": 0}
    message = r"names none of the patients of these 6 series: expected ids such as \['x0', 'x1', 'x2'\], found \["
    with pytest.raises(DatalistError, match=message):
        unlabelled_datalist(str(tmp_path), part="training", **options)
    (tmp_path / "folds.csv").write_text("patient_id,fold\n001,first\n")
    with pytest.raises(DatalistError, match=r"expected a number or 'test' as fold, found \['first'\]"):
        unlabelled_datalist(str(tmp_path), part="training", **options)
