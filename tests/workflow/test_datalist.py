# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Finding series, reading datalists and dividing patients."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workflow.datalist import DatalistError, find_series, load_datalist, load_sections, select_part, unlabelled_datalist
from workflow.sections import PARTS

DICOM = b"\x00" * 128 + b"DICM" + b"\x00" * 8  # the mark that every DICOM file has


def touch(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Every kind of source at several depths, with a space and an umlaut in the name."""
    top = tmp_path / "all dätä"
    touch(top / "hospital/7/ct/1.dcm")
    touch(top / "hospital/7/ct/2.dcm")
    touch(top / "hospital/7/ct/notes.txt")
    touch(top / "pacs/8/IM0001", DICOM)  # no extension
    touch(top / "pacs/8/DICOMDIR", DICOM)
    touch(top / "pacs/9/1.2.840.10008.5", DICOM)  # named by its UID
    touch(top / "pacs/10/README", b"plain text")
    touch(top / "scanner/1/b.IMA", DICOM)
    touch(top / "scanner/1/a.protocol", b"plain text")
    touch(top / "scanner/2/a.img", DICOM)
    touch(top / "scanner/3/a.hdr", b"no image")
    touch(top / "pacs/11/1.5", b"no image")
    touch(top / "pacs/12/DICOMDIR", DICOM)  # an index alone is no series
    touch(top / "capitals/X.DCM")
    touch(top / "flare/a.nii.gz")
    touch(top / "flare/b.NII")
    touch(top / "flare/a_mask.nii.gz")
    touch(top / "flare/segmentations/a.nii.gz")
    touch(top / "flare/table.csv")
    return top


def names(items: list[dict], top: Path) -> list[str]:
    return [Path(item["image"]).relative_to(top).as_posix() for item in items]


def test_every_series_of_a_mixed_tree_is_found_in_a_stable_order(mixed, caplog):
    with caplog.at_level(logging.INFO):
        items = find_series(mixed, exclude=["*mask*", "*segmentation*"])
    expected = ["capitals", "flare/a.nii.gz", "flare/b.NII", "hospital/7/ct", "pacs/8", "pacs/9"]
    expected += ["scanner/1", "scanner/2"]
    assert names(items, mixed) == expected
    assert [item["patient_id"] for item in items] == expected  # elsewhere a patient is one path
    assert [item["series_id"] for item in items] == expected
    assert "2 series or files passed over" in caplog.text
    assert find_series(str(mixed), exclude=["*mask*", "*segmentation*"]) == items


@pytest.mark.parametrize(
    ("exclude", "gone"),
    [([], []), (["flare/*"], ["a.nii.gz", "b.NII", "a_mask.nii.gz"]), (["*.NII"], ["b.NII"]), (["pacs/8"], ["8"])],
)
def test_excluded_paths_are_those_that_match(mixed, exclude, gone):
    found = [Path(item["image"]).name for item in find_series(mixed, exclude)]
    everything = [Path(item["image"]).name for item in find_series(mixed)]
    assert len(everything) == 10
    assert set(everything) - set(found) == set(gone) - ({"a.nii.gz"} & set(found))


def test_the_folder_may_be_one_series_or_one_file(mixed):
    ct = mixed / "hospital/7/ct"
    assert find_series(ct) == [{"image": str(ct), "patient_id": "ct", "series_id": "ct"}]
    file = mixed / "flare/a.nii.gz"
    assert find_series(file) == [{"image": str(file), "patient_id": "a.nii.gz", "series_id": "a.nii.gz"}]
    assert names(find_series(ct / "1.dcm"), mixed) == ["hospital/7/ct/1.dcm"]


@pytest.mark.parametrize("start", ["rsna", "rsna/train_images", "rsna/train_images/12", "."])
def test_patients_of_an_rsna_tree_are_its_folders(tmp_path, start):
    for series in ("12/100", "12/20", "9/5"):
        touch(tmp_path / "rsna/train_images" / series / "1.dcm")
    touch(tmp_path / "rsna/segmentations/100.nii")  # masks beside the images
    touch(tmp_path / "rsna/test_images/48843/62825/30.dcm")
    items = find_series(tmp_path / start, exclude=["*segmentations*"])
    found = [(item["patient_id"], item["series_id"]) for item in items]
    expected = [("12", "100"), ("12", "20")] + ([] if start.endswith("12") else [("9", "5")])
    assert found == ([("48843", "62825"), *expected] if start in (".", "rsna") else expected)


def test_the_default_exclusions_spare_unlabelled_data(tmp_path, root):
    """FLARE's unlabelled cases say "Unlabel": no reason to pass them over; masks are, whatever their case."""
    exclude = json.loads((root / "bundles/voco2d_pretrain/configs/train.json").read_text())["exclude"]
    kept = ["FLARE22_UnlabeledCase1-500/Case_00001_0000.nii.gz", "unlabelled/a.nii.gz"]
    for name in (*kept, "a/Mask.nii.gz", "labelsTr/a.nii.gz", "b/labels.nii", "c/ct_label.nii.gz"):
        touch(tmp_path / name)
    assert names(find_series(tmp_path, exclude), tmp_path) == kept


def test_own_parts_and_a_fold_file_contradict_each_other(tmp_path):
    touch(tmp_path / "a.nii.gz")
    touch(tmp_path / "b.nii.gz")
    file = tmp_path / "list.json"
    file.write_text(json.dumps({"training": ["a.nii.gz"], "validation": ["b.nii.gz"]}))
    with pytest.raises(DatalistError, match=r"has its own parts .* and folds_file is given too"):
        unlabelled_datalist(str(tmp_path), str(file), folds_file=str(tmp_path / "folds.csv"))


def test_a_folder_without_series_is_an_error_that_names_it(tmp_path):
    touch(tmp_path / "table.csv")
    with pytest.raises(DatalistError, match=f"{tmp_path}: expected DICOM series folders or NIfTI files, found none"):
        find_series(tmp_path)
    with pytest.raises(DatalistError, match=r"found none at .*nowhere"):
        find_series(tmp_path / "nowhere")
    touch(tmp_path / "mask.nii")
    with pytest.raises(DatalistError, match="found none"):
        find_series(tmp_path, ["*mask*"])


@pytest.fixture
def datalist(tmp_path) -> Path:
    for name in "abcdefgh":
        touch(tmp_path / "data" / f"{name}.nii.gz")
    entries = [
        {"image": "data/a.nii.gz", "patient_id": 7, "series_id": 1, "liver": "low"},
        {"image": "data/b.nii.gz", "patient_id": 7},
        "data/c.nii.gz",
        {"image": str(tmp_path / "data/d.nii.gz")},
        *({"image": f"data/{name}.nii.gz"} for name in "efgh"),
    ]
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"name": "own", "training": entries}))
    return path


