# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""RSNA 2023's ``submission.csv``, exactly as Kaggle takes it."""

from __future__ import annotations

import pandas as pd

from .labels import LabelTable

__all__ = ["SUBMISSION_COLUMNS", "kaggle_submission"]

# the header of sample_submission.csv
SUBMISSION_COLUMNS = (
    "patient_id", "bowel_healthy", "bowel_injury", "extravasation_healthy", "extravasation_injury",
    "kidney_healthy", "kidney_low", "kidney_high", "liver_healthy", "liver_low", "liver_high",
    "spleen_healthy", "spleen_low", "spleen_high",
)  # fmt: skip


def kaggle_submission(patients: pd.DataFrame, table: LabelTable) -> pd.DataFrame | None:
    """Predictions of patients in the columns and order of ``sample_submission.csv``; ``None`` for another label table.

    Args:
        patients: ``patient_id`` and the table's columns, one row a patient.
        table: the label table; it may name RSNA's groups in another order.

    Returns:
        one row a patient, sorted as numbers where every id is one, as text elsewhere. A patient without predictions has
        no row: none is made up.
    """
    if set(table.columns) != set(SUBMISSION_COLUMNS[1:]):
        return None
    ids = patients["patient_id"].astype(str)
    order = ids.astype(object).map(int) if ids.str.fullmatch(r"[0-9]+").all() else ids
    return patients.loc[order.sort_values(kind="stable").index, list(SUBMISSION_COLUMNS)].reset_index(drop=True)
