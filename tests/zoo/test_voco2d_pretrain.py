# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Unit tests of the bundle in the Model Zoo's form: train, evaluate, infer, on synthetic volumes (seconds on a CPU)."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import unittest
from typing import Any

import nibabel as nib
import numpy as np
from monai.bundle import ConfigWorkflow
from parameterized import parameterized
from utils import check_workflow

BUNDLE_ROOT = "models/voco2d_pretrain"

TEST_CASE_1 = [  # train, evaluate
    {
        "bundle_root": BUNDLE_ROOT,
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

TEST_CASE_2 = [  # inference, with the weights of the bundle
    {"bundle_root": BUNDLE_ROOT, "num_workers": 0, "volume_size": [96, 96, 8], "num_slices": 4}
]


def test_order(test_name1: str, test_name2: str) -> int:
    def get_order(name: str) -> int:
        return 1 if "train" in name else 2

    return get_order(test_name1) - get_order(test_name2)


def write_ct(path: str, seed: int) -> None:
    """A noisy ellipse of soft tissue in air, in HU."""
    x, y = np.mgrid[-1:1:64j, -1:1:64j]
    body = ((x / 0.8) ** 2 + (y / 0.6) ** 2 < 1)[..., None]
    volume = np.where(body, np.random.default_rng(seed).normal(50, 30, (64, 64, 16)), -1000)
    nib.save(nib.Nifti1Image(volume.astype(np.int16), np.diag([6, 6, 5, 1])), path)


def workflow(kind: str, configs: list[str], override: dict[str, Any]) -> ConfigWorkflow:
    folder = os.path.join(BUNDLE_ROOT, "configs")
    return ConfigWorkflow(
        workflow_type=kind,
        config_file=[os.path.join(folder, name) for name in configs],
        logging_file=os.path.join(folder, "logging.conf"),
        meta_file=os.path.join(folder, "metadata.json"),
        **override,
    )


class TestVoco2dPretrain(unittest.TestCase):
    def setUp(self) -> None:
        sys.path.insert(0, BUNDLE_ROOT)  # properties are checked before MONAI's run() does so
        self.dataset_dir = tempfile.mkdtemp()
        self.output_root = tempfile.mkdtemp()
        for number in range(4):
            write_ct(os.path.join(self.dataset_dir, f"volume_{number}.nii.gz"), number)

    def tearDown(self) -> None:
        sys.path.remove(BUNDLE_ROOT)
        shutil.rmtree(self.dataset_dir)
        shutil.rmtree(self.output_root)

    def paths(self, run_name: str) -> dict[str, str]:
        return {"dataset_dir": self.dataset_dir, "output_root": self.output_root, "run_name": run_name}

    @parameterized.expand([TEST_CASE_1])
    def test_train_eval_config(self, override: dict[str, Any]) -> None:
        trainer = workflow("train", ["train.json"], {**override, **self.paths("train")})
        check_workflow(trainer, check_properties=True)
        run = os.path.join(self.output_root, "train")
        self.assertTrue(os.path.isfile(os.path.join(run, "model.pt")))

        (checkpoint,) = os.listdir(os.path.join(run, "checkpoints"))
        override = {**override, "checkpoint": os.path.join(run, "checkpoints", checkpoint)}
        # overrides train.json, thus the type is "train"
        validator = workflow("train", ["train.json", "evaluate.json"], {**override, **self.paths("evaluate")})
        check_workflow(validator, check_properties=True)
        self.assertTrue(os.path.isfile(os.path.join(self.output_root, "evaluate", "metrics.csv")))

    @parameterized.expand([TEST_CASE_2])
    def test_infer_config(self, override: dict[str, Any]) -> None:
        inferrer = workflow("infer", ["inference.json"], {**override, **self.paths("infer")})
        check_workflow(inferrer, check_properties=True)
        embeddings = os.listdir(os.path.join(self.output_root, "infer", "embeddings"))
        self.assertEqual(len(embeddings), 4)


if __name__ == "__main__":
    loader = unittest.TestLoader()
    loader.sortTestMethodsUsing = test_order
    unittest.main(testLoader=loader)
