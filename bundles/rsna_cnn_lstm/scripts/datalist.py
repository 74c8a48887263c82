# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""RSNA 2023's folders and CSV files -> a list of dictionaries, one a series, for MONAI's datasets.

dataset_dir/
  train.csv                                    one row a patient, class columns of the label table
  train_series_meta.csv                        optional: patient_id, series_id, aortic_hu, incomplete_organ
  train_images/<patient_id>/<series_id>/*.dcm
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from workflow.index import walk

from .labels import MISSING, LabelTable, first_few, raise_error

__all__ = ["RSNATree", "datalist_solution", "read_labels", "read_table", "read_tree", "rsna_datalist"]

logger = logging.getLogger(__name__)


def rsna_datalist(
    dataset_dir: str | Path,
    labels_file: str | Path | LabelTable,
    labels_csv: str | Path | None = None,
    split: str = "train",
    strict: bool = True,
    cache_dir: str | Path | None = None,
) -> list[dict[str, Any]]:
    """The series of one split with their patients' labels.

    Args:
        dataset_dir: folder in RSNA's layout.
        labels_file: path of the label table, or the table.
        labels_csv: CSV of the labels; ``None`` takes ``<dataset_dir>/<split>.csv``, which the split ``"test"`` may
            lack (no labels).
        split: the series are those of ``<split>_images``.
        strict: ``False`` keeps what has both images and a label and logs the rest, for a part of the set.
        cache_dir: keeps an index of the folders (see `workflow.index`); None lists them all.

    Returns:
        Dictionaries in order of patient and series: ``image`` (path of the series folder), ``patient_id``,
        ``series_id`` (text, the folders' names), ``label`` ([G] int64, -1 without a label; only with labels), and
        where the series table exists ``aortic_hu`` (float, NaN if unknown) and ``incomplete_organ`` (int, -1 if
        unknown).

    Raises:
        ValueError: no images, no labels, duplicate rows, groups that do not sum to 1, and, if ``strict``, patients
            without images or images without labels or files: one message with every kind of problem, its count and the
            first few.
    """
    root = Path(dataset_dir)
    table = labels_file if isinstance(labels_file, LabelTable) else LabelTable.from_file(labels_file)
    tree = read_tree(root, table, labels_csv, split, cache_dir=cache_dir)
    empty = ["/".join(key) for key in tree.empty]
    _report(root, {"series folders without files": empty, **tree.mismatches()}, strict)
    items = [item for item in tree.items() if tree.labels is None or "label" in item]
    if not items:
        raise ValueError(f"{root}: no series of {split}_images has both files and a label")
    return items


@dataclass(frozen=True)
class RSNATree:
    """What the folders and CSV files of one split say."""

    series: dict[tuple[str, str], Path]  # (patient, series) -> folder
    empty: dict[tuple[str, str], Path]  # the same of folders without a file
    labels: dict[str, np.ndarray] | None  # patient -> class indices
    meta: dict[tuple[str, str], dict[str, Any]] | None  # (patient, series) -> columns of the series table

    def items(self) -> Iterator[dict[str, Any]]:
        """A dictionary a series, with ``label`` where its patient has one."""
        for (patient, name), folder in self.series.items():
            item: dict[str, Any] = {"image": str(folder), "patient_id": patient, "series_id": name}
            if self.labels is not None and patient in self.labels:
                item["label"] = self.labels[patient].copy()
            if self.meta is not None:
                item.update(self.meta.get((patient, name), {"aortic_hu": float("nan"), "incomplete_organ": -1}))
            yield item

    def mismatches(self) -> dict[str, list[str]]:
        """What the folders, the labels and the series table do not share: kind of problem -> where."""
        found: dict[str, list[str]] = {}
        if self.labels is not None:
            imaged = {patient for patient, _ in self.series}
            found["patients with a label but without images"] = [p for p in self.labels if p not in imaged]
            found["patients with images but without a label"] = sorted(imaged - set(self.labels))
        if self.meta is not None:
            absent = set(self.meta) - set(self.series)
            found["series of the series table without images"] = sorted("/".join(key) for key in absent)
        return found


def read_tree(
    root: Path,
    table: LabelTable,
    labels_csv: str | Path | None = None,
    split: str = "train",
    *,
    cache_dir: str | Path | None = None,
    refuse: Callable[[str], None] = raise_error,
) -> RSNATree:
    """Folders, labels and series table of one split, as `rsna_datalist` takes them.

    Args:
        refuse: told of rows that cannot be used (repeated, or a group that does not sum to 1), which are then left out;
            by default the first one is an error.

    Raises:
        ValueError: no images, no labels, or a CSV file that cannot be read.
    """
    series, empty = _list_series(root / f"{split}_images", cache_dir)
    labels = _split_labels(root, labels_csv, split, table, refuse)
    return RSNATree(series, empty, labels, _read_meta(root / f"{split}_series_meta.csv", refuse))


def read_labels(
    csv_file: str | Path, table: LabelTable, refuse: Callable[[str], None] = raise_error
) -> dict[str, np.ndarray]:
    """Patient id -> [G] class indices of a CSV with one row a patient.

    Raises:
        ValueError: no ``patient_id`` column, empty or repeated ids, no rows, or wrong class columns; the message names
            the file.
    """
    frame = read_table(csv_file, ["patient_id"], refuse)
    indices = table.class_indices(frame, lambda message: refuse(f"{csv_file}: {message}"))
    return dict(zip(frame["patient_id"], indices, strict=True))


def datalist_solution(items: Iterable[Mapping[str, Any]], table: LabelTable) -> pd.DataFrame:
    """The solution frame (``patient_id`` and the P columns, NaN without a label) of labelled items, one row a patient.

    Where the series of a patient differ in their labels (own data, labelled by series), the patient has the most
    severe.
    """
    worst: dict[str, np.ndarray] = {}
    for item in items:
        label = np.asarray(item["label"], dtype=np.int64)
        patient = str(item["patient_id"])
        worst[patient] = np.maximum(worst.get(patient, label), label)  # MISSING is below every class
    indices = np.stack(list(worst.values())) if worst else np.full((0, len(table.groups)), MISSING)
    frame = pd.DataFrame(table.one_hot(indices), columns=list(table.columns))
    frame.insert(0, "patient_id", list(worst))
    return frame


def _list_series(
    images: Path, cache_dir: str | Path | None
) -> tuple[dict[tuple[str, str], Path], dict[tuple[str, str], Path]]:
    """(patient, series) -> folder, of those with files and of those without."""
    if not images.is_dir():
        raise ValueError(f"{images}: no such folder; expected {images.name}/<patient_id>/<series_id>/*.dcm")
    found: tuple[dict[tuple[str, str], Path], ...] = ({}, {})
    for folder in walk(images, cache_dir):
        parts = folder.path.split("/")
        if len(parts) == 2 and not any(part.startswith(".") for part in parts):
            found[not folder.files][parts[0], parts[1]] = images / folder.path
    if not found[0]:
        raise ValueError(f"{images}: holds no series; expected {images.name}/<patient_id>/<series_id>/*.dcm")
    return found[0], found[1]


def _split_labels(
    root: Path, labels_csv: str | Path | None, split: str, table: LabelTable, refuse: Callable[[str], None]
) -> dict[str, np.ndarray] | None:
    """Patient id -> class indices; ``None`` for a test split without a CSV."""
    csv_file = root / f"{split}.csv" if labels_csv is None else Path(labels_csv)
    if csv_file.is_file():
        return read_labels(csv_file, table, refuse)
    if labels_csv is None and split == "test":
        return None
    raise ValueError(f"{csv_file}: no such file; expected a CSV with patient_id and the class columns")


def read_table(
    csv_file: str | Path, keys: Sequence[str], refuse: Callable[[str], None] = raise_error, unique: bool = True
) -> pd.DataFrame:
    """A CSV whose key columns are text, present, filled and, if asked for, unique together."""
    try:
        frame = pd.read_csv(csv_file, dtype={key: str for key in keys})
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{csv_file}: not a readable CSV: {error}") from error
    absent = [key for key in keys if key not in frame.columns]
    if absent:
        raise ValueError(f"{csv_file}: lacks the columns {first_few(absent)}; it has {first_few(frame.columns)}")
    for key in keys:
        frame[key] = frame[key].str.strip()
        blank = frame[key].isna() | (frame[key] == "")
        if blank.any():
            raise ValueError(
                f"{csv_file}: {int(blank.sum())} rows without {key}, the first is row {int(blank.argmax()) + 2}"
            )
    if frame.empty:
        raise ValueError(f"{csv_file}: has no rows")
    twice = frame.loc[frame.duplicated(list(keys)), keys[0]].unique() if unique else ()
    if len(twice):
        refuse(f"{csv_file}: {len(twice)} {' and '.join(keys)} in more than one row: {first_few(twice)}")
    return frame.drop_duplicates(list(keys), ignore_index=True) if unique else frame


def _read_meta(csv_file: Path, refuse: Callable[[str], None]) -> dict[tuple[str, str], dict[str, Any]] | None:
    """(patient, series) -> ``aortic_hu`` and ``incomplete_organ``; ``None`` without the file."""
    if not csv_file.is_file():
        return None
    frame = read_table(csv_file, ["patient_id", "series_id"], refuse)
    frame = frame.reindex(columns=["patient_id", "series_id", "aortic_hu", "incomplete_organ"])
    frame["aortic_hu"] = pd.to_numeric(frame["aortic_hu"]).astype(float)
    frame["incomplete_organ"] = pd.to_numeric(frame["incomplete_organ"]).fillna(-1).astype(int)
    return {
        (row.patient_id, row.series_id): {"aortic_hu": row.aortic_hu, "incomplete_organ": row.incomplete_organ}
        for row in frame.itertuples(index=False)
    }


def _report(root: Path, problems: Mapping[str, Sequence[str]], strict: bool) -> None:
    lines = [f"{len(names)} {what}: {first_few(names)}" for what, names in problems.items() if names]
    if lines and strict:
        raise ValueError(f"{root}: {'; '.join(lines)} (--strict False leaves them out)")
    for what, names in problems.items():
        if names:
            logger.warning("%s: %d %s left out", root, len(names), what)