def test_a_decathlon_datalist_is_read(datalist, tmp_path):
    items = load_datalist(datalist, None, "training")
    assert len(items) == 8
    assert items[0] == {
        "image": str(tmp_path / "data/a.nii.gz"), "patient_id": "7", "series_id": "1", "liver": "low",
    }  # fmt: skip
    assert (items[1]["patient_id"], items[1]["series_id"]) == ("7", "data/b.nii.gz")
    assert (items[2]["patient_id"], items[2]["series_id"]) == ("data/c.nii.gz", "data/c.nii.gz")
    assert items[3]["image"] == str(tmp_path / "data/d.nii.gz")
    assert load_datalist(str(datalist), str(tmp_path), "training") == items
    with pytest.raises(DatalistError, match=r"training\[0\] names .*other/data/a.nii.gz, which does not exist"):
        load_datalist(datalist, tmp_path / "other", "training")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("\udcff", "not readable as JSON"),
        ("[1]", "expected a list under 'training', found list"),
        ('{"test": []}', r"expected a list under 'training', found \['test'\]"),
        ('{"training": {}}', "expected a list under 'training'"),
        ('{"training": [{"label": 1}]}', r"training\[0\] has no path under 'image'"),
        ('{"training": [{"image": 3}]}', r"training\[0\] has no path under 'image'"),
        ('{"training": ["gone.nii"]}', r"training\[0\] names .*gone.nii, which does not exist"),
    ],
)
def test_a_datalist_that_is_none_is_an_error_that_names_it(tmp_path, content, message):
    path = tmp_path / "own.json"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(DatalistError, match=f"own.json: {message}"):
        load_datalist(path, None, "training")
    with pytest.raises(DatalistError, match=f"own.json: {message}"):
        unlabelled_datalist(None, str(path))


