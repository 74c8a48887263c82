# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Folds by patient, stratified on classes and number of series, written to a file once and read by both bundles."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold

from .run import write_atomically

__all__ = ["make_folds", "write_folds"]

logger = logging.getLogger(__name__)


def make_folds(datalist: Sequence[Mapping[str, Any]], num_folds: int = 5, seed: int = 0) -> pd.DataFrame:
    """A fold for each patient of a labelled datalist.

    A patient's stratum is the rarest of its injuries (group and class), or none, and whether it has several series;
    strata of fewer patients than folds are pooled.

    Args:
        datalist: items with ``patient_id`` and ``label`` ([G] class indices, 0 healthy, negative missing).
        num_folds: number of folds. seed: of the shuffle.

    Returns:
        columns ``patient_id`` and ``fold`` (0..num_folds-1), sorted by patient.

    Raises:
        ValueError: for fewer patients than folds.
    """
    series = Counter(item["patient_id"] for item in datalist)
    labels: dict[str, np.ndarray] = {}
    for item in datalist:
        label = np.asarray(item["label"])
        labels[item["patient_id"]] = np.maximum(label, labels.get(item["patient_id"], label))
    patients = sorted(labels)
    if len(patients) < num_folds:
        raise ValueError(f"folds: expected at least {num_folds} patients, found {len(patients)}")
    injuries = {p: [(g, int(c)) for g, c in enumerate(labels[p]) if c > 0] for p in patients}
    frequency = Counter(injury for found in injuries.values() for injury in found)
    strata = [str((min(injuries[p], key=lambda i: (frequency[i], i), default=None), series[p] > 1)) for p in patients]
    counts = Counter(strata)
    strata = [s if counts[s] >= num_folds else "rare" for s in strata]
    if 0 < strata.count("rare") < num_folds:  # too few even together: they join the largest stratum
        strata = [counts.most_common(1)[0][0] if s == "rare" else s for s in strata]
    fold = np.zeros(len(patients), dtype=int)
    splitter = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    for number, (_, held_out) in enumerate(splitter.split(patients, strata)):
        fold[held_out] = number
    return pd.DataFrame({"patient_id": patients, "fold": fold})


def write_folds(path: str | os.PathLike[str], folds: pd.DataFrame) -> None:
    """Write a fold file for both bundles' ``folds_file``."""
    write_atomically(path, folds.to_csv(index=False))
    logger.info("folds of %d patients written to %s", len(folds), path)
