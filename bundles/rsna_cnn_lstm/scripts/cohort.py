# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Which labelled series train, validate or test: RSNA's tree or an own datalist, divided by patient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workflow.datalist import PARTS, DatalistError, has_own_parts, load_datalist, select_part
from workflow.folds import make_folds

from .datalist import rsna_datalist
from .findings import add_findings
from .labels import LabelTable
from .masks import add_masks

__all__ = ["labelled_series", "with_series_table"]


def labelled_series(
    dataset_dir: str | None,
    labels: LabelTable,
    datalist: str | None = None,
    *,
    part: str = "training",
    folds_file: str | None = None,
    fold: int = 0,
    num_folds: int = 5,
    seed: int = 0,
    strata: LabelTable | None = None,
    findings: bool = False,
    crop: str = "body",
    mask_dir: str | None = None,
) -> list[dict[str, Any]]:
    """Items with ``image``, ``patient_id``, ``series_id`` and ``label`` ([G] class indices) of one part.

    Each has ``aortic_hu`` (NaN if unknown) and ``incomplete_organ`` (-1 if unknown) too, and what `findings` and `crop`
    ask for: all items have the same keys, so that they batch.

    Args:
        dataset_dir: an RSNA 2023 tree, or the base of `datalist`'s paths.
        labels: the label table.
        datalist: JSON ``{"training": [{"image": ..., "patient_id": ..., "liver": "low", ...}]}`` with a class name for
            each group (a missing group is masked); None reads the RSNA tree.
        part: ``training``, ``validation`` or ``test``.
        folds_file: fold file (see `workflow.datalist.select_part`). None makes `num_folds` folds from `seed`, the same
            each time; they have no test part. A datalist with a ``validation`` section is taken at its word instead.
        fold: the validation fold.
        strata: the whole label table where `labels` is a selection of it; the folds are stratified on it.
        findings: add ``findings``, the labels of single images, see `findings.add_findings`.
        crop: "organs" adds ``mask``, see `masks.add_masks`.
        mask_dir: of `masks.add_masks`.

    Raises:
        DatalistError: for unknown classes or an empty part. ValueError: for a tree that does not fit its CSV files.
    """
    if part not in PARTS:
        raise DatalistError(f"part: expected one of {PARTS}, got {part!r}")
    if datalist is None and dataset_dir is None:
        raise DatalistError("neither dataset_dir nor datalist is given")
    if datalist is None:
        items = rsna_datalist(dataset_dir, labels)
    else:
        own_parts = has_own_parts(datalist, part, folds_file)
        items = load_datalist(datalist, dataset_dir, part if own_parts else "training")
        items = [{**item, "label": _classes(item, labels, datalist)} for item in items]
    items = [_plain(item, ["findings"] * findings + ["mask"] * (crop == "organs")) for item in items]
    items = add_findings(items, labels, dataset_dir, datalist) if findings else items
    items = add_masks(items, crop, dataset_dir, mask_dir)
    if datalist is not None and own_parts:
        return items
    if folds_file is None:
        folds = make_folds(_with_all_labels(items, dataset_dir, datalist, labels, strata), num_folds, seed)
        of_patient = dict(zip(folds["patient_id"], folds["fold"], strict=True))
        held_out = [of_patient[item["patient_id"]] == fold for item in items]
        chosen = [item for item, out in zip(items, held_out, strict=True) if out == (part == "validation")]
        if part == "test" or not chosen:
            raise DatalistError(
                f"no {part} series: without a folds_file there are folds 0 to {num_folds - 1} and no test"
            )
        return chosen
    return select_part(items, part, folds_file=folds_file, fold=fold, val_fraction=0.0, seed=seed)


def with_series_table(frame: pd.DataFrame, items: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The rows of a frame of series with what `items` know of them: ``aortic_hu`` and ``incomplete_organ``.

    A blank cell is unknown; a column of which nothing is known is left out.
    """
    known = {
        (item["patient_id"], item["series_id"]): (item.get("aortic_hu"), item.get("incomplete_organ")) for item in items
    }
    rows = [known.get(key, (None, None)) for key in zip(frame["patient_id"], frame["series_id"], strict=True)]
    table = pd.DataFrame(rows, columns=["aortic_hu", "incomplete_organ"], index=frame.index)
    table["incomplete_organ"] = table["incomplete_organ"].astype("Int64").replace(-1, pd.NA)
    return frame.join(table.dropna(axis="columns", how="all"))


def _plain(item: dict[str, Any], further: list[str]) -> dict[str, Any]:
    """The same keys for every item, whatever a table or datalist says of it."""
    hu, incomplete = item.get("aortic_hu"), item.get("incomplete_organ")
    plain = {key: item[key] for key in ("image", "patient_id", "series_id", "label")}
    plain["aortic_hu"] = math.nan if hu is None else float(hu)
    plain["incomplete_organ"] = -1 if incomplete is None else int(incomplete)
    return plain | {key: item.get(key) for key in further}


def _with_all_labels(
    items: list[dict[str, Any]],
    dataset_dir: str | None,
    datalist: str | None,
    labels: LabelTable,
    strata: LabelTable | None,
) -> list[dict[str, Any]]:
    """The items with the labels of `strata`, so that the folds do not depend on the groups that are trained."""
    if strata is None or strata.group_names == labels.group_names:
        return items
    if datalist is None:
        return rsna_datalist(dataset_dir, strata)
    entries = load_datalist(datalist, dataset_dir, "training")
    return [{**item, "label": _classes(item, strata, datalist)} for item in entries]


def _classes(item: dict[str, Any], labels: LabelTable, datalist: str) -> np.ndarray:
    indices = []
    for group in labels.groups:
        names = [c.name for c in group.classes]
        value = item.get(group.name)
        if value is not None and value not in names:
            raise DatalistError(
                f"datalist {Path(datalist)}: {item['image']}: {group.name} is {value!r}, expected {names}"
            )
        indices.append(-1 if value is None else names.index(value))
    return np.asarray(indices, dtype=np.int64)
