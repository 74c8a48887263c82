# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Which labelled series train, validate or test: RSNA's tree or an own datalist, divided by patient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from workflow.datalist import ALL, PARTS, DatalistError, has_own_parts, load_datalist, load_sections, select_part
from workflow.folds import make_folds

from .datalist import rsna_datalist
from .labels import LabelTable

__all__ = ["labelled_series"]


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
    cache_dir: str | None = None,
) -> list[dict[str, Any]]:
    """Items with ``image``, ``patient_id``, ``series_id`` and ``label`` ([G] class indices) of one part.

    Args:
        dataset_dir: an RSNA 2023 tree, or the base of `datalist`'s paths.
        labels: the label table.
        datalist: JSON ``{"training": [{"image": ..., "patient_id": ..., "liver": "low", ...}]}`` with a class name for
            each group (a missing group is masked); None reads the RSNA tree.
        part: ``training``, ``validation`` or ``test``; ``all`` for every series, whatever its part.
        folds_file: fold file (see `workflow.datalist.select_part`). None makes `num_folds` folds from `seed`, the same
            each time; they have no test part. A datalist with a ``validation`` section is taken at its word instead.
        fold: the validation fold.
        strata: the whole label table where `labels` is a selection of it; the folds are stratified on it.
        cache_dir: keeps an index of the tree's folders.

    Raises:
        DatalistError: for unknown classes or an empty part. ValueError: for a tree that does not fit its CSV files.
    """
    if part not in (*PARTS, ALL):
        raise DatalistError(f"part: expected one of {(*PARTS, ALL)}, got {part!r}")
    if datalist is None and dataset_dir is None:
        raise DatalistError("neither dataset_dir nor datalist is given")
    if datalist is None:
        items = rsna_datalist(dataset_dir, labels, cache_dir=cache_dir)
    elif part == ALL:
        items = [{**item, "label": _classes(item, labels, datalist)} for item in load_sections(datalist, dataset_dir)]
    else:
        own_parts = has_own_parts(datalist, part, folds_file)
        items = load_datalist(datalist, dataset_dir, part if own_parts else "training")
        items = [{**item, "label": _classes(item, labels, datalist)} for item in items]
    wanted = ("image", "patient_id", "series_id", "label")
    items = [{key: item[key] for key in wanted} for item in items]
    if part == ALL or (datalist is not None and own_parts):
        return items
    if folds_file is None:
        folds = make_folds(_with_all_labels(items, dataset_dir, datalist, labels, strata, cache_dir), num_folds, seed)
        of_patient = dict(zip(folds["patient_id"], folds["fold"], strict=True))
        held_out = [of_patient[item["patient_id"]] == fold for item in items]
        chosen = [item for item, out in zip(items, held_out, strict=True) if out == (part == "validation")]
        if part == "test" or not chosen:
            raise DatalistError(
                f"no {part} series: without a folds_file there are folds 0 to {num_folds - 1} and no test"
            )
        return chosen
    return select_part(items, part, folds_file=folds_file, fold=fold, val_fraction=0.0, seed=seed)


def _with_all_labels(
    items: list[dict[str, Any]],
    dataset_dir: str | None,
    datalist: str | None,
    labels: LabelTable,
    strata: LabelTable | None,
    cache_dir: str | None,
) -> list[dict[str, Any]]:
    """The items with the labels of `strata`, so that the folds do not depend on the groups that are trained."""
    if strata is None or strata.group_names == labels.group_names:
        return items
    if datalist is None:
        return rsna_datalist(dataset_dir, strata, cache_dir=cache_dir)
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
