# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Own data as a CSV: the path of an image and whatever else is known of it, one row a series or a patient.

All rows are read before anything is refused, so that one message lists every cell to be put right.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .errors import DatalistError

__all__ = ["CellError", "ParserOf", "is_table", "load_table"]

logger = logging.getLogger(__name__)

OWN_COLUMNS = ("image", "patient_id", "series_id", "mask")
LISTED = 100  # bad cells that a message lists; it counts them all

Row = Mapping[str, str]
# columns of the file -> (row -> further keys of its items, or None to leave the row out)
ParserOf = Callable[[Sequence[str]], Callable[[Row], dict[str, Any] | None]]


class CellError(ValueError):
    """Cells of one row that are not what they should be: (column, value, what was expected)."""

    def __init__(self, *cells: tuple[str, str, str]) -> None:
        super().__init__(*cells)  # as they came: a copy or a pickle is made from these
        self.cells = cells

    def __str__(self) -> str:
        return "; ".join(f"{column} is {value!r}, expected {expected}" for column, value, expected in self.cells)


def is_table(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix.lower() == ".csv"


def load_table(
    path: Path,
    dataset_dir: str | os.PathLike[str] | None,
    series_below: Callable[[Path, str], list[dict[str, str]]],
    labels: ParserOf | None = None,
) -> list[dict[str, Any]]:
    """The series of a CSV with a column ``image``: a NIfTI file, a folder of one DICOM series, or a folder of all
    series of one patient, below `dataset_dir` or beside the CSV.

    Args:
        path: the CSV (UTF-8, commas). ``patient_id`` and ``series_id`` are optional columns or cells; without them the
            folders of an RSNA tree or the path name both. ``mask`` is the path of a series' organs, found as ``image``.
        dataset_dir: see above; None for beside the CSV alone.
        series_below: (path, its name) -> items of the series there.
        labels: what the other columns mean; None reads none of them.

    Returns:
        Items with ``image``, ``patient_id``, ``series_id``, ``mask`` where one is named, and what `labels` adds.

    Raises:
        DatalistError: listing row number (as a spreadsheet counts, the header is 1), column and value of every bad
            cell.
    """
    frame = _read(path)
    parse = (lambda row: {}) if labels is None else _with_path(path, labels, list(frame.columns))
    bases = [Path(base).expanduser() for base in (dataset_dir, path.parent) if base is not None]
    items: list[dict[str, Any]] = []
    bad: list[tuple[int, tuple[str, str, str]]] = []
    seen: dict[tuple[str, ...], int] = {}
    left_out = 0
    for number, row in enumerate(frame.to_dict("records"), start=2):
        extra, series = None, []
        try:
            extra = parse(row)
        except CellError as error:
            bad += [(number, cell) for cell in error.cells]
        try:
            series = _series(row, bases, series_below)
            _once(row, series, seen, number)
        except CellError as error:
            bad += [(number, cell) for cell in error.cells]
        left_out += extra is None
        items += [{**item, **extra} for item in series if extra is not None]
    if bad:
        lines = [f"  row {number}, column {c}: {value!r}, expected {what}" for number, (c, value, what) in bad[:LISTED]]
        more = [f"  and {len(bad) - LISTED} more"] if len(bad) > LISTED else []
        rows = len({number for number, _ in bad})
        raise DatalistError("\n".join([f"datalist {path}: {rows} of {len(frame)} rows are not usable:", *lines, *more]))
    if left_out:
        logger.warning("datalist %s: %d of %d rows without any label left out", path, left_out, len(frame))
    if not items:
        raise DatalistError(f"datalist {path}: no row is left to use")
    return items


def _read(path: Path) -> pd.DataFrame:
    """All cells as text without the blanks around it, empty where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows with more cells than the header
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False)
    except (OSError, ValueError, pd.errors.ParserWarning) as error:  # ValueError: no UTF-8, or errors of the format
        raise DatalistError(f"datalist {path}: not readable as CSV: {error}") from error
    frame = frame.fillna("").rename(columns=str.strip).apply(lambda column: column.str.strip())
    if "image" not in frame.columns or frame.empty:
        raise DatalistError(
            f"datalist {path}: expected rows with a column 'image', found {len(frame)} rows of {list(frame.columns)}"
        )
    return frame


def _with_path(path: Path, labels: ParserOf, columns: Sequence[str]) -> Callable[[Row], dict[str, Any] | None]:
    try:
        return labels([column for column in columns if column not in OWN_COLUMNS])
    except ValueError as error:
        raise DatalistError(f"datalist {path}: {error}") from error


def _series(
    row: Row, bases: Sequence[Path], series_below: Callable[[Path, str], list[dict[str, str]]]
) -> list[dict[str, str]]:
    """The items of a row without its labels."""
    name, patient, series = row["image"], row.get("patient_id", ""), row.get("series_id", "")
    path = _existing("image", name, bases)
    items = series_below(path, name)
    if not items:
        raise CellError(("image", name, f"a NIfTI file or a folder with DICOM series; {path} holds none"))
    if series and len(items) > 1:
        raise CellError(("series_id", series, f"a blank: the folder holds {len(items)} series"))
    given = {key: value for key, value in (("patient_id", patient), ("series_id", series)) if value}
    if row.get("mask"):
        if len(items) > 1:
            raise CellError(("mask", row["mask"], f"a blank: the folder holds {len(items)} series"))
        given["mask"] = str(_existing("mask", row["mask"], bases))
    return [{**item, **given} for item in items]


def _existing(column: str, name: str, bases: Sequence[Path]) -> Path:
    path = next((base / name for base in bases if name and (base / name).exists()), None)
    if path is None:
        raise CellError((column, name, f"a path below {' or '.join(map(str, bases))}"))
    return path


def _once(row: Row, series: Sequence[Row], seen: dict[tuple[str, ...], int], number: int) -> None:
    """Refuses an image, or a pair of patient and series, that an earlier row has."""
    for item in series:
        for column, key in (("image", (item["image"],)), ("series_id", (item["patient_id"], item["series_id"]))):
            first = seen.setdefault(key, number)
            if first != number:
                raise CellError((column, row.get(column) or item["series_id"], f"what row {first} does not have"))
