# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A training that is killed by ``kill -9`` again and again ends with the same bits as one that is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workflow.small_training import assert_same

COMMON = {"backbone_name": "test_efficientnet", "device": "cpu", "batch_size": 2, "save_every_steps": 1}
ARGUMENTS = {
    "rsna_cnn_lstm": {
        "volume_size": [72, 72, 16],
        "image_size": [64, 64],
        "num_slices": 8,
        "hidden_size": 16,
        "num_folds": 3,
        "max_epochs": 4,
        "num_workers": 2,
        "weighted_sampling": True,
    },
    "voco2d_pretrain": {
        "volume_size": [96, 96, 16],
        "crop_size": [32, 32],
        "num_slices": 4,
        "hidden_size": 64,
        "val_fraction": 0.4,
        "max_epochs": 3,
        "num_workers": 0,
        "accumulation_steps": 2,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(("bundle", "kills"), [("rsna_cnn_lstm", 10), ("voco2d_pretrain", 6)])
def test_ten_kills_change_no_bit(root: Path, phantoms: Path, tmp_path: Path, bundle: str, kills: int) -> None:
    """In both bundles, with and without worker processes, also while a checkpoint or model.pt is being written."""
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 10**6))
    paths = {"dataset_dir": str(phantoms), "output_root": str(tmp_path)}
    options: dict[str, Any] = {"arguments": {**COMMON, **ARGUMENTS[bundle], **paths}}
    options |= {"kills": kills, "seed": seed, "out": str(tmp_path)}
    code = (root / "tests" / "bundles" / "killed_runs.py").read_text(encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, json.dumps(options)], cwd=root / "bundles" / bundle,
                          env=environment, capture_output=True, text=True, timeout=900)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    told = f"KILL_SEED={seed} {found}"
    log = (tmp_path / "killed.txt").read_text(encoding="utf-8")
    assert found["status"] == 0, told + log[-3000:]
    assert [kill["status"] for kill in found["kills"]] == [-signal.SIGKILL] * kills, told + log[-3000:]
    assert log.count("resumed from") > 2, told
    assert found["again"] == 0, told
    again = (tmp_path / "again.txt").read_text(encoding="utf-8")
    assert "nothing left to do" in again
    assert "best" not in again  # no further validation
    whole, killed = ({path.name: path for path in (tmp_path / name / "checkpoints").iterdir()}
                     for name in ("whole", "killed"))  # fmt: skip
    assert sorted(whole) == sorted(killed), told  # nothing is left over of what was half-written
    for name in whole:
        assert_same(torch.load(killed[name], weights_only=True), torch.load(whole[name], weights_only=True), told)
    models = [torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("killed", "whole")]
    assert_same(*models, told)
    assert not list((tmp_path / "killed").rglob("*.pt.*"))
