# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Sown faults: each kind occurs, is listed, touches nothing else, and the reader refuses exactly the harmful ones."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pandas as pd
import pytest
from transforms import LoadSeries, SeriesError

from demo.dataset import Options, write_dataset
from demo.faults import HARMFUL, HARMLESS, main, sow

# a part of the reader's message, so that no series is refused for another reason than its fault
REASONS = {
    "missing slices": "2 missing between",
    "different duplicate": "one image at each position",
    "two series": "one series, found 2",
    "mixed pixel spacing": "expected the pixel spacing",
    "mixed orientation": "expected the orientation",
    "gantry tilt": "gantry tilt of 15.0 degrees",
    "non-uniform spacing": "expected evenly spaced slices, found steps",
    "mixed matrix size": "expected the rows and columns",
    "truncated pixel data": "truncated or damaged",
    "no rescale slope": "in RescaleSlope, found none",
    "8-bit images": "8 bits allocated",
    "undecodable transfer syntax": "found the transfer syntax MPEG2",
    "coronal": "found coronal ones",
    "multi-frame": "multi-frame object of 2",
    "one slice": "at least 2 slices, found 1",
    "0-byte files": "expected a DICOM file, found 0 bytes",
    "0-byte first slice": "expected a DICOM file, found 0 bytes",
    "absurd rows": "x 60000 x",
    "no position": "in ImagePositionPatient, found none",
    "several frames of reference": "one FrameOfReferenceUID, found 2",
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "clean"
    options = Options(size=32, slices=11, series_per_patient=1.5)
    return write_dataset(folder, patients=32, options=options, workers=1, progress=False)


def _digests(tree: Path) -> dict[str, str]:
    return {
        str(p.relative_to(tree)): hashlib.sha256(p.read_bytes()).hexdigest() for p in tree.rglob("*") if p.is_file()
    }


def test_the_reader_refuses_the_harmful_ones_alone(clean: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(clean, tmp_path / "tree")
    faults = sow(tree, share=0.5, seed=0)
    assert set(faults.fault) == set(HARMFUL) | set(HARMLESS)
    assert faults.equals(pd.read_csv(tree / "faults.csv", dtype={"patient_id": str, "series_id": str}))
    truth = {(row.patient_id, row.series_id): row for row in faults.itertuples()}
    for folder in (tree / "train_images").glob("*/*"):
        row = truth.get((folder.parent.name, folder.name))
        if row is None or not row.harmful:
            LoadSeries()(folder)
        else:
            with pytest.raises(SeriesError) as refused:
                LoadSeries()(folder)
            assert REASONS[row.fault] in str(refused.value)


def test_what_is_not_listed_is_not_touched(clean: Path, tmp_path: Path) -> None:
    trees = [shutil.copytree(clean, tmp_path / name) for name in "ab"]
    faults = sow(trees[0], share=0.1, seed=3)
    assert sow(trees[1], share=0.1, seed=3).equals(faults)
    assert _digests(trees[0]) == _digests(trees[1])  # the seed decides every byte
    before, after = _digests(clean), _digests(trees[0])
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)} - {"faults.csv"}
    assert {tuple(Path(name).parts[1:3]) for name in changed} == set(
        zip(faults.patient_id, faults.series_id, strict=True)
    )
    # small trees have the rows of the fault table
    assert list(HARMFUL)[: faults.harmful.sum()] == sorted(faults[faults.harmful == 1].fault, key=list(HARMFUL).index)


def test_only_synthetic_trees_and_only_once(clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "real").mkdir()
    with pytest.raises(ValueError, match="real: expected a synthetic tree"):
        sow(tmp_path / "real", share=0.1)
    with pytest.raises(ValueError, match=r"share: expected above 0 to 0\.5, found 0"):
        sow(clean, share=0)
    with pytest.raises(ValueError, match="at least 500 series for one fault"):
        sow(clean, share=0.001)
    tree = shutil.copytree(clean, tmp_path / "tree")
    main([str(tree), "--share", "0.03", "--seed", "1"])
    assert len(pd.read_csv(tree / "faults.csv")) == 2 * round(0.03 * len(list(clean.glob("train_images/*/*"))))
    with pytest.raises(SystemExit):
        main([str(tree)])
    assert "expected a tree without faults" in capsys.readouterr().err
