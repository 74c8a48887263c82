# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Weights meet the input that they were trained on, or the run says so before it reads a series.

Tensors of the right shapes load whatever the window or the number of slices: the result would be confidently wrong. A
run leaves its ``config.json`` beside ``model.pt``, so that the two can be compared, and the pseudonyms of its training
patients, so that a score is never one of patients that the weights have seen.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .privacy import pseudonym
from .run import write_atomically

__all__ = ["ConfigMismatch", "SeenPatients", "check_training_config", "check_unseen_patients", "record_patients",
           "run_folder_of"]  # fmt: skip

logger = logging.getLogger(__name__)

PATIENTS = "training_patients.json"


class SeenPatients(ValueError):
    """Patients to be scored were in the training of the weights."""


class ConfigMismatch(ValueError):
    """A run whose settings are not those of the weights' training; the message names each with both values."""


def check_training_config(
    weights: str | os.PathLike[str] | Sequence[str] | None, settings: Mapping[str, Any], allow: bool = False
) -> None:
    """Compare this run's settings with the ``config.json`` beside each weights file.

    Args:
        weights: a file, a list of files, or None. The config is looked for in the file's folder, and for a checkpoint
            in ``checkpoints/`` in the folder above. Weights without one (a published file) cannot be checked.
        settings: name of a top-level id -> this run's value.
        allow: log the differences instead of refusing.

    Raises:
        ConfigMismatch: if any value differs, or the config is not readable.
    """
    problems = []
    for path in _files(weights):
        trained = _training_config(path)
        if trained is None:
            logger.info("%s: no config.json of a training beside it, settings cannot be compared", path)
            continue
        # an expression has no value before its config runs: it is not compared
        known = [n for n in settings if n in trained and not str(trained[n]).startswith(("$", "@"))]
        differing = [name for name in known if trained[name] != _plain(settings[name])]
        problems += [f"{path}: {n} was {trained[n]!r} in training and is {settings[n]!r} here" for n in differing]
    if problems and allow:
        logger.warning("settings differ from those of the training (allowed): %s", "; ".join(problems))
    elif problems:
        raise ConfigMismatch(
            f"{'; '.join(problems)}. Give the same values, or --allow_config_mismatch True if it is meant"
        )


def record_patients(folder: str | os.PathLike[str], items: Iterable[Mapping[str, Any]], write: bool = True) -> None:
    """Leave the pseudonyms of the training patients beside the weights; `write` is False in all processes but one."""
    if write:
        names = sorted({pseudonym(str(item["patient_id"])) for item in items})
        write_atomically(Path(folder) / PATIENTS, json.dumps(names, indent=0) + "\n")


def check_unseen_patients(
    weights: str | os.PathLike[str] | Sequence[str] | None, items: Sequence[Mapping[str, Any]], allow: bool = False
) -> None:
    """Hold the patients to be scored against those that each weights file was trained on.

    Args:
        weights: as in `check_training_config`; weights without a list of patients beside them cannot be checked.
        items: the series to be scored, with ``patient_id``.
        allow: log the overlap instead of refusing.

    Raises:
        SeenPatients: saying how many, of which weights.
    """
    patients = {str(item["patient_id"]) for item in items}
    problems = []
    for path in _files(weights):
        file = run_folder_of(path) / PATIENTS
        if not file.is_file():
            logger.info("%s: no list of training patients beside it, seen patients cannot be told", path)
            continue
        trained = set(json.loads(file.read_text(encoding="utf-8")))
        seen = sum(pseudonym(patient) in trained for patient in patients)
        if seen:
            problems.append(f"{path} was trained on {seen} of the {len(patients)} patients to be scored")
    if problems and allow:
        logger.warning("%s (allowed): the figures are no estimate for new patients", "; ".join(problems))
    elif problems:
        raise SeenPatients(
            f"{'; '.join(problems)}: give the fold, folds_file and split_seed of the training (for an ensemble of folds"
            " --part test), or --allow_seen_patients True if it is meant"
        )


def _files(weights: str | os.PathLike[str] | Sequence[str] | None) -> list[Path]:
    return [Path(path) for path in ([weights] if isinstance(weights, str | os.PathLike) else weights or ())]


def run_folder_of(weights: Path) -> Path:
    """The folder of the training run that left a weights file or a checkpoint."""
    return weights.parent.parent if weights.parent.name == "checkpoints" else weights.parent


def _training_config(path: Path) -> dict[str, Any] | None:
    file = run_folder_of(path) / "config.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigMismatch(f"{file}: expected the JSON config of a training, got {error}") from error
    if not isinstance(content, dict):
        raise ConfigMismatch(f"{file}: expected the JSON config of a training, found a {type(content).__name__}")
    return content


def _plain(value: Any) -> Any:
    """As the value comes back from JSON: a tuple is a list."""
    return json.loads(json.dumps(value, default=str))
