# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The synthetic tree: layout, tables, determinism, DICOM and segmentation geometry, refusals of the command line."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest

from demo.dataset import COLUMNS, GROUPS, Options, main, make_patient, write_dataset

OPTIONS = Options(size=64, slices=20, prevalence=0.5, series_per_patient=1.4, segmentations=0.5)
PATIENTS, SEED = 12, 3


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set, written by two processes."""
    out = tmp_path_factory.mktemp("synthetic") / "rsna"
    return write_dataset(out, patients=PATIENTS, seed=SEED, options=OPTIONS, workers=2, progress=False)


def _digests(folder: Path, patterns: tuple[str, ...] = ("**/*",)) -> dict[str, str]:
    files = (p for pattern in patterns for p in sorted(folder.glob(pattern)) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_seed_gives_the_same_bytes_whatever_the_workers(tree: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "b", patients=PATIENTS, seed=SEED, options=OPTIONS, workers=1, progress=False)
    assert _digests(tree) == _digests(other)


def test_a_patient_does_not_depend_on_the_number_of_patients(tree: Path, tmp_path: Path) -> None:
    few = write_dataset(tmp_path / "few", patients=2, seed=SEED, options=OPTIONS, workers=1, progress=False)
    dicom = _digests(few, ("train_images/**/*.dcm", "segmentations/*"))
    assert len(dicom) > 30
    assert dicom.items() <= _digests(tree).items()
    rows = (few / "train.csv").read_text().splitlines()
    assert (tree / "train.csv").read_text().splitlines()[: len(rows)] == rows


def test_another_seed_gives_other_images(tree: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "b", patients=1, seed=SEED + 1, options=OPTIONS, workers=1, progress=False)
    images = ("train_images/**/*.dcm",)
    assert not set(_digests(tree, images).values()) & set(_digests(other, images).values())


def test_layout_and_tables_agree(tree: Path) -> None:
    train, meta = pd.read_csv(tree / "train.csv"), pd.read_csv(tree / "train_series_meta.csv")
    images = pd.read_csv(tree / "image_level_labels.csv")
    assert list(train.columns) == ["patient_id", *COLUMNS, "any_injury"]
    assert len(COLUMNS) == 13
    healthy = pd.DataFrame({group: train[f"{group}_healthy"] for group in GROUPS})
    for group in GROUPS:
        assert (train.filter(regex=f"^{group}_").sum(axis=1) == 1).all()
    assert (train["any_injury"] == (healthy.min(axis=1) == 0)).all()
    assert list(meta.columns) == ["patient_id", "series_id", "aortic_hu", "incomplete_organ"]
    assert list(images.columns) == ["patient_id", "series_id", "instance_number", "injury_name"]
    folders = {tuple(map(int, p.parts[-2:])) for p in tree.glob("train_images/*/*")}
    assert folders == set(zip(meta["patient_id"], meta["series_id"], strict=True))
    assert set(meta["patient_id"]) == set(train["patient_id"]) == set(range(10001, 10001 + PATIENTS))
    assert meta["series_id"].is_unique
    assert len(meta) > PATIENTS
    for row in images.itertuples():
        assert (tree / f"train_images/{row.patient_id}/{row.series_id}/{row.instance_number}.dcm").is_file()
    for group, name in (("bowel", "Bowel"), ("extravasation", "Active_Extravasation")):
        injured = set(train.loc[train[f"{group}_injury"] == 1, "patient_id"])
        assert set(images.loc[images["injury_name"] == name, "patient_id"]) == injured
        assert injured
    assert (tree / "README.txt").read_text().startswith("SYNTHETIC")
    assert "interrupted" not in (tree / "README.txt").read_text()


def test_image_level_labels_point_at_slices_with_the_injury(tree: Path) -> None:
    images = pd.read_csv(tree / "image_level_labels.csv")
    codes = {"Bowel": 4, "Active_Extravasation": 5}
    for index in range(4):
        patient = make_patient(SEED, index, OPTIONS)
        for k, scan in enumerate(patient.scans):
            injury = patient.render(k).injury
            mine = images[images["series_id"] == patient.series_id(k)]
            for name, code in codes.items():
                area = (injury == code).sum(axis=(1, 2)) * scan.pixel**2
                expected = {scan.instance_number(z) for z in np.flatnonzero(area >= 20)}
                assert set(mine.loc[mine["injury_name"] == name, "instance_number"]) == expected


def test_series_read_by_highdicom_have_the_true_geometry_and_hu(tree: Path) -> None:
    for index in range(4):
        patient = make_patient(SEED, index, OPTIONS)
        rendered = patient.render()
        folder = tree / "train_images" / str(patient.patient_id) / str(patient.series_id(0))
        files = [pydicom.dcmread(f) for f in sorted(folder.glob("*.dcm"))]
        volume = hd.get_volume_from_series(files)
        scan = rendered.scan
        assert volume.spatial_shape == rendered.hu.shape
        assert volume.spacing == pytest.approx((scan.spacing, scan.pixel, scan.pixel), abs=1e-4)
        if np.asarray(volume.affine)[2, 0] < 0:
            volume = volume[::-1]
        assert np.array_equal(volume.array, rendered.hu)
        corner = np.asarray(volume.affine) @ [0, 0, 0, 1]
        assert corner[:3] == pytest.approx([*scan.first_pixel, scan.lowest], abs=1e-4)
        inside = rendered.hu[rendered.labels == 1]
        assert 20 < np.median(inside) < 140
        assert rendered.hu[rendered.hu > -2000].min() >= -1024
        assert rendered.hu.max() > 250


def test_every_file_is_ct_and_says_synthetic(tree: Path) -> None:
    uids, orders, padded = set(), set(), set()
    for folder in sorted(tree.glob("train_images/*/*")):
        files = [pydicom.dcmread(f) for f in folder.glob("*.dcm")]
        for ds in files:
            assert ds.SOPClassUID == pydicom.uid.CTImageStorage
            assert str(ds.PatientName) == "SYNTHETIC^PHANTOM"
            assert "SYNTHETIC" in ds.ImageComments
            assert "SYNTHETIC" in ds.Manufacturer
            assert ds.RescaleIntercept == -1024
            assert ds.SOPInstanceUID.startswith("2.25.")
            assert ds.SOPInstanceUID.is_valid
            assert ds.SOPInstanceUID == ds.file_meta.MediaStorageSOPInstanceUID
            uids.add(ds.SOPInstanceUID)
        ordered = sorted(files, key=lambda ds: ds.InstanceNumber)
        orders.add(ordered[0].ImagePositionPatient[2] > ordered[-1].ImagePositionPatient[2])
        padded.add("PixelPaddingValue" in ordered[0])
        assert len({ds.SeriesInstanceUID for ds in files}) == len({ds.FrameOfReferenceUID for ds in files}) == 1
    assert len(uids) == len(list(tree.glob("train_images/*/*/*.dcm")))
    assert orders == padded == {True, False}


def test_segmentations_lie_where_the_images_do(tree: Path) -> None:
    files = sorted(tree.glob("segmentations/*.nii"))
    assert 2 <= len(files) < len(list(tree.glob("train_images/*/*")))
    for file in files:
        image = nib.load(file)
        (folder,) = tree.glob(f"train_images/*/{file.stem}")
        volume = hd.get_volume_from_series([pydicom.dcmread(f) for f in folder.glob("*.dcm")])
        if np.asarray(volume.affine)[2, 0] < 0:
            volume = volume[::-1]
        labels = np.asarray(image.dataobj)
        assert labels.shape == volume.spatial_shape[::-1]
        index = np.array([[0, 0, 0], np.array(labels.shape) - 1])
        lps = np.c_[index[:, ::-1], [1, 1]] @ np.asarray(volume.affine).T
        ras = np.c_[index, [1, 1]] @ image.affine.T
        assert np.allclose(ras[:, :3], lps[:, :3] * [-1, -1, 1], atol=1e-3)
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        assert {1, 2, 3, 4, 5} <= set(np.unique(labels))
        world = {
            k: (np.argwhere(labels == k).mean(0) @ image.affine[:3, :3].T + image.affine[:3, 3]) for k in range(1, 6)
        }
        assert world[1][0] > 20 > -20 > world[2][0]  # RAS: the liver to the right, the spleen to the left
        assert world[4][0] > 20 > -20 > world[3][0]
        assert min(world[1][2], world[2][2]) > max(world[3][2], world[4][2], world[5][2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--patients", "0"], "patients: expected at least 1"),
        (["--workers", "0"], "workers"),
        (["--seed", "-1"], "seed"),
        (["--prevalence", "1.5"], "prevalence: expected 0 to 1, found 1.5"),
        (["--conspicuity", "0"], "conspicuity"),
        (["--size", "8"], "size"),
        (["--slices", "2"], "slices"),
        (["--series-per-patient", "3"], "series_per_patient"),
        (["--segmentations", "-0.1"], "segmentations"),
        (["--colour", "red"], "unrecognized arguments"),
    ],
)
def test_command_line_refuses(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as failure:
        main([str(tmp_path / "out"), *arguments])
    assert failure.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_overwrites_a_synthetic_data_set_only_when_asked_and_nothing_else_ever(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    small = ["--patients", "1", "--size", "32", "--slices", "8", "--workers", "1"]
    out = tmp_path / "out"
    main([str(out), *small])
    first = _digests(out)
    with pytest.raises(SystemExit):
        main([str(out), *small])
    assert "expected an empty folder" in capsys.readouterr().err
    main([str(out), *small, "--overwrite"])
    assert _digests(out) == first
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit):
        main([str(mine), *small, "--overwrite"])
    assert (mine / "thesis.txt").read_text() == "years of work"
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit):
        main([str(out), *small, "--overwrite"])
    assert (out / "thesis.txt").is_file()


def test_workers_import_neither_torch_nor_monai(root: Path) -> None:
    code = "import sys, demo.dataset; sys.exit(bool({'torch', 'monai'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_help_names_every_option(root: Path) -> None:
    command = [sys.executable, "-m", "demo.dataset", "--help"]
    text = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    for name in ("patients", "seed", "size", "slices", "prevalence", "conspicuity", "series-per-patient", "overwrite"):
        assert f"--{name}" in text
    assert "SYNTHETIC" in text
