# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Pretraining from MONAI Label: of the backbone, on every image."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from workflow.datalist import read_folds
from workflow.run import write_atomically

from .bundle_run import RunFailed, is_complete
from .bundle_task import FOLDS, TRAINING, BundleTrainTask
from .bundles import CLASSIFIER, PRETRAINING, Setup
from .cohort import unlabelled_entries, write_datalist
from .errors import Conflict
from .versions import WEIGHTS, ModelVersions, now

__all__ = ["PretrainTask", "newest_pretraining"]

logger = logging.getLogger(__name__)

RECORD = "pretraining.json"


class PretrainTask(BundleTrainTask):
    """Pretrains a backbone on every image, labelled or not; the classifier's next training starts from it.

    Patients that the classifier's comparison holds out are held out here too. ``start`` of a request: ``auto``, from
    the settings' ``pretrained_path``, else from the backbone of the classifier's version in use, if there is one; or
    ``version`` or ``scratch``.
    """

    model = PRETRAINING
    starts = ("auto", "version", "scratch")
    # one broken series among thousands is listed, and does not keep the others from being used
    defaults: Mapping[str, Any] = {"skip_failed": True}

    def __init__(self, setup: Setup, versions: ModelVersions) -> None:
        super().__init__(setup, versions, "Pretrains on every image; the classifier's next training starts from it")

    def stats(self) -> dict[str, Any]:
        newest = newest_pretraining(self.setup)
        return {key: value for key, value in (newest or {}).items() if key != "weights"}

    def _run(self, start: str, parameters: Mapping[str, Any], store: Any) -> dict[str, Any]:
        entries = unlabelled_entries(store, Path(store.images_root))
        patients = {entry["patient_id"] for entry in entries}
        if len(patients) < 2:
            raise Conflict(f"too few images: pretraining needs those of at least 2 patients, found {len(patients)}")
        origin, started_from = self._origin(start)
        run = self._new_run()
        write_datalist(run / "datalist.json", entries)
        overrides = {**self._overrides(parameters, run, store), **self._held_out(patients, run), **origin}
        logger.info("pretraining on %d images; starts from %s", len(entries), started_from)
        done = self._bundle(("train.json",), overrides, run, TRAINING, store)
        if not (run / WEIGHTS).is_file():
            raise RunFailed(f"{TRAINING} left no weights")
        shutil.rmtree(done / "checkpoints", ignore_errors=True)
        failed = done / "failed.csv"
        left_out = len(pd.read_csv(failed)) if failed.is_file() else 0
        record = {"name": run.name, "created": now(), "images": len(entries) - left_out, "left_out": left_out,
                  "started_from": started_from}  # fmt: skip
        write_atomically(run / RECORD, json.dumps(record, indent=2) + "\n")
        logger.info("pretraining %s is complete: the classifier's next training starts from it", run.name)
        return record

    def _held_out(self, patients: Collection[str], run: Path) -> dict[str, Any]:
        """By the classifier's folds, where these leave images on both sides; else a share of the patients."""
        folds = self.setup.output_root / CLASSIFIER / FOLDS
        if not folds.is_file():
            return {"folds_file": None}
        path = Path(shutil.copyfile(folds, run / FOLDS))
        fold = self.setup.overrides(CLASSIFIER, "train").get("fold", self._train["fold"])
        of_patient = read_folds(path)
        out = {patient for patient in patients if of_patient.get(patient) == str(fold)}
        tested = {patient for patient in patients if of_patient.get(patient) == "test"}
        both = out and len(out) + len(tested) < len(patients)
        return {"folds_file": str(path), "fold": fold} if both else {"folds_file": None}

    def _origin(self, start: str) -> tuple[dict[str, Any], str]:
        """Overrides that load the weights to start from, and what they are."""
        if start == "scratch":
            return {"pretrained_path": None}, "scratch"
        if start == "auto" and self._settings().get("pretrained_path"):
            return {}, "the settings' pretrained_path"
        current = self.versions.current() if start == "version" else self.versions.in_use()
        if current is None:
            return {}, "scratch"
        return {"pretrained_path": str(current.weights)}, f"the backbone of version {current.name}"


def newest_pretraining(setup: Setup) -> dict[str, Any] | None:
    """``name``, ``created``, ``images``, ``started_from`` and ``weights`` of the newest complete pretraining."""
    found = []
    for path in (setup.output_root / PRETRAINING / "runs").glob(f"*/{RECORD}"):
        weights = path.parent / WEIGHTS
        if weights.is_file() and is_complete(weights.parent):
            try:
                found.append({**json.loads(path.read_text(encoding="utf-8")), "weights": str(weights)})
            except (OSError, ValueError, TypeError) as error:
                logger.warning("pretraining %s is passed over, its record cannot be read: %s", path.parent.name, error)
    return max(found, key=lambda record: record["created"], default=None)
