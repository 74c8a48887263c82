# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Linear probes of frozen slice features: a slice's height within one patient, and which organs it shows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, LeaveOneGroupOut
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

BLOCK = 4  # neighbouring slices of the prepared volume that are learnt from, or predicted, together
ALPHAS = np.logspace(-1, 4, 11)  # of the ridge, chosen by leaving out one block of those learnt from
STRENGTH = 0.01  # C of the logistic regression: far fewer slices than features


def alternating_blocks(slices: int, block: int = BLOCK) -> np.ndarray:
    """[S] 0 or 1: which half each slice belongs to, in blocks of neighbours, so that none is predicted from both its
    neighbours alone."""
    return np.arange(slices) // block % 2


def height_errors(features: np.ndarray, heights: np.ndarray, block: int = BLOCK) -> tuple[float, float]:
    """Mean absolute error in mm, within one patient, of a ridge that learns heights from one half of the blocks and
    predicts the other, both ways round; and that of the constant (the mean height learnt from). Predictions outside the
    volume are taken for its ends.

    Args:
        features: [S, F]. heights: [S] mm; at least four blocks.
    """
    half, blocks = alternating_blocks(len(heights), block), np.arange(len(heights)) // block
    # neighbours are alike: a single slice left out would be told by those beside it, and favour too small a penalty
    search = GridSearchCV(
        make_pipeline(StandardScaler(), Ridge()), {"ridge__alpha": ALPHAS}, cv=LeaveOneGroupOut(),
        scoring="neg_mean_absolute_error",
    )  # fmt: skip
    predicted, constant = np.empty(len(heights)), np.empty(len(heights))
    for held_out in (0, 1):
        learn, test = half != held_out, half == held_out
        probe = search.fit(features[learn], heights[learn], groups=blocks[learn])
        predicted[test], constant[test] = probe.predict(features[test]), heights[learn].mean()
    predicted = predicted.clip(heights.min(), heights.max())
    return float(np.abs(predicted - heights).mean()), float(np.abs(constant - heights).mean())


def organ_aucs(
    features: np.ndarray, present: Mapping[str, np.ndarray], other: np.ndarray, other_present: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """AUC, for each organ, of a logistic regression on slices [N, F] that tells its presence on other slices [M, F].

    Organs that are in all or in no slice of either are left out: nothing can be learnt, or told apart.

    Args:
        present, other_present: [N] and [M] 0 or 1 for each organ.
    """
    found = {}
    for organ, seen in present.items():
        if len(np.unique(seen)) < 2 or len(np.unique(other_present[organ])) < 2:
            continue
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=1000)).fit(features, seen)
        found[organ] = float(roc_auc_score(other_present[organ], probe.decision_function(other)))
    return found
