# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The classes of own data: what the columns of a CSV, or the keys of a JSON entry, say of each group of the table."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from workflow.datalist import DatalistError
from workflow.table import CellError, Row

from .labels import MISSING, LabelGroup, LabelTable, first_few

__all__ = ["UNLABELLED", "entry_label", "row_labels"]

logger = logging.getLogger(__name__)

SERIES_COLUMNS = ("aortic_hu", "incomplete_organ")  # as RSNA's series table has them
FLAGS = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
ALIKE = 0.8  # of two names, by difflib
UNLABELLED = "a class of one group at least (--skip_unlabelled True leaves such series out)"


def row_labels(
    labels: LabelTable, columns: Sequence[str], *, skip_unlabelled: bool = False
) -> Callable[[Row], dict[str, Any] | None]:
    """How to read the classes of a row: each group from one column with the class's name (``liver``: ``low``), or from
    one 0/1 column a class as in RSNA's ``train.csv`` (``liver_healthy``, ``liver_low``, ``liver_high``).

    A group without columns, or with blank cells, is missing.

    Args:
        labels: the label table. columns: of the file.
        skip_unlabelled: a row without any label is left out instead of being an error.

    Returns:
        row -> ``{"label": [G] class indices, -1 missing}`` with ``aortic_hu`` and ``incomplete_organ`` where the row
        has them, or None to leave it out; raises CellError.

    Raises:
        ValueError: no group has a column, or one has both kinds, or only some of its classes; or a column that is not
            read looks like one of a group that has none.
    """
    readers = [_reader(group, columns) for group in labels.groups]
    _account_for(labels, readers, columns)
    if not any(readers):
        wanted = first_few([labels.groups[0].name, *labels.groups[0].columns])
        raise ValueError(f"no column holds a class of the label table (such as {wanted}), found {first_few(columns)}")

    def parse(row: Row) -> dict[str, Any] | None:
        label, bad = [], []
        for read in readers:
            try:
                label.append(MISSING if read is None else read(row))
            except CellError as error:
                bad += error.cells
        try:
            known = _known_of_series(row)
        except CellError as error:
            bad += error.cells
        if bad:
            raise CellError(*bad)
        if max(label) == MISSING:
            if skip_unlabelled:
                return None
            raise CellError((first_few(labels.group_names), "", UNLABELLED))
        return {"label": np.asarray(label, dtype=np.int64), **known}

    return parse


def _account_for(labels: LabelTable, readers: Sequence[object], columns: Sequence[str]) -> None:
    """Say which groups are read and which columns are not; refuse a column that is misspelt rather than further."""
    read = {name for group in labels.groups for name in (group.name, *group.columns)} | set(SERIES_COLUMNS)
    unread = [column for column in columns if column not in read]
    pairs = list(zip(labels.groups, readers, strict=True))
    absent = [name for group, reader in pairs if reader is None for name in (group.name, *group.columns)]
    by_lower = {name.lower(): name for name in absent}
    for column in unread:
        near = difflib.get_close_matches(column.lower(), by_lower, n=1, cutoff=ALIKE)
        if near:
            raise ValueError(f"column {column!r} is not read: is {by_lower[near[0]]!r} meant, which is absent?")
    found = first_few((group.name for group, reader in pairs if reader is not None), len(pairs))
    logger.info("groups with labels: %s; columns that are not read: %s", found, first_few(unread, 20) or "none")


def _known_of_series(row: Row) -> dict[str, Any]:
    """``aortic_hu`` and ``incomplete_organ``, those that the row has."""
    known: dict[str, Any] = {}
    hu, incomplete = (row.get(column, "") for column in SERIES_COLUMNS)
    if hu:
        try:
            known["aortic_hu"] = float(hu)
        except ValueError as error:
            raise CellError(("aortic_hu", hu, "a number or a blank")) from error
    if incomplete:
        if incomplete not in FLAGS:
            raise CellError(("incomplete_organ", incomplete, "0, 1 or a blank"))
        known["incomplete_organ"] = FLAGS[incomplete]
    return known


def _reader(group: LabelGroup, columns: Sequence[str]) -> Callable[[Row], int] | None:
    absent = [column for column in group.columns if column not in columns]
    if group.name in columns:
        if len(absent) < len(group.columns):
            raise ValueError(f"group '{group.name}' has a column of its own and columns of its classes: keep one kind")
        return lambda row: _by_name(group, row[group.name])
    if absent and len(absent) < len(group.columns):
        raise ValueError(f"group '{group.name}' lacks the columns {first_few(absent)}")
    return None if absent else lambda row: _by_flags(group, row)


def _by_name(group: LabelGroup, name: str) -> int:
    names = [item.name for item in group.classes]
    if name and name not in names:
        raise CellError((group.name, name, f"{', '.join(names)} or a blank"))
    return names.index(name) if name else MISSING


def _by_flags(group: LabelGroup, row: Row) -> int:
    cells = [row[column] for column in group.columns]
    if not any(cells):
        return MISSING
    flags = [FLAGS.get(cell) for cell in cells]
    if None in flags:
        wrong = flags.index(None)
        raise CellError((group.columns[wrong], cells[wrong], "0 or 1 (or a blank in all columns of the group)"))
    if sum(flags) != 1:
        raise CellError((" ".join(group.columns), " ".join(cells), "one 1 and else 0"))
    return flags.index(1)


def entry_label(
    entry: Mapping[str, Any], labels: LabelTable, datalist: str, *, skip_unlabelled: bool = False
) -> np.ndarray | None:
    """[G] class indices of a JSON entry, which names the class under its group's name; None to leave it out.

    Raises:
        DatalistError: for an unknown class, or no label at all.
    """
    label = []
    for group in labels.groups:
        names, value = [item.name for item in group.classes], entry.get(group.name)
        if value is not None and value not in names:
            raise DatalistError(f"datalist {datalist}: {entry['image']}: {group.name} is {value!r}, expected {names}")
        label.append(MISSING if value is None else names.index(value))
    if max(label) > MISSING:
        return np.asarray(label, dtype=np.int64)
    if skip_unlabelled:
        return None
    raise DatalistError(f"datalist {datalist}: {entry['image']}: no label, expected {UNLABELLED}")
