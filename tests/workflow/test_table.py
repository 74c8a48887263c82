# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Own data as a CSV: which rows are read as what, and all that is wrong in one message."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from workflow.datalist import DatalistError, has_own_parts, load_datalist, unlabelled_datalist
from workflow.table import CellError


@pytest.fixture
def data(tmp_path) -> Path:
    """A NIfTI file, one DICOM series, a patient's folder with two, and an RSNA series."""
    for name in ("a.nii.gz", "b/1.dcm", "c/first/1.dcm", "c/second/1.dcm", "train_images/12/100/1.dcm", "empty/x.txt"):
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path / "data"


def table(folder: Path, *lines: str) -> str:
    (folder / "own.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / "own.csv")


def short(items: list[dict], top: Path) -> list[tuple[str, str, str]]:
    return [(str(Path(i["image"]).relative_to(top)), i["patient_id"], i["series_id"]) for i in items]


def test_a_row_is_a_file_a_series_or_all_series_of_a_patient(data, tmp_path):
    file = table(tmp_path, "image,patient_id,series_id", "a.nii.gz,7,s", "b,7,", "c,,", "train_images/12/100,,")
    items = load_datalist(file, data, "training")
    assert short(items, data) == [
        ("a.nii.gz", "7", "s"),
        ("b", "7", "b"),
        ("c/first", "c", "c/first"),
        ("c/second", "c", "c/second"),  # of one patient
        ("train_images/12/100", "12", "100"),  # the folders of an RSNA tree name both
    ]
    assert set(items[0]) == {"image", "patient_id", "series_id"}


def test_paths_are_below_dataset_dir_or_beside_the_file(data, tmp_path):
    assert short(load_datalist(table(data, "image", "a.nii.gz"), None, "training"), data) == [("a.nii.gz",) * 3]
    assert short(load_datalist(table(data, "image", "a.nii.gz"), tmp_path / "x", "training"), data)
    assert short(load_datalist(table(tmp_path, "image", "a.nii.gz"), data, "training"), data)
    assert short(load_datalist(table(tmp_path, "image", str(data / "b")), None, "training"), data)


def test_text_is_as_spreadsheets_write_it(data):
    (data / "own.CSV").write_bytes("\ufeffimage , patient_id\r\n a.nii.gz , 007 \r\nb\r\n".encode())
    assert short(load_datalist(data / "own.CSV", None, "training"), data) == [
        ("a.nii.gz", "007", "a.nii.gz"),
        ("b", "b", "b"),
    ]


def test_every_bad_row_is_reported_together(data):
    file = table(data, "image,series_id", "a.nii.gz,", "nowhere,", "empty,", "c,5", ",", "./a.nii.gz,", "b,a.nii.gz")
    with pytest.raises(DatalistError) as caught:
        load_datalist(file, None, "training")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"datalist {file}: 5 of 7 rows are not usable:"
    assert [line.split(", expected")[0] for line in lines[1:]] == [
        "  row 3, column image: 'nowhere'",
        "  row 4, column image: 'empty'",
        "  row 5, column series_id: '5'",
        "  row 6, column image: ''",
        "  row 7, column image: './a.nii.gz'",
    ]
    assert "the folder holds 2 series" in lines[3]
    assert "what row 2 does not have" in lines[5]


def test_a_patient_has_a_series_once(data):
    file = table(data, "image,patient_id,series_id", "a.nii.gz,7,1", "b,7,1", "c/first,8,1")
    with pytest.raises(
        DatalistError, match="1 of 3 rows are not usable:\n  row 3, column series_id: '1', expected what"
    ):
        load_datalist(file, None, "training")


def test_bad_cells_of_the_labels_are_listed_with_the_others_up_to_a_limit(data):
    def labels(columns):
        assert columns == ["age"]

        def parse(row):
            if not row["age"].isdigit():
                raise CellError(("age", row["age"], "a number"))
            return {"age": int(row["age"])} if row["age"] != "0" else None

        return parse

    file = table(data, "image,age", "a.nii.gz,old", "nowhere,x", "b,5")
    with pytest.raises(DatalistError) as caught:
        load_datalist(file, None, "training", labels)
    assert "2 of 3 rows" in str(caught.value)
    assert [line[:20] for line in str(caught.value).splitlines()[1:]] == [
        "  row 2, column age:", "  row 3, column age:", "  row 3, column imag"]  # fmt: skip
    with pytest.raises(DatalistError, match=r"120 of 120 rows(.|\n)*and 20 more"):
        load_datalist(table(data, "image,age", *[f"{i}.nii,1" for i in range(120)]), None, "training", labels)
    items = load_datalist(table(data, "image,age", "a.nii.gz,0", "b,5"), None, "training", labels)
    assert [(Path(item["image"]).name, item["age"]) for item in items] == [("b", 5)]
    with pytest.raises(DatalistError, match="no row is left to use"):
        load_datalist(table(data, "image,age", "a.nii.gz,0"), None, "training", labels)


def test_what_is_no_table_of_images_is_named(data, tmp_path):
    for content, message in (
        (b"", "not readable as CSV"),
        (b"\xff\xfe\x00", "not readable as CSV"),
        (b"image\n", "found 0 rows"),
        (b"image\na.nii.gz,7\n", "not readable as CSV"),
        (b"image\na.nii.gz\nb,7\n", "not readable as CSV"),
        (
            b"image;patient_id\na.nii.gz;7\n",
            r"expected rows with a column 'image', found 1 rows of \['image;patient_id'\]",
        ),
        (b"path\na.nii.gz\n", "expected rows with a column 'image'"),
    ):
        (data / "own.csv").write_bytes(content)
        with pytest.raises(DatalistError, match=message):
            load_datalist(data / "own.csv", None, "training")
    with pytest.raises(DatalistError, match="not readable as CSV"):
        load_datalist(tmp_path / "absent.csv", None, "training")


def test_pretraining_reads_the_same_file_and_no_label_of_it(data, tmp_path):
    file = table(data, "image,patient_id,liver", "a.nii.gz,1,low", "b,2,", "c,3,")
    assert not has_own_parts(file, "validation", str(tmp_path / "folds.csv"))
    (tmp_path / "folds.csv").write_text("patient_id,fold\n1,0\n2,1\n3,test\n")
    options = {"folds_file": str(tmp_path / "folds.csv"), "fold": 1}
    training = unlabelled_datalist(None, file, part="training", **options)
    assert short(training, data) == [("a.nii.gz", "1", "a.nii.gz")]
    assert set(training[0]) == {"image", "patient_id", "series_id"}
    assert len(unlabelled_datalist(None, file, part="test", **options)) == 2


def test_an_error_about_cells_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(CellError(("age", "old", "a number"), ("sex", "", "F or M"))))
    assert error.cells == (("age", "old", "a number"), ("sex", "", "F or M"))
    assert str(error) == "age is 'old', expected a number; sex is '', expected F or M"
