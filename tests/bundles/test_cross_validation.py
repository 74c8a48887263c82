# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Folds, cross-validation and own data as users run them, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from demo.dataset import Options, write_dataset
from demo.faults import sow

RSNA = "rsna_cnn_lstm"
SMALL = (
    "--backbone_name", "test_efficientnet", "--device", "cpu", "--num_workers", 0, "--volume_size", "[40,40,8]",
    "--image_size", "[32,32]", "--num_slices", 4, "--hidden_size", 16,
)  # fmt: skip
CONFIGS = ("train.json", "cross_validate.json")
RESULTS = ("predictions.csv", "series_predictions.csv", "solution.csv", "metrics.json", "folds.csv")


def arguments(phantoms: Path, out: Path, cache: Path) -> tuple[object, ...]:
    return (
        "--dataset_dir", phantoms, "--output_root", out, "--run_name", "cv", "--cache_dir", cache, *SMALL,
        "--num_folds", 5, "--max_epochs", 2, "--batch_size", 16, "--n_resamples", 50, "--weighted_sampling", True,
        "--train#trainer#accumulation_steps", 2, "--skip_failed", True, "--report", False,
    )  # fmt: skip


def kill_when(command: list[str], cwd: Path, reached: Callable[[], bool], log: Path) -> None:
    """Starts a command and kills it and all its children at some point, as a machine does that goes down."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=cwd, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        deadline = time.time() + 600
        while not reached():
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.time() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def sown(tmp_path: Path) -> tuple[Path, pd.DataFrame]:
    """A synthetic tree of 330 patients with faults of every kind in 5 % of the series, and what was sown."""
    tree = tmp_path / "rsna"
    write_dataset(tree, patients=330, seed=3, options=Options(size=64, slices=16), workers=2, progress=False)
    return tree, sow(tree, 0.05, seed=3)


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_numbers(root, run_bundle, sown, tmp_path):
    bundle, cache = root / "bundles" / RSNA, tmp_path / "cache"
    phantoms, faults = sown
    harmful = set(faults.loc[faults["harmful"] == 1, "series_id"])
    usable = {path.parent.name for path in (phantoms / "train_images").glob("*/*") if path.name not in harmful}
    whole, parts = tmp_path / "whole" / "cv", tmp_path / "parts" / "cv"
    done = run_bundle(RSNA, *arguments(phantoms, tmp_path / "whole", cache), configs=CONFIGS, cwd=root, check=False)
    assert done.returncode == 1  # for the series that were left out
    assert {Path(image).name for image in pd.read_csv(whole / "failed.csv")["image"]} == harmful
    assert f"pooled score of {len(usable)} patients" in done.stdout
    assert "fold 4 (5 of 5)" in done.stdout
    again = [str(word) for word in (*arguments(phantoms, tmp_path / "parts", cache), "--resume", "latest")]
    configs = str([f"configs/{name}" for name in CONFIGS])
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", configs]
    # in the second fold, between its two epochs: from the bundle's folder this time
    first = [word for word in again if word not in ("--resume", "latest")]
    checkpoints = parts / "fold_1" / "checkpoints"
    kill_when([*command, *first], bundle, lambda: any(checkpoints.glob("checkpoint_*.pt")), tmp_path / "log.txt")
    assert json.loads((parts / "fold_0" / "run.json").read_text())["result"].startswith("completed")
    assert not (parts / "predictions.csv").exists()
    # as if a second time between the start of an evaluation and its end, and before the first checkpoint of a fold
    state = json.loads((parts / "fold_0_scores" / "run.json").read_text())
    (parts / "fold_0_scores" / "run.json").write_text(json.dumps({**state, "result": "started"}))
    (parts / "fold_0_scores" / "predictions.csv").unlink()
    (parts / "fold_2").mkdir()
    shutil.copy(parts / "fold_1" / "config.json", parts / "fold_2" / "config.json")
    done = subprocess.run([*command, *again], cwd=bundle, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stderr[-2000:]
    started = re.findall(r"run folder: (.*)", done.stdout)
    assert [Path(line).name for line in started] == [
        "cv",
        "fold_0_scores",
        "fold_1",
        "fold_1_scores",
        *(f"fold_{k}{part}" for k in (2, 3, 4) for part in ("", "_scores")),
    ]  # fold_0 was finished
    assert f"resumed from {checkpoints}" in done.stdout
    assert f"no checkpoint in {parts / 'fold_2' / 'checkpoints'} yet" in done.stdout
    for name in RESULTS:
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    assert json.loads((parts / "metrics.json").read_text())["score"]["low"] is not None
    assert json.loads((parts / "fold_2" / "config.json").read_text())["train"]["trainer"]["accumulation_steps"] == 2


@pytest.mark.slow
def test_own_data_with_a_label_table_of_its_own_by_config_alone(run_bundle, phantoms, tmp_path):
    """Pancreas, two classes, no any-injury term; one row a patient."""
    classes = [{"name": "healthy"}, {"name": "tumour", "loss_weight": 2, "score_weight": 2}]
    (tmp_path / "pancreas.json").write_text(json.dumps({"groups": [{"name": "pancreas", "classes": classes}]}))
    patients = sorted(path.name for path in (phantoms / "train_images").iterdir())
    images = [f"train_images/{patient}" for patient in patients]
    table = pd.DataFrame({"image": images, "pancreas": ["healthy", "tumour"] * 12})
    table.to_csv(tmp_path / "own.csv", index=False)
    data = ("--dataset_dir", phantoms, "--datalist", tmp_path / "own.csv", "--labels_file", tmp_path / "pancreas.json")
    folds = ("--folds_file", tmp_path / "folds.csv")
    done = run_bundle(RSNA, *data, *folds, "--num_folds", 3, "--test_fraction", 0.25, configs=("folds.json",))
    assert "pancreas_tumour" in done.stdout
    again = run_bundle(RSNA, *data, *folds, configs=("folds.json",), check=False)
    assert again.returncode == 1
    assert "exists already and is never overwritten" in again.stderr.strip().splitlines()[-1]
    run_bundle(RSNA, *data, *folds, "--output_root", tmp_path, "--run_name", "own", "--max_epochs", 1, *SMALL)
    options = ("--weights", tmp_path / "own" / "model.pt", "--n_resamples", 20, "--part", "test")
    run_bundle(RSNA, *data, *folds, *options, "--output_root", tmp_path, "--run_name", "scores", *SMALL,
               configs=("train.json", "evaluate.json"))  # fmt: skip
    predictions = pd.read_csv(tmp_path / "scores" / "predictions.csv", dtype={"patient_id": str})
    assert list(predictions) == ["patient_id", "pancreas_healthy", "pancreas_tumour"]
    tested = pd.read_csv(tmp_path / "folds.csv", dtype=str).query("fold == 'test'")["patient_id"]
    assert set(predictions["patient_id"]) == set(tested)
    assert set(json.loads((tmp_path / "scores" / "metrics.json").read_text())["score_terms"]) == {"pancreas"}
