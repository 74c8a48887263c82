# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What a user asks of a prediction on the command line: two weights files, flips, calibration, pseudonyms, Kaggle's
file, and a refusal where the input is not the training's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from networks import Backbone
from workflow.privacy import pseudonym

from bundles.rsna_cnn_lstm.scripts.calibration import Calibration
from bundles.rsna_cnn_lstm.scripts.labels import LabelTable
from bundles.rsna_cnn_lstm.scripts.network import CNNLSTM

BUNDLE = "rsna_cnn_lstm"
SETTINGS = {
    "backbone_name": "test_efficientnet", "volume_size": [40, 40, 8], "image_size": [32, 32], "num_slices": 4,
    "hidden_size": 16,
}  # fmt: skip
OPTIONS = [word for name, value in SETTINGS.items() for word in (f"--{name}", json.dumps(value).strip('"'))]
OPTIONS += ["--device", "cpu", "--num_workers", 0]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folds(tmp_path_factory) -> list[Path]:
    """What the trainings of two folds leave: a flat file and a full checkpoint, each with its config."""
    files = []
    for seed, name in enumerate(("model.pt", "checkpoints/checkpoint_9.pt")):
        torch.manual_seed(seed)
        state = CNNLSTM(Backbone("test_efficientnet"), num_logits=11, hidden_size=16).state_dict()
        head = [key for key in state if state[key].shape[:1] == (11,)]
        for key in head:
            state[key] = torch.randn_like(state[key])  # logits that differ from file to file
        file = tmp_path_factory.mktemp(f"fold{seed}") / name
        file.parent.mkdir(exist_ok=True)
        torch.save({"network": state, "epoch": 1} if seed else state, file)
        folder = file.parent.parent if seed else file.parent
        (folder / "config.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
        files.append(file)
    return files


@pytest.fixture(scope="module")
def studies(phantoms, tmp_path_factory) -> Path:
    """Kaggle's test tree: two patients."""
    top = tmp_path_factory.mktemp("kaggle")
    for patient in sorted((phantoms / "train_images").iterdir())[:2]:
        (top / "test_images").mkdir(exist_ok=True)
        (top / "test_images" / patient.name).symlink_to(patient)
    return top


@pytest.fixture
def infer(run_bundle, studies, tmp_path):
    def run(name: str, weights: object, *options: object, data: Path = studies, **keywords):
        done = run_bundle(BUNDLE, "--dataset_dir", data, "--output_root", tmp_path, "--run_name", name, "--weights",
                          weights, *OPTIONS, *options, configs=("inference.json",), **keywords)  # fmt: skip
        return done, tmp_path / name

    return run


def log_odds(folder: Path) -> np.ndarray:
    """Differences of logits to the healthy class, [series, injured classes]: what a mean of logits averages."""
    table = LabelTable.from_file(Path("bundles") / BUNDLE / "configs" / "labels.json")
    frame = np.log(pd.read_csv(folder / "series_predictions.csv")[list(table.columns)])
    return np.stack([frame[c] - frame[g.columns[0]] for g in table.groups for c in g.columns[1:]], axis=1)


def test_two_folds_are_the_mean_of_their_logits(infer, folds, studies):
    single = [log_odds(infer(f"fold{k}", file)[1]) for k, file in enumerate(folds)]
    done, folder = infer("both", str([str(file) for file in folds]))
    total = len(torch.load(folds[0], weights_only=True))
    for file in folds:
        assert f"{total} of {total} network tensors loaded from {file}" in done.stdout
    np.testing.assert_allclose(log_odds(folder), (single[0] + single[1]) / 2, atol=1e-4)
    assert np.abs(single[0] - single[1]).max() > 0.1
    submission = pd.read_csv(folder / "submission.csv", dtype=str)
    assert submission["patient_id"].tolist() == sorted(p.name for p in (studies / "test_images").iterdir())
    assert submission.shape == (2, 14)


def test_other_input_than_in_training_is_refused(infer, folds):
    done, folder = infer("other", str([str(file) for file in folds]), "--num_slices", 8, "--window", "[-100, 300]",
                         check=False)  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0
    for file in folds:
        assert f"{file}: num_slices was 4 in training and is 8 here" in last
    assert "--allow_config_mismatch True" in last
    assert "window" not in last  # not in this training's config: cannot be compared
    assert not folder.exists()
    done, folder = infer("other", folds[0], "--num_slices", 8, "--allow_config_mismatch", True, "--tta", "['x','y']")
    assert "settings differ from those of the training (allowed)" in done.stdout + done.stderr
    assert "1 weights files, 3 views each" in done.stdout
    assert (folder / "submission.csv").is_file()


def test_evaluate_calibrate_and_evaluate_again(run_bundle, folds, phantoms, tmp_path):
    def evaluate(name: str, *options: object) -> Path:
        run_bundle(BUNDLE, "--dataset_dir", phantoms, "--output_root", tmp_path, "--run_name", name, "--weights",
                   folds[0], "--num_folds", 2, "--n_resamples", 20, *OPTIONS, *options,
                   configs=("train.json", "evaluate.json"))  # fmt: skip
        return tmp_path / name

    plain = evaluate("plain")
    done = run_bundle(BUNDLE, "--predictions", plain, "--method", "vector", "--num_folds", 3, "--n_resamples", 20,
                      "--output_root", tmp_path, "--run_name", "fit", configs=("calibrate.json",))  # fmt: skip
    assert "cross_fitted" in done.stdout
    figures = pd.read_csv(tmp_path / "fit" / "before_after.csv", index_col="figure")
    assert figures.loc["score", "after"] < figures.loc["score", "before"]
    file = tmp_path / "fit" / "calibration.json"
    again = evaluate("again", "--calibration", file, "--anonymise", True)
    table = LabelTable.from_file(Path("bundles") / BUNDLE / "configs" / "labels.json")
    series = [pd.read_csv(path / "series_predictions.csv", dtype={"patient_id": str}) for path in (plain, again)]
    expected = Calibration.from_file(file, table).apply(series[0])
    expected["patient_id"] = expected["patient_id"].map(pseudonym)
    expected["series_id"] = expected["series_id"].astype(str).map(pseudonym)
    columns = ["patient_id", "series_id", *table.columns]
    expected = expected.sort_values(columns[:2], ignore_index=True)
    pd.testing.assert_frame_equal(series[1][columns], expected[columns], rtol=1e-6)
    metrics = json.loads((again / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["calibration"] == "vector"
    assert metrics["score"]["value"] == pytest.approx(figures.loc["score", "after"], rel=1e-4)
    assert not (again / "submission.csv").exists()
