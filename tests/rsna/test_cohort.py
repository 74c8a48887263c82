# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Which labelled series train, validate or test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from workflow.datalist import DatalistError, unlabelled_datalist
from workflow.folds import make_folds, write_folds

from bundles.rsna_cnn_lstm.scripts.cohort import labelled_series
from bundles.rsna_cnn_lstm.scripts.fold_file import FoldFile
from bundles.rsna_cnn_lstm.scripts.labels import LabelTable

PATIENTS = 15


@pytest.fixture
def table(root) -> LabelTable:
    return LabelTable.from_file(root / "bundles/rsna_cnn_lstm/configs/labels.json")


@pytest.fixture
def tree(tmp_path, table) -> Path:
    """An RSNA tree of 15 patients with one or two series."""
    top = tmp_path / "rsna"
    rng = np.random.default_rng(0)
    indices = np.stack([rng.integers(0, len(group.classes), PATIENTS) for group in table.groups], axis=1)
    patients = [f"{i:03d}" for i in range(PATIENTS)]
    for i, patient in enumerate(patients):
        for series in range(1 + i % 2):
            file = top / "train_images" / patient / f"{i}{series}" / "1.dcm"
            file.parent.mkdir(parents=True)
            file.touch()
    frame = pd.DataFrame(table.one_hot(indices).astype(int), columns=list(table.columns))
    frame.insert(0, "patient_id", patients)
    frame.to_csv(top / "train.csv", index=False)
    return top


def patients(items: list[dict]) -> set[str]:
    return {item["patient_id"] for item in items}


def test_folds_divide_the_patients_and_each_validates_once(tree, table):
    seen: list[str] = []
    for fold in range(5):
        training = labelled_series(str(tree), table, fold=fold, seed=3)
        validation = labelled_series(str(tree), table, part="validation", fold=fold, seed=3)
        assert not patients(training) & patients(validation)
        assert len(training) + len(validation) == 22
        assert len(patients(training) | patients(validation)) == PATIENTS
        seen += sorted(patients(validation))
        wanted = {"image", "patient_id", "series_id", "label", "aortic_hu", "incomplete_organ"}
        assert set(training[0]) == wanted
        assert training[0]["label"].shape == (5,)
        assert labelled_series(str(tree), table, fold=fold, seed=3)[0]["image"] == training[0]["image"]
    assert sorted(seen) == [f"{i:03d}" for i in range(PATIENTS)]
    other = labelled_series(str(tree), table, part="validation", fold=0, seed=4)
    assert patients(other) != patients(labelled_series(str(tree), table, part="validation", fold=0, seed=3))
    assert len(patients(labelled_series(str(tree), table, part="validation", num_folds=3))) == 5


def test_a_fold_file_decides_where_there_is_one_for_both_bundles(tree, table, tmp_path):
    everything = labelled_series(str(tree), table, fold=0) + labelled_series(str(tree), table, part="validation")
    folds = make_folds(everything, 3)
    folds["fold"] = folds["fold"].astype(object).where(folds["patient_id"] != "004", "test")
    write_folds(tmp_path / "folds.csv", folds)
    options = {"folds_file": str(tmp_path / "folds.csv"), "fold": 1}
    parts = {
        part: labelled_series(str(tree), table, part=part, **options) for part in ("training", "validation", "test")
    }
    assert patients(parts["test"]) == {"004"}
    assert patients(parts["validation"]) == set(folds.loc[folds["fold"] == 1, "patient_id"])
    pretrained = unlabelled_datalist(str(tree), part="training", **options)  # no image that validates was pretrained on
    assert patients(pretrained) == patients(parts["training"])
    with pytest.raises(DatalistError, match="has no fold 7"):
        labelled_series(str(tree), table, folds_file=options["folds_file"], fold=7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "test"}, "no test series: without a folds_file there are folds 0 to 4 and no test"),
        ({"part": "validation", "fold": 5}, "no validation series: without a folds_file there are folds 0 to 4"),
        ({"part": "valid"}, r"part: expected one of \('training', 'validation', 'test', 'all'\), got 'valid'"),
    ],
)
def test_a_part_that_is_none_is_an_error(tree, table, options, message):
    with pytest.raises(DatalistError, match=message):
        labelled_series(str(tree), table, **options)


def test_no_source_is_an_error(table):
    with pytest.raises(DatalistError, match="neither dataset_dir nor datalist is given"):
        labelled_series(None, table)


