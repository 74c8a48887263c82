# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Weights with which series are drawn, against the imbalance of the classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from workflow.dataset import SlabDataset
from workflow.folds import patient_labels

from .labels import MISSING

__all__ = ["inverse_frequency", "sampling_weights"]


def sampling_weights(dataset: SlabDataset, weighted: bool) -> np.ndarray | None:
    """`inverse_frequency` of a dataset's series, or None for plain sampling."""
    return inverse_frequency(dataset.data) if weighted else None


def inverse_frequency(items: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """[N] one weight a series: 1 / (share of the patients who have the rarest class of the series' patient).

    The share is among the patients with a label in that group, and a patient has the worst class of its series. Healthy
    is a class, too: a patient healthy in all groups gets the weight of the least common "healthy", about 1. A series of
    a patient without any label has weight 1. So each class that is some patients' rarest is drawn about equally often.

    Args:
        items: with ``patient_id`` and ``label`` ([G] class indices, -1 missing).
    """
    worst = patient_labels(items)
    labels = np.stack(list(worst.values()))  # [patients, G]
    shares = np.ones(labels.shape)
    for group in range(labels.shape[1]):
        known = labels[:, group] != MISSING
        classes, inverse, counts = np.unique(labels[known, group], return_inverse=True, return_counts=True)
        if len(classes):
            shares[known, group] = counts[inverse] / known.sum()
    weight = dict(zip(worst, 1 / shares.min(axis=1), strict=True))
    return np.asarray([weight[item["patient_id"]] for item in items])
