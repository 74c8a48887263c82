# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Which labelled series train, validate or test: RSNA's tree or an own datalist, divided by patient."""

from __future__ import annotations

import functools
from typing import Any

from workflow.datalist import ALL, PARTS, DatalistError, has_own_parts, load_datalist, load_sections, select_part
from workflow.folds import make_folds

from .datalist import rsna_datalist
from .labels import LabelTable
from .own_data import entry_label, row_labels

__all__ = ["labelled_series", "read_cohort"]


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
    skip_unlabelled: bool = False,
    cache_dir: str | None = None,
) -> list[dict[str, Any]]:
    """Items with ``image``, ``patient_id``, ``series_id`` and ``label`` ([G] class indices) of one part.

    Args:
        dataset_dir, labels, datalist, skip_unlabelled, cache_dir: see `read_cohort`.
        part: ``training``, ``validation`` or ``test``; ``all`` for every series, whatever its part.
        folds_file: fold file (see `workflow.datalist.select_part`). None makes `num_folds` folds from `seed`, the same
            each time; they have no test part. A datalist with a ``validation`` section is taken at its word instead.
        fold: the validation fold.
        strata: the whole label table where `labels` is a selection of it; the folds are stratified on it.

    Raises:
        DatalistError: for unknown classes or an empty part. ValueError: for a tree that does not fit its CSV files.
    """
    if part not in (*PARTS, ALL):
        raise DatalistError(f"part: expected one of {(*PARTS, ALL)}, got {part!r}")
    read = functools.partial(
        read_cohort, dataset_dir, datalist=datalist, skip_unlabelled=skip_unlabelled, cache_dir=cache_dir
    )
    if part == ALL or (datalist is not None and has_own_parts(datalist, part, folds_file)):
        return read(labels=labels, section=part)
    items = read(labels=labels)
    if folds_file is not None:
        return select_part(items, part, folds_file=folds_file, fold=fold, val_fraction=0.0, seed=seed)
    # the folds do not depend on the groups that are trained
    same = strata is None or strata.group_names == labels.group_names
    folds = make_folds(items if same else read(labels=strata), num_folds, seed)
    of_patient = dict(zip(folds["patient_id"], folds["fold"], strict=True))
    held_out = [of_patient[item["patient_id"]] == fold for item in items]
    chosen = [item for item, out in zip(items, held_out, strict=True) if out == (part == "validation")]
    if part == "test" or not chosen:
        raise DatalistError(f"no {part} series: without a folds_file there are folds 0 to {num_folds - 1} and no test")
    return chosen


def read_cohort(
    dataset_dir: str | None,
    labels: LabelTable,
    datalist: str | None = None,
    *,
    section: str = "training",
    skip_unlabelled: bool = False,
    cache_dir: str | None = None,
) -> list[dict[str, Any]]:
    """All labelled series, undivided: items with ``image``, ``patient_id``, ``series_id`` and ``label``.

    Args:
        dataset_dir: an RSNA 2023 tree, or the base of `datalist`'s paths.
        labels: the label table.
        datalist: JSON ``{"training": [{"image": ..., "patient_id": ..., "liver": "low", ...}]}`` with a class name for
            each group, or a CSV with the columns of `workflow.table.load_table` and `scripts.own_data.row_labels`
            (either way a missing group is masked); None reads the RSNA tree.
        section: of the JSON; ``all`` for all of them.
        skip_unlabelled: leave out the series of a datalist that have no label at all, instead of refusing them.
        cache_dir: of the tree's index, see `workflow.index`.

    Raises:
        as `labelled_series`.
    """
    if datalist is None and dataset_dir is None:
        raise DatalistError("neither dataset_dir nor datalist is given")
    if datalist is None:
        items = rsna_datalist(dataset_dir, labels, cache_dir=cache_dir)
    else:
        parser = functools.partial(row_labels, labels, skip_unlabelled=skip_unlabelled)
        if section == ALL:
            items = load_sections(datalist, dataset_dir, parser)
        else:
            items = load_datalist(datalist, dataset_dir, section, parser)
    wanted = ("image", "patient_id", "series_id", "label")
    found = []
    for item in items:
        label = (
            item["label"] if "label" in item else entry_label(item, labels, datalist, skip_unlabelled=skip_unlabelled)
        )
        if label is not None:
            found.append({key: {**item, "label": label}[key] for key in wanted})
    return found
