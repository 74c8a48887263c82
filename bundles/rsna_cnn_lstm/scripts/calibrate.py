# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Fits a calibration to out-of-fold predictions and says honestly what it gains.

    python -m monai.bundle run --config_file configs/calibrate.json --predictions RUN_FOLDER --method temperature

Figures after calibration on the patients it was fitted to flatter it; the cross-fitted ones, where each patient is
calibrated by parameters of the others, do not.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from workflow.folds import make_folds
from workflow.run import write_atomically

from .calibration import METHODS, WEIGHTINGS, Calibration, GroupCalibration
from .labels import MISSING, LabelGroup, LabelTable, first_few
from .metrics import evaluate_patients
from .score import combine_group, combine_series, group_probabilities, rsna_score

__all__ = ["Calibrator", "cross_fit", "fit_calibration", "read_predictions"]

logger = logging.getLogger(__name__)

LIMIT = float(np.log(20.0))  # temperatures and factors stay within 1/20 and 20


def fit_calibration(
    series: pd.DataFrame,
    solution: pd.DataFrame,
    table: LabelTable,
    method: str = "temperature",
    combine: str = "max",
    weighting: str = "none",
) -> Calibration:
    """The parameters that minimise each group's log loss, after series are combined to patients.

    To the sum of the log losses half the squared logarithm of each parameter is added (a standard normal
    prior): it means nothing to hundreds of patients and keeps a handful from extremes, as do the bounds 1/20 and 20.
    A class that no patient has keeps the factor 1; a group with one class alone stays as it is and says so.

    Args:
        series: ``patient_id`` and the class columns, one row a series (or a patient).
        solution: truth, one row a patient; blank groups are left out of their fit.
        table: groups and score weights.
        method: ``"temperature"`` (one a group), ``"factor"`` (one an injured class) or ``"vector"`` (both).
        combine: ``"max"`` or ``"mean"``.
        weighting: ``"none"``: probabilities then mean what they say. ``"score"`` weighs patients as the score does: the
            score gains most, and injuries are overstated.

    Raises:
        ValueError: an unknown method or weighting, or frames as `rsna_score` refuses them.
    """
    for name, value, known in (("method", method, METHODS), ("weighting", weighting, WEIGHTINGS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    rsna_score(solution, combine_series(series, table, combine), table)  # checks both frames
    truth = pd.Series(range(len(solution)), index=solution["patient_id"].astype(str))
    patients = truth.loc[series["patient_id"].astype(str)].to_numpy()
    columns = zip(
        table.groups, table.class_indices(solution).T, group_probabilities(series, table, "predictions"), strict=True
    )
    weights = {group.name: group.score_weights for group in _target(table, weighting).groups}
    groups = {
        group.name: _fit_group(group, weights[group.name], true, part, patients, method, combine)
        for group, true, part in columns
    }
    return Calibration(table, method, combine, groups, weighting)


def _target(table: LabelTable, weighting: str) -> LabelTable:
    """The table whose score is what the fit is for."""
    if weighting == "score":
        return table
    plain = [replace(g, classes=tuple(replace(c, score_weight=1.0) for c in g.classes)) for g in table.groups]
    injury = table.any_injury and replace(table.any_injury, healthy_weight=1.0, injury_weight=1.0)
    return replace(table, groups=tuple(plain), any_injury=injury)


def _fit_group(
    group: LabelGroup,
    class_weights: Sequence[float],
    true: np.ndarray,
    probabilities: np.ndarray,
    patients: np.ndarray,
    method: str,
    combine: str,
) -> GroupCalibration:
    """`true` [M] of patients, `probabilities` [N, C] of series, `patients` [N]."""
    counts = np.bincount(true[true != MISSING], minlength=len(group.classes))
    identity = GroupCalibration((1.0,) * len(group.classes))
    if np.count_nonzero(counts) < 2:
        found = ", ".join(f"{count} {column}" for column, count in zip(group.columns, counts, strict=True))
        note = f"left as it is: a fit needs patients of two classes, found {found}"
        logger.warning("calibration of %s %s", group.name, note)
        return GroupCalibration(identity.factors, note=note)
    free = np.zeros(len(group.classes), dtype=bool)  # the temperature stands in the healthy class's place
    free[0] = method in ("temperature", "vector")
    free[1:] = (counts[1:] > 0) & (method in ("factor", "vector"))
    known = true != MISSING
    weights = np.asarray(class_weights)[true[known]]
    eps = np.finfo(np.float64).eps  # where scikit-learn clips

    def parameters(logs: np.ndarray) -> GroupCalibration:
        whole = np.zeros(len(free))
        whole[free] = logs
        return GroupCalibration((1.0, *np.exp(whole[1:]).tolist()), float(np.exp(whole[0])))

    def objective(logs: np.ndarray) -> float:
        combined = combine_group(parameters(logs).apply(probabilities), patients, len(true), combine)
        losses = -np.log(np.clip(combined[known, true[known]], eps, 1 - eps))
        return float((weights @ losses + 0.5 * logs @ logs) / weights.sum())

    start = np.zeros(np.count_nonzero(free))
    found = minimize(objective, start, method="L-BFGS-B", jac="3-point", bounds=[(-LIMIT, LIMIT)] * len(start))
    if found.fun >= objective(start):
        return GroupCalibration(identity.factors, note="left as it is: nothing is gained")
    absent = [column for column, count in zip(group.columns, counts, strict=True) if not count]
    note = f"no patient with {first_few(absent)}" if absent else ""
    if (np.abs(found.x) >= LIMIT).any():
        note = f"{note}; at the bound of 20 or 1/20".removeprefix("; ")
        logger.warning("calibration of %s: %s: are these predictions of patients held out?", group.name, note)
    fitted = parameters(found.x)
    return GroupCalibration(fitted.factors, fitted.temperature, note)


def cross_fit(
    series: pd.DataFrame,
    solution: pd.DataFrame,
    table: LabelTable,
    method: str = "temperature",
    combine: str = "max",
    weighting: str = "none",
    num_folds: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Series calibrated by parameters fitted to the patients of the other folds; arguments as `fit_calibration`.

    Folds are by patient and stratified, see `workflow.folds.make_folds`.
    """
    labels = dict(zip(solution["patient_id"].astype(str), table.class_indices(solution), strict=True))
    ids = series["patient_id"].astype(str)
    folds = make_folds([{"patient_id": p, "label": labels[p]} for p in ids], num_folds, seed)
    fold = folds.set_index("patient_id")["fold"]
    of_series, of_patient = fold.loc[ids].to_numpy(), fold.loc[solution["patient_id"].astype(str)].to_numpy()
    parts = []
    for number in range(num_folds):
        fitted = fit_calibration(
            series[of_series != number], solution[of_patient != number], table, method, combine, weighting
        )
        parts.append(fitted.apply(series[of_series == number]))
    return pd.concat(parts).sort_index()


def read_predictions(
    predictions: str | Sequence[str], solution: str | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Predictions and truth of held-out patients.

    Args:
        predictions: run folder of an evaluation (its ``series_predictions.csv``, or ``predictions.csv`` where there is
            none), such a file, or a list of them: the folds of a cross-validation.
        solution: CSV of the truth (RSNA's ``train.csv`` will do); ``None`` takes ``solution.csv`` beside each.

    Returns:
        one row a series, one row a patient.

    Raises:
        ValueError: no such file, a patient in two of them (one had it in training), or calibrated predictions.
    """
    frames, truths, seen = [], [], dict[str, Path]()
    for name in [predictions] if isinstance(predictions, str | Path) else predictions:
        path = Path(name)
        if path.is_dir():
            files = [path / "series_predictions.csv", path / "predictions.csv"]
            path = next((file for file in files if file.is_file()), files[0])
        if (path.parent / "calibration.json").is_file():
            raise ValueError(f"{path}: calibrated already; evaluate without calibration first")
        frame = _read_patients(path)
        twice = [patient for patient in frame["patient_id"].unique() if patient in seen]
        if twice:
            raise ValueError(f"{path} and {seen[twice[0]]} share {len(twice)} patients: {first_few(twice)}; a patient "
                             "is held out in one fold only")  # fmt: skip
        seen |= dict.fromkeys(frame["patient_id"], path)
        frames.append(frame)
        if solution is None:
            truths.append(_read_patients(path.parent / "solution.csv"))
    truth = _read_patients(Path(solution)) if solution is not None else pd.concat(truths, ignore_index=True)
    return pd.concat(frames, ignore_index=True), truth[truth["patient_id"].isin(list(seen))].reset_index(drop=True)


def _read_patients(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise ValueError(f"{path}: expected a CSV with patient_id and class columns, found no such file")
    try:
        frame = pd.read_csv(path, dtype={"patient_id": str, "series_id": str})
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable CSV: {error}") from error
    if "patient_id" not in frame.columns or frame["patient_id"].isna().any():
        raise ValueError(f"{path}: expected a patient_id in each row, found columns {first_few(frame.columns)}")
    return frame


class Calibrator:
    """The run of ``calibrate.json``: fits, compares and writes ``calibration.json`` and ``before_after.csv``.

    Args:
        output_dir: folder of the run.
        labels: the label table.
        predictions, solution: see `read_predictions`.
        method, combine, weighting: see `fit_calibration`.
        num_folds, seed: of the cross-fit.
        n_resamples: bootstrap resamples of the interval of the gain.
    """

    def __init__(
        self,
        output_dir: str | Path,
        labels: LabelTable,
        predictions: str | Sequence[str],
        solution: str | None = None,
        method: str = "temperature",
        combine: str = "max",
        weighting: str = "none",
        num_folds: int = 5,
        seed: int = 0,
        n_resamples: int = 1000,
    ) -> None:
        self.output_dir, self.table = Path(output_dir), labels
        self.predictions, self.solution = predictions, solution
        self.method, self.combine, self.weighting = method, combine, weighting
        self.num_folds, self.seed, self.n_resamples = num_folds, seed, n_resamples

    def run(self) -> Calibration:
        """Does it all. Raises ValueError as the functions of this module."""
        series, solution = read_predictions(self.predictions, self.solution)
        options = (self.table, self.method, self.combine, self.weighting)
        fitted = fit_calibration(series, solution, *options)
        held_out = cross_fit(series, solution, *options, self.num_folds, self.seed)
        frames = {"before": series, "after": fitted.apply(series), "cross_fitted": held_out}
        patients = {name: combine_series(frame, self.table, self.combine) for name, frame in frames.items()}
        figures = pd.DataFrame(
            {name: rsna_score(solution, part, self.table) for name, part in patients.items()}, dtype=float
        )
        plain = _target(self.table, "none")
        figures.loc["unweighted"] = [rsna_score(solution, part, plain)["score"] for part in patients.values()]
        figures.index.name = "figure"
        gain = evaluate_patients(
            solution,
            patients["cross_fitted"],
            _target(self.table, self.weighting),
            self.n_resamples,
            self.seed,
            baseline=patients["before"],
        )["baseline"]["score_difference"]
        write_atomically(self.output_dir / "before_after.csv", figures.to_csv())
        content = {
            **fitted.to_dict(),
            "fitted_to": self._source(len(solution), len(series)),
            "score": _scores(figures, "score"),
        }
        content["unweighted"] = _scores(figures, "unweighted")
        content["cross_fitted_minus_before"] = gain
        write_atomically(self.output_dir / "calibration.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
        logger.info("score before and after calibration, lower is better\n%s", figures.round(4).to_string())
        return fitted

    def _source(self, patients: int, series: int) -> dict[str, Any]:
        names = [self.predictions] if isinstance(self.predictions, str | Path) else list(self.predictions)
        return {"predictions": [str(name) for name in names], "patients": patients, "rows": series,
                "num_folds": self.num_folds, "seed": self.seed}  # fmt: skip


def _scores(figures: pd.DataFrame, figure: str) -> dict[str, float]:
    return {name: float(value) for name, value in figures.loc[figure].items()}
