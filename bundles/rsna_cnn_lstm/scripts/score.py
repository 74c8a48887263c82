# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The score of the RSNA 2023 Abdominal Trauma Detection challenge, its baseline, and series -> patient.

Frames have a ``patient_id`` column and one column a class (``<group>_<class>``); ids are compared as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.metrics import log_loss

from .labels import MISSING, LabelTable, first_few

__all__ = [
    "PatientArrays",
    "align_patients",
    "combine_group",
    "combine_series",
    "frequency_baseline",
    "group_probabilities",
    "rsna_score",
    "term_losses",
]


@dataclass(frozen=True)
class PatientArrays:
    """N patients, G groups, in the order of the solution.

    Attributes:
        ids: the N patient ids.
        classes: [N, G] true class indices, -1 without a label.
        probabilities: for each group [N, C] float64, rows sum to 1.
        any_true: [N] 0/1 injured in any group; NaN where a group has no label, since the truth is then not known.
        any_probability: [N] maximum over the groups of 1 - p(healthy).
    """

    ids: tuple[str, ...]
    classes: np.ndarray
    probabilities: tuple[np.ndarray, ...]

    @property
    def any_true(self) -> np.ndarray:
        known = (self.classes != MISSING).all(axis=1)
        return np.where(known, (self.classes > 0).any(axis=1).astype(np.float64), np.nan)

    @property
    def any_probability(self) -> np.ndarray:
        return np.max([1.0 - part[:, 0] for part in self.probabilities], axis=0)


def rsna_score(solution: pd.DataFrame, submission: pd.DataFrame, table: LabelTable) -> dict[str, float | None]:
    """The score and its terms, lower is better.

    1. Each group's probabilities are divided by their sum.
    2. Each group: log loss with the class's ``score_weight`` as sample weight.
    3. any_injury: binary log loss of the maximum over the groups of 1 - p(healthy), weight 6 for injured and 1
       otherwise.
    4. The score is the plain mean of the terms.

    Args:
        solution: one row a patient, 0/1 in the class columns; blank cells of a whole group mean "not labelled" and are
            masked.
        submission: one row a patient, the same patients in any order, non-negative numbers.
        table: groups and weights; without ``any_injury`` the score is the mean over the groups.

    Returns:
        Group name -> term, the any-injury term, and ``"score"``. A term without a labelled patient is ``None`` and
        left out of the mean.

    Raises:
        ValueError: missing or unknown patients, missing columns, duplicate ids, NaN, infinite or negative values, a
            group that sums to 0, labels that are not one 1 a group, or nothing labelled at all.
    """
    patients = align_patients(solution, submission, table)
    terms: dict[str, float | None] = {}
    for group, true, probability in zip(table.groups, patients.classes.T, patients.probabilities, strict=True):
        terms[group.name] = _term(true, probability, group.score_weights)
    if table.any_injury is not None:
        known = np.nan_to_num(patients.any_true, nan=MISSING).astype(np.int64)
        injured = patients.any_probability
        weights = (table.any_injury.healthy_weight, table.any_injury.injury_weight)
        terms[table.any_injury.name] = _term(known, np.stack((1.0 - injured, injured), axis=1), weights)
    defined = [value for value in terms.values() if value is not None]
    if not defined:
        raise ValueError("no patient of the solution has a label in any group: there is nothing to score")
    return {**terms, "score": float(np.mean(defined))}


def _term(true: np.ndarray, probability: np.ndarray, weights: Sequence[float]) -> float | None:
    """Weighted log loss over the labelled patients; ``None`` without any."""
    known = true != MISSING
    if not known.any():
        return None
    sample_weight = np.asarray(weights)[true[known]]
    return float(log_loss(true[known], probability[known], sample_weight=sample_weight, labels=range(len(weights))))


