# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Whose an image is: what a CSV says, or the header of a DICOM series. Patients, never series, are divided between
training and validation, so two series of one patient have to be known as such."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Collection, Iterable
from pathlib import Path

import pandas as pd
from pydicom import dcmread
from pydicom.errors import InvalidDicomError
from workflow.index import NOT_DICOM
from workflow.run import write_atomically

from .bundles import SetupError

__all__ = ["HeaderPatients", "read_patients"]

logger = logging.getLogger(__name__)

LISTED = 10  # of each kind of fault that a message lists
Known = tuple[int, str, int, str]  # time of the folder, name and time of the file that was read, what it says


def read_patients(path: Path, images: Collection[str]) -> dict[str, str]:
    """Image -> patient of a CSV with the columns ``image`` (its id) and ``patient_id``.

    Raises:
        SetupError: it is none; or, all in one message, it names images that are not among `images`, leaves a cell
            blank, or names an image twice.
    """
    what = f"--conf patients {path}"
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False).fillna("")
        rows = [(image.strip(), patient.strip()) for image, patient in zip(table["image"], table["patient_id"],
                                                                           strict=True)]  # fmt: skip
    except (OSError, KeyError, ValueError) as error:
        raise SetupError(f"{what}: expected a CSV with the columns image and patient_id: {error}") from error
    blank = [f"row {number}" for number, row in enumerate(rows, 2) if not all(row)]
    names = [image for image, _ in rows if image]
    known = set(images)
    faults = {
        "not among the images": [repr(name) for name in dict.fromkeys(names) if name not in known],
        "image or patient_id blank": blank,
        "listed more than once": [repr(name) for name in dict.fromkeys(names) if names.count(name) > 1],
    }
    said = [f"{fault}: {', '.join(cells[:LISTED])}{f' and {len(cells) - LISTED} more' if len(cells) > LISTED else ''}"
            for fault, cells in faults.items() if cells]  # fmt: skip
    if said:
        raise SetupError(f"{what}: {'; '.join(said)}")
    return dict(rows)


class HeaderPatients:
    """PatientID of the header of DICOM series; a series is read again when its folder or that file changes.

    Args:
        file: where what was read is kept for the next process; None keeps it in memory only.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._known: dict[str, Known] | None = None
        self._reading = threading.Lock()

    def of(self, folders: Iterable[Path]) -> dict[Path, str]:
        """The PatientID of each folder of a DICOM series; "" where the header has none or cannot be read."""
        with self._reading:
            if self._known is None:
                self._known = self._load()
            found, read = {}, 0
            for folder in folders:
                name = str(folder)
                known = self._known.get(name)
                if known is None or not _is_fresh(folder, known):
                    self._known.pop(name, None)
                    known, read = _read_header(folder), read + 1
                if known is not None:
                    self._known[name] = known
                found[folder] = "" if known is None else known[3]
            if read:
                logger.info("read the patients of %d series from their headers", read)
                self._save()
        return found

    def _load(self) -> dict[str, Known]:
        try:
            content = {} if self._file is None else json.loads(self._file.read_text(encoding="utf-8"))
            return {folder: (int(at), str(file), int(then), str(patient))
                    for folder, (at, file, then, patient) in content.items()}  # fmt: skip
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            logger.warning("the patients that were read before are read again: %s", error)
            return {}

    def _save(self) -> None:
        if self._file is None:
            return
        try:
            write_atomically(self._file, json.dumps(self._known))
        except OSError as error:  # it costs time, not the training
            logger.warning("the patients that were read cannot be kept: %s", error)


def _is_fresh(folder: Path, known: Known) -> bool:
    try:
        return (os.stat(folder).st_mtime_ns, os.stat(folder / known[1]).st_mtime_ns) == (known[0], known[2])
    except OSError:
        return False


def _read_header(folder: Path) -> Known | None:
    """What the first DICOM file of a folder says; None if there is none that can be read."""
    try:
        at = os.stat(folder).st_mtime_ns
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in NOT_DICOM or path.name == "DICOMDIR" or not path.is_file():
                continue
            try:
                header = dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"])
            except InvalidDicomError:
                continue
            return at, path.name, path.stat().st_mtime_ns, str(header.get("PatientID") or "").strip()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # as pydicom fails on damaged files
        logger.warning("the patient of %s cannot be read from its header: %s", folder, error)
    return None
