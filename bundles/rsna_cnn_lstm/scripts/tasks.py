# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The yes-no questions that a label table asks about every patient: injured, of which class, of the highest grade."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .labels import MISSING, LabelTable
from .score import PatientArrays

__all__ = ["BinaryTask", "binary_tasks"]


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
