# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The trainings and their measurement, in a process of `common.in_bundle`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bundle_parts import parse
from benchmarks.common import write
from benchmarks.phantoms import phantom_series
from benchmarks.pretraining import Pretraining, collated, series_dataset
from benchmarks.windows import position_baselines

from .data import MASKED, ORGANS
from .probes import height_errors, organ_aucs

MIN_AREA = 100.0  # mm2 of an organ in a slice that count as present


def run_trainings(task: dict[str, Any]) -> dict[str, Any]:
    """Train and measure one network after another, each into a file of its own as soon as it is done.

    Args:
        task: ``settings``, ``sizes`` and ``revision`` (see `__main__`), ``real`` (patient -> series), ``mask``,
            ``phantoms`` (the synthetic tree), ``cache``, and ``trainings``: name of the network, seed, patient left
            out (None: no real series is seen, all four are measured) and file of each.
    """
    for training in task["trainings"]:
        start = time.perf_counter()
        found = _train_and_measure(task, training)
        key = {name: training[name] for name in ("network", "seed", "left_out")}
        kind = {name: task[name] for name in ("settings", "sizes", "revision")}
        write(Path(training["file"]), {**key, **kind, **found, "seconds": time.perf_counter() - start})
    return {}


def seen_series(real: Mapping[str, str], left_out: str | None) -> list[str]:
    """Series (patient -> path) that a training sees: never those of the patient it is measured on; none where nobody is
    left out, since all are measured then.

    Raises:
        KeyError: for a patient that is not there, whose series could not be kept out.
    """
    if left_out is None:
        return []
    kept_out = real[left_out]
    return [path for patient, path in real.items() if patient != left_out and path != kept_out]


