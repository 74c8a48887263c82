# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The classes of own data."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workflow.datalist import DatalistError

from bundles.rsna_cnn_lstm.scripts.cohort import labelled_series, read_cohort
from bundles.rsna_cnn_lstm.scripts.labels import LabelTable
from bundles.rsna_cnn_lstm.scripts.own_data import row_labels

TABLE = LabelTable.from_dict(
    {
        "groups": [
            {"name": "bowel", "classes": [{"name": "healthy"}, {"name": "injury"}]},
            {"name": "liver", "classes": [{"name": "healthy"}, {"name": "low"}, {"name": "high"}]},
        ]
    }
)


def own(folder: Path, *lines: str) -> str:
    for name in "abcdef":
        (folder / f"{name}.nii.gz").touch()
    (folder / "own.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / "own.csv")


def labels(items: list[dict]) -> list[list[int]]:
    return [item["label"].tolist() for item in items]


@given(classes=st.lists(st.tuples(st.integers(-1, 1), st.integers(-1, 2)), min_size=1, max_size=8))
@settings(deadline=None)
def test_names_and_flags_say_the_same(classes):
    """A row as names, as 0/1 columns and as one of each; -1 is a blank."""
    names = [[c.name for c in group.classes] for group in TABLE.groups]
    for label in classes:
        by_name = {g.name: "" if i < 0 else n[i] for g, n, i in zip(TABLE.groups, names, label, strict=True)}
        by_flag = {
            column: "" if i < 0 else str(int(k == i))
            for g, i in zip(TABLE.groups, label, strict=True)
            for k, column in enumerate(g.columns)
        }
        mixed = {"bowel": by_name["bowel"], **{k: v for k, v in by_flag.items() if k.startswith("liver")}}
        for row in (by_name, by_flag, mixed):
            parse = row_labels(TABLE, list(row), skip_unlabelled=True)
            found = parse(row)
            assert (found is None) == (max(label) < 0)
            if found is not None:
                assert found["label"].tolist() == list(label)
                assert found["label"].dtype == np.int64


@pytest.mark.parametrize(
    ("header", "column", "meant"),
    [("liver,Bowel", "Bowel", "bowel"), ("bowel,livers", "livers", "liver"), ("Liver", "Liver", "liver"),
     ("bowel,Liver_healthy", "Liver_healthy", "liver_healthy")],
)  # fmt: skip
def test_misspelt_columns_are_refused(tmp_path, header, column, meant):
    file = own(tmp_path, f"image,{header}", ",".join(["a.nii.gz", "healthy", "healthy"][: header.count(",") + 2]))
    with pytest.raises(DatalistError, match=f"own.csv: column '{column}' is not read: is '{meant}' meant"):
        read_cohort(None, TABLE, file)


def test_columns_that_are_not_read_are_told_once(tmp_path, caplog):
    file = own(tmp_path, "image,liver,age,Bowels of the ship", "a.nii.gz,low,40,", "b.nii.gz,healthy,50,")
    with caplog.at_level(logging.INFO):
        read_cohort(None, TABLE, file)
    said = [record.getMessage() for record in caplog.records if "not read" in record.getMessage()]
    assert said == ["groups with labels: liver; columns that are not read: age, Bowels of the ship"]


def test_what_else_is_known_of_a_series(tmp_path):
    lines = ["image,mask,liver,aortic_hu,incomplete_organ", "a.nii.gz,b.nii.gz,low,210.5,1", "c.nii.gz,,low,,"]
    file = own(tmp_path, *lines)
    first, second = read_cohort(None, TABLE, file, crop="organs")
    assert (first["mask"], second["mask"]) == (str(tmp_path / "b.nii.gz"), "")
    assert (first["aortic_hu"], first["incomplete_organ"]) == (210.5, 1)
    assert np.isnan(second["aortic_hu"])
    assert second["incomplete_organ"] == -1
    folder = tmp_path / "two"
    for name in "xy":
        (folder / name).mkdir(parents=True)
        (folder / name / "1.dcm").touch()
    file = own(tmp_path, *lines, "d.nii.gz,gone.nii,low,high,2", "two,b.nii.gz,low,1,0.0")
    with pytest.raises(DatalistError) as caught:
        read_cohort(None, TABLE, file)
    listed = [line.split(": ", 1)[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert listed == ["row 4, column aortic_hu", "row 4, column mask", "row 5, column mask"]
    file = own(tmp_path, *lines, "d.nii.gz,,low,,2")
    with pytest.raises(DatalistError, match="row 4, column incomplete_organ: '2', expected 0, 1 or a blank"):
        read_cohort(None, TABLE, file)


def test_missing_groups_are_masked(tmp_path):
    file = own(tmp_path, "image,liver,age", "a.nii.gz,low,40", "b.nii.gz,healthy,50")
    assert labels(read_cohort(None, TABLE, file)) == [[-1, 1], [-1, 0]]
    file = own(tmp_path, "image,liver,bowel_healthy,bowel_injury", "a.nii.gz,low,,", "b.nii.gz,,0.0,1.0")
    items = read_cohort(None, TABLE, file)
    assert labels(items) == [[-1, 1], [1, -1]]
    assert set(items[0]) == {"image", "patient_id", "series_id", "label", "aortic_hu", "incomplete_organ"}


def test_every_bad_row_is_reported_with_row_column_and_value(tmp_path):
    file = own(
        tmp_path,
        "image,liver,bowel_healthy,bowel_injury",
        "a.nii.gz,low,1,0",
        "b.nii.gz,Low,1,0",
        "c.nii.gz,low,1,1",
        "nowhere.nii.gz,severe,yes,0",
        "d.nii.gz,,,",
        "e.nii.gz,,1,",
    )
    with pytest.raises(DatalistError) as caught:
        read_cohort(None, TABLE, file)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("5 of 6 rows are not usable:")
    assert [line.strip() for line in lines[1:4]] == [
        "row 3, column liver: 'Low', expected healthy, low, high or a blank",
        "row 4, column bowel_healthy bowel_injury: '1 1', expected one 1 and else 0",
        "row 5, column bowel_healthy: 'yes', expected 0 or 1 (or a blank in all columns of the group)",
    ]
    assert [line.split(", expected")[0].strip() for line in lines[4:]] == [
        "row 5, column liver: 'severe'",
        "row 5, column image: 'nowhere.nii.gz'",
        "row 6, column bowel, liver: ''",
        "row 7, column bowel_injury: ''",
    ]
    assert "--skip_unlabelled True" in str(caught.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("image,age", r"own.csv: no column holds a class of the label table \(such as bowel, bowel_healthy"),
        ("image,liver_healthy,liver_low", r"group 'liver' lacks the columns liver_high"),
        ("image,liver,liver_low", r"group 'liver' has a column of its own and columns of its classes"),
    ],
)
def test_columns_that_do_not_fit_are_named(tmp_path, header, message):
    with pytest.raises(DatalistError, match=message):
        read_cohort(None, TABLE, own(tmp_path, header, ",".join(["a.nii.gz", "1", "0"][: header.count(",") + 1])))


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_rows_without_a_label_are_left_out_when_asked(tmp_path, kind):
    file = own(tmp_path, "image,liver", "a.nii.gz,low", "b.nii.gz,")
    if kind == "json":
        file = str(tmp_path / "own.json")
        entries = [{"image": "a.nii.gz", "liver": "low"}, {"image": "b.nii.gz", "liver": None}]
        Path(file).write_text(json.dumps({"training": entries}))
    with pytest.raises(DatalistError, match=r"a class of one group at least \(--skip_unlabelled True"):
        read_cohort(str(tmp_path), TABLE, file)
    assert labels(read_cohort(str(tmp_path), TABLE, file, skip_unlabelled=True)) == [[-1, 1]]


def test_a_csv_is_divided_by_patient(tmp_path):
    rows = [f"{name}.nii.gz,{k // 2},low" for k, name in enumerate("abcdef")]
    file = own(tmp_path, "image,patient_id,liver", *rows)
    options = {"num_folds": 3, "seed": 1}
    training = labelled_series(None, TABLE, file, part="training", **options)
    validation = labelled_series(None, TABLE, file, part="validation", **options)
    assert (len(training), len(validation)) == (4, 2)
    assert not {i["patient_id"] for i in training} & {i["patient_id"] for i in validation}
    only = TABLE.select(["liver"])
    assert labels(labelled_series(None, only, file, strata=TABLE, **options)) == [[1]] * 4
