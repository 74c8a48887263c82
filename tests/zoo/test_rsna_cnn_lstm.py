# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Unit tests of the bundle in the Model Zoo's form: train, evaluate, infer, on synthetic volumes (seconds on a CPU)."""

from __future__ import annotations

import csv
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

BUNDLE_ROOT = "models/rsna_cnn_lstm"
CLASSES = {
    "bowel": ("healthy", "injury"),
    "extravasation": ("healthy", "injury"),
    "kidney": ("healthy", "low"),
    "liver": ("healthy", "high"),
    "spleen": ("low", "healthy"),
}
SMALL = {"volume_size": [72, 72, 8], "image_size": [64, 64], "num_slices": 4, "num_workers": 0}

TEST_CASE_1 = [  # train, evaluate
    {"bundle_root": BUNDLE_ROOT, "max_epochs": 1, "batch_size": 2, "num_folds": 2, **SMALL}
]

# inference, with the weights of the bundle
TEST_CASE_2 = [{"bundle_root": BUNDLE_ROOT, **SMALL}]


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


class TestRsnaCnnLstm(unittest.TestCase):
    def setUp(self) -> None:
        sys.path.insert(0, BUNDLE_ROOT)  # properties are checked before MONAI's run() does so
        self.dataset_dir = tempfile.mkdtemp()
        self.output_root = tempfile.mkdtemp()
        self.datalist = os.path.join(self.dataset_dir, "datalist.csv")
        with open(self.datalist, "w", newline="") as file:
            table = csv.DictWriter(file, ["image", "patient_id", *CLASSES])
            table.writeheader()
            for number in range(8):
                image = f"volume_{number}.nii.gz"
                write_ct(os.path.join(self.dataset_dir, image), number)
                classes = {group: names[number % 2] for group, names in CLASSES.items()}
                table.writerow({"image": image, "patient_id": f"p{number}", **classes})

    def tearDown(self) -> None:
        sys.path.remove(BUNDLE_ROOT)
        shutil.rmtree(self.dataset_dir)
        shutil.rmtree(self.output_root)

    def paths(self, run_name: str) -> dict[str, str]:
        return {"dataset_dir": self.dataset_dir, "output_root": self.output_root, "run_name": run_name}

    @parameterized.expand([TEST_CASE_1])
    def test_train_eval_config(self, override: dict[str, Any]) -> None:
        override = {**override, "datalist": self.datalist}
        trainer = workflow("train", ["train.json"], {**override, **self.paths("train")})
        check_workflow(trainer, check_properties=True)
        weights = os.path.join(self.output_root, "train", "model.pt")
        self.assertTrue(os.path.isfile(weights))

        override |= {"weights": weights, "n_resamples": 20, **self.paths("evaluate")}
        # overrides train.json, thus the type is "train"
        validator = workflow("train", ["train.json", "evaluate.json"], override)
        check_workflow(validator, check_properties=True)
        self.assertTrue(os.path.isfile(os.path.join(self.output_root, "evaluate", "metrics.json")))

    @parameterized.expand([TEST_CASE_2])
    def test_infer_config(self, override: dict[str, Any]) -> None:
        inferrer = workflow("infer", ["inference.json"], {**override, **self.paths("infer")})
        check_workflow(inferrer, check_properties=True)
        with open(os.path.join(self.output_root, "infer", "predictions.csv"), newline="") as file:
            self.assertEqual(len(list(csv.DictReader(file))), 8)


if __name__ == "__main__":
    loader = unittest.TestLoader()
    loader.sortTestMethodsUsing = test_order
    unittest.main(testLoader=loader)
