# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Slice labels and organ masks on the command line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

RSNA = "rsna_cnn_lstm"
SMALL = (
    "--backbone_name", "test_efficientnet", "--device", "cpu", "--num_workers", 0, "--volume_size", "[40,40,16]",
    "--image_size", "[32,32]", "--num_slices", 8, "--hidden_size", 16,
)  # fmt: skip
TRAIN = (*SMALL, "--max_epochs", 2, "--num_folds", 3, "--slice_loss_weight", 0.5)
ORGANS = ("--crop", "organs", "--organ_margin", 8, "--crop_missing", "body")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(run_bundle: Callable, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a training with slice labels on volumes cropped to the organs where there is a mask."""
    out = tmp_path_factory.mktemp("slices")
    run_bundle(RSNA, "--dataset_dir", phantoms, "--output_root", out, "--run_name", "whole", *TRAIN, *ORGANS)
    return out / "whole"


def scalars(run: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[float]] = {}
    for file in (run / "tensorboard").iterdir():
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend(event.value for event in events.Scalars(tag))
    return found


def test_the_slices_are_a_term_of_the_loss(trained: Path) -> None:
    found = scalars(trained)
    assert all(value > 0 for value in found["loss_slices"])
    assert len(found["loss_slices"]) == 2
    groups = ("bowel", "extravasation", "kidney", "liver", "spleen")
    for epoch, loss in enumerate(found["loss"]):
        series = sum(found[f"loss_{group}"][epoch] for group in groups)
        assert loss == pytest.approx(series + 0.5 * found["loss_slices"][epoch], rel=1e-4)
    state = torch.load(trained / "model.pt", weights_only=True)
    assert all(name.split(".")[0] in ("backbone", "norm", "rnn", "head") for name in state)


def test_resumed_training_ends_with_the_same_weights(run_bundle: Callable, trained: Path, phantoms: Path) -> None:
    parts = trained.parent / "parts"
    shutil.copytree(trained, parts)
    checkpoints = sorted((parts / "checkpoints").iterdir(), key=lambda path: int(path.stem.split("_")[1]))
    checkpoints[-1].unlink()  # as if it had been killed in the last epoch
    (parts / "model.pt").unlink()
    common = ("--dataset_dir", phantoms, "--output_root", trained.parent, *TRAIN, *ORGANS)
    done = run_bundle(RSNA, *common, "--run_name", "parts", "--resume", "latest")
    assert "resumed from" in done.stdout
    whole, again = (
        torch.load(run / "checkpoints" / checkpoints[-1].name, weights_only=False)["network"]
        for run in (trained, parts)
    )
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_evaluation_tells_what_the_series_table_knows(run_bundle: Callable, trained: Path, phantoms: Path) -> None:
    weights = ("--weights", trained / "model.pt", "--num_folds", 3, "--n_resamples", 20)
    common = ("--dataset_dir", phantoms, "--output_root", trained.parent, "--run_name", "evaluation")
    run_bundle(RSNA, *common, *weights, *SMALL, *ORGANS, configs=("train.json", "evaluate.json"))
    ids = {"patient_id": str, "series_id": str}
    found = pd.read_csv(trained.parent / "evaluation" / "series_predictions.csv", dtype=ids)
    table = pd.read_csv(phantoms / "train_series_meta.csv", dtype=ids)
    merged = found.merge(table, on=["patient_id", "series_id"], suffixes=("", "_true"))
    assert len(merged) == len(found) > 8
    assert merged["aortic_hu"].tolist() == pytest.approx(merged["aortic_hu_true"].tolist())
    assert merged["incomplete_organ"].tolist() == merged["incomplete_organ_true"].tolist()


def test_a_series_without_a_mask_is_named(run_bundle: Callable, phantoms: Path, tmp_path: Path) -> None:
    common = ("--dataset_dir", phantoms, "--output_root", tmp_path, "--run_name", "x", *TRAIN)
    done = run_bundle(RSNA, *common, "--crop", "organs", check=False)
    assert done.returncode != 0
    assert "train_images" in done.stderr
    assert "expected a mask to crop to the organs, found none" in done.stderr


def test_inference_with_masks_of_their_own_folder(
    run_bundle: Callable, trained: Path, phantoms: Path, tmp_path: Path
) -> None:
    """One series has a folder of organs as TotalSegmentator writes them, the other has none."""
    import nibabel as nib
    import numpy as np

    mask = next((phantoms / "segmentations").iterdir())
    with_mask = next((phantoms / "train_images").glob(f"*/{mask.stem}"))
    without = next(s for s in (phantoms / "train_images").glob("*/*") if s.name != mask.stem)
    for name, series in (("a", with_mask), ("b", without)):
        (tmp_path / "studies").mkdir(exist_ok=True)
        shutil.copytree(series, tmp_path / "studies" / name)
    (tmp_path / "organs" / "a").mkdir(parents=True)
    stored = nib.load(mask)
    labels = np.asarray(stored.dataobj)
    for label, name in ((1, "liver"), (2, "spleen")):
        part = nib.Nifti1Image((labels == label).astype(np.uint8), stored.affine)
        nib.save(part, tmp_path / "organs" / "a" / f"{name}.nii.gz")
    common = ("--dataset_dir", tmp_path / "studies", "--output_root", tmp_path, "--run_name", "i", *SMALL)
    masks = ("--crop", "organs", "--mask_dir", tmp_path / "organs", "--weights", trained / "model.pt")
    refused = run_bundle(RSNA, *common, *masks, configs=("inference.json",), check=False)
    assert "organ_margin was 8 in training and is 10.0 here" in refused.stderr.strip().splitlines()[-1]
    masks += ("--organ_margin", 8)
    done = run_bundle(RSNA, *common, *masks, configs=("inference.json",), check=False)
    assert done.returncode == 1
    assert pd.read_csv(tmp_path / "i" / "predictions.csv")["patient_id"].tolist() == ["a"]
    failed = pd.read_csv(tmp_path / "i" / "failed.csv")
    assert failed["image"].tolist() == [str(tmp_path / "studies" / "b")]
    assert "expected a mask to crop to the organs" in failed["reason"].item()


def test_slice_labels_that_are_not_there(run_bundle: Callable, phantoms: Path, tmp_path: Path) -> None:
    (tmp_path / "rsna").mkdir()
    for name in ("train_images", "train.csv"):
        (tmp_path / "rsna" / name).symlink_to(phantoms / name)
    common = ("--dataset_dir", tmp_path / "rsna", "--output_root", tmp_path, "--run_name", "x", *TRAIN)
    done = run_bundle(RSNA, *common, check=False)
    assert done.returncode != 0
    assert "image_level_labels.csv: no such file; slice labels are asked for" in done.stderr
