# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The sections of the report that come from the results of the evaluation alone. Every plotted value that matters also
stands in a table, for screen readers and tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.metrics import brier_score_loss, confusion_matrix

from .calibration import Calibration
from .curves import GRID, average_precision, curve_band, reliability
from .figures import calibration_figure, confusion_figure, curves_figure, terms_figure
from .labels import MISSING
from .results import (
    BASELINE,
    FOOTNOTE,
    Picture,
    Results,
    Section,
    Table,
    intervals,
    number,
    with_interval,
    with_marked_interval,
)
from .tasks import BinaryTask

__all__ = ["calibration", "classes", "confusion", "curves", "score"]

POINTS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)  # of the curves that their tables name


def score(results: Results) -> Section:
    """The score and its terms beside those of predicting class frequencies."""
    metrics, base = results.metrics, results.metrics["baseline"]
    rows = [("score", with_interval(metrics["score"]), number(base["score"]))]
    rows += [(_plain(name), with_interval(value), number(base["score_terms"][name]))
             for name, value in metrics["score_terms"].items()]  # fmt: skip
    difference = with_interval(base["score_difference"])
    source = "of the training patients" if base["source"] == "given" else "of these patients"
    text = [
        "The score is the mean of the terms, each a log loss over patients with the weights of the label table; lower "
        f"is better. The baseline predicts the {BASELINE} {source} for every patient, without an image.",
        f"Score minus baseline: {difference} (negative is better).",
    ]
    table = Table("Score and terms", ("term", "this run", BASELINE), rows)
    caption = "Score and its terms with 95 % intervals, beside those of predicting weighted class frequencies"
    return Section("score", "Score", text, [Picture("score", caption, terms_figure(metrics))], [table])


def curves(results: Results, kind: str) -> Section:
    """ROC (``"roc"``) or precision-recall curves (``"precision_recall"``) of injured against healthy, by group."""
    bands = {name: curve_band(task, kind, *results.resampling) for name, task in results.groups.items()}
    prevalence = {name: _prevalence(task.truth[task.known]) for name, task in results.groups.items()}
    if kind == "roc":
        found = {name: _marked(results, value, results.groups[name]) for name, value in results.metrics["auc"].items()}
        figure_name, point, title, section = "AUC", "1 − specificity", "ROC curves", "roc"
    else:
        found = {name: _marked(results, average_precision(task, *results.resampling), task)
                 for name, task in results.groups.items()}  # fmt: skip
        figure_name, point, title, section = (
            "average precision",
            "recall",
            "Precision-recall curves",
            "precision-recall",
        )
    captions = {name: text if text == "undefined" else f"{_short(figure_name)} {text}" for name, text in found.items()}
    at = [round(100 * place) for place in POINTS]
    rows, points = [], []
    for name, band in bands.items():
        task = results.groups[name]
        rows.append((_plain(name), f"{int(np.nansum(task.truth))} of {int(task.known.sum())}", found[name]))
        if band is not None:
            low, high = (None, None) if band.low is None else (band.low[at], band.high[at])
            points.append((_plain(name), *intervals(band.value[at], low, high)))
    what = "Sensitivity" if kind == "roc" else "Precision"
    text = [
        "Injured against healthy, by patient. Bands: pointwise 95 % bootstrap intervals over patients. Dashed: chance."
    ]
    text += [FOOTNOTE] * any("*" in value for value in found.values())
    tables = [
        Table(f"{figure_name[0].upper()}{figure_name[1:]} by group", ("group", "injured", figure_name), rows),
        Table(f"{what} at given {point}", ("group", *(f"at {GRID[k]:.2f}" for k in at)), points, folded=True),
    ]
    figure = curves_figure(bands, kind, captions, prevalence)
    return Section(section, title, text, [Picture(kind, f"{title} by group with 95 % bands", figure)], tables)


def calibration(results: Results) -> Section:
    """Whether a predicted probability comes true that often."""
    bins = {name: reliability(task) for name, task in results.groups.items()}
    summary, points = [], []
    for name, task in results.groups.items():
        truth, probability = task.truth[task.known], task.probability[task.known]
        known = len(truth) > 0
        brier = float(brier_score_loss(truth, probability, pos_label=1)) if known else None
        mean = float(probability.mean()) if known else None
        summary.append((_plain(name), number(mean), number(_prevalence(truth)), number(brier)))
        frame = bins[name]
        if frame is not None:
            points += [
                (_plain(name), str(int(row.patients)), number(row.predicted),
                 *intervals([row.observed], [row.low], [row.high]))
                for row in frame.itertuples()
            ]  # fmt: skip
    text = [
        "Patients in bins of equal size by predicted probability of injury; bars: 95 % Wilson intervals of the "
        "observed share. On the dashed line a probability means what it says.",
        _meaning(results),
    ]
    tables = [
        Table("Means and Brier score", ("group", "mean predicted", "observed", "Brier score"), summary),
        Table("Points of the curves", ("group", "patients", "predicted", "observed"), points, folded=True),
    ]
    picture = Picture("calibration", "Observed share of injured patients against predicted probability, by group",
                      calibration_figure(bins))  # fmt: skip
    return Section("calibration", "Calibration", text, [picture], tables)


