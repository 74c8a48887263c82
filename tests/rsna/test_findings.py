# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Labels of single images, organ masks and the series table, as items of the data list have them."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from torch.utils.data import default_collate
from workflow.datalist import DatalistError

from bundles.rsna_cnn_lstm.scripts.cohort import labelled_series, with_series_table
from bundles.rsna_cnn_lstm.scripts.findings import add_findings, read_image_labels
from bundles.rsna_cnn_lstm.scripts.labels import LabelTable
from bundles.rsna_cnn_lstm.scripts.masks import add_masks

ROW = "patient_id,series_id,instance_number,injury_name\n"


@pytest.fixture
def table(root: Path) -> LabelTable:
    return LabelTable.from_file(root / "bundles/rsna_cnn_lstm/configs/labels.json")


def item(patient: str, series: str, bowel: int, extravasation: int) -> dict:
    label = np.array([bowel, extravasation, 0, 0, 0])
    return {"image": f"/x/{series}", "patient_id": patient, "series_id": series, "label": label}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "image_level_labels.csv").write_text(
        ROW + "1,11,7,Active_Extravasation\n1,11,8,Active_Extravasation\n1,11,8,Active_Extravasation\n1,11,3,Bowel\n"
        "2,21,5,Bowel\n"
    )
    return tmp_path


def test_healthy_listed_and_unknown(tree: Path, table: LabelTable, caplog: pytest.LogCaptureFixture) -> None:
    items = [item("1", "11", 1, 1), item("1", "12", 1, 1), item("2", "21", 0, 0), item("3", "31", -1, 0)]
    with caplog.at_level(logging.WARNING):
        found = [entry["findings"] for entry in add_findings(items, table, str(tree))]
    assert found[0] == {"bowel": [3], "extravasation": [7, 8, 8]}
    assert found[1] == {"bowel": None, "extravasation": None}  # injured, but no image of this series is listed
    assert found[2] == {"bowel": None, "extravasation": []}  # healthy and listed: a contradiction
    assert found[3] == {"bowel": None, "extravasation": []}
    assert "1 groups are healthy by their label and have listed images" in caplog.text
    assert "2/21 bowel" in caplog.text


