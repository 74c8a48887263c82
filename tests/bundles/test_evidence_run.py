# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Inference with `evidence` and `dicom_sr` as a user calls it, on phantoms of which one is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from matplotlib.image import imread
from networks import Backbone
from transforms import LoadSeries

from bundles.rsna_cnn_lstm.scripts.network import CNNLSTM

RSNA, SLICES = "rsna_cnn_lstm", 6
NETWORK = ("--backbone_name", "test_efficientnet", "--neighbours", 1, "--slice_pool", "attention", "--hidden_size", 8,
           "--volume_size", "[72,72,16]", "--image_size", "[64,64]", "--num_slices", SLICES, "--num_workers", 0,
           "--device", "cpu")  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    network = CNNLSTM(Backbone("test_efficientnet", in_channels=3), hidden_size=8, slice_pool="attention")
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.slow
def test_evidence_and_reports_of_a_run_with_a_bad_series(run_bundle, weights, phantoms, data_dir, tmp_path):
    studies = tmp_path / "studies"
    for number, series in enumerate(sorted((phantoms / "train_images").glob("*/*"))[:2]):
        (studies / f"s{number}").mkdir(parents=True)
        for file in series.iterdir():
            (studies / f"s{number}" / file.name).symlink_to(file)
    (studies / "s2.nii.gz").symlink_to(data_dir / "cptac_pda_c3l_00189.nii.gz")
    broken = sorted((studies / "s0").iterdir())[10]
    content = broken.read_bytes()
    broken.unlink()
    broken.write_bytes(content[: len(content) // 2])
    done = run_bundle(RSNA, "--dataset_dir", studies, "--output_root", tmp_path, "--run_name", "run",
                      "--weights", weights, "--evidence", True, "--evidence_slices", 2, "--dicom_sr", True, *NETWORK,
                      configs=("inference.json",), check=False)  # fmt: skip
    run = tmp_path / "run"
    assert done.returncode == 1
    assert pd.read_csv(run / "failed.csv")["image"].tolist() == [str(studies / "s0")]
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.parent.name in ("evidence", "sr", "series")}
    assert found == {
        *(f"evidence/00000{n}.{kind}" for n in (1, 2) for kind in ("png", "json")),
        "series/000001.json", "series/000002.json", "sr/000001.dcm",
    }  # fmt: skip
    check_evidence(run, LoadSeries()(studies / "s1").affine, LoadSeries()(studies / "s1").shape[-1])
    report = pydicom.dcmread(run / "sr" / "000001.dcm")
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in (studies / "s1").iterdir()]
    (series,) = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    referenced = {item.ReferencedSOPInstanceUID for item in series.ReferencedSOPSequence}
    assert referenced == {header.SOPInstanceUID for header in headers}
    log = done.stdout + done.stderr + (run / "log.txt").read_text()
    assert "1 series are NIfTI files" in log
    assert not [uid for uid in referenced if uid in log]


def check_evidence(run: Path, affine: torch.Tensor, depth: int) -> None:
    """Numbers and picture of the first series."""
    predicted = json.loads((run / "series" / "000001.json").read_text())
    assert predicted["patient_id"] == "s1"
    evidence = json.loads((run / "evidence" / "000001.json").read_text())
    z = np.array(evidence["slice_z_mm"])
    ends = float(affine[2, 3]), float(affine[2, 3] + affine[2, 2] * (depth - 1))
    assert len(z) == SLICES
    assert (np.diff(z) > 0).all()
    assert ends[0] <= z[0] < ends[0] + 0.25 * (ends[1] - ends[0])
    assert ends[1] >= z[-1] > ends[1] - 0.25 * (ends[1] - ends[0])
    assert sum(evidence["attention"]) == pytest.approx(1)
    for name, group in evidence["groups"].items():
        injury = 1 - predicted["probabilities"][name]["healthy"]
        assert group["injury_log_odds"] == pytest.approx(np.log(injury / (1 - injury)), abs=1e-3)
        assert len(group["change"]) == SLICES
        assert group["top_slices"] == np.argsort(group["change"])[::-1][:2].tolist()
    picture = imread(run / "evidence" / "000001.png")
    assert min(picture.shape[:2]) > 600
    assert picture[..., :3].std() > 0.1


def test_neither_is_written_unless_asked_for(root):
    config = json.loads((root / "bundles" / RSNA / "configs" / "inference.json").read_text())
    assert config["evidence"] is False
    assert config["dicom_sr"] is False
    handlers = [h for h in config["handlers"] if isinstance(h, dict)]
    disabled = {h["_target_"]: h["_disabled_"] for h in handlers if "_disabled_" in h}
    assert disabled == {
        "scripts.evidence_writer.EvidenceWriter": "$not @evidence",
        "scripts.structured_report.StructuredReportWriter": "$not @dicom_sr",
    }
