# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The fold file of a labelled cohort, for both bundles; with a table of what each fold holds in the log.

python -m monai.bundle run --config_file configs/folds.json --dataset_dir rsna --folds_file folds.csv
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from workflow.datalist import has_own_parts
from workflow.folds import make_folds, write_folds

from .cohort import read_cohort
from .datalist import datalist_solution
from .labels import LabelTable

__all__ = ["FoldFile", "class_counts"]

logger = logging.getLogger(__name__)


def class_counts(items: Sequence[Mapping[str, Any]], folds: pd.DataFrame, labels: LabelTable) -> pd.DataFrame:
    """Patients, series and patients of each class (rows) in each fold (columns)."""
    fold = folds.set_index("patient_id")["fold"]
    truth = datalist_solution(items, labels).set_index("patient_id")
    table = truth.groupby(fold).sum()
    injured = truth[list(labels.injury_columns)].sum(axis=1) > 0
    table.insert(0, "injured", injured.groupby(fold).sum())
    table.insert(0, "series", fold.loc[[item["patient_id"] for item in items]].value_counts())
    table.insert(0, "patients", fold.value_counts())
    return table.astype(int).T


class FoldFile:
    """Divides a cohort into folds by patient, and writes them once.

    Args:
        path: of the CSV with ``patient_id`` and ``fold``.
        dataset_dir, labels, datalist, skip_unlabelled, strict: see `scripts.cohort.read_cohort`.
        num_folds, seed, test_fraction: see `workflow.folds.make_folds`.
    """

    def __init__(
        self,
        path: str | Path,
        dataset_dir: str | None,
        labels: LabelTable,
        datalist: str | None = None,
        *,
        num_folds: int = 5,
        seed: int = 0,
        test_fraction: float = 0.0,
        skip_unlabelled: bool = False,
        strict: bool = True,
    ) -> None:
        self.path, self.labels = Path(path).expanduser(), labels
        self.dataset_dir, self.datalist = dataset_dir, datalist
        self.skip_unlabelled, self.strict = skip_unlabelled, strict
        self.num_folds, self.seed, self.test_fraction = num_folds, seed, test_fraction

    def read_cohort(self, labels: LabelTable | None = None) -> list[dict[str, Any]]:
        """The series whose patients it divides, with their classes of its own label table or another one."""
        table = self.labels if labels is None else labels
        return read_cohort(
            self.dataset_dir, table, self.datalist, skip_unlabelled=self.skip_unlabelled, strict=self.strict
        )

    def run(self) -> None:
        """Write the file.

        Raises:
            DatalistError: if it exists, or the datalist has parts of its own. ValueError: for too few patients.
        """
        if self.datalist is not None:
            has_own_parts(self.datalist, "validation", str(self.path))
        items = self.read_cohort()
        folds = make_folds(items, self.num_folds, self.seed, self.test_fraction)
        write_folds(self.path, folds)
        logger.info("patients by fold:\n%s", class_counts(items, folds, self.labels).to_string())
