# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Unit test of the bundle's training in several processes, in the Model Zoo's form: one a GPU, or two on a CPU."""

from __future__ import annotations

import os
import shutil
import tempfile
import unittest
from typing import Any

import nibabel as nib
import numpy as np
import torch
from parameterized import parameterized
from utils import export_config_and_run_mgpu_cmd

BUNDLE_ROOT = "models/voco2d_pretrain"

TEST_CASE_1 = [
    {
        "bundle_root": BUNDLE_ROOT,
        "run_name": "train_mgpu",
        "max_epochs": 1,
        "batch_size": 2,
        "num_workers": 0,
        "val_fraction": 0.25,
        "volume_size": [96, 96, 8],
        "crop_size": [32, 32],
        "num_slices": 2,
        "hidden_size": 32,
    }
]


class TestVoco2dPretrainMGPU(unittest.TestCase):
    def setUp(self) -> None:
        self.dataset_dir = tempfile.mkdtemp()
        self.output_root = tempfile.mkdtemp()
        x, y = np.mgrid[-1:1:64j, -1:1:64j]
        body = ((x / 0.8) ** 2 + (y / 0.6) ** 2 < 1)[..., None]  # a noisy ellipse of soft tissue in air, in HU
        for number in range(8):
            volume = np.where(body, np.random.default_rng(number).normal(50, 30, (64, 64, 16)), -1000)
            image = nib.Nifti1Image(volume.astype(np.int16), np.diag([6, 6, 5, 1]))
            nib.save(image, os.path.join(self.dataset_dir, f"volume_{number}.nii.gz"))

    def tearDown(self) -> None:
        shutil.rmtree(self.dataset_dir)
        shutil.rmtree(self.output_root)

    @parameterized.expand([TEST_CASE_1])
    def test_train_mgpu_config(self, override: dict[str, Any]) -> None:
        override = {**override, "dataset_dir": self.dataset_dir, "output_root": self.output_root}
        n_gpu = torch.cuda.device_count()
        if n_gpu == 0:
            override |= {"backend": "gloo", "device": "cpu"}
        configs = os.path.join(BUNDLE_ROOT, "configs")
        export_config_and_run_mgpu_cmd(
            config_file=[os.path.join(configs, name) for name in ("train.json", "multi_gpu_train.json")],
            logging_file=os.path.join(configs, "logging.conf"),
            meta_file=os.path.join(configs, "metadata.json"),
            override_dict=override,
            output_path=os.path.join(self.dataset_dir, "train_override.json"),
            ngpu=n_gpu or 2,
        )
        self.assertTrue(os.path.isfile(os.path.join(self.output_root, "train_mgpu", "model.pt")))


if __name__ == "__main__":
    unittest.main()
