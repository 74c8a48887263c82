# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What the bundles train on: the images of a store as a datalist, and the folds of their patients.

A patient's fold is decided when its first label is trained on, and never moves. So no version was trained on a patient
whose score decides about a later one. The datalist is the bundles' JSON rather than their CSV: in a CSV a folder means
all series below it, and blanks around a name are cut off.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock
from workflow.datalist import read_folds
from workflow.errors import DatalistError
from workflow.folds import make_folds, patient_labels
from workflow.run import write_atomically

from scripts.labels import LabelTable
from scripts.own_data import entry_label

from .errors import AppError, Conflict

__all__ = ["deal_folds", "labelled_entries", "parts_of", "unlabelled_entries", "write_datalist"]

logger = logging.getLogger(__name__)

GIVE_UP = 5  # images one after the other
Item = Mapping[str, Any]
Entry = dict[str, str]


def labelled_entries(datalist: Iterable[Item], root: Path) -> list[Entry]:
    """Entries of a datalist, with the class of each group that the final label names; a group that it does not name is
    unknown, which the bundle masks.

    Args:
        datalist: of a store. root: folder that paths are written relative to.

    Raises:
        Conflict: for a label that cannot be read.
    """
    entries = []
    for item in datalist:
        try:
            groups = json.loads(Path(item["label"]).read_text(encoding="utf-8"))["groups"]
        except FileNotFoundError:
            continue  # removed since the store listed it
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Conflict(f"the final label of {item['id']} cannot be read: {error}") from error
        entries.append({**_entry(item, item["image"], root), **groups})
    return entries


def unlabelled_entries(store: Any, root: Path) -> list[Entry]:
    """Entries of all images of a store, labelled or not; those of a PACS are fetched.

    One that cannot be had is left out, and said.

    Raises:
        AppError: if that happens again and again, as when the PACS is down.
    """
    entries, in_a_row = [], 0
    for item in store.items():
        try:
            entries.append(_entry(item, store.get_image_uri(item["id"]), root))
            in_a_row = 0
        except AppError as error:
            in_a_row += 1
            if in_a_row == GIVE_UP:
                raise
            logger.warning("left out: %s", error)
    return entries


def _entry(item: Item, image: str | os.PathLike[str], root: Path) -> Entry:
    path = Path(image)
    name = path.relative_to(root) if path.is_relative_to(root) else path.absolute()
    known = {key: str(item.get(key) or item["id"]) for key in ("patient_id", "series_id")}
    return {"image": str(name), **known}


def write_datalist(path: Path, entries: Sequence[Entry]) -> None:
    path.write_text(json.dumps({"training": list(entries)}, indent=1) + "\n", encoding="utf-8")


def deal_folds(
    path: Path, entries: Sequence[Entry], labels: LabelTable, num_folds: int, seed: int = 0
) -> dict[str, str]:
    """Patient -> fold of the fold file, to which those of the entries are added that it does not have.

    The first patients are stratified by the bundle; each later one goes where there are fewest of its kind (injured or
    not), then fewest at all.

    Args:
        path: a CSV as the bundles' ``folds_file``; a patient may be marked ``test`` there by hand.
        entries: see `labelled_entries`. labels: the bundle's label table.
        num_folds: number of folds. seed: of the first division.

    Raises:
        Conflict: saying how many labelled patients are needed, or that the file is damaged.
    """
    items = [{**entry, "label": _classes(entry, labels)} for entry in entries]
    items = [item for item in items if item["label"].max() >= 0]
    worst = patient_labels(items)
    if len(worst) < num_folds:
        raise Conflict(
            f"too few labels: training needs final labels of at least {num_folds} patients, found {len(worst)}"
            f" (one of {num_folds} parts is held out to compare versions)"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock"), timeout=60):
        folds = _read(path)
        new = [patient for patient in worst if patient not in folds]
        if new and not set(folds) & set(worst):
            table = make_folds(items, num_folds, seed)
            folds |= dict(zip(table["patient_id"], map(str, table["fold"]), strict=True))
        elif new:
            folds |= _deal(new, worst, folds, num_folds)
        if new:
            rows = {"patient_id": sorted(folds), "fold": [folds[patient] for patient in sorted(folds)]}
            write_atomically(path, pd.DataFrame(rows).to_csv(index=False))
    return folds


def parts_of(entries: Sequence[Entry], folds: Mapping[str, str], fold: int) -> tuple[int, int]:
    """How many patients train, and how many are held out.

    Raises:
        Conflict: if one is empty.
    """
    patients = {entry["patient_id"] for entry in entries}
    counts = Counter(folds.get(patient, "") for patient in patients)
    held_out = counts[str(fold)]
    training = len(patients) - held_out - counts["test"]
    if not held_out or not training:
        raise Conflict(
            f"too few labels: of {len(patients)} patients with final labels {held_out} are in the part that is held out"
            f" to compare versions and {training} in that to train on, at least one is needed in each: label more"
        )
    return training, held_out


def _classes(entry: Entry, labels: LabelTable) -> np.ndarray:
    """[G] class indices, negative where unknown."""
    found = entry_label(entry, labels, "the final labels", skip_unlabelled=True)
    return np.full(len(labels.group_names), -1) if found is None else found


def _read(path: Path) -> dict[str, str]:
    try:
        return read_folds(path) if path.is_file() else {}
    except DatalistError as error:
        message = str(error).replace(str(path), path.name)
        raise Conflict(f"{message}. Put it right: without it versions cannot be compared") from error


def _deal(
    new: Sequence[str], worst: Mapping[str, np.ndarray], folds: Mapping[str, str], num_folds: int
) -> dict[str, str]:
    """Folds of the new patients, injured ones first."""
    injured = {patient: bool((label > 0).any()) for patient, label in worst.items()}
    dealt = dict(folds)
    for patient in sorted(new, key=lambda patient: (not injured[patient], patient)):
        alike = Counter(fold for other, fold in dealt.items() if injured.get(other) == injured[patient])
        size = Counter(dealt.values())
        numbers = map(str, range(num_folds))
        dealt[patient] = min(numbers, key=lambda fold: (alike[fold], size[fold], int(fold)))
    return dealt
