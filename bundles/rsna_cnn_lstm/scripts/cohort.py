# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Which labelled series train, validate or test: RSNA's tree or an own datalist, divided by patient."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from workflow.datalist import ALL, PARTS, DatalistError, has_own_parts, load_datalist, load_sections, select_part
from workflow.folds import make_folds

from .datalist import rsna_datalist
from .findings import add_findings
from .labels import LabelTable
from .masks import add_masks
from .own_data import entry_label, row_labels

__all__ = ["labelled_series", "read_cohort", "with_series_table"]


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
    strict: bool = True,
    findings: bool = False,
    crop: str = "body",
    mask_dir: str | None = None,
    cache_dir: str | None = None,
) -> list[dict[str, Any]]:
    """The items of one part, see `read_cohort`.

    Args:
        dataset_dir, labels, datalist, skip_unlabelled, strict, findings, crop, mask_dir, cache_dir: see `read_cohort`.
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
    source = {"datalist": datalist, "skip_unlabelled": skip_unlabelled, "strict": strict, "cache_dir": cache_dir}
    read = functools.partial(read_cohort, dataset_dir, **source, findings=findings, crop=crop, mask_dir=mask_dir)
    if part == ALL or (datalist is not None and has_own_parts(datalist, part, folds_file)):
        return read(labels=labels, section=part)
    items = read(labels=labels)
    if folds_file is not None:
        return select_part(items, part, folds_file=folds_file, fold=fold, val_fraction=0.0, seed=seed)
    # the folds do not depend on the groups that are trained
    same = strata is None or strata.group_names == labels.group_names
    folds = make_folds(items if same else read_cohort(dataset_dir, labels=strata, **source), num_folds, seed)
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
    strict: bool = True,
    findings: bool = False,
    crop: str = "body",
    mask_dir: str | None = None,
    cache_dir: str | None = None,
) -> list[dict[str, Any]]:
    """All labelled series, undivided: items with ``image``, ``patient_id``, ``series_id``, ``label`` ([G] class
    indices), ``aortic_hu`` (NaN if unknown) and ``incomplete_organ`` (-1 if unknown), and what `findings` and `crop`
    ask for. All have the same keys, so that they batch.

    Args:
        dataset_dir: an RSNA 2023 tree, or the base of `datalist`'s paths.
        labels: the label table.
        datalist: JSON ``{"training": [{"image": ..., "patient_id": ..., "liver": "low", ...}]}`` with a class name for
            each group, or a CSV with the columns of `workflow.table.load_table` and `scripts.own_data.row_labels`
            (either way a missing group is masked); None reads the RSNA tree.
        section: of the JSON; ``all`` for all of them.
        skip_unlabelled: leave out the series of a datalist that have no label at all, instead of refusing them.
        strict: of the RSNA tree, see `datalist.rsna_datalist`.
        findings: add ``findings``, the labels of single images, see `findings.add_findings`.
        crop: "organs" adds ``mask``, see `masks.add_masks`.
        mask_dir: of `masks.add_masks`.
        cache_dir: of the tree's index, see `workflow.index`.

    Raises:
        as `labelled_series`.
    """
    if datalist is None and dataset_dir is None:
        raise DatalistError("neither dataset_dir nor datalist is given")
    if datalist is None:
        items = rsna_datalist(dataset_dir, labels, strict=strict, cache_dir=cache_dir)
    else:
        parser = functools.partial(row_labels, labels, skip_unlabelled=skip_unlabelled)
        if section == ALL:
            items = load_sections(datalist, dataset_dir, parser)
        else:
            items = load_datalist(datalist, dataset_dir, section, parser)
    further = ["findings"] * findings + ["mask"] * (crop == "organs")
    items = [_plain(item, further) for item in _labelled(items, labels, datalist, skip_unlabelled)]
    items = add_findings(items, labels, dataset_dir, datalist) if findings else items
    return add_masks(items, crop, dataset_dir, mask_dir)


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


def _labelled(
    items: Sequence[dict[str, Any]], labels: LabelTable, datalist: str | None, skip_unlabelled: bool
) -> list[dict[str, Any]]:
    """The items with ``label``, which trees and tables have already."""
    found = []
    for item in items:
        label = item.get("label")
        if label is None:
            label = entry_label(item, labels, str(datalist), skip_unlabelled=skip_unlabelled)
        if label is not None:
            found.append({**item, "label": label})
    return found


def _plain(item: dict[str, Any], further: list[str]) -> dict[str, Any]:
    """The same keys for every item, whatever a table or datalist says of it."""
    hu, incomplete = item.get("aortic_hu"), item.get("incomplete_organ")
    plain = {key: item[key] for key in ("image", "patient_id", "series_id", "label")}
    plain["aortic_hu"] = math.nan if hu is None else float(hu)
    plain["incomplete_organ"] = -1 if incomplete is None else int(incomplete)
    return plain | {key: item.get(key) for key in further}
