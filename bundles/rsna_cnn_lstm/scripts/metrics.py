# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Patient-level evaluation: score, mAP, AUC, precision, recall and F1, with bootstrap intervals over patients.

Point values are scikit-learn's. Intervals are percentile intervals of ``scipy.stats.bootstrap`` over patient indices;
every figure is computed in the same resamples, as a function of how often each patient was drawn, so that 1,000
resamples take a moment and differences are paired. A figure that the data do not define (no positive, no label) is
``None``, never 0 or 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score

from .labels import MISSING, LabelTable
from .score import PatientArrays, align_patients, frequency_baseline, rsna_score, term_losses

__all__ = [
    "BinaryTask",
    "binary_tasks",
    "bootstrap_interval",
    "evaluate_patients",
    "summary_table",
    "weighted_auc",
    "weighted_average_precision",
]

_BATCH_CELLS = 2_000_000  # resamples x patients held at once: about 16 MB an array


@dataclass(frozen=True)
class BinaryTask:
    """One yes-no question about every patient.

    Attributes:
        name: key of the figure in its section.
        kind: ``"class"`` (an injury class, or any injury), ``"group"`` (injured or healthy) or ``"high"`` (highest
            grade or not).
        truth: [N] 0/1, NaN without a label.
        probability: [N] of a yes.
        decision: [N] bool, the yes that argmax or the threshold gives.
    """

    name: str
    kind: str
    truth: np.ndarray
    probability: np.ndarray
    decision: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """[N] bool: the patient is labelled."""
        return ~np.isnan(self.truth)

    @property
    def defined(self) -> bool:
        """Whether there is a positive to find."""
        return bool(np.nansum(self.truth) > 0)

    @property
    def separable(self) -> bool:
        """Whether there are positives and negatives, as an AUC needs."""
        return self.defined and bool(np.nanmin(self.truth) == 0)


def binary_tasks(patients: PatientArrays, table: LabelTable, threshold: float | None = None) -> list[BinaryTask]:
    """The questions of a label table.

    Args:
        patients: aligned truth and probabilities.
        table: groups; the highest grade is the last class of a group with three or more.
        threshold: a class is called at this probability or above; ``None`` calls the most probable class of each group.
    """
    tasks, called = [], np.zeros(len(patients.ids), dtype=bool)
    for group, true, probability in zip(table.groups, patients.classes.T, patients.probabilities, strict=True):
        known = true != MISSING
        most_probable = probability.argmax(axis=1)
        for index, column in enumerate(group.columns[1:], start=1):
            part = probability[:, index]
            truth = np.where(known, true == index, np.nan)
            decision = most_probable == index if threshold is None else part >= threshold
            tasks.append(BinaryTask(column, "class", truth, part, decision))
            if index == len(group.classes) - 1 and not group.is_binary:
                tasks.append(BinaryTask(group.name, "high", truth, part, decision))
        injured = 1.0 - probability[:, 0]
        decision = most_probable > 0 if threshold is None else injured >= threshold
        called |= decision
        tasks.append(BinaryTask(group.name, "group", np.where(known, true > 0, np.nan), injured, decision))
    if table.any_injury is not None:
        for kind in ("class", "group"):
            tasks.append(BinaryTask(table.any_injury.name, kind, patients.any_true, patients.any_probability, called))
    return tasks


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
    return _divide(wins, positive.sum(axis=1) * negative.sum(axis=1))


