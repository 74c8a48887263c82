# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Folds by patient, stratified on classes and number of series, written to a file once and read by both bundles."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .errors import DatalistError
from .run import write_atomically

__all__ = ["make_folds", "patient_labels", "write_folds"]

logger = logging.getLogger(__name__)


def make_folds(
    datalist: Sequence[Mapping[str, Any]], num_folds: int = 5, seed: int = 0, test_fraction: float = 0.0
) -> pd.DataFrame:
    """A fold for each patient of a labelled datalist.

    Iterative stratification (Sechidis et al., ECML 2011): the injuries of one patient overlap, and scikit-learn's
    splitters balance one stratum a patient, so that each class, "injured at all", "several series" and "labelled" are
    spread one after the other, the rarest first. Sizes differ by at most one patient.

    Args:
        datalist: items with ``patient_id`` and ``label`` ([G] class indices, 0 healthy, negative missing); of several
            series the worst class counts.
        num_folds: number of folds. seed: of the order in which patients are dealt out.
        test_fraction: share of the patients that no fold gets; they are marked ``test``.

    Returns:
        columns ``patient_id`` and ``fold`` (0..num_folds-1, or ``test``), sorted by patient.

    Raises:
        ValueError: for numbers out of range, or too few patients for a part.
    """
    if num_folds < 2 or not 0 <= test_fraction < 1:
        raise ValueError(f"folds: need num_folds >= 2 and 0 <= test_fraction < 1, got {num_folds}, {test_fraction}")
    series = Counter(item["patient_id"] for item in datalist)
    worst = patient_labels(datalist)
    patients = sorted(worst)
    shares = [(1 - test_fraction) / num_folds] * num_folds + ([test_fraction] if test_fraction else [])
    sizes = np.diff(np.round(np.cumsum([0.0, *shares]) * len(patients)).astype(int))
    if len(patients) < num_folds or sizes.min() < 1:
        part = f" and a test part of {test_fraction:g}" if test_fraction else ""
        raise ValueError(f"folds: expected at least {num_folds} patients, found {len(patients)}{part}")
    labels = np.stack([worst[patient] for patient in patients])  # [N, G]
    several = np.asarray([series[patient] > 1 for patient in patients])
    fold = _iterative_stratification(_traits(labels, several), sizes, seed)
    names = [*range(num_folds), "test"]
    return pd.DataFrame({"patient_id": patients, "fold": [names[f] for f in fold] if test_fraction else fold})


def patient_labels(datalist: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Patient -> [G] class indices, the worst of the patient's series."""
    worst: dict[str, np.ndarray] = {}
    for item in datalist:
        label = np.asarray(item["label"])
        worst[item["patient_id"]] = np.maximum(label, worst.get(item["patient_id"], label))
    return worst


def _traits(labels: np.ndarray, several: np.ndarray) -> np.ndarray:
    """[N, K] 0/1: what is to be spread evenly, last a column of ones."""
    classes = [labels[:, g] == c for g in range(labels.shape[1]) for c in range(1, labels[:, g].max() + 1)]
    labelled = [labels[:, g] >= 0 for g in range(labels.shape[1])]
    everyone = np.ones(len(labels), dtype=bool)
    return np.stack([*classes, (labels > 0).any(axis=1), several, *labelled, everyone], axis=1).astype(int)


def _iterative_stratification(traits: np.ndarray, sizes: np.ndarray, seed: int) -> np.ndarray:
    """[N] part of each patient: those of the rarest remaining trait go, one by one, to the part that lacks it most."""
    rng = np.random.default_rng(seed)
    total = traits.sum(axis=0)
    wanted = np.outer(sizes / sizes.sum(), total)  # [parts, K] still to come
    parts = np.zeros(len(traits), dtype=int)
    left = rng.permutation(len(traits))
    while len(left):
        counts = traits[left].sum(axis=0)
        rarest = np.where(counts > 0, counts, len(traits) + 1).argmin()
        has_it = traits[left, rarest] == 1
        for patient in left[has_it]:
            # only parts with room; of equal ones that which lacks most of all that the patient has, then any
            full = wanted[:, -1] < 0.5
            lack = (wanted * (traits[patient] / np.maximum(total, 1))).sum(axis=1).round(9)
            part = np.lexsort((rng.random(len(sizes)), -lack, -wanted[:, rarest].round(9), full))[0]
            parts[patient] = part
            wanted[part] -= traits[patient]
        left = left[~has_it]
    return parts


def write_folds(path: str | os.PathLike[str], folds: pd.DataFrame) -> None:
    """Write a fold file for both bundles' ``folds_file``, once.

    Raises:
        DatalistError: if it exists: runs may rest on it.
    """
    if Path(path).exists():
        raise DatalistError(f"folds_file {path}: exists already and is never overwritten: runs may rest on it")
    write_atomically(path, folds.to_csv(index=False))
    logger.info("folds of %d patients written to %s", len(folds), path)
