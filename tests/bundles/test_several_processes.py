# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""`multi_gpu_train.json` on CPU processes trains as `train.json` with the same global batch does.

Both run from their configs, in forked processes, with a small network that has BN. Dropout and augmentation, which draw
from the state of each process, are off; slices and crops are a function of the item and agree by themselves.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.workflow.ranks import in_processes

ROOT = Path(__file__).resolve().parents[2]
COMMON = {
    "backbone_name": "test_efficientnet", "device": "cpu", "num_workers": 0, "max_epochs": 2, "learning_rate": 1e-3,
    "volume_size": [64, 64, 8], "num_slices": 2,
    "backbone_kwargs": {"bn_momentum": 0.5},  # so that a validation after four steps tells one volume from another
}  # fmt: skip
OWN = {
    "voco2d_pretrain": {"grid_size": [2, 2], "crop_size": [32, 32], "hidden_size": 16, "num_val_crops": 4},
    "rsna_cnn_lstm": {"image_size": [48, 48], "hidden_size": 8, "dropout": 0.0, "flip_prob": 0.0, "augment_prob": 0.0},
}
CLASSES = {
    "bowel": ("healthy", "injury"), "extravasation": ("healthy", "injury"), "kidney": ("healthy", "low", "high"),
    "liver": ("healthy", "low", "high"), "spleen": ("healthy", "low", "high"),
}  # fmt: skip


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> Path:
    """Thirteen small bodies of different build."""
    folder = tmp_path_factory.mktemp("volumes")
    generator = np.random.default_rng(0)
    x, y = np.mgrid[-1:1:48j, -1:1:48j]
    for number in range(13):
        a, b = generator.uniform(0.6, 0.95, 2)
        body = ((x / a) ** 2 + (y / b) ** 2 < 1)[..., None]
        organs = generator.uniform(-150, 200, (6, 6, 4)).repeat(8, 0).repeat(8, 1).repeat(4, 2)
        volume = np.where(body, organs, -1000.0).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(volume, np.diag([5.0, 5.0, 5.0, 1.0])), folder / f"{number:02d}.nii.gz")
    return folder


def datalist(folder: Path, training: int, validation: int) -> str:
    """The first volumes to train on and the last to validate on, with classes that differ."""
    items = [
        {
            "image": path.name,
            "patient_id": path.name[:2],
            **{group: names[number % (len(names) + shift) % len(names)]
               for shift, (group, names) in enumerate(CLASSES.items())},
        }
        for number, path in enumerate(sorted(folder.glob("*.nii.gz")))
    ]  # fmt: skip
    path = folder / f"{training}_{validation}.json"
    path.write_text(json.dumps({"training": items[:training], "validation": items[-validation:]}))
    return str(path)


def to_double(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def train(bundle: str, configs: list[str], overrides: dict[str, Any], double: bool) -> dict[str, dict[str, float]]:
    """A run in this process, and the last figures it knows."""
    if double:
        torch.set_default_dtype(torch.float64)
        torch.nn.modules.module.register_module_forward_pre_hook(to_double)
    os.chdir(ROOT / "bundles" / bundle)
    sys.path.insert(0, os.getcwd())
    workflow = ConfigWorkflow(
        config_file=[f"configs/{name}.json" for name in configs],
        meta_file="configs/metadata.json",
        workflow_type="train",
        **overrides,
    )
    workflow.initialize()
    workflow.run()
    engines = {name: workflow.parser.get_parsed_content(name) for name in ("train#trainer", "validate#evaluator")}
    figures = {name: {key: float(v) for key, v in engine.state.metrics.items()} for name, engine in engines.items()}
    figures["best"] = {"metric": float(engines["validate#evaluator"].state.best_metric)}
    workflow.finalize()
    return figures


def run(bundle: str, volumes: Path, out: Path, processes: int, batch_size: int, parts: tuple[int, int],
        double: bool = True, **overrides: Any) -> tuple[list[dict], Path]:  # fmt: skip
    """The figures of each process, and the run's folder; a single process runs train.json alone."""
    several = processes > 1
    name = f"{processes}_processes"
    arguments = {
        **COMMON, **OWN[bundle], **({"backend": "gloo"} if several else {}), **overrides,
        "dataset_dir": str(volumes), "datalist": datalist(volumes, *parts),
        "output_root": str(out), "run_name": name, "batch_size": batch_size,
    }  # fmt: skip
    configs = ["train", "multi_gpu_train"] if several else ["train"]
    figures = in_processes(
        processes, out / f"{name}_figures", train, bundle, configs, arguments, double, join=not several
    )
    return figures, out / name


def curves(folder: Path) -> dict[str, list[float]]:
    """Every scalar of an epoch; `train_loss` is of each step and of the first process alone."""
    found: dict[str, list[float]] = {}
    for file in sorted((folder / "tensorboard").iterdir()):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            if tag != "train_loss":
                found.setdefault(tag, []).extend(event.value for event in events.Scalars(tag))
    return found


def checkpoint(folder: Path) -> dict[str, Any]:
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.stem.split("_")[1]))
    return torch.load(newest, weights_only=True)