def weighted_average_precision(counts: np.ndarray, truth: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Average precision of R resamples at once, arguments and result as :func:`weighted_auc`."""
    positive, negative = (part[:, ::-1] for part in _by_threshold(counts, truth, probability))
    found = positive.cumsum(axis=1)
    precision = found / np.maximum(found + negative.cumsum(axis=1), 1)  # 0 / 0 comes with no positive: any value does
    return _divide((positive * precision).sum(axis=1), positive.sum(axis=1))


def _by_threshold(counts: np.ndarray, truth: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drawn positives and negatives [R, U] at each of the U distinct probabilities, ascending."""
    order = np.argsort(probability, kind="stable")
    _, starts = np.unique(probability[order], return_index=True)
    drawn, yes = counts[:, order], truth[order]
    return np.add.reduceat(drawn * yes, starts, axis=1), np.add.reduceat(drawn * (1 - yes), starts, axis=1)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
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


def evaluate_patients(
    solution: pd.DataFrame,
    submission: pd.DataFrame,
    table: LabelTable,
    n_resamples: int = 1000,
    seed: int = 0,
    threshold: float | None = None,
    baseline: pd.DataFrame | None = None,
    confidence_level: float = 0.95,
) -> dict[str, Any]:
    """Everything that is reported about a set of patients, ready for JSON.

    Args:
        solution: truth, one row a patient; blank groups are masked.
        submission: predictions, one row a patient.
        table: groups and weights.
        n_resamples: bootstrap resamples of the patients; 0 for no intervals.
        seed: of the resampling.
        threshold: calls for precision, recall and F1; ``None`` takes the most probable class.
        baseline: a constant submission to compare with; ``None`` takes the weighted class frequencies of these very
            patients: each group's best constant in hindsight, the hardest to beat.
        confidence_level: of the intervals.

    Returns:
        ``score``, ``mAP`` (over the injury classes and any_injury), and by name ``score_terms``,
        ``average_precision``, ``auc`` (injured or healthy, by group), ``auc_high_grade``: each
        ``{"value", "low", "high", "resamples"}``, the last being how many resamples define it. ``classes``:
        positives, precision, recall and F1 by class; ``macro``: their means over the classes that define them.
        ``baseline``: the same figures of the baseline as plain numbers, and ``score_difference`` (ours minus the
        baseline's, paired by patient; negative is better) with its interval. Undefined values are ``None``.

    Raises:
        ValueError: as :func:`rsna_score`.
    """
    if n_resamples < 0 or not 0 < confidence_level < 1:
        raise ValueError(f"need n_resamples >= 0 and 0 < confidence_level < 1, got {n_resamples}, {confidence_level}")
    patients = align_patients(solution, submission, table)
    source = "given"
    if baseline is None:
        source = "weighted class frequencies of these patients"
        baseline = frequency_baseline(solution, list(solution["patient_id"]), table, weighted=True, pseudocount=0.0)
    constant = align_patients(solution, baseline, table)
    tasks = binary_tasks(patients, table, threshold)
    values = _point_values(rsna_score(solution, submission, table), tasks)
    base = _point_values(rsna_score(solution, baseline, table), binary_tasks(constant, table, threshold))
    values["score_difference"] = values["score"] - base["score"]
    figures = _resampled_figures(patients, constant, table, tasks, list(values))
    full = _with_intervals(values, figures, len(patients.ids), n_resamples, seed, confidence_level)
    return {
        "patients": len(patients.ids),
        "bootstrap": {"n_resamples": n_resamples, "seed": seed, "confidence_level": confidence_level},
        "decision": "most probable class" if threshold is None else f"probability >= {threshold:g}",
        **_sections(full),
        **_calls(tasks),
        "baseline": {"source": source, **_sections(base), "score_difference": full["score_difference"]},
    }


def _with_intervals(
    values: dict[str, float | None],
    figures: Callable[[np.ndarray], np.ndarray],
    n: int,
    n_resamples: int,
    *options: Any,
) -> dict[str, dict[str, Any]]:
    """Each value as ``{"value", "low", "high", "resamples"}``; one patient or no resamples give no interval."""
    full = {name: {"value": value, "low": None, "high": None, "resamples": 0} for name, value in values.items()}
    if n_resamples and n > 1:
        for name, low, high, count in zip(values, *bootstrap_interval(figures, n, n_resamples, *options), strict=True):
            full[name].update(low=_number(low), high=_number(high), resamples=int(count))
    return full


def _sections(values: dict[str, Any]) -> dict[str, Any]:
    """Flat names -> the sections of the report."""
    prefixes = {"score_terms": "term:", "average_precision": "ap:", "auc": "auc:", "auc_high_grade": "high:"}
    parts = {section: _section(values, prefix) for section, prefix in prefixes.items()}
    return {"score": values["score"], "mAP": values["mAP"], **parts}


def _point_values(score: dict[str, float | None], tasks: list[BinaryTask]) -> dict[str, float | None]:
    """Flat name -> value by scikit-learn; sections are told apart by prefix."""
    values: dict[str, float | None] = {"score": score["score"], "mAP": None}
    values.update({f"term:{name}": value for name, value in score.items() if name != "score"})
    for task in tasks:
        truth, probability = task.truth[task.known], task.probability[task.known]
        if task.kind == "class":
            value = float(average_precision_score(truth, probability)) if task.defined else None
            values[f"ap:{task.name}"] = value
        else:
            prefix = "auc" if task.kind == "group" else "high"
            value = float(roc_auc_score(truth, probability)) if task.separable else None
            values[f"{prefix}:{task.name}"] = value
    precisions = [value for name, value in values.items() if name.startswith("ap:") and value is not None]
    values["mAP"] = float(np.mean(precisions)) if precisions else None
    return values


def _resampled_figures(
    patients: PatientArrays, constant: PatientArrays, table: LabelTable, tasks: list[BinaryTask], names: list[str]
) -> Callable[[np.ndarray], np.ndarray]:
    """The function counts [R, N] -> [K, R] of the figures ``names``, for :func:`bootstrap_interval`."""
    losses, weights = term_losses(patients, table)
    base_losses, base_weights = term_losses(constant, table)
    term_names = [f"term:{name}" for name in table.group_names] + (
        [f"term:{table.any_injury.name}"] if table.any_injury else []
    )

    def figures(counts: np.ndarray) -> np.ndarray:
        terms = _divide(counts @ (losses * weights), counts @ weights)  # [R, T]
        base = _divide(counts @ (base_losses * base_weights), counts @ base_weights)
        found = dict(zip(term_names, terms.T, strict=True))
        found["score"] = _mean_of_defined(terms.T)
        found["score_difference"] = found["score"] - _mean_of_defined(base.T)
        for task in tasks:
            arguments = (counts[:, task.known], task.truth[task.known], task.probability[task.known])
            if task.kind == "class":
                found[f"ap:{task.name}"] = _if(task.defined, weighted_average_precision, *arguments)
            else:
                prefix = "auc" if task.kind == "group" else "high"
                found[f"{prefix}:{task.name}"] = _if(task.separable, weighted_auc, *arguments)
        found["mAP"] = _mean_of_defined(np.stack([value for name, value in found.items() if name.startswith("ap:")]))
        return np.stack([found[name] for name in names])

    return figures


def _if(defined: bool, function: Callable[..., np.ndarray], counts: np.ndarray, *arguments: np.ndarray) -> np.ndarray:
    """``function(counts, ...)``, or NaN for every resample of a figure that the patients do not define."""
    return function(counts, *arguments) if defined else np.full(len(counts), np.nan)


def _mean_of_defined(rows: np.ndarray) -> np.ndarray:
    """[K, R] -> [R]: the mean over the rows that are not NaN, NaN without any."""
    return _divide(np.nansum(rows, axis=0), np.isfinite(rows).sum(axis=0))


def _calls(tasks: list[BinaryTask]) -> dict[str, dict[str, Any]]:
    """Counts, precision, recall and F1 of every class and their means over the classes that define them."""
    classes = {}
    for task in (task for task in tasks if task.kind == "class"):
        truth, decision = task.truth[task.known], task.decision[task.known]
        row: dict[str, Any] = {"labelled": len(truth), "positives": int(truth.sum()), "called": int(decision.sum())}
        figures = (np.nan, np.nan, np.nan)
        if task.defined:
            figures = precision_recall_fscore_support(truth, decision, average="binary", zero_division=np.nan)[:3]
        row.update(zip(("precision", "recall", "f1"), map(_number, figures), strict=True))
        classes[task.name] = row
    macro = {}
    for name in ("precision", "recall", "f1"):
        values = [row[name] for row in classes.values() if row[name] is not None]
        macro[name] = float(np.mean(values)) if values else None
    return {"classes": classes, "macro": macro}


def _section(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _number(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def summary_table(metrics: dict[str, Any]) -> pd.DataFrame:
    """The figures of :func:`evaluate_patients` as rows ``figure, value, low, high, baseline``.

    Undefined cells are ``None``.
    """
    base = metrics["baseline"]
    rows = [("score", metrics["score"], base["score"]), ("mAP", metrics["mAP"], base["mAP"])]
    rows.insert(1, ("score minus baseline", base["score_difference"], None))
    titles = {
        "score_terms": "score {}",
        "average_precision": "AP {}",
        "auc": "AUC {}",
        "auc_high_grade": "AUC {} high grade",
    }
    for section, title in titles.items():
        rows += [(title.format(name), figure, base[section][name]) for name, figure in metrics[section].items()]
    cells = [(name, figure["value"], figure["low"], figure["high"], plain) for name, figure, plain in rows]
    return pd.DataFrame(cells, columns=["figure", "value", "low", "high", "baseline"], dtype=object)
