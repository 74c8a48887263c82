# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""check_data finds exactly what cannot be used, and says what is in the rest."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.uid import SecondaryCaptureImageStorage
from transforms import LoadSeries, SeriesError
from workflow.run import RunFolder

from bundles.rsna_cnn_lstm.scripts.check import DataCheck
from bundles.rsna_cnn_lstm.scripts.labels import LabelTable
from demo.dataset import Options, write_dataset
from demo.faults import HARMFUL, sow

LABELS_FILE = Path(__file__).parents[2] / "bundles/rsna_cnn_lstm/configs/labels.json"
LABELS = LabelTable.from_file(LABELS_FILE)


def check(folder: Path, out: Path, **options: object) -> tuple[pd.DataFrame, pd.DataFrame, DataCheck]:
    """check.csv, problems.csv and the check itself."""
    done = DataCheck(str(folder), LoadSeries(), LABELS, **options)
    done.run(out)
    text = {name: str for name in ("image", "patient_id", "series_id", "reason", "problem", "where")}
    tables = [pd.read_csv(out / name, dtype=text, keep_default_na=True) for name in ("check.csv", "problems.csv")]
    return tables[0], tables[1], done


def ids(table: pd.DataFrame) -> set[tuple[str, str]]:
    return set(zip(table["patient_id"], table["series_id"], strict=True))


def sown(top: Path, patients: int, share: float, workers: int = 1) -> tuple[Path, pd.DataFrame]:
    tree = write_dataset(
        top, patients=patients, seed=3, options=Options(size=64, slices=12), workers=workers, progress=False
    )
    return tree, sow(tree, share=share, seed=1)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """Each kind of fault once, and each harmless peculiarity, in a tree of 40 patients."""
    tree, truth = sown(tmp_path_factory.mktemp("faulty") / "rsna", 40, 0.48)
    assert set(HARMFUL) <= set(truth["fault"])
    return tree, truth


@pytest.fixture(scope="module")
def checked(faulty, tmp_path_factory) -> tuple[pd.DataFrame, pd.DataFrame, DataCheck]:
    return check(faulty[0], tmp_path_factory.mktemp("out"))


def assert_exact(truth: pd.DataFrame, series: pd.DataFrame) -> None:
    found = ids(series[series["usable"] == 0])
    harmful = ids(truth[truth["harmful"] == 1])
    wrong = truth.merge(series, on=["patient_id", "series_id"])
    wrong = wrong[wrong["harmful"] == wrong["usable"]]
    assert found == harmful, wrong[["fault", "reason"]].to_string()


def test_exactly_the_sown_faults_are_found(faulty, checked):
    tree, truth = faulty
    series, problems, done = checked
    assert_exact(truth, series)
    assert len(series) == len(list((tree / "train_images").glob("*/*")))
    assert problems.empty
    assert series["reason"].notna().tolist() == (series["usable"] == 0).tolist()
    assert len(done.failed) == (truth["harmful"] == 1).sum()
    assert all(Path(image).name in reason for image, reason in done.failed)


def test_loading_agrees(checked):
    """Of a series of each kind: what is usable loads, what is not does not."""
    for row in checked[0].groupby("usable").head(12).itertuples():
        if row.usable:
            assert sorted(LoadSeries()(row.image).shape[1:]) == sorted((row.columns, row.rows, row.slices))
        else:
            with pytest.raises(SeriesError) as refused:
                LoadSeries()(row.image)
            assert str(refused.value) == row.reason


def test_a_row_says_what_the_series_is(checked, faulty):
    series, _, _ = checked
    good = series[series["usable"] == 1]
    assert (series["label"] == 1).all()
    assert (good[["columns", "rows"]] == 64).all(axis=None)
    assert set(good["orientation"]) == {"axial"}
    assert set(series["entry"].dropna()) == {"head-first", "feet-first"}
    assert set(series["body_part"].dropna()) == {"ABDOMEN"}
    assert (good["slice_thickness_mm"] > 0).all()
    np.testing.assert_allclose(good["extent_z_mm"], good["slices"] * good["spacing_z_mm"], atol=0.05)
    assert good["hu_min"].isna().all()  # headers only
    coronal = faulty[1].query("fault == 'coronal'").merge(series, on=["patient_id", "series_id"])
    assert coronal["orientation"].tolist() == ["coronal"]
    duplicates = faulty[1].query("fault == 'identical duplicate'").merge(series, on=["patient_id", "series_id"])
    assert (duplicates["dropped_duplicates"] == 1).all()


def small(top: Path) -> Path:
    return write_dataset(top, patients=5, seed=0, options=Options(size=32, slices=8), workers=1, progress=False)


