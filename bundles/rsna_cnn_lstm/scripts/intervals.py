# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Bootstrap intervals over patients, and the figures of many resamples at once.

A resample is how often each patient was drawn, so that 1,000 of them take a moment and differences are paired.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from scipy import stats

__all__ = ["bootstrap_interval", "divide", "weighted_auc", "weighted_average_precision", "weighted_calls"]

_BATCH_CELLS = 2_000_000  # resamples x patients held at once: about 16 MB an array


def weighted_auc(counts: np.ndarray, truth: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of R resamples at once, equal to scikit-learn's with ``sample_weight``.

    Args:
        counts: [R, N] how often each patient was drawn.
        truth: [N] 0/1.
        probability: [N]; ties count one half.

    Returns:
        [R], NaN where a resample lacks positives or negatives.
    """
    positive, negative = _by_threshold(counts, truth, probability)
    below = negative.cumsum(axis=1) - negative
    wins = (positive * (below + 0.5 * negative)).sum(axis=1)
    return divide(wins, positive.sum(axis=1) * negative.sum(axis=1))


def weighted_average_precision(counts: np.ndarray, truth: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Average precision of R resamples at once, arguments and result as :func:`weighted_auc`."""
    positive, negative = (part[:, ::-1] for part in _by_threshold(counts, truth, probability))
    found = positive.cumsum(axis=1)
    precision = found / np.maximum(found + negative.cumsum(axis=1), 1)  # 0 / 0 comes with no positive: any value does
    return divide((positive * precision).sum(axis=1), positive.sum(axis=1))


def weighted_calls(
    counts: np.ndarray, truth: np.ndarray, decision: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of R resamples at once, equal to scikit-learn's.

    Args:
        counts: [R, N]. truth: [N] 0/1. decision: [N] 0/1 or bool.

    Returns:
        three of [R], NaN where a resample lacks positives, and precision also where nobody is called.
    """
    hits, called, positives = counts @ (truth * decision), counts @ decision, counts @ truth
    lacking = positives == 0
    precision, f1 = divide(hits, called), divide(2 * hits, called + positives)
    return np.where(lacking, np.nan, precision), divide(hits, positives), np.where(lacking, np.nan, f1)


def _by_threshold(counts: np.ndarray, truth: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drawn positives and negatives [R, U] at each of the U distinct probabilities, ascending."""
    order = np.argsort(probability, kind="stable")
    _, starts = np.unique(probability[order], return_index=True)
    drawn, yes = counts[:, order], truth[order]
    return np.add.reduceat(drawn * yes, starts, axis=1), np.add.reduceat(drawn * (1 - yes), starts, axis=1)


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient, NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator > 0)


def bootstrap_interval(
    figures: Callable[[np.ndarray], np.ndarray], n: int, n_resamples: int, seed: int, confidence_level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Percentile bootstrap intervals of K figures over n patients.

    Args:
        figures: maps counts [R, n] float64 to [K, R].
        n: number of patients, at least 2.
        n_resamples: R in total.
        seed: of the resampling.
        confidence_level: in (0, 1).

    Returns:
        low [K], high [K] and the number of resamples [K] that define the figure; the interval is over those, NaN
        without any.
    """

    def statistic(index: np.ndarray, axis: int = -1) -> np.ndarray:
        flat = index.reshape(-1, n)  # the index is always along the last axis
        offset = np.arange(len(flat))[:, None] * n
        counts = np.bincount((flat + offset).ravel(), minlength=flat.size).reshape(flat.shape).astype(np.float64)
        return figures(counts).reshape(-1, *index.shape[:-1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # undefined resamples are handled below
        drawn = stats.bootstrap(
            (np.arange(n),),
            statistic,
            n_resamples=n_resamples,
            batch=max(1, _BATCH_CELLS // n),
            vectorized=True,
            method="percentile",
            confidence_level=confidence_level,
            rng=np.random.default_rng(seed),
        ).bootstrap_distribution
    tail = (1 - confidence_level) / 2
    defined = np.isfinite(drawn)
    low, high = np.full((2, len(drawn)), np.nan)
    some = defined.any(axis=1)
    low[some], high[some] = np.nanquantile(drawn[some], (tail, 1 - tail), axis=1)
    return low, high, defined.sum(axis=1)
