# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The commands that users run, in processes of their own: pretrain, fine-tune from it, evaluate, infer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

VOCO, RSNA = "voco2d_pretrain", "rsna_cnn_lstm"
BACKBONE = ("--backbone_name", "test_efficientnet", "--device", "cpu", "--num_workers", 0)
PRETRAIN = (
    *BACKBONE,
    "--volume_size",
    "[96,96,16]",
    "--crop_size",
    "[32,32]",
    "--num_slices",
    4,
    "--hidden_size",
    64,
    "--max_epochs",
    2,
    "--val_fraction",
    0.25,
)
NETWORK = (*BACKBONE, "--volume_size", "[72,72,16]", "--image_size", "[64,64]", "--num_slices", 8, "--hidden_size", 16)


@pytest.fixture(scope="module")
def samples(data_dir: Path) -> Path:
    """Real CT in the project: one DICOM series and three NIfTI files, and a mask to be passed over."""
    return data_dir


@pytest.fixture(scope="module")
def pretrained(run_bundle, samples, tmp_path_factory) -> Path:
    """Run folder of a pretraining on real CT, from the bundle's folder without PYTHONPATH."""
    out = tmp_path_factory.mktemp("voco")
    run_bundle(
        VOCO,
        "--dataset_dir",
        samples,
        "--output_root",
        out,
        "--run_name",
        "real",
        "--exclude",
        "['*organs*']",
        *PRETRAIN,
    )
    return out / "real"


@pytest.fixture(scope="module")
def fine_tuned(run_bundle, pretrained, phantoms, tmp_path_factory) -> Path:
    """Run folder of the classifier trained from it, from the project's top folder without PYTHONPATH."""
    out = tmp_path_factory.mktemp("rsna")
    done = run_bundle(
        RSNA,
        "--dataset_dir",
        phantoms,
        "--output_root",
        out,
        "--run_name",
        "fold0",
        "--max_epochs",
        1,
        "--pretrained_path",
        pretrained / "model.pt",
        "--num_folds",
        3,
        *NETWORK,
        cwd=Path.cwd(),
    )
    total = len(torch.load(pretrained / "model.pt", weights_only=True))
    assert f"{total} of {total} backbone tensors loaded" in done.stdout
    return out / "fold0"


def test_pretraining_writes_only_its_run_folder(pretrained, root):
    names = {path.name for path in pretrained.iterdir()}
    assert names == {"checkpoints", "config.json", "log.txt", "model.pt", "run.json", "tensorboard"}
    assert {path.name for path in pretrained.parent.iterdir()} == {"real", "cache"}
    assert {path.name for path in (root / "bundles" / VOCO / "models").iterdir()} == {"model.pt", "MODEL_CARD.md"}
    config = json.loads((pretrained / "config.json").read_text())
    assert config["max_epochs"] == 2
    assert json.loads((pretrained / "run.json").read_text())["result"] == "completed"


def test_model_is_a_flat_state_dict_of_the_backbone(pretrained):
    state = torch.load(pretrained / "model.pt", weights_only=True)
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    assert all(name.startswith(("model.", "pool.")) for name in state)


def test_tensorboard_holds_losses_health_and_crops(pretrained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(pretrained / "tensorboard"))
    scalars, images = set(), set()
    for file in (pretrained / "tensorboard").iterdir():
        events = EventAccumulator(str(file)).Reload()
        scalars |= set(events.Tags()["scalars"])
        images |= set(events.Tags()["images"])
    assert {"train_loss", "loss_intra", "loss_inter", "loss_reg", "position_accuracy", "embedding_spread"} <= scalars
    assert "crops/volume_0" in images