def test_a_missing_datalist_is_an_error_that_names_it(tmp_path):
    for read in (lambda p: load_datalist(p, None, "training"), lambda p: unlabelled_datalist(None, p)):
        with pytest.raises(DatalistError, match=r"gone.json: not readable as JSON"):
            read(tmp_path / "gone.json")


def items_of(patients: list[str]) -> list[dict]:
    return [{"image": str(i), "patient_id": patient, "series_id": str(i)} for i, patient in enumerate(patients)]


@given(
    patients=st.lists(st.integers(0, 30).map(str), min_size=2, max_size=60).filter(lambda p: len(set(p)) > 1),
    fraction=st.floats(0.05, 0.5),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=100)
def test_no_patient_is_on_both_sides_of_a_split(patients, fraction, seed):
    items = items_of(patients)
    options = {"folds_file": None, "fold": 0, "val_fraction": fraction, "seed": seed}
    training, validation = (select_part(items, part, **options) for part in PARTS[:2])
    assert not {i["patient_id"] for i in training} & {i["patient_id"] for i in validation}
    assert sorted(i["image"] for i in training + validation) == sorted(i["image"] for i in items)
    assert select_part(items, "training", **options) == training
    assert len({i["patient_id"] for i in validation}) == pytest.approx(fraction * len(set(patients)), abs=1)


@given(folds=st.lists(st.sampled_from(["0", "1", "2", "test", None]), min_size=4, max_size=30))
@settings(deadline=None, max_examples=100)
def test_no_patient_is_in_two_parts_of_a_fold_file(tmp_path_factory, folds):
    folds = ["0", "1", "test", None, *folds]
    path = tmp_path_factory.getbasetemp() / "folds.csv"
    table = pd.DataFrame({"patient_id": [f"{i:03d}" for i in range(len(folds))], "fold": folds})
    table[table["fold"].notna()].to_csv(path, index=False)
    items = items_of([f"{i:03d}" for i in range(len(folds)) for _ in range(2)])
    for fold in (0, 1):
        found = {
            part: {
                i["patient_id"] for i in select_part(items, part, folds_file=path, fold=fold, val_fraction=0, seed=0)
            }
            for part in PARTS
        }
        expected = {part: set() for part in PARTS}
        for i, value in enumerate(folds):  # a patient that the file does not name may train
            part = {str(fold): "validation", "test": "test"}.get(value, "training")
            expected[part].add(f"{i:03d}")
        assert found == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a CSV with patient_id and fold"),
        ("", "expected a CSV with patient_id and fold"),
        ("patient_id,split\n1,0\n", "expected a CSV with patient_id and fold"),
        ("patient_id,fold\n1,0\n1,1\n2,0\n", "1 patients are listed twice"),
        ("patient_id,fold\n1,1\n2,test\n", r"has no fold 0, only \['1', 'test'\]"),
    ],
)
def test_a_fold_file_that_is_none_is_an_error_that_names_it(tmp_path, content, message):
    path = tmp_path / "folds.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DatalistError, match=f"folds.csv: .*{message}"):
        select_part(items_of(["1", "2"]), "training", folds_file=str(path), fold=0, val_fraction=0, seed=0)


def test_an_empty_or_unknown_part_is_an_error(tmp_path):
    items = items_of(["1", "2"])
    options = {"folds_file": None, "fold": 0, "val_fraction": 0.5, "seed": 0}
    with pytest.raises(DatalistError, match=r"part: expected one of .* got 'val'"):
        select_part(items, "val", **options)
    with pytest.raises(DatalistError, match="no test series: 2 series"):
        select_part(items, "test", **options)
    with pytest.raises(DatalistError, match="no validation series"):
        select_part(items_of(["1", "1"]), "validation", **options)
    assert select_part(items, "training", **{**options, "val_fraction": 0.0}) == items
    assert len(select_part(items_of(["1", "1"]), "training", **options)) == 2


