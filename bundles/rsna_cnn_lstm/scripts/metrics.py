# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Patient-level evaluation: score, mAP, AUC, precision, recall, F1 and Brier score, with bootstrap intervals over
patients.

Point values are scikit-learn's. Intervals are percentile intervals of ``scipy.stats.bootstrap`` over patient indices;
every figure is computed in the same resamples, as a function of how often each patient was drawn, so that 1,000
resamples take a moment and differences are paired. A figure that the data do not define (no positive, no label) is
``None``, never 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score, brier_score_loss, precision_recall_fscore_support, roc_auc_score

from .intervals import bootstrap_interval, divide, weighted_auc, weighted_average_precision, weighted_calls
from .labels import LabelTable
from .score import PatientArrays, align_patients, frequency_baseline, rsna_score, term_losses
from .tasks import BinaryTask, binary_tasks

__all__ = [
    "BinaryTask",
    "binary_tasks",
    "bootstrap_interval",
    "evaluate_patients",
    "summary_table",
    "weighted_auc",
    "weighted_average_precision",
]

_CALLS = ("precision", "recall", "f1")
# sections of the report -> prefixes of the flat names that the figures have meanwhile
_PREFIXES = {
    "score_terms": "term", "average_precision": "ap", "auc": "auc", "auc_high_grade": "high", "brier": "brier",
    **{name: name for name in _CALLS},
}  # fmt: skip


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
        ``average_precision`` and ``brier`` (by class), ``auc`` (injured or healthy, by group), ``auc_high_grade``,
        ``precision``, ``recall``, ``f1`` (by class, high grades among them, and by group): each
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
    parts = {section: _section(values, f"{prefix}:") for section, prefix in _PREFIXES.items()}
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
            values[f"brier:{task.name}"] = float(brier_score_loss(truth, probability)) if task.defined else None
        else:
            prefix = "auc" if task.kind == "group" else "high"
            value = float(roc_auc_score(truth, probability)) if task.separable else None
            values[f"{prefix}:{task.name}"] = value
        if task.kind != "high":  # a class too
            values.update(zip((f"{name}:{task.name}" for name in _CALLS), _called(task), strict=True))
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
        terms = divide(counts @ (losses * weights), counts @ weights)  # [R, T]
        base = divide(counts @ (base_losses * base_weights), counts @ base_weights)
        found = dict(zip(term_names, terms.T, strict=True))
        found["score"] = _mean_of_defined(terms.T)
        found["score_difference"] = found["score"] - _mean_of_defined(base.T)
        for task in tasks:
            arguments = (counts[:, task.known], task.truth[task.known], task.probability[task.known])
            if task.kind == "class":
                found[f"ap:{task.name}"] = _if(task.defined, weighted_average_precision, *arguments)
                found[f"brier:{task.name}"] = _if(task.defined, _weighted_brier, *arguments)
            else:
                prefix = "auc" if task.kind == "group" else "high"
                found[f"{prefix}:{task.name}"] = _if(task.separable, weighted_auc, *arguments)
            if task.kind != "high":
                calls = weighted_calls(*arguments[:2], task.decision[task.known])
                found.update(zip((f"{name}:{task.name}" for name in _CALLS), calls, strict=True))
        found["mAP"] = _mean_of_defined(np.stack([value for name, value in found.items() if name.startswith("ap:")]))
        return np.stack([found[name] for name in names])

    return figures


def _if(defined: bool, function: Callable[..., np.ndarray], counts: np.ndarray, *arguments: np.ndarray) -> np.ndarray:
    """``function(counts, ...)``, or NaN for every resample of a figure that the patients do not define."""
    return function(counts, *arguments) if defined else np.full(len(counts), np.nan)


def _weighted_brier(counts: np.ndarray, truth: np.ndarray, probability: np.ndarray) -> np.ndarray:
    return divide(counts @ (probability - truth) ** 2, counts.sum(axis=1))


def _mean_of_defined(rows: np.ndarray) -> np.ndarray:
    """[K, R] -> [R]: the mean over the rows that are not NaN, NaN without any."""
    return divide(np.nansum(rows, axis=0), np.isfinite(rows).sum(axis=0))


def _calls(tasks: list[BinaryTask]) -> dict[str, dict[str, Any]]:
    """Counts, precision, recall and F1 of every class and their means over the classes that define them."""
    classes = {}
    for task in (task for task in tasks if task.kind == "class"):
        truth, decision = task.truth[task.known], task.decision[task.known]
        row: dict[str, Any] = {"labelled": len(truth), "positives": int(truth.sum()), "called": int(decision.sum())}
        row.update(zip(_CALLS, _called(task), strict=True))
        classes[task.name] = row
    macro = {}
    for name in _CALLS:
        values = [row[name] for row in classes.values() if row[name] is not None]
        macro[name] = float(np.mean(values)) if values else None
    return {"classes": classes, "macro": macro}


def _called(task: BinaryTask) -> list[float | None]:
    """Precision, recall and F1 of a task's calls by scikit-learn; ``None`` where they are not defined."""
    if not task.defined:
        return [None, None, None]
    truth, decision = task.truth[task.known], task.decision[task.known]
    figures = precision_recall_fscore_support(truth, decision, average="binary", zero_division=np.nan)[:3]
    return [_number(figure) for figure in figures]


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
        "brier": "Brier {}",
        "precision": "precision {}",
        "recall": "recall {}",
        "f1": "F1 {}",
    }
    for section, title in titles.items():
        rows += [(title.format(name), figure, base[section][name]) for name, figure in metrics[section].items()]
    cells = [(name, figure["value"], figure["low"], figure["high"], plain) for name, figure, plain in rows]
    return pd.DataFrame(cells, columns=["figure", "value", "low", "high", "baseline"], dtype=object)
