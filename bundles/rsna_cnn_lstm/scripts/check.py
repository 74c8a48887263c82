# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What is in a tree, and what of it cannot be used: a row a series, and what folders and tables do not share.

Each series goes through the same checks as in loading (`transforms.series.LoadSeries.check`), so a series that is
usable here is refused in training only for what cannot be seen without decoding its voxels: ``full`` decodes them, and
looks for the body as the crop of training does.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydicom
from pydicom.errors import InvalidDicomError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transforms.body import CropBody
from transforms.dicom_headers import CT_CLASSES, NO_SLICE, image_types
from transforms.errors import DAMAGED, SeriesError
from transforms.geometry import SeriesSummary
from transforms.series import LoadSeries
from workflow.datalist import ALL, RSNA_IMAGES, DatalistError, find_series, load_sections
from workflow.errors import root_cause
from workflow.privacy import anonymous_path, anonymous_text, pseudonym
from workflow.run import write_atomically

from .cohort import labelled_series
from .datalist import RSNATree, read_tree
from .labels import MISSING, LabelTable

__all__ = ["DataCheck"]

logger = logging.getLogger(__name__)

COLUMNS = (
    "image", "patient_id", "series_id", "usable", "reason", "note", "label", "columns", "rows", "slices",
    "spacing_x_mm", "spacing_y_mm", "spacing_z_mm", "extent_z_mm", "slice_thickness_mm", "orientation", "entry",
    "body_part", "hu_min", "hu_max", "skipped_files", "dropped_duplicates", "resampled",
)  # fmt: skip
DESCRIPTION_TAGS = [
    "SOPClassUID", "ImageType", "SliceThickness", "BodyPartExamined", "PatientPosition", "ImageOrientationPatient",
]  # fmt: skip
PLANES = ("sagittal", "coronal", "axial")  # by the axis that their normal is nearest to
BAD_ROWS = "rows or tables that cannot be used"
NO_NEGATIVE = "no value below 0"  # air has HU below: perhaps the intercept was left out
ENTRIES = {"HF": "head-first", "FF": "feet-first"}