def test_problems_of_tables_and_folders(tmp_path, caplog):
    tree = small(tmp_path / "rsna")
    patients = sorted(path.name for path in (tree / "train_images").iterdir())
    labels = pd.read_csv(tree / "train.csv", dtype=str)
    labels.loc[1, "liver_healthy"] = "7"
    labels = pd.concat([labels, labels[:1], labels[:1].assign(patient_id="77")])
    labels[labels["patient_id"] != patients[4]].to_csv(tree / "train.csv", index=False)
    meta = pd.read_csv(tree / "train_series_meta.csv", dtype=str)
    pd.concat([meta, meta[:1], meta[:1].assign(series_id="9")]).to_csv(tree / "train_series_meta.csv", index=False)
    (tree / "train_images" / patients[0] / "empty").mkdir()
    shutil.copytree(tree / "train_images" / patients[0], tmp_path / "rsna/other/place")
    with caplog.at_level(logging.INFO):
        series, problems, done = check(tree, tmp_path / "out")
    found = problems.groupby("problem")["where"].apply(list)
    rows = found.pop("rows or tables that cannot be used")
    assert [text.split("train")[-1].split(":")[0] for text in rows] == [".csv", ".csv", "_series_meta.csv"]
    assert f"1 patient_id in more than one row: {patients[0]}" in rows[0]
    assert "must sum to 1" in rows[1]
    assert found.to_dict() == {
        "patients with a label but without images": ["77"],
        "patients with images but without a label": [patients[4]],
        "series of the series table without images": [f"{patients[0]}/9"],
    }
    unusable = series[series["usable"] == 0]
    assert unusable["series_id"].tolist() == ["empty"]
    assert "found none: no file" in unusable["reason"].iloc[0]
    inside = series[series["image"].str.contains("train_images")]
    assert inside.set_index("patient_id")["label"].dropna().to_dict() == {p: int(p != patients[4]) for p in patients}
    assert series[series["image"].str.contains("other")]["label"].isna().all()
    assert len(done.failed) == 7
    assert "6 problems of folders and tables" in caplog.text
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["series"] == len(series)
    assert sum(summary["problems"].values()) == 6


def test_tables_that_cannot_be_read_do_not_end_it(tmp_path):
    tree = small(tmp_path / "rsna")
    (tree / "train.csv").write_text("")
    series, problems, _ = check(tree, tmp_path / "out")
    assert (series["usable"] == 1).all()
    assert "not a readable CSV" in problems["where"].iloc[0]


def test_anonymised(tmp_path):
    tree = small(tmp_path / "rsna")
    victim = sorted((tree / "train_images").glob("*/*"))[0]
    shutil.rmtree(victim)
    victim.mkdir()
    done = check(tree, tmp_path / "out", anonymise=True)[2]
    with pytest.raises(SystemExit):
        RunFolder(tmp_path, "out", anonymise=True).finish(done.failed)
    text = "".join(path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix == ".csv")
    assert len(done.failed) == 3  # the folder, its patient without images, its row of the series table
    for path in (tree / "train_images").glob("*/*"):
        assert str(path) not in text
        assert path.name not in text
        assert path.parent.name not in text
    plain = check(tree, tmp_path / "plain")[0]
    hidden, failed = (pd.read_csv(tmp_path / "out" / name) for name in ("check.csv", "failed.csv"))
    assert hidden[hidden["usable"] == 0]["image"].tolist() == failed["image"].tolist()[:1]  # the same pseudonym
    assert hidden["slices"].equals(plain["slices"])
    assert hidden["image"].is_unique


def test_what_is_resampled_when_asked_is_usable(faulty, tmp_path):
    tree, truth = faulty
    tilted = truth[truth["fault"].isin(["gantry tilt", "non-uniform spacing"])]
    folder = tmp_path / "two"
    for row in tilted.itertuples():
        shutil.copytree(tree / "train_images" / row.patient_id / row.series_id, folder / row.series_id)
    assert (check(folder, tmp_path / "strict")[0]["usable"] == 0).all()
    done = DataCheck(str(folder), LoadSeries(resample=True), LABELS, full=True)
    done.run(tmp_path / "out")
    series = pd.read_csv(tmp_path / "out/check.csv")
    assert len(series) == len(tilted) >= 2
    assert (series[["usable", "resampled"]] == 1).all(axis=None)