def test_only_the_groups_that_are_trained(tree: Path, table: LabelTable, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = add_findings([item("1", "11", 1, 1)], table.select(["bowel", "liver"]), str(tree))
    assert found[0]["findings"] == {"bowel": [3]}
    assert "no group has the image_level_name Active_Extravasation" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "image_level_labels.csv: no such file; slice labels are asked for"),
        (ROW, "has no rows"),
        ("patient_id,series_id,injury_name\n1,11,Bowel\n", "lacks the columns instance_number"),
        (ROW + "1,11,7,Bowel\n1,11,x,Bowel\n", "1 rows whose instance_number is no integer, the first is row 3: 'x'"),
        (ROW + "1,11,7.5,Bowel\n", "row 2: '7.5'"),
        (ROW + "1,99,7,Bowel\n", "none of 1 series has a listed image of bowel, extravasation"),
        (ROW + "1,11,7,Spleen\n", "none of 1 series has a listed image of bowel, extravasation"),
    ],
)
def test_a_file_without_slice_labels_says_so(
    tmp_path: Path, table: LabelTable, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "image_level_labels.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        add_findings([item("1", "11", 1, 1)], table, str(tmp_path))


def test_groups_without_slice_labels_are_refused(tree: Path, table: LabelTable) -> None:
    with pytest.raises(ValueError, match="no group of the label table has an image_level_name; the groups are liver"):
        add_findings([item("1", "11", 1, 1)], table.select(["liver"]), str(tree))


def test_every_row_of_the_phantoms_is_read_and_no_other(phantoms: Path, table: LabelTable) -> None:
    rows = pd.read_csv(phantoms / "image_level_labels.csv")
    read = read_image_labels(phantoms / "image_level_labels.csv", table)
    assert sum(len(numbers) for groups in read.values() for numbers in groups.values()) == len(rows)
    items = labelled_series(str(phantoms), table, findings=True, num_folds=3)
    items += labelled_series(str(phantoms), table, part="validation", findings=True, num_folds=3)
    for entry in items:
        here = rows[rows["series_id"].astype(str) == entry["series_id"]]
        for position, (group, name) in enumerate((("bowel", "Bowel"), ("extravasation", "Active_Extravasation"))):
            listed = here.loc[here["injury_name"] == name, "instance_number"].tolist()
            expected = listed or (None if entry["label"][position] else [])
            assert entry["findings"][group] == expected


def datalist(folder: Path, entries: list[dict]) -> str:
    for entry in entries:
        (folder / entry["image"]).touch()
    path = folder / "list.json"
    path.write_text(json.dumps({"training": entries, "validation": [{"image": "v.nii", "bowel": "healthy"}]}))
    return str(path)


def test_a_datalist_may_have_findings_masks_and_the_series_table(tmp_path: Path, table: LabelTable) -> None:
    (tmp_path / "m.nii").touch()
    path = datalist(tmp_path, [
        {"image": "a.nii", "bowel": "injury", "findings": {"bowel": [3, 4]}, "mask": "m.nii", "aortic_hu": 210},
        {"image": "b.nii", "bowel": "injury", "incomplete_organ": 1},
        {"image": "c.nii", "bowel": "healthy"},
    ])  # fmt: skip
    plain = labelled_series(str(tmp_path), table, path)
    keys = {"image", "patient_id", "series_id", "label", "aortic_hu", "incomplete_organ"}
    assert [set(entry) for entry in plain] == [keys] * 3  # the same for all, so that they batch
    batch = default_collate(plain)
    assert batch["incomplete_organ"].tolist() == [-1, 1, -1]
    assert batch["aortic_hu"][0] == 210
    assert math.isnan(batch["aortic_hu"][1])
    full = labelled_series(str(tmp_path), table, path, findings=True, crop="organs")
    assert [set(entry) for entry in full] == [keys | {"findings", "mask"}] * 3
    assert [entry["findings"]["bowel"] for entry in full] == [[3, 4], None, []]
    assert [entry["findings"]["extravasation"] for entry in full] == [None] * 3  # the group has no label
    assert [entry["mask"] for entry in full] == [str(tmp_path / "m.nii"), "", ""]


@pytest.mark.parametrize("findings", [[3], {"bowel": 3}, {"bowel": ["3"]}, {"bowel": [True]}])
def test_findings_of_a_datalist_are_checked(tmp_path: Path, table: LabelTable, findings: object) -> None:
    path = datalist(tmp_path, [{"image": "a.nii", "bowel": "injury", "findings": findings}])
    with pytest.raises(ValueError, match=r"a\.nii: expected findings as a list of instance numbers by group, found"):
        labelled_series(str(tmp_path), table, path, findings=True)


def test_findings_of_other_groups_are_named(
    tmp_path: Path, table: LabelTable, caplog: pytest.LogCaptureFixture
) -> None:
    path = datalist(tmp_path, [{"image": "a.nii", "bowel": "injury", "findings": {"bowel": [1], "liver": [2]}}])
    with caplog.at_level(logging.WARNING):
        labelled_series(str(tmp_path), table, path, findings=True)
    assert "no slice labels for the groups liver" in caplog.text


def test_a_mask_of_a_datalist_must_exist(tmp_path: Path, table: LabelTable) -> None:
    path = datalist(tmp_path, [{"image": "a.nii", "bowel": "injury", "mask": "gone.nii"}])
    with pytest.raises(DatalistError, match=r"training\[0\] names the mask .*gone\.nii, which does not exist"):
        labelled_series(str(tmp_path), table, path, crop="organs")


def test_masks_are_found_by_the_series_id(tmp_path: Path) -> None:
    (tmp_path / "segmentations").mkdir()
    for name in ("1.nii", "2.nii.gz", "s/4.nii"):
        file = tmp_path / "segmentations" / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    (tmp_path / "segmentations" / "3").mkdir()
    names = ("1", "2", "3", "s/4", "5", "1.nii.gz")
    series = [{"series_id": name} for name in names]
    found = [entry["mask"] for entry in add_masks(series, "organs", str(tmp_path))]
    expected = ["1.nii", "2.nii.gz", "3", "s/4.nii", None, "1.nii"]
    assert found == ["" if name is None else str(tmp_path / "segmentations" / name) for name in expected]
    assert add_masks(series, "organs", "/nowhere", str(tmp_path / "segmentations"))[0]["mask"] == found[0]
    assert add_masks([{"series_id": "1", "mask": "own"}], "organs", str(tmp_path))[0]["mask"] == "own"
    assert add_masks(series, "body", str(tmp_path)) == series
    assert add_masks(series, "organs", None)[0]["mask"] == ""
    with pytest.raises(ValueError, match="mask_dir: expected a folder of masks, found none at"):
        add_masks(series, "organs", str(tmp_path), str(tmp_path / "absent"))


@pytest.mark.parametrize("series_id", ["{top}/images/1.nii.gz", "../images/1.nii.gz", "../images/1", ".", "here/1"])
def test_an_image_is_never_its_own_mask(tmp_path: Path, series_id: str) -> None:
    masks, image = tmp_path / "masks", tmp_path / "images/1.nii.gz"
    for file in (masks / "1.nii.gz", image):
        file.parent.mkdir()
        file.touch()
    (masks / "here").symlink_to(image.parent)
    entry = {"image": str(image), "series_id": series_id.format(top=tmp_path)}
    assert add_masks([entry], "organs", None, str(masks))[0]["mask"] == ""
    assert add_masks([{**entry, "series_id": "1"}], "organs", None, str(masks))[0]["mask"] == str(masks / "1.nii.gz")


def test_every_segmentation_of_the_phantoms_is_an_item_s(phantoms: Path, table: LabelTable) -> None:
    items = labelled_series(str(phantoms), table, crop="organs", num_folds=3)
    items += labelled_series(str(phantoms), table, part="validation", crop="organs", num_folds=3)
    assert {entry["mask"] for entry in items} - {""} == {str(p) for p in (phantoms / "segmentations").iterdir()}
    assert all(not entry["mask"] or Path(entry["mask"]).stem == entry["series_id"] for entry in items)


def test_what_is_known_of_a_series_becomes_columns() -> None:
    frame = pd.DataFrame({"patient_id": ["1", "2"], "series_id": ["11", "21"]})
    items = [{"patient_id": "2", "series_id": "21", "aortic_hu": 190.5, "incomplete_organ": 1}]
    items.append({"patient_id": "1", "series_id": "11", "aortic_hu": math.nan, "incomplete_organ": -1})
    csv = with_series_table(frame, items).to_csv(index=False)
    assert csv == "patient_id,series_id,aortic_hu,incomplete_organ\n1,11,,\n2,21,190.5,1\n"
    assert list(with_series_table(frame, items[1:]).columns) == ["patient_id", "series_id"]
    assert with_series_table(frame, []).equals(frame)
