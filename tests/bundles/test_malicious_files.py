# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The commands, given a weights file that holds code: refused with our message last, and the code never runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

VOCO, RSNA = "voco2d_pretrain", "rsna_cnn_lstm"
SMALL = ("--backbone_name", "test_efficientnet", "--device", "cpu", "--num_workers", 0)
TRAIN = (*SMALL, "--hidden_size", 16, "--max_epochs", 1, "--volume_size", "[48,48,8]", "--num_slices", 4)
CROPS = ("--crop_size", "[16,16]", "--val_fraction", 0.25, "--exclude", "['*organs*']")
RUNS = {
    "pretrained_path of the pretraining": (VOCO, "train.json", ".", "{evil}", "--pretrained_path", (*TRAIN, *CROPS)),
    "resume": (VOCO, "train.json", ".", "{evil}", "--resume", (*TRAIN, *CROPS)),
    "weights of the classifier": (RSNA, "inference.json", "crlm_ct_1004", "['{evil}']", "--weights", SMALL),
}


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_refuses_a_file_with_code(run_bundle, data_dir, tmp_path, name):
    bundle, config, data, value, flag, options = RUNS[name]
    evil = tmp_path / "checkpoint_1.pt"
    torch.save({"network": {"a": torch.zeros(1)}, "optimizer": Malicious(tmp_path / "marker")}, evil)
    done = run_bundle(
        bundle, "--dataset_dir", data_dir / data, "--output_root", tmp_path / "out", "--run_name", "a",
        flag, value.format(evil=evil), *options, configs=(config,), check=False,
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{evil}: refused, it holds more than tensors" in last
    assert "posix.system" in last
    assert not (tmp_path / "marker").exists()