def test_full_decodes(tmp_path, data_dir):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.nii.gz").symlink_to(data_dir / "lidc_idri_0001.nii.gz")
    packed = (data_dir / "lidc_idri_0001.nii.gz").read_bytes()
    (tmp_path / "data/cut.nii.gz").write_bytes(packed[: len(packed) // 2])
    series, _, _ = check(tmp_path / "data", tmp_path / "out")
    assert series["usable"].tolist() == [1, 1]  # nothing in the header of a packed file betrays a cut
    series, _, _ = check(tmp_path / "data", tmp_path / "full", full=True)
    assert series["usable"].tolist() == [1, 0]
    assert series["hu_min"][0] < -900
    assert series["hu_max"][0] > 200


def test_full_finds_what_the_crop_of_training_refuses(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name, low, high in (("air", -1000, -1000), ("positive", 0, 1060), ("body", -1000, 60)):
        volume = np.full((40, 40, 8), low, dtype=np.int16)
        volume[8:32, 8:32] = high
        nib.save(nib.Nifti1Image(volume, np.diag([2.0, 2.0, 5.0, 1.0])), data / f"{name}.nii.gz")
    assert check(data, tmp_path / "out")[0]["usable"].tolist() == [1, 1, 1]
    series = check(data, tmp_path / "full", full=True)[0].set_index("series_id")
    assert series["usable"].to_dict() == {"air.nii.gz": 0, "body.nii.gz": 1, "positive.nii.gz": 1}
    assert "expected a body above" in series["reason"]["air.nii.gz"]
    assert series["hu_max"]["air.nii.gz"] == -1000
    assert series["note"].dropna().to_dict() == {"positive.nii.gz": "no value below 0"}


def test_a_localizer_does_not_describe_the_series(tmp_path, data_dir):
    folder = shutil.copytree(data_dir / "crlm_ct_1004", tmp_path / "data" / "series")
    expected = check(tmp_path / "data", tmp_path / "plain")[0].drop(columns="skipped_files")
    for name, tags in {"0-1.dcm": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
                       "0-2.dcm": {"SOPClassUID": SecondaryCaptureImageStorage}}.items():  # fmt: skip
        ds = pydicom.dcmread(folder / "1-18.dcm")
        ds.ImageOrientationPatient, ds.SliceThickness, ds.BodyPartExamined = [1, 0, 0, 0, 0, -1], 777, "SCOUT"
        for tag, value in tags.items():
            setattr(ds, tag, value)
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
        ds.save_as(folder / name)
    found = check(tmp_path / "data", tmp_path / "out")[0]
    assert found.pop("skipped_files").tolist() == [2]
    assert expected["orientation"].tolist() == ["axial"]
    pd.testing.assert_frame_equal(found, expected)


def test_own_data_by_a_datalist(tmp_path, data_dir):
    entries = [{"image": "lidc_idri_0001.nii.gz", "patient_id": "a", "liver": "low"}, {"image": "crlm_ct_1004"}]
    (tmp_path / "list.json").write_text(json.dumps({"training": entries[:1], "validation": entries[1:]}))
    series, problems, done = check(data_dir, tmp_path / "out", datalist=str(tmp_path / "list.json"))
    assert series["label"].tolist() == [1, 0]
    assert series["usable"].tolist() == [1, 1]
    assert problems.to_dict("list") == {
        "problem": ["series of the datalist without a label"],
        "where": [str(data_dir / "crlm_ct_1004")],
    }
    assert len(done.failed) == 1
    (tmp_path / "list.json").write_text(json.dumps({"training": [entries[0] | {"liver": "torn"}]}))
    series, problems, _ = check(data_dir, tmp_path / "out", datalist=str(tmp_path / "list.json"))
    assert series["usable"].tolist() == [1]
    assert "liver is 'torn'" in problems["where"].iloc[0]


def test_no_false_alarm_on_real_ct(data_dir, tmp_path):
    series, problems, _ = check(data_dir, tmp_path, num_workers=2, exclude=["*organs*"])
    assert len(series) == 4
    assert (series["usable"] == 1).all(), series["reason"].tolist()
    assert problems.empty
    assert series["label"].isna().all()


@pytest.mark.slow
def test_no_false_alarm_on_further_real_ct(shared_dir, tmp_path):
    config = LABELS_FILE.with_name("check_data.json")
    exclude = json.loads(config.read_text())["exclude"]  # masks are no images
    series, problems, _ = check(shared_dir / "data" / "abdomen", tmp_path, exclude=exclude)
    assert len(series) >= 4
    assert (series["usable"] == 1).all(), series["reason"].tolist()
    assert problems.empty


@pytest.mark.slow
def test_a_tree_of_two_hundred_patients(tmp_path, run_bundle):
    """By the command line: 5 % of the series are faulty, those are found and no other, and the status is 1."""
    tree, truth = sown(tmp_path / "rsna", 350, 0.05, workers=2)
    assert set(HARMFUL) <= set(truth["fault"])
    done = run_bundle("rsna_cnn_lstm", "--dataset_dir", tree, "--output_root", tmp_path / "out", "--run_name", "check",
                      "--num_workers", 2, configs=("check_data.json",), check=False)  # fmt: skip
    assert done.returncode == 1, done.stderr[-3000:]
    out = tmp_path / "out" / "check"
    series = pd.read_csv(out / "check.csv", dtype={"patient_id": str, "series_id": str})
    assert_exact(truth, series)
    assert (series["usable"] == 0).sum() == (truth["harmful"] == 1).sum() >= 19
    failed = pd.read_csv(out / "failed.csv")
    assert len(failed) == (truth["harmful"] == 1).sum()
    assert len(pd.read_csv(out / "problems.csv")) == 0
    assert list((tmp_path / "out" / "cache" / "index").iterdir())
    assert truth["series_id"].iloc[0] not in (out / "log.txt").read_text()
