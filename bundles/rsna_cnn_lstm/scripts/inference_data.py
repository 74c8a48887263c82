# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The series to predict, with the patients they belong to."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from workflow.datalist import unlabelled_datalist

__all__ = ["series_to_predict"]

logger = logging.getLogger(__name__)

KEYS = ("image", "patient_id", "series_id", "mask")


def series_to_predict(
    dataset_dir: str | None, datalist: str | None = None, exclude: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """All series of a datalist, or else those below a folder, see `workflow.datalist.unlabelled_datalist`.

    Without a datalist and outside an RSNA tree nothing says which series are one patient's: each then counts as a
    patient of its own, and the log says so.

    Raises:
        DatalistError: as `unlabelled_datalist`.
    """
    items = unlabelled_datalist(dataset_dir, datalist, part="all", exclude=exclude)
    unknown = sum(item["patient_id"] == item["series_id"] for item in items) if datalist is None else 0
    if unknown and len(items) > 1:
        logger.warning(
            "%d of %d series are in no RSNA tree and no datalist: their paths stand for patients, each series counts "
            "as a patient of its own (a datalist with patient_id joins them)", unknown, len(items),
        )  # fmt: skip
    return [{key: item[key] for key in KEYS if key in item} for item in items]
