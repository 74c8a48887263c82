# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Where the volumes are: a folder of any mix of DICOM series and NIfTI files, an RSNA tree, a decathlon-style JSON
or a CSV.

A datalist is a list of dicts: ``image`` (path of a series folder or NIfTI file), ``patient_id``, ``series_id`` and, for
labelled data, ``label``. Patients, never series, are divided between training and validation.
"""

from __future__ import annotations

import fnmatch
import logging
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import pandas as pd
from sklearn.model_selection import GroupShuffleSplit

from .errors import DatalistError
from .index import walk
from .sections import PARTS, read_json, read_section
from .table import ParserOf, is_table, load_table

__all__ = [
    "DatalistError",
    "find_series",
    "load_datalist",
    "load_sections",
    "read_folds",
    "select_part",
    "unlabelled_datalist",
]

logger = logging.getLogger(__name__)

RSNA_IMAGES = ("train_images", "test_images")
RSNA_MASKS = "segmentations"
ALL = "all"  # what is prepared ahead or checked


def find_series(
    dataset_dir: str | os.PathLike[str], exclude: Sequence[str] = (), *, cache_dir: str | os.PathLike[str] | None = None
) -> list[dict[str, Any]]:
    """Every DICOM series folder and NIfTI file below a folder, at any depth, in a stable order.

    Below a folder ``train_images`` or ``test_images`` (an RSNA tree, anywhere) the patient is the next folder's name,
    and the masks beside it (``segmentations``) are passed over. Elsewhere a patient is one path: name patients in a
    datalist if one has several series.

    Args:
        dataset_dir: the folder to search, a folder that is itself a series, or one file.
        exclude: patterns (as in a shell) of paths below it to pass over, such as ``*mask*``.
        cache_dir: keeps an index of the folders (see `workflow.index`); None lists them all.

    Raises:
        DatalistError: if it does not exist or holds no series.
    """
    root = Path(dataset_dir).expanduser()
    if root.is_file():
        return [{"image": str(root), "patient_id": root.name, "series_id": root.name}]
    if not root.is_dir():
        raise DatalistError(f"dataset_dir: expected a folder or file, found none at {root}")
    items, passed_over = [], 0
    for path in _series_paths(root, cache_dir):
        name = path.relative_to(root).as_posix() if path != root else path.name
        if any(fnmatch.fnmatchcase(name.lower(), pattern.lower()) for pattern in exclude):
            passed_over += 1
        else:
            items.append({"image": str(path), **_identify(path, name)})
    if passed_over:
        logger.warning("%s: %d series or files passed over by exclude %s", root, passed_over, list(exclude))
    if not items:
        raise DatalistError(f"{root}: expected DICOM series folders or NIfTI files, found none")
    return items


def _identify(path: Path, name: str) -> dict[str, str]:
    """Patient and series: by the folders of an RSNA tree, else by the path."""
    parts = path.absolute().parts
    for folder in RSNA_IMAGES:
        if folder in parts[:-2]:
            return {"patient_id": parts[parts.index(folder) + 1], "series_id": parts[-1]}
    return {"patient_id": name, "series_id": name}


def _series_below(path: Path, name: str) -> list[dict[str, str]]:
    """The series that a row of a table means by a path: itself, or all below it, which then are one patient's."""
    items = []
    for found in [path] if path.is_file() else _series_paths(path, None):
        series = name if found == path else f"{name}/{found.relative_to(path).as_posix()}"
        identity = _identify(found, series)
        if identity["patient_id"] == series:
            identity["patient_id"] = name
        items.append({"image": str(found), **identity})
    return items


def _series_paths(top: Path, cache_dir: str | os.PathLike[str] | None) -> Iterator[Path]:
    masks: list[str] = []
    for folder in walk(top, cache_dir):
        if any(f"{folder.path}/".startswith(f"{name}/") for name in masks):
            continue
        if RSNA_IMAGES[0] in folder.subfolders and RSNA_MASKS in folder.subfolders:
            masks.append(f"{folder.path}/{RSNA_MASKS}".lstrip("/"))
        here = top / folder.path
        yield from (here / name for name in folder.nifti)
        if folder.dicom:
            yield here


def load_datalist(
    path: str | os.PathLike[str],
    dataset_dir: str | os.PathLike[str] | None,
    section: str,
    labels: ParserOf | None = None,
) -> list[dict]:
    """A section of a decathlon-style JSON: ``{"training": [{"image": "a.nii.gz", "patient_id": "7"}, ...], ...}``, or
    the rows of a CSV (see `workflow.table.load_table`), which has no sections.

    An entry may have a ``mask`` of its organs. Relative paths are below `dataset_dir`, or beside the JSON where that is
    None.

    Args:
        labels: what a CSV's further columns mean.

    Raises:
        DatalistError: if the file, the section, an ``image`` entry or a file that it names is missing, or an image or
            patient is in two sections.
    """
    path = Path(path).expanduser()
    if is_table(path):
        return load_table(path, dataset_dir, _series_below, labels)
    base = Path(dataset_dir).expanduser() if dataset_dir is not None else path.parent
    return read_section(path, base, section)


def load_sections(
    path: str | os.PathLike[str], dataset_dir: str | os.PathLike[str] | None, labels: ParserOf | None = None
) -> list[dict]:
    """The series of all sections of a datalist; see `load_datalist`."""
    if is_table(path):
        return load_datalist(path, dataset_dir, "training", labels)
    content = read_json(Path(path).expanduser())
    sections = [part for part in PARTS if isinstance(content, dict) and part in content] or ["training"]
    return [item for section in sections for item in load_datalist(path, dataset_dir, section, labels)]


