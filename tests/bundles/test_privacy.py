# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A run over a PACS export, whose folders and files are named by UIDs: none is said, and nothing of the headers."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from networks import Backbone
from pydicom.uid import generate_uid

from bundles.rsna_cnn_lstm.scripts.network import CNNLSTM
from tests.transforms.ct_factory import PRIVATE, ct_slice, save

TINY = ("--backbone_name", "test_efficientnet", "--device", "cpu", "--num_workers", 0, "--volume_size", "[40,40,8]",
        "--image_size", "[32,32]", "--num_slices", 4, "--hidden_size", 16)  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    network = CNNLSTM(Backbone("test_efficientnet"), num_logits=11, hidden_size=16)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def export(tmp_path: Path) -> tuple[Path, list[str]]:
    """A readable series, one with a missing slice, and a folder with two; all UIDs, those of folders too."""
    uids = []
    for fault in ("none", "missing", "two series"):
        study, series, other = (generate_uid() for _ in range(3))
        uids += [study, series, other]
        for k in range(8):
            ds = ct_slice(k, size=64)
            ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = study, series, generate_uid()
            if fault == "two series" and k > 5:
                ds.SeriesInstanceUID = other
            uids.append(ds.SOPInstanceUID)
            if fault != "missing" or k != 4:
                save(ds, tmp_path / "export" / study / series / f"{ds.SOPInstanceUID}.dcm")
        (tmp_path / "export" / study / series / "notes.txt").write_text("skipped, and reported")
    return tmp_path / "export", uids


def test_no_uid_and_no_person_in_logs(run_bundle, weights, export, tmp_path):
    folder, uids = export
    arguments = ("--dataset_dir", folder, "--output_root", tmp_path, "--run_name", "a", "--weights", weights)
    done = run_bundle("rsna_cnn_lstm", *arguments, *TINY, configs=("inference.json",), check=False)
    assert done.returncode == 1  # two of the three
    log = (tmp_path / "a" / "log.txt").read_text()
    assert "1 files skipped" in log
    for said in (log, done.stdout, done.stderr):
        assert not [text for text in (*uids, *PRIVATE) if text in said]
    written = "".join(path.read_text() for path in (tmp_path / "a").rglob("*.*") if path.is_file())
    assert not [text for text in PRIVATE if text in written]
    failed = pd.read_csv(tmp_path / "a" / "failed.csv")
    assert len(failed) == 2
    assert all(uid in " ".join(failed.image) for uid in (uids[11], uids[12], uids[22], uids[23]))