def align_patients(solution: pd.DataFrame, submission: pd.DataFrame, table: LabelTable) -> PatientArrays:
    """Checks both frames and brings them into one order; arguments and errors as :func:`rsna_score`."""
    solution, submission = _by_patient(solution, table, "solution"), _by_patient(submission, table, "submission")
    for name, one, other in (("submission", solution, submission), ("solution", submission, solution)):
        absent = one.index.difference(other.index)
        if len(absent):
            raise ValueError(f"the {name} lacks {len(absent)} of {len(one)} patients: {first_few(absent)}")
    return PatientArrays(
        ids=tuple(solution.index),
        classes=table.class_indices(solution.reset_index()),
        probabilities=group_probabilities(submission.loc[solution.index], table, "submission"),
    )


def term_losses(patients: PatientArrays, table: LabelTable) -> tuple[np.ndarray, np.ndarray]:
    """The score patient by patient: log losses [N, T] and sample weights [N, T] of the T terms.

    A term is ``sum(losses * weights) / sum(weights)`` over the patients; the weight is 0 without a label.
    """
    group_weights = [group.score_weights for group in table.groups]
    columns = list(zip(patients.classes.T, patients.probabilities, group_weights, strict=True))
    if table.any_injury is not None:
        known = np.nan_to_num(patients.any_true, nan=MISSING).astype(np.int64)
        both = np.stack((1.0 - patients.any_probability, patients.any_probability), axis=1)
        columns.append((known, both, (table.any_injury.healthy_weight, table.any_injury.injury_weight)))
    losses, weights = [], []
    eps = np.finfo(np.float64).eps  # where scikit-learn clips
    for true, probability, class_weights in columns:
        index = np.maximum(true, 0)
        picked = np.take_along_axis(probability, index[:, None], axis=1)[:, 0]
        losses.append(-np.log(np.clip(picked, eps, 1 - eps)))
        weights.append(np.asarray(class_weights)[index] * (true != MISSING))
    return np.stack(losses, axis=1), np.stack(weights, axis=1)


def _by_patient(frame: pd.DataFrame, table: LabelTable, name: str) -> pd.DataFrame:
    """The class columns indexed by patient id as text."""
    absent = [column for column in ("patient_id", *table.columns) if column not in frame.columns]
    if absent:
        raise ValueError(f"the {name} lacks {len(absent)} columns: {first_few(absent)}")
    if not len(frame):
        raise ValueError(f"the {name} has no rows")
    ids = pd.Index(frame["patient_id"].astype(str), name="patient_id")
    if ids.has_duplicates:
        twice = ids[ids.duplicated()].unique()
        raise ValueError(f"the {name} has {len(twice)} patients more than once: {first_few(twice)}")
    return frame[list(table.columns)].set_axis(ids, axis=0)