def select_part(
    items: list[dict], part: str, *, folds_file: str | None, fold: int, val_fraction: float, seed: int
) -> list[dict]:
    """The items of one part; a patient is only ever in one.

    With a fold file (columns ``patient_id`` and ``fold``, an integer or ``test``) validation is the patients of `fold`,
    test those marked ``test``, training all others. Without one a seeded share of the patients is held out.

    Raises:
        DatalistError: for an unreadable fold file, a fold that it lacks or a part without a single item.
    """
    if part not in PARTS:
        raise DatalistError(f"part: expected one of {PARTS}, got {part!r}")
    if folds_file is not None:
        chosen = _by_fold(items, part, Path(folds_file).expanduser(), fold)
    else:
        chosen = _by_fraction(items, part, val_fraction, seed)
    if not chosen:
        raise DatalistError(f"no {part} series: {len(items)} series, folds_file {folds_file}, fold {fold}, "
                            f"val_fraction {val_fraction}")  # fmt: skip
    return chosen


def read_folds(path: Path) -> dict[str, str]:
    """Patient -> fold of a fold file.

    Raises:
        DatalistError: if it is none, lists a patient twice, or a fold is neither a number nor ``test``.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        of_patient = dict(zip(table["patient_id"], table["fold"], strict=True))
    except (OSError, KeyError, ValueError) as error:
        raise DatalistError(f"folds_file {path}: expected a CSV with patient_id and fold: {error}") from error
    if len(of_patient) != len(table):
        raise DatalistError(f"folds_file {path}: {len(table) - len(of_patient)} patients are listed twice")
    unknown = sorted({fold for fold in of_patient.values() if fold != "test" and not fold.isdecimal()})
    if unknown:
        raise DatalistError(f"folds_file {path}: expected a number or 'test' as fold, found {unknown[:5]}")
    return of_patient


def _by_fold(items: list[dict], part: str, path: Path, fold: int) -> list[dict]:
    of_patient = read_folds(path)
    if str(fold) not in set(of_patient.values()):
        raise DatalistError(f"folds_file {path}: has no fold {fold}, only {sorted(set(of_patient.values()))}")
    patients = {item["patient_id"] for item in items}
    if patients.isdisjoint(of_patient):
        raise DatalistError(
            f"folds_file {path}: names none of the patients of these {len(items)} series: expected ids such as"
            f" {sorted(of_patient)[:3]}, found {sorted(patients)[:3]}. Leave it out where it is about other patients"
        )
    _warn_of_absent(path, of_patient, fold, patients)
    # a patient that the file does not name is unlabelled: it may train, and is nowhere else
    wanted = {"validation": {str(fold)}, "test": {"test"}}
    if part == "training":
        held_out = wanted["validation"] | wanted["test"]
        return [item for item in items if of_patient.get(item["patient_id"], "") not in held_out]
    return [item for item in items if of_patient.get(item["patient_id"], "") in wanted[part]]


def _warn_of_absent(path: Path, of_patient: Mapping[str, str], fold: int, patients: Set[str]) -> None:
    """Say which of the patients held out are not among the series: ids that are written in two ways look like that."""
    held_out = [patient for patient, name in of_patient.items() if name in (str(fold), "test")]
    absent = [patient for patient in held_out if patient not in patients]
    if absent and len(absent) < len(held_out):
        logger.warning("folds_file %s: %d of %d patients of fold %d and test are not among the series: %s",
                       path, len(absent), len(held_out), fold, absent[:5])  # fmt: skip


def _by_fraction(items: list[dict], part: str, val_fraction: float, seed: int) -> list[dict]:
    if part == "test":
        return []
    patients = [item["patient_id"] for item in items]
    if len(set(patients)) < 2 or val_fraction <= 0:
        return items if part == "training" else []
    splitter = GroupShuffleSplit(n_splits=1, test_size=val_fraction, random_state=seed)
    training, validation = next(splitter.split(items, groups=patients))
    return [items[i] for i in (training if part == "training" else validation)]


def has_own_parts(datalist: str | os.PathLike[str], part: str, folds_file: str | None = None) -> bool:
    """Whether a datalist says itself which series are in this part, and so is taken at its word.

    One with nothing but ``training`` does not, nor does a CSV: it is divided, for that part too.

    Raises:
        DatalistError: if it does, and a fold file that would say the same is given too.
    """
    if is_table(datalist):
        return False
    sections = read_json(Path(datalist).expanduser())
    own = "validation" in sections or (part != "training" and part in sections)
    if own and folds_file is not None:
        raise DatalistError(f"datalist {datalist}: has its own parts {sorted(sections)}, and folds_file is given too")
    return own


def unlabelled_datalist(
    dataset_dir: str | None,
    datalist: str | None = None,
    *,
    part: str = "training",
    exclude: Sequence[str] = (),
    folds_file: str | None = None,
    fold: int = 0,
    val_fraction: float = 0.1,
    seed: int = 0,
    cache_dir: str | None = None,
) -> list[dict]:
    """The series to pretrain on (or to hold out): from `datalist` where given, else everything below `dataset_dir`.

    A datalist that names its own ``validation`` (or ``test``) section is taken at its word; see `select_part` for the
    rest. The part ``all`` is every series, whatever its part.
    """
    if datalist is not None:
        if part == ALL:
            return load_sections(datalist, dataset_dir)
        if has_own_parts(datalist, part, folds_file):
            return load_datalist(datalist, dataset_dir, part)
        items = load_datalist(datalist, dataset_dir, "training")
    elif dataset_dir is not None:
        items = find_series(dataset_dir, exclude, cache_dir=cache_dir)
    else:
        raise DatalistError("neither dataset_dir nor datalist is given")
    if part == ALL:
        return items
    return select_part(items, part, folds_file=folds_file, fold=fold, val_fraction=val_fraction, seed=seed)