class DataCheck:
    """Checks every series below a folder and writes ``check.csv``, ``problems.csv`` and ``summary.json``.

    Args:
        dataset_dir: an RSNA 2023 tree, or a folder of DICOM series and NIfTI files at any depth.
        loader: reads the series, with the options that training uses.
        labels: the label table.
        datalist: own data (see `scripts.cohort.labelled_series`) instead of the tree.
        exclude: patterns of paths below `dataset_dir` to pass over (not of an RSNA tree's images).
        cache_dir: keeps an index of the folders; None lists them all.
        full: decode every series too.
        anonymise: pseudonyms in place of paths and ids in all that is written (`failed` is left to the run folder).
        num_workers: processes.
    """

    def __init__(
        self,
        dataset_dir: str,
        loader: LoadSeries,
        labels: LabelTable,
        *,
        datalist: str | None = None,
        exclude: Sequence[str] = (),
        cache_dir: str | None = None,
        full: bool = False,
        anonymise: bool = False,
        num_workers: int = 0,
    ) -> None:
        self.dataset_dir, self.loader, self.labels, self.datalist = dataset_dir, loader, labels, datalist
        self.exclude, self.cache_dir, self.full, self.anonymise = list(exclude), cache_dir, full, anonymise
        self.num_workers = num_workers
        self.failed: list[tuple[str, str]] = []

    def run(self, output_dir: str | Path) -> None:
        """Check everything; what cannot be used is in ``failed`` afterwards, as (where, reason)."""
        items, problems = self._list()
        rows = DataLoader(_Rows(items, self.loader, self.full), batch_size=None, num_workers=self.num_workers)
        rows = list(tqdm(rows, desc="checking series", unit="series", leave=False, mininterval=1.0))
        self.failed = [(row["image"], row["reason"]) for row in rows if not row["usable"]]
        self.failed += ((row["where"], row["problem"]) for row in problems)
        series = pd.DataFrame([self._private(row) for row in rows], columns=list(COLUMNS))
        faults = pd.DataFrame([self._private(row) for row in problems], columns=["problem", "where"])
        unusable = series[series["usable"] == 0]
        write_atomically(Path(output_dir) / "check.csv", series.to_csv(index=False))
        write_atomically(Path(output_dir) / "problems.csv", faults.to_csv(index=False))
        summary = {
            "series": len(series),
            "usable": len(series) - len(unusable),
            "patients": int(series["patient_id"].nunique()),
            "slices": int(series["slices"].sum()),
            "problems": {str(kind): int(count) for kind, count in faults["problem"].value_counts().items()},
            "decoded": self.full,
        }
        write_atomically(Path(output_dir) / "summary.json", json.dumps(summary, indent=4) + "\n")
        logger.info(
            "%d series of %d patients: %d usable, %d not; %d problems of folders and tables",
            len(series), summary["patients"], summary["usable"], len(unusable), len(faults),
        )  # fmt: skip

    def _list(self) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
        """All series, and the problems that no series shows by itself."""
        if self.datalist is not None:
            return self._list_own(self.datalist)
        root, problems = Path(self.dataset_dir).expanduser(), []
        items: dict[str, dict[str, Any]] = {}
        for folder in RSNA_IMAGES:
            if (root / folder).is_dir():
                tree = self._read_tree(root, folder.removesuffix("_images"), problems)
                for item in [] if tree is None else _items(tree):
                    items[item["image"]] = item
        try:
            others = find_series(root, self.exclude, cache_dir=self.cache_dir)
        except DatalistError:
            if not items:
                raise
            others = []
        items = {item["image"]: item for item in others} | items
        return [items[image] for image in sorted(items)], problems

    def _list_own(self, datalist: str) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
        """The same of a datalist, whose series need a label each."""
        items = load_sections(datalist, self.dataset_dir)
        try:
            found = labelled_series(self.dataset_dir, self.labels, datalist, part=ALL, skip_unlabelled=True)
        except ValueError as error:
            return items, [{"problem": BAD_ROWS, "where": str(error)}]
        of_image = {item["image"]: item["label"] for item in found}
        absent = [item["image"] for item in items if item["image"] not in of_image]
        items = [{**item, "label": of_image.get(item["image"])} for item in items]
        return items, [{"problem": "series of the datalist without a label", "where": image} for image in absent]

    def _read_tree(self, root: Path, split: str, problems: list[dict[str, str]]) -> RSNATree | None:
        faults: list[str] = []
        try:
            tree = read_tree(root, self.labels, split=split, cache_dir=self.cache_dir, refuse=faults.append)
        except ValueError as error:
            faults.append(str(error))
            tree = None
        problems += ({"problem": BAD_ROWS, "where": fault} for fault in faults)
        shared = {} if tree is None else tree.mismatches()
        problems += ({"problem": kind, "where": name} for kind, names in shared.items() for name in names)
        return tree

    def _private(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row as it may be written."""
        if not self.anonymise:
            return row
        if "where" in row:
            bad_rows = row["problem"] == BAD_ROWS  # the message begins with the file and ends with ids
            where = Path(row["where"].split(": ")[0]).name if bad_rows else pseudonym(row["where"])
            return {**row, "where": where}
        image = row["image"]
        ids = {key: pseudonym(row[key]) for key in ("patient_id", "series_id")}
        return {**row, **ids, "image": anonymous_path(image), "reason": anonymous_text(row["reason"], image)}


def _items(tree: RSNATree) -> Iterator[dict[str, Any]]:
    """The series of a tree, empty folders included, which loading refuses."""
    unlabelled = {} if tree.labels is None else {"label": None}
    yield from ({**unlabelled, **item} for item in tree.items())
    for (patient, series), path in tree.empty.items():
        yield {"image": str(path), "patient_id": patient, "series_id": series}


class _Rows(Dataset):
    """Row i of the table, made when asked for."""

    def __init__(self, items: Sequence[dict[str, Any]], loader: LoadSeries, full: bool) -> None:
        self.items, self.loader, self.full = items, loader, full

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        row = {key: item[key] for key in ("image", "patient_id", "series_id")} | {"usable": 1, "reason": ""}
        if "label" in item:
            row["label"] = int(item["label"] is not None and bool((np.asarray(item["label"]) != MISSING).any()))
        try:
            summary = self.loader.check(item["image"])
            row |= _geometry(summary)
            if self.full:
                volume = self.loader(item["image"])
                row |= {"hu_min": float(volume.min()), "hu_max": float(volume.max())}
                row["note"] = NO_NEGATIVE if row["hu_min"] >= 0 else ""
                CropBody().bounding_box(volume)
        except SeriesError as error:
            row |= {"usable": 0, "reason": str(error)}
        except (RuntimeError, ValueError, OSError) as error:
            row |= {"usable": 0, "reason": root_cause(error)}
        return _description(Path(item["image"])) | row  # what was computed of the whole series counts


def _geometry(summary: SeriesSummary) -> dict[str, Any]:
    columns, rows, slices = summary.shape
    x, y, z = (round(value, 4) for value in summary.spacing)
    return {
        "columns": columns, "rows": rows, "slices": slices, "spacing_x_mm": x, "spacing_y_mm": y, "spacing_z_mm": z,
        "extent_z_mm": round(slices * summary.spacing[2], 2), "orientation": _plane(summary.affine[:3, 2]),
        "skipped_files": summary.skipped_files, "dropped_duplicates": summary.dropped_duplicates,
        "resampled": int(summary.resampled),
    }  # fmt: skip


def _plane(normal: np.ndarray) -> str:
    return PLANES[int(np.abs(normal).argmax())]


def _description(path: Path) -> dict[str, Any]:
    """What the first CT slice of a folder says of the scan, usable or not; nothing that names a person."""
    if not path.is_dir():
        return {}
    for file in sorted(entry for entry in path.iterdir() if entry.is_file()):
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=DESCRIPTION_TAGS)
            kinds = image_types(header)
            if header.get("SOPClassUID") not in CT_CLASSES or kinds.intersection(NO_SLICE):
                continue
            directions = np.asarray(header.ImageOrientationPatient, dtype=float).reshape(2, 3)
            thickness = header.get("SliceThickness")
            found = {"slice_thickness_mm": None if thickness in (None, "") else float(thickness)}
        except (InvalidDicomError, *DAMAGED):
            continue  # no image: the next one
        body_part = str(header.get("BodyPartExamined") or "")
        return found | {
            "orientation": _plane(np.cross(*directions)),
            "entry": ENTRIES.get(str(header.get("PatientPosition") or "")[:2].upper(), ""),
            # a code of letters and digits (PS3.16, annex L), and no free text
            "body_part": body_part if re.fullmatch(r"[A-Z0-9_ ]{1,16}", body_part) else "",
        }
    return {}
