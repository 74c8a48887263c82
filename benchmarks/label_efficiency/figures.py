# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Figures of predictions by the bundle's own metrics, and paired comparisons over seeds and over patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from bundles.rsna_cnn_lstm.scripts.intervals import bootstrap_interval, weighted_average_precision
from bundles.rsna_cnn_lstm.scripts.labels import LabelTable
from bundles.rsna_cnn_lstm.scripts.metrics import binary_tasks, evaluate_patients
from bundles.rsna_cnn_lstm.scripts.score import align_patients

LABELS_FILE = "bundles/rsna_cnn_lstm/configs/labels.json"
CONFIDENCE = 0.95
BOOTSTRAP_SEED = 0


def frames(table: LabelTable, classes: np.ndarray, probabilities: np.ndarray) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Solution and submission as the bundle's score takes them; [N, G] and [N, P]."""
    ids = [f"{index:05d}" for index in range(len(classes))]
    columns = list(table.columns)
    made = [pd.DataFrame(values, columns=columns) for values in (table.one_hot(classes), probabilities)]
    for frame in made:
        frame.insert(0, "patient_id", ids)
    return made[0], made[1]


def point_figures(table: LabelTable, classes: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """``mAP``, RSNA's ``score`` and its ``terms``, ``auc`` by group; None where the patients do not define it."""
    found = evaluate_patients(*frames(table, classes, probabilities), table, n_resamples=0)
    plain = {name: value["value"] for name, value in found["auc"].items()}
    terms = {name: value["value"] for name, value in found["score_terms"].items()}
    return {"mAP": found["mAP"]["value"], "score": found["score"]["value"], "auc": plain, "terms": terms}


def frequency_figures(table: LabelTable, classes: np.ndarray) -> dict[str, Any]:
    """``mAP`` and ``score`` of predicting each group's best constant in hindsight: what any network has to beat."""
    uniform = np.ones((len(classes), len(table.columns)))
    found = evaluate_patients(*frames(table, classes, uniform), table, n_resamples=0)["baseline"]
    return {"mAP": found["mAP"], "score": found["score"]}


def resampled_map(table: LabelTable, classes: np.ndarray, probabilities: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """mAP [R] of resamples given as how often each patient was drawn, [R, N]."""
    patients = align_patients(*frames(table, classes, probabilities), table)
    chosen = [task for task in binary_tasks(patients, table) if task.kind == "class"]
    return np.nanmean([weighted_average_precision(counts, task.truth, task.probability) for task in chosen], axis=0)


def bootstrap_differences(
    table: LabelTable,
    classes: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    pairs: Sequence[tuple[Sequence[str], Sequence[str]]],
    resamples: int,
) -> list[tuple[float, float]]:
    """Interval over patients of each difference of mean mAP, paired by patient.

    Args:
        predictions: [N, P] by run.
        pairs: of each comparison the runs of the one (one a seed) and those of the other.
    """

    def figures(counts: np.ndarray) -> np.ndarray:
        found = {run: resampled_map(table, classes, values, counts) for run, values in predictions.items()}
        return np.stack(
            [np.mean([found[a] for a in one], 0) - np.mean([found[b] for b in two], 0) for one, two in pairs]
        )

    low, high, _ = bootstrap_interval(figures, len(classes), resamples, BOOTSTRAP_SEED, CONFIDENCE)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean with its t-interval, standard deviation, and each value."""
    sample = np.asarray(values, dtype=float)
    spread = float(sample.std(ddof=1)) if len(sample) > 1 else None
    low = high = None
    if spread:
        half = stats.t.ppf((1 + CONFIDENCE) / 2, len(sample) - 1) * spread / np.sqrt(len(sample))
        low, high = float(sample.mean() - half), float(sample.mean() + half)
    return {"mean": float(sample.mean()), "low": low, "high": high, "sd": spread, "values": sample.tolist()}


def paired_over_seeds(one: Sequence[float], two: Sequence[float]) -> dict[str, Any]:
    """Difference (one minus two) over seeds as `over_seeds`, with the p value of the paired t-test."""
    difference = np.subtract(one, two)
    tested = bool(len(difference) > 1 and np.ptp(difference) > 0)
    p = float(stats.ttest_rel(one, two).pvalue) if tested else None
    return over_seeds(difference.tolist()) | {"p": p}