@pytest.fixture
def datalist(tmp_path) -> Path:
    entries = []
    for i in range(10):
        (tmp_path / f"{i}.nii.gz").touch()
        entries.append({"image": f"{i}.nii.gz", "patient_id": i // 2, "liver": ("healthy", "low", "high")[i % 3]})
    entries[0]["bowel"] = "injury"
    entries[1]["extravasation"] = None
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"training": entries}))
    return path


def test_own_data_come_with_class_names(datalist, table, tmp_path):
    items = [
        item
        for part in ("training", "validation")
        for item in labelled_series(None, table, str(datalist), part=part, num_folds=5)
    ]
    items.sort(key=lambda item: item["image"])
    names = [group.name for group in table.groups]
    labels = np.stack([item["label"] for item in items])
    assert labels.dtype == np.int64
    assert labels[:, names.index("liver")].tolist() == [i % 3 for i in range(10)]
    assert labels[:, names.index("bowel")].tolist() == [1] + [-1] * 9
    for name in ("extravasation", "kidney", "spleen"):
        assert (labels[:, names.index(name)] == -1).all()
    assert [item["patient_id"] for item in items] == [str(i // 2) for i in range(10)]
    same = labelled_series(str(tmp_path), table, str(datalist), num_folds=5)
    assert {item["image"] for item in same} < {item["image"] for item in items}


def test_an_unknown_class_is_an_error_that_names_file_series_and_choice(datalist, table):
    content = json.loads(datalist.read_text())
    content["training"][3]["liver"] = "severe"
    datalist.write_text(json.dumps(content))
    message = r"own.json: .*3.nii.gz: liver is 'severe', expected \['healthy', 'low', 'high'\]"
    with pytest.raises(DatalistError, match=message):
        labelled_series(None, table, str(datalist))


def test_single_organ_models_take_their_group_alone(datalist, root):
    liver = LabelTable.from_file(root / "bundles/rsna_cnn_lstm/configs/labels.json", groups=["liver"])
    assert labelled_series(None, liver, str(datalist))[0]["label"].shape == (1,)


def test_a_part_of_a_tree_is_used_when_asked(tree, table, root, tmp_path):
    shutil.rmtree(tree / "train_images" / "003")
    options = {"part": "all"}
    with pytest.raises(ValueError, match=r"1 patients with a label but without images: 003 \(--strict False leaves"):
        labelled_series(str(tree), table, **options)
    assert len(patients(labelled_series(str(tree), table, strict=False, **options))) == PATIENTS - 1
    assert patients(labelled_series(str(tree), table, strict=False, strata=table.select(["liver"])))
    folds = FoldFile(tmp_path / "folds.csv", str(tree), table, strict=False)
    folds.run()
    assert len(pd.read_csv(folds.path)) == PATIENTS - 1
    with pytest.raises(ValueError, match="--strict False"):
        FoldFile(tmp_path / "other.csv", str(tree), table).run()
    configs = [json.loads((root / f"bundles/rsna_cnn_lstm/configs/{name}.json").read_text())
               for name in ("train", "folds", "cross_validate")]  # fmt: skip
    assert configs[0]["strict"] is configs[1]["strict"] is True
    readers = [configs[0][part]["dataset"]["data"] for part in ("train", "validate")]
    assert [reader["strict"] for reader in (*readers, *(config["folds"] for config in configs[1:]))] == ["@strict"] * 4


def test_the_folds_do_not_depend_on_the_groups_that_are_trained(tree, table):
    """A single-organ model is validated on the patients on whom the others are."""
    one = table.select(["liver"])
    whole = labelled_series(str(tree), table, part="validation", num_folds=3)
    assert patients(labelled_series(str(tree), one, part="validation", num_folds=3, strata=table)) == patients(whole)


def test_a_datalist_with_its_own_validation_is_taken_at_its_word(tmp_path, table):
    for name in "abc":
        (tmp_path / f"{name}.nii.gz").touch()
    content = {"training": [{"image": "a.nii.gz", "liver": "low"}, {"image": "b.nii.gz", "liver": "healthy"}],
               "validation": [{"image": "c.nii.gz", "liver": "high"}]}  # fmt: skip
    file = tmp_path / "list.json"
    file.write_text(json.dumps(content))
    parts = [patients(labelled_series(None, table, str(file), part=part)) for part in ("training", "validation")]
    assert parts == [{"a.nii.gz", "b.nii.gz"}, {"c.nii.gz"}]
    with pytest.raises(DatalistError, match="has its own parts"):
        labelled_series(None, table, str(file), folds_file=str(tmp_path / "folds.csv"))