def group_probabilities(frame: pd.DataFrame, table: LabelTable, name: str) -> tuple[np.ndarray, ...]:
    """Each group's probabilities [N, C] float64, divided by their sum. Raises ValueError as :func:`rsna_score`."""
    try:
        values = frame[list(table.columns)].to_numpy(dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the {name} holds values that are not numbers: {error}") from error
    for fault, wrong in (("NaN or infinite", ~np.isfinite(values)), ("negative", values < 0)):
        if wrong.any():
            columns = np.asarray(table.columns)[wrong.any(axis=0)]
            rows = frame.index[wrong.any(axis=1)]
            raise ValueError(
                f"the {name} has {fault} values in {len(rows)} rows ({first_few(rows)}): {first_few(columns)}"
            )
    blocks = []
    for group, part in table.column_slices.items():
        total = values[:, part].sum(axis=1, keepdims=True)
        empty = frame.index[total[:, 0] <= 0]
        if len(empty):
            raise ValueError(f"the {name}: group '{group}' sums to 0 in {len(empty)} rows: {first_few(empty)}")
        blocks.append(values[:, part] / total)
    return tuple(blocks)


def frequency_baseline(
    train_solution: pd.DataFrame,
    ids: Sequence[object],
    table: LabelTable,
    weighted: bool = True,
    pseudocount: float = 0.5,
) -> pd.DataFrame:
    """The submission that ignores the images: every patient gets the class frequencies.

    Args:
        train_solution: labelled patients to count, class columns as in the solution; unlabelled groups are left out of
            their count.
        ids: patients of the submission.
        table: groups and weights.
        weighted: count each patient with the ``score_weight`` of its class. That constant minimises the weighted log
            loss of every group, so it is the stronger baseline; ``False`` gives the plain frequencies.
        pseudocount: patients added to each class, so that a class absent from a small training set is not predicted as
            impossible, at infinite cost. 0 for the raw frequencies.

    Returns:
        Frame of ``patient_id`` and the P columns. A group nobody is labelled in is uniform.
    """
    if pseudocount < 0:
        raise ValueError(f"pseudocount must not be negative, got {pseudocount}")
    classes = table.class_indices(train_solution)
    row: list[float] = []
    for position, group in enumerate(table.groups):
        true = classes[:, position]
        counts = np.bincount(true[true != MISSING], minlength=len(group.classes)) + float(pseudocount)
        if not counts.any():
            counts = np.ones(len(group.classes))
        elif weighted:
            counts = counts * np.asarray(group.score_weights)
        row.extend(counts / counts.sum())
    frame = pd.DataFrame(np.tile(row, (len(ids), 1)), columns=list(table.columns))
    frame.insert(0, "patient_id", [str(patient) for patient in ids])
    return frame


def combine_series(predictions: pd.DataFrame, table: LabelTable, how: str = "max") -> pd.DataFrame:
    """One row a patient from one row a series.

    ``"max"``: each series' groups are divided by their sum; then every injured class takes its maximum over the series
    and healthy its minimum (1 - the maximum probability of being injured), and the group is divided by its sum. That
    sum is at least 1, so the division is always possible; a group of two classes keeps the maximum exactly.
    ``"mean"``: the mean over the series of every class.

    Args:
        predictions: ``patient_id`` and the P columns; with a ``series_id``, no pair may occur twice.
        table: groups.
        how: ``"max"`` or ``"mean"``.

    Returns:
        Frame of ``patient_id`` and the P columns, patients in order of first appearance, each group summing to 1.

    Raises:
        ValueError: unknown ``how``, missing columns, a repeated series, or values as in :func:`rsna_score`.
    """
    if how not in ("max", "mean"):
        raise ValueError(f"how must be 'max' or 'mean', got {how!r}")
    absent = [column for column in ("patient_id", *table.columns) if column not in predictions.columns]
    if absent:
        raise ValueError(f"the predictions lack {len(absent)} columns: {first_few(absent)}")
    patients = predictions["patient_id"].astype(str)
    if "series_id" in predictions.columns:
        twice = pd.DataFrame({"patient": patients, "series": predictions["series_id"].astype(str)}).duplicated()
        if twice.any():
            raise ValueError(
                f"the predictions have {int(twice.sum())} series more than once: {first_few(patients[twice])}"
            )
    numbers, ids = pd.factorize(patients)
    blocks = group_probabilities(predictions, table, "predictions")
    combined = [combine_group(block, numbers, len(ids), how) for block in blocks]
    result = pd.DataFrame(np.concatenate(combined, axis=1), columns=list(table.columns))
    result.insert(0, "patient_id", ids.astype(str))
    return result


def combine_group(probabilities: np.ndarray, patients: np.ndarray, num_patients: int, how: str) -> np.ndarray:
    """One group of :func:`combine_series`: [N, C] of series -> [M, C] of patients, rows sum to 1.

    Args:
        probabilities: [N, C], healthy first. patients: [N] number of each series' patient, 0..M-1, each of them there.
        num_patients: M. how: ``"max"`` or ``"mean"``.
    """
    combined = np.zeros((num_patients, probabilities.shape[1]))
    if how == "mean":
        np.add.at(combined, patients, probabilities)
    else:
        combined[:, 0] = 1.0
        np.maximum.at(combined[:, 1:], patients, probabilities[:, 1:])
        np.minimum.at(combined[:, 0], patients, probabilities[:, 0])
    return combined / combined.sum(axis=1, keepdims=True)
