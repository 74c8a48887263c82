# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The numbers behind the curves of the report: ROC and precision-recall curves with bootstrap bands, reliability bins.

Bands are pointwise percentile intervals over patients on a grid, from the same resampling as the intervals of
`evaluate_patients`. What the patients do not define (no positive, or no negative) is ``None``, never a line.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

from .metrics import BinaryTask, bootstrap_interval, weighted_average_precision

__all__ = ["GRID", "CurveBand", "average_precision", "curve_band", "reliability"]

GRID = np.linspace(0, 1, 101)
_SLACK = 1e-12  # 29/100 and the grid's 0.29 may differ in the last bit


@dataclass(frozen=True)
class CurveBand:
    """A curve and its interval.

    Attributes:
        x, y: [U] the curve by scikit-learn: false and true positive rate, or recall and precision.
        value: [101] the same on `GRID`: the best sensitivity at no more than this false positive rate, or the precision
            where this recall is first reached.
        low, high: [101] interval of `value`, ``None`` with a single patient or without resamples.
    """

    x: np.ndarray
    y: np.ndarray
    value: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None


def curve_band(task: BinaryTask, kind: str, n_resamples: int, seed: int) -> CurveBand | None:
    """The curve of one yes-no question.

    Args:
        task: truth and probabilities of all patients; the unlabelled are left out.
        kind: ``"roc"`` or ``"precision_recall"``.
        n_resamples: bootstrap resamples; 0 for no interval.
        seed: of the resampling.

    Returns:
        ``None`` where the patients do not define it.
    """
    if kind not in _ON_GRID:
        raise ValueError(f"kind: expected one of {sorted(_ON_GRID)}, got {kind!r}")
    if not (task.separable if kind == "roc" else task.defined):
        return None
    truth, probability = task.truth[task.known], task.probability[task.known]
    if kind == "roc":
        x, y, _ = roc_curve(truth, probability, drop_intermediate=False)
    else:
        y, x, _ = precision_recall_curve(truth, probability)
    value = curves_on_grid(np.ones((1, len(truth))), truth, probability, kind)[:, 0]
    low = high = None
    if n_resamples and len(truth) > 1:
        low, high, _ = bootstrap_interval(
            lambda counts: curves_on_grid(counts, truth, probability, kind), len(truth), n_resamples, seed
        )
    return CurveBand(x, y, value, low, high)


def average_precision(task: BinaryTask, n_resamples: int, seed: int) -> dict[str, float | None]:
    """Average precision of a question as ``{"value", "low", "high"}``, ``None`` where it is not defined; arguments as
    `curve_band`. (metrics.json has it by class; groups of several injured classes are asked here.)"""
    figure: dict[str, float | None] = {"value": None, "low": None, "high": None}
    if task.defined:
        truth, probability = task.truth[task.known], task.probability[task.known]
        figure["value"] = float(average_precision_score(truth, probability))
        if n_resamples and len(truth) > 1:
            low, high, _ = bootstrap_interval(
                lambda counts: weighted_average_precision(counts, truth, probability)[None],
                len(truth),
                n_resamples,
                seed,
            )
            figure |= {"low": float(low[0]), "high": float(high[0])}
    return figure


def curves_on_grid(counts: np.ndarray, truth: np.ndarray, probability: np.ndarray, kind: str) -> np.ndarray:
    """The curves of R resamples on `GRID`.

    Args:
        counts: [R, N] how often each patient was drawn.
        truth: [N] 0/1.
        probability: [N]; patients of the same probability enter together.
        kind: as in `curve_band`.

    Returns:
        [101, R], NaN where a resample does not define the curve.
    """
    order = np.argsort(-probability, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(probability[order]) != 0, True))  # the last of each distinct value
    drawn, yes = counts[:, order], truth[order]
    found = (drawn * yes).cumsum(axis=1)[:, ends]
    alarms = (drawn * (1 - yes)).cumsum(axis=1)[:, ends]
    return np.stack([_ON_GRID[kind](*pair) for pair in zip(found, alarms, strict=True)], axis=1)


def _roc_on_grid(found: np.ndarray, alarms: np.ndarray) -> np.ndarray:
    if not found[-1] or not alarms[-1]:
        return np.full(len(GRID), np.nan)
    return np.interp(GRID + _SLACK, np.append(0, alarms / alarms[-1]), np.append(0, found / found[-1]))


def _precision_on_grid(found: np.ndarray, alarms: np.ndarray) -> np.ndarray:
    if not found[-1]:
        return np.full(len(GRID), np.nan)
    wanted = np.maximum(GRID - _SLACK, _SLACK)  # at recall 0: the first positive that is found
    first = np.searchsorted(found / found[-1], wanted, side="left")
    return found[first] / (found[first] + alarms[first])


_ON_GRID = {"roc": _roc_on_grid, "precision_recall": _precision_on_grid}


def reliability(task: BinaryTask, max_bins: int = 10, per_bin: int = 10) -> pd.DataFrame | None:
    """How often what was predicted came true, in bins of equally many patients.

    Args:
        task: truth and probabilities; the unlabelled are left out.
        max_bins: at most so many bins, and
        per_bin: about so many patients in each, where there are enough.

    Returns:
        Rows ``patients``, ``predicted`` (mean probability), ``observed`` (share of positives), ``low`` and ``high``
        (95 % Wilson interval of the latter); ``None`` without a labelled patient.
    """
    truth, probability = task.truth[task.known], task.probability[task.known]
    if not len(truth):
        return None
    bins = int(np.clip(len(truth) // per_bin, 1, max_bins))
    of_bin = pd.qcut(probability, bins, labels=False, duplicates="drop")
    of_bin = np.nan_to_num(np.asarray(of_bin, dtype=np.float64))  # one distinct probability: one bin
    rows = []
    for number in np.unique(of_bin):
        part = of_bin == number
        patients, positives = int(part.sum()), int(truth[part].sum())
        interval = binomtest(positives, patients).proportion_ci(0.95, method="wilson")
        rows.append((patients, probability[part].mean(), positives / patients, interval.low, interval.high))
    return pd.DataFrame(rows, columns=["patients", "predicted", "observed", "low", "high"])