def confusion(results: Results) -> Section:
    """Confusion matrices of the most probable classes."""
    matrices, rows = {}, []
    columns = zip(results.table.groups, results.patients.classes.T, results.patients.probabilities, strict=True)
    for group, true, probability in columns:
        known = true != MISSING
        names = [item.name for item in group.classes]
        labels = range(len(names))
        if known.any():
            counts = confusion_matrix(true[known], probability[known].argmax(axis=1), labels=labels)
            matrices[group.name] = (counts, names)
            rows += [(_plain(group.name), names[row], names[column], str(counts[row, column]))
                     for row in labels for column in labels]  # fmt: skip
    text = ["Patients by true class (rows) and most probable class (columns); shade: share of the row."]
    picture = Picture("confusion", "Confusion matrices by group", confusion_figure(matrices))
    table = Table("Counts", ("group", "truth", "predicted", "patients"), rows, folded=True)
    return Section("confusion", "Confusion matrices", text, [picture], [table])


def classes(results: Results) -> Section:
    """Precision, recall, F1 and average precision of every class, their means, and the AUCs of high grades."""
    metrics, (n_resamples, _) = results.metrics, results.resampling
    rows = []
    for name, row in metrics["classes"].items():
        figures = [metrics[key][name] for key in ("precision", "recall", "f1", "average_precision")]
        cells = [with_marked_interval(figure, row["positives"], n_resamples) for figure in figures]
        rows.append((_plain(name), str(row["positives"]), str(row["called"]), *cells))
    macro = [number(metrics["macro"][key]) for key in ("precision", "recall", "f1")]
    rows.append(("mean of the defined", "", "", *macro, with_interval(metrics["mAP"])))
    heads = ("class", "positives", "called", "precision", "recall", "F1", "average precision")
    groups = [
        (_plain(name), str(int(np.nansum(task.truth))), str(int(task.decision[task.known].sum())),
         *(_marked(results, metrics[key][name], task) for key in ("precision", "recall", "f1")))
        for name, task in results.groups.items()
    ]  # fmt: skip
    tables = [Table("Classes", heads, rows), Table("Injured or healthy", ("group", *heads[1:6]), groups)]
    if metrics["auc_high_grade"]:
        tasks = {task.name: task for task in results.tasks if task.kind == "high"}
        high = [(_plain(name), _marked(results, value, tasks[name]))
                for name, value in metrics["auc_high_grade"].items()]  # fmt: skip
        tables.append(Table("AUC of high grade against all others", ("group", "AUC"), high))
    text = [f"Called by: {metrics['decision']}. The mean of the average precisions is the mAP."]
    text += [FOOTNOTE] * any("*" in cell for table in tables for row in table.rows for cell in row)
    return Section("classes", "Precision, recall, F1 by class", text, tables=tables)


def _marked(results: Results, figure: Mapping[str, Any], task: BinaryTask) -> str:
    return with_marked_interval(figure, int(np.nansum(task.truth)), results.resampling[0])


def _meaning(results: Results) -> str:
    """What the probabilities are expected to say, by the calibration that was applied."""
    if not results.metrics.get("calibration"):
        return ("The probabilities are uncalibrated: training and score weigh injured patients more, so they are "
                "expected to exceed the observed shares.")  # fmt: skip
    weighting = Calibration.from_file(results.folder / "calibration.json", results.table).weighting
    if weighting == "score":
        return ("The probabilities are calibrated for the weighted score, which wants injuries overstated: they are "
                "expected to exceed the observed shares.")  # fmt: skip
    return ("The probabilities are calibrated to mean what they say: on patients like those of the fit they are "
            "expected to agree with the observed shares.")  # fmt: skip


def _prevalence(truth: np.ndarray) -> float:
    return float(truth.mean()) if len(truth) else float("nan")


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _short(name: str) -> str:
    return "AP" if name == "average precision" else name