def largest_difference(first: Any, second: Any) -> float:
    """Over all numbers of two trees of one structure, relative to those above 1; NaN equals NaN alone."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        return max([largest_difference(first[key], second[key]) for key in first], default=0.0)
    if isinstance(first, list | tuple):
        assert len(first) == len(second)
        return max(map(largest_difference, first, second), default=0.0)
    one, other = torch.as_tensor(first).double(), torch.as_tensor(second).double()
    assert torch.equal(one.isnan(), other.isnan())
    return float(((one - other).abs() / one.abs().clamp(min=1)).nan_to_num().max())


def compare(single: tuple[list[dict], Path], several: tuple[list[dict], Path]) -> tuple[float, float, float]:
    """Largest difference of the figures (losses and metrics of each epoch), of weights, and of running statistics."""
    figures = largest_difference(single[0][0], several[0][0])
    curve = largest_difference(curves(single[1]), curves(several[1]))
    states = [
        checkpoint(folder)["network"]
        | {f"exported.{k}": v for k, v in torch.load(folder / "model.pt", weights_only=True).items()}
        for _, folder in (single, several)
    ]
    weights, statistics = (
        largest_difference(*({k: v for k, v in state.items() if (".running_" in k) is running} for state in states))
        for running in (False, True)
    )
    return max(figures, curve), weights, statistics


@pytest.mark.slow
@pytest.mark.parametrize("bundle", sorted(OWN))
@pytest.mark.parametrize(
    ("processes", "parts", "overrides"),
    [
        (2, (8, 4), {}),
        (2, (7, 3), {"sync_batch_norm": True}),  # the last step has two items and one; validation likewise
        (2, (6, 1), {"accumulation_steps": 2}),  # one process has nothing to validate
        (3, (10, 2), {"max_epochs": 3}),
    ],
)
def test_processes_equal_one_with_the_same_global_batch(bundle, processes, parts, overrides, volumes, tmp_path):
    shared = {key: value for key, value in overrides.items() if key != "sync_batch_norm"}
    single = run(bundle, volumes, tmp_path, 1, 2 * processes, parts, **shared)
    several = run(bundle, volumes, tmp_path, processes, 2, parts, **overrides)
    for other in several[0][1:]:
        assert largest_difference(several[0][0], other) == 0  # so that best and early stopping agree
    assert max(compare(single, several)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("bundle", sorted(OWN))
def test_in_float32_they_agree_as_far_as_rounding_goes(bundle, volumes, tmp_path):
    """With plain gradient steps: Adam's divide a gradient by its size, and make a full step of a rounding error."""
    part = "student" if bundle == "voco2d_pretrain" else "backbone"
    module = "voco" if bundle == "voco2d_pretrain" else "network_def"
    sgd = {"_target_": "torch.optim.SGD", "params": f"$@{module}.{part}.parameters()", "lr": "@learning_rate"}
    single = run(bundle, volumes, tmp_path, 1, 4, (7, 3), double=False, optimizer=sgd)
    several = run(bundle, volumes, tmp_path, 2, 2, (7, 3), double=False, optimizer=sgd)
    figures, weights, statistics = compare(single, several)
    assert max(figures, weights) < 1e-5
    assert statistics < 1e-4  # variances of features that are sums of many: more digits are lost there


@pytest.mark.slow
def test_each_option_is_what_makes_them_equal(volumes, tmp_path):
    """BN of each process's own batch, and partners within it, give another run: the comparison above would tell."""
    bundle = "voco2d_pretrain"
    single = run(bundle, volumes, tmp_path, 1, 2, (8, 4))
    equal = run(bundle, volumes, tmp_path / "equal", 2, 1, (8, 4))
    assert max(compare(single, equal)) < 1e-6
    apart = run(bundle, volumes, tmp_path / "apart", 2, 1, (8, 4), partner_across_ranks=False)
    assert apart[0][0]["train#trainer"]["loss_inter"] == 0  # a batch of one has no partner
    assert compare(single, apart)[0] > 1e-3
    own = run(bundle, volumes, tmp_path / "own", 2, 1, (8, 4), sync_batch_norm=False)
    assert compare(single, own)[0] > 1e-3
    assert own[0][0]["validate#evaluator"] == own[0][1]["validate#evaluator"]