def _train_and_measure(task: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    sizes, seed, left_out = task["sizes"], training["seed"], training["left_out"]
    steps = 0 if training["network"] == "untrained" else sizes["steps"]
    pretraining = Pretraining(["train"], {**task["settings"], "seed": seed}, max(steps, 1))
    phantoms = phantom_series(Path(task["phantoms"]))
    losses = _train(pretraining, seen_series(task["real"], left_out), phantoms[: sizes["phantoms"]], steps, task)
    measured = [*task["real"]] if left_out is None else [left_out]
    return {
        "steps": steps,
        "losses": losses,
        "patients": _measure(pretraining, measured, phantoms[sizes["phantoms"] :], task),
    }


def batch_items(rng: np.random.Generator, real: int, phantoms: int, batch_size: int) -> list[int]:
    """Which volumes a step sees: half of the batch real patients, as far as there are as many, the rest phantoms; none
    twice. Real ones come first in the numbering.
    """
    chosen = rng.permutation(real)[: batch_size // 2].tolist()
    others = rng.permutation(phantoms)[: batch_size - len(chosen)]
    return chosen + (real + others).tolist()


def _train(
    pretraining: Pretraining, real: list[str], phantoms: list[str], steps: int, task: dict[str, Any]
) -> list[float]:
    """The loss of the first and of the last step."""
    parser = pretraining.parser
    dataset = series_dataset(parser, [*real, *phantoms], "train", task["cache"])
    rng = np.random.default_rng([parser["seed"], len(real)])
    losses = []
    for step in range(steps):
        items = batch_items(rng, len(real), len(phantoms), parser["batch_size"])
        # an item's number decides its windows: others at each step
        losses.append(pretraining.step(collated(dataset, [item + step * len(dataset) for item in items])))
    return losses[:1] + losses[-1:]


def _measure(
    pretraining: Pretraining, patients: list[str], phantoms: list[str], task: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Figures of each patient; BN statistics are always those of the volumes that are measured."""
    series = [task["real"][patient] for patient in patients]
    windows = series_dataset(pretraining.parser, series, "validate", task["cache"])
    whole = _whole(series, task)
    found = {}
    for number, patient in enumerate(patients):
        crops = collated(windows, [number])
        accuracy = pretraining.position_accuracy([crops])
        batch, volume = collated(whole, [number]), whole.cache.load(whole.data[number])
        pretraining.recalibrate([batch])
        features = pretraining.slice_features(batch)[0].numpy()
        heights = slice_heights(volume)
        error, constant = height_errors(features, heights)
        found[patient] = {
            "position_accuracy": accuracy,
            "position_baselines": position_baselines(crops["overlap"].numpy()),
            "height_mm": error,
            "height_mm_constant": constant,
            "height_mm_brightness": height_errors(slice_brightness(volume), heights)[0],
        }
        if patient == MASKED:
            present = presence(volume, task["mask"], [labels[0] for labels in ORGANS.values()])
            found[patient] |= _organ_probe(pretraining, phantoms, features, present, task)
    return found


def _whole(series: Sequence[str], task: dict[str, Any]) -> Any:
    """Validation data with every slice of the prepared volume and few windows."""
    settings = {**task["settings"], "num_slices": task["settings"]["volume_size"][-1], "num_val_crops": 2}
    return series_dataset(parse(["train"], settings), series, "validate", task["cache"])


def slice_heights(volume: Any) -> np.ndarray:
    """[Z] mm of the slices' centres along the volume's third axis."""
    return np.arange(volume.shape[-1]) * float(np.linalg.norm(np.asarray(volume.affine)[:3, 2]))


def slice_brightness(volume: Any) -> np.ndarray:
    """[Z, 2] of a prepared volume [1, X, Y, Z]: mean of each slice, and mm2 in it above the window's lower end, which
    is the body without air."""
    pixels = np.asarray(volume, dtype=float)[0]
    area = float(np.prod(np.linalg.norm(np.asarray(volume.affine)[:3, :2], axis=0)))
    return np.stack([pixels.mean(axis=(0, 1)), (pixels > 0).sum(axis=(0, 1)) * area], axis=1)


def presence(volume: Any, mask: str, labels: Sequence[int]) -> dict[str, np.ndarray]:
    """[Z] 0 or 1 for each organ: does a slice of the prepared volume show at least `MIN_AREA` of it?"""
    import nibabel as nib
    from nibabel.processing import resample_from_to

    affine = np.asarray(volume.affine)
    placed = np.asarray(resample_from_to(nib.load(mask), (volume.shape[1:], affine), order=0).dataobj)
    pixel = float(np.prod(np.linalg.norm(affine[:3, :2], axis=0)))
    areas = [(placed == label).sum(axis=(0, 1)) * pixel for label in labels]
    return {organ: (area >= MIN_AREA).astype(int) for organ, area in zip(ORGANS, areas, strict=True)}


def _organ_probe(
    pretraining: Pretraining,
    phantoms: list[str],
    features: np.ndarray,
    present: dict[str, np.ndarray],
    task: dict[str, Any],
) -> dict[str, Any]:
    """AUCs on the real patient of a probe that learnt from phantoms which no training saw; and, to know whether it
    learnt, those of a probe of two thirds of them on the rest."""
    dataset = _whole(phantoms, task)
    batches = [collated(dataset, [number]) for number in range(len(phantoms))]
    pretraining.recalibrate(batches)
    slices = np.concatenate([pretraining.slice_features(batch)[0].numpy() for batch in batches])
    masks = [str(Path(task["phantoms"], "segmentations", f"{Path(path).name}.nii")) for path in phantoms]
    labels = [labels[1] for labels in ORGANS.values()]
    volumes = [dataset.cache.load(item) for item in dataset.data]
    each = [presence(volume, mask, labels) for volume, mask in zip(volumes, masks, strict=True)]
    seen = {organ: np.concatenate([one[organ] for one in each]) for organ in ORGANS}
    cut = max(len(phantoms) * 2 // 3, 1) * len(features)  # between two phantoms
    first, rest = ({organ: one[part] for organ, one in seen.items()} for part in (slice(cut), slice(cut, None)))
    return {
        "organ_auc": organ_aucs(slices, seen, features, present),
        "organ_auc_phantoms": organ_aucs(slices[:cut], first, slices[cut:], rest),
        "organ_slices": {organ: int(one.sum()) for organ, one in present.items()},
        "slices": len(features),
    }