def test_resume_goes_on_where_the_run_stopped(run_bundle, pretrained, samples, tmp_path):
    """2 + 1 epochs give the weights of 3, bit for bit."""
    common = (
        "--dataset_dir",
        samples,
        "--exclude",
        "['*organs*']",
        "--output_root",
        tmp_path,
        "--cache_dir",
        pretrained.parent / "cache",
        *PRETRAIN,
        "--learning_rate",
        0.001,
        "--warmup_fraction",
        0,
    )
    # the schedule depends on the length of the whole run, so the shorter one is cut off rather than configured shorter
    run_bundle(VOCO, *common, "--run_name", "whole", "--max_epochs", 3)
    run_bundle(VOCO, *common, "--run_name", "parts", "--max_epochs", 3)
    checkpoints = sorted((tmp_path / "parts" / "checkpoints").iterdir(), key=lambda path: int(path.stem.split("_")[1]))
    checkpoints[-1].unlink()  # as if it had been killed in the last epoch
    (tmp_path / "parts" / "model.pt").unlink()
    done = run_bundle(VOCO, *common, "--run_name", "parts", "--max_epochs", 3, "--resume", "latest")
    assert "resumed from" in done.stdout
    whole = torch.load(tmp_path / "whole" / "model.pt", weights_only=True)
    parts = torch.load(tmp_path / "parts" / "model.pt", weights_only=True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_second_run_of_the_same_name_is_refused(run_bundle, pretrained, samples):
    done = run_bundle(
        VOCO, "--dataset_dir", samples, "--output_root", pretrained.parent, "--run_name", "real", *PRETRAIN, check=False
    )
    assert done.returncode != 0
    assert "holds a run already" in done.stderr.strip().splitlines()[-1]


def test_evaluation_writes_score_and_predictions(run_bundle, fine_tuned, phantoms):
    run_bundle(
        RSNA,
        "--dataset_dir",
        phantoms,
        "--output_root",
        fine_tuned.parent,
        "--run_name",
        "evaluation",
        "--weights",
        fine_tuned / "model.pt",
        "--num_folds",
        3,
        "--n_resamples",
        50,
        *NETWORK,
        configs=("train.json", "evaluate.json"),
    )
    folder = fine_tuned.parent / "evaluation"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["patients"] == 8
    assert set(metrics["score_terms"]) >= {"bowel", "extravasation", "kidney", "liver", "spleen", "any_injury"}
    assert len(pd.read_csv(folder / "predictions.csv")) == 8
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert f"{metrics['score']['value']:.3f}" in report
    assert "SYNTHETIC DATA" in report
    assert "Training run fold0" in report
    names = {path.stem for path in (folder / "report").iterdir()}
    assert {"score", "roc", "precision_recall", "confusion", "calibration", "learning", "worst_1_series_1"} <= names


def test_inference_on_a_real_dicom_series(run_bundle, fine_tuned, data_dir, tmp_path):
    run_bundle(
        RSNA,
        "--dataset_dir",
        data_dir / "crlm_ct_1004",
        "--output_root",
        tmp_path,
        "--run_name",
        "one",
        "--weights",
        fine_tuned / "model.pt",
        *NETWORK,
        configs=("inference.json",),
    )
    row = pd.read_csv(tmp_path / "one" / "predictions.csv")
    assert row.shape == (1, 14)
    for group in ("bowel", "extravasation", "kidney", "liver", "spleen"):
        assert row.filter(like=f"{group}_").sum(axis=1).item() == pytest.approx(1.0, abs=1e-6)
    content = json.loads(next((tmp_path / "one" / "series").iterdir()).read_text())
    assert set(content["probabilities"]) == {"bowel", "extravasation", "kidney", "liver", "spleen"}


def test_inference_goes_on_past_a_bad_series_and_ends_non_zero(run_bundle, fine_tuned, phantoms, tmp_path):
    studies = tmp_path / "studies with spaces ü"
    for number, series in enumerate(sorted((phantoms / "train_images").glob("*/*"))[:2]):
        folder = studies / f"s{number}"
        folder.mkdir(parents=True)
        for file in series.iterdir():
            (folder / file.name).symlink_to(file)
    broken = sorted((studies / "s0").iterdir())[10]
    content = broken.read_bytes()
    broken.unlink()
    broken.write_bytes(content[: len(content) // 2])
    done = run_bundle(
        RSNA,
        "--dataset_dir",
        studies,
        "--output_root",
        tmp_path,
        "--run_name",
        "many",
        "--weights",
        fine_tuned / "model.pt",
        *NETWORK,
        configs=("inference.json",),
        check=False,
    )
    assert done.returncode == 1
    failed = pd.read_csv(tmp_path / "many" / "failed.csv")
    assert failed["image"].tolist() == [str(studies / "s0")]
    assert broken.name in failed["reason"].item()
    assert pd.read_csv(tmp_path / "many" / "predictions.csv")["patient_id"].tolist() == ["s1"]


def test_embeddings_of_slices_and_volumes(run_bundle, pretrained, samples, tmp_path):
    run_bundle(
        VOCO,
        "--dataset_dir",
        samples,
        "--exclude",
        "['*organs*']",
        "--output_root",
        tmp_path,
        "--run_name",
        "e",
        "--weights",
        pretrained / "model.pt",
        *PRETRAIN[:8],
        configs=("inference.json",),
    )
    index = pd.read_csv(tmp_path / "e" / "embeddings.csv")
    assert len(index) == 4
    for name, slices in zip(index["file"], index["slices"], strict=True):
        content = np.load(tmp_path / "e" / name)
        assert content["slices"].shape == (slices, 256)
        np.testing.assert_allclose(content["volume"], content["slices"].mean(axis=0), rtol=1e-5)


def test_pretraining_leaves_out_validation_and_test_patients(run_bundle, phantoms, tmp_path):
    patients = sorted(path.name for path in (phantoms / "train_images").iterdir())
    parts = ["test" if i % 3 == 0 else str(i % 3) for i in range(len(patients))]
    pd.DataFrame({"patient_id": patients, "fold": parts}).to_csv(tmp_path / "folds.csv", index=False)
    done = run_bundle(
        VOCO,
        "--dataset_dir",
        phantoms,
        "--output_root",
        tmp_path,
        "--run_name",
        "f",
        *PRETRAIN,
        "--max_epochs",
        1,
        "--folds_file",
        tmp_path / "folds.csv",
        "--fold",
        1,
    )
    assert "finished" in done.stdout
    prepared = {json.loads(path.read_text())["source"] for path in (tmp_path / "cache").glob("[0-9a-f][0-9a-f]/*.json")}
    seen = {Path(source).parent.name for source in prepared}
    assert seen == {p for p, part in zip(patients, parts, strict=True) if part != "test"}


def test_training_from_a_weights_file_that_does_not_fit_is_refused(run_bundle, pretrained, phantoms, tmp_path):
    done = run_bundle(
        RSNA,
        "--dataset_dir",
        phantoms,
        "--output_root",
        tmp_path,
        "--run_name",
        "x",
        *NETWORK,
        "--backbone_name",
        "test_resnet",
        "--num_folds",
        3,
        "--max_epochs",
        1,
        "--pretrained_path",
        pretrained / "model.pt",
        check=False,
    )
    assert done.returncode != 0
    assert "backbone tensors fit" in done.stderr.strip().splitlines()[-1]


def test_three_dimensions_by_config(run_bundle, samples, tmp_path):
    run_bundle(
        VOCO,
        "--dataset_dir",
        samples,
        "--exclude",
        "['*organs*']",
        "--output_root",
        tmp_path,
        "--run_name",
        "3d",
        "--device",
        "cpu",
        "--num_workers",
        0,
        "--volume_size",
        "[48,48,16]",
        "--crop_size",
        "[16,16,16]",
        "--hidden_size",
        32,
        "--max_epochs",
        1,
        "--val_fraction",
        0.25,
        configs=("train.json", "train_3d.json"),
    )
    assert (tmp_path / "3d" / "model.pt").is_file()