def test_a_datalist_of_training_alone_is_divided_for_both_parts(datalist):
    options = {"datalist": str(datalist), "val_fraction": 0.3, "seed": 1}
    training = unlabelled_datalist(None, part="training", **options)
    validation = unlabelled_datalist(None, part="validation", **options)
    assert not {i["patient_id"] for i in training} & {i["patient_id"] for i in validation}
    assert len(training) + len(validation) == 8


def test_a_datalist_with_its_own_parts_is_taken_at_its_word(datalist):
    content = json.loads(datalist.read_text())
    content = {"training": content["training"][:2], "test": content["training"][2:3]}
    datalist.write_text(json.dumps(content))
    test = unlabelled_datalist(None, str(datalist), part="test")
    assert [i["series_id"] for i in test] == ["data/c.nii.gz"]
    datalist.write_text(json.dumps({**content, "validation": ["data/e.nii.gz"]}))
    assert len(unlabelled_datalist(None, str(datalist), part="training", val_fraction=0.5)) == 2
    assert [i["series_id"] for i in unlabelled_datalist(None, str(datalist), part="validation")] == ["data/e.nii.gz"]
    datalist.write_text(json.dumps({"training": [], "validation": []}))
    with pytest.raises(DatalistError, match="expected a list under 'test'"):
        unlabelled_datalist(None, str(datalist), part="test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"training": [{"image": "a.nii.gz", "patient_id": 1}], "validation": [{"image": "b.nii.gz", "patient_id": 1}]},
         r"1 patients are both in 'training' and in 'validation': \['1'\]"),
        ({"training": ["a.nii.gz"], "test": [{"image": "../data/a.nii.gz", "patient_id": 1}], "validation": []},
         r"1 images are both in 'training' and in 'test': \[.*a.nii.gz'\]"),
        ({"training": ["b.nii.gz", "a.nii.gz", {"image": "./a.nii.gz", "patient_id": 2}], "validation": ["c.nii.gz"]},
         r"1 series are more than once in 'training': \[.*a.nii.gz'\]"),
        ({"training": [{"image": f"{n}.nii.gz", "patient_id": 1, "series_id": 2} for n in "ab"]},
         "1 series are more than once in 'training'"),
    ],
)  # fmt: skip
def test_a_patient_or_image_in_two_sections_is_refused(datalist, tmp_path, content, message):
    datalist.write_text(json.dumps(content))
    for read in (
        lambda: unlabelled_datalist(str(tmp_path / "data"), str(datalist)),
        lambda: load_sections(datalist, tmp_path / "data"),
    ):
        with pytest.raises(DatalistError, match=f"list.json: {message}"):
            read()


def test_held_out_patients_that_are_not_there_are_told(tmp_path, caplog):
    path = tmp_path / "folds.csv"
    path.write_text("patient_id,fold\n01,0\n2,0\n3,1\n4,test\n9,1\n")
    options = {"folds_file": str(path), "val_fraction": 0, "seed": 0}
    assert len(select_part(items_of(["1", "2", "3"]), "training", fold=0, **options)) == 2
    assert "2 of 3 patients of fold 0 and test are not among the series: ['01', '4']" in caplog.text
    caplog.clear()
    select_part(items_of(["01", "2", "3", "4"]), "training", fold=0, **options)
    assert not caplog.text


def test_a_folder_is_searched_where_there_is_no_datalist(mixed):
    exclude = ["*mask*", "*segmentation*"]
    parts = [unlabelled_datalist(str(mixed), part=part, exclude=exclude, val_fraction=0.2) for part in PARTS[:2]]
    assert [len(part) for part in parts] == [6, 2]
    with pytest.raises(DatalistError, match="neither dataset_dir nor datalist"):
        unlabelled_datalist(None)


def test_the_mixed_sources_of_the_project_are_found(data_dir):
    found = [Path(item["image"]).name for item in find_series(data_dir, exclude=["*organs*"])]
    assert found == [
        "acrin_flt_breast_001.nii.gz",
        "cptac_pda_c3l_00189.nii.gz",
        "lidc_idri_0001.nii.gz",
        "crlm_ct_1004",
    ]
