# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Training of the classifier from MONAI Label, and (see `lib.pretraining`) of its backbone."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workflow.datalist import read_folds
from workflow.provenance import SeenPatients, check_unseen_patients

from scripts.labels import LabelTable

from .bundle_run import RunFailed
from .bundle_task import FOLDS, TRAINING, BundleTrainTask
from .bundles import CLASSIFIER, PRETRAINING, Setup
from .cohort import deal_folds, labelled_entries, parts_of, write_datalist
from .comparison import Score, decide, read_score
from .errors import AppError, Conflict
from .pretraining import PretrainTask, newest_pretraining
from .versions import WEIGHTS, ModelVersions, Version

__all__ = ["ClassifierTrainTask", "PretrainTask"]

logger = logging.getLogger(__name__)

LOADER = "workflow.weights.WeightsLoader"


class ClassifierTrainTask(BundleTrainTask):
    """Fine-tunes the classifier on the final labels: a new version, which is used if it is better than the last.

    A request may say where it starts (``start``): ``auto``, from the backbone of the newest pretraining if that is
    newer than the version in use, else from that version as a whole; or ``version``, ``backbone`` (of the version in
    use), ``pretraining``, ``scratch``.
    """

    model = CLASSIFIER
    starts = ("auto", "version", "backbone", "pretraining", "scratch")
    # the patients that are held out compare versions, so they do not also choose the epoch
    defaults: Mapping[str, Any] = {"keep_best": False}

    def __init__(self, setup: Setup, versions: ModelVersions) -> None:
        super().__init__(setup, versions, "Fine-tunes the classifier on the final labels: a new version each time")

    def stats(self) -> dict[str, Any]:
        """What /info tells of the versions."""
        try:
            listed = self.versions.list()
        except Conflict as error:  # the rest of /info is still worth something
            return {"error": str(error)}
        used = next((entry["name"] for entry in listed if entry["chosen"]), None)
        return {"version": used, "versions": [entry["name"] for entry in listed]}

    def _run(self, start: str, parameters: Mapping[str, Any], store: Any) -> dict[str, Any]:
        settings = self._settings()
        entries = labelled_entries(store.datalist(), Path(store.images_root))
        entries, folds, fold = self._divide(entries, settings)
        training, held_out = parts_of(entries, folds, fold)
        current = self.versions.in_use()  # what was chosen can be read, and is there: known before hours of training
        origin, started_from = self._origin(start, current)
        logger.info("training on %d patients, %d held out; starts from %s", training, held_out, started_from)
        run = self._new_run()
        write_datalist(run / "datalist.json", entries)
        shutil.copyfile(self._folds, run / FOLDS)
        data = {"folds_file": str(run / FOLDS), "fold": fold}
        overrides = {**self._overrides(parameters, run, store), **data}
        self._bundle(("train.json",), {**overrides, **origin}, run, TRAINING, store)
        if not (run / WEIGHTS).is_file():
            raise RunFailed(f"{TRAINING} left no weights: its validation score was not defined in any epoch")
        shutil.rmtree(run / TRAINING / "checkpoints", ignore_errors=True)
        known = {"labels": training + held_out, "started_from": started_from}
        return self._compare(run, overrides, current, known, store)

    @property
    def _folds(self) -> Path:
        return self.folder / FOLDS

    def _divide(
        self, entries: list[dict[str, str]], settings: Mapping[str, Any]
    ) -> tuple[list[dict[str, str]], dict[str, str], int]:
        """Entries with a label of the groups that are trained, the fold of each patient, the fold that is held out."""
        table = self.bundle / settings.get("labels_file", "configs/labels.json")
        labels = LabelTable.from_file(table, settings.get("groups"))
        known = [entry for entry in entries if any(name in entry for name in labels.group_names)]
        value = {name: settings.get(name, self._train[name]) for name in ("num_folds", "split_seed", "fold")}
        folds = deal_folds(self._folds, known, labels, value["num_folds"], value["split_seed"])
        return known, folds, value["fold"]

    def _origin(self, start: str, current: Version | None) -> tuple[dict[str, Any], str]:
        """Overrides that load the weights to start from, and what they are."""
        pretraining = newest_pretraining(self.setup)
        if start == "auto":
            created = {entry["name"]: entry["created"] or "" for entry in self.versions.list()}
            newer = pretraining and (current is None or pretraining["created"] > created.get(current.name, ""))
            given = "settings" if self._settings().get("pretrained_path") else "scratch"
            start = "pretraining" if newer else "version" if current else given
        if start == "settings":
            return {}, "the settings' pretrained_path"
        if start == "scratch":
            return {"pretrained_path": None}, "scratch"
        if start == "pretraining":
            if pretraining is None:
                raise Conflict(f"start: there is no complete pretraining yet: train {PRETRAINING} first")
            return {"pretrained_path": pretraining["weights"]}, f"the backbone of pretraining {pretraining['name']}"
        if current is None:
            raise Conflict("start: there is no version yet to start from: give start scratch or pretraining")
        path = {"pretrained_path": str(current.weights)}
        if start == "backbone":
            return path, f"the backbone of version {current.name}"
        handlers = self._train["train"]["handlers"]
        place = next(i for i, item in enumerate(handlers) if isinstance(item, dict) and item["_target_"] == LOADER)
        loader = f"train#handlers#{place}"
        # the bundle loads the backbone of a file; this is all of the same network
        return {**path, f"{loader}#module": "@network_def", f"{loader}#what": "network"}, f"version {current.name}"

    def _compare(self, run: Path, overrides: Mapping[str, Any], current: Version | None,
                 known: Mapping[str, Any], store: Any) -> dict[str, Any]:  # fmt: skip
        """Score the new version and the one in use on the patients held out; then it is a version, whatever came out.

        Raises:
            AppError: if the new one could not be scored; it is kept all the same.
        """
        scored, old, note, problem = None, None, "", None
        try:
            scored = self._score(run, overrides, run / WEIGHTS, "evaluation", store)
        except AppError as error:
            problem = error
        if problem is None and current is not None:
            seen = self._seen(current, overrides)
            note = f"version {current.name} was trained on some of them, which flatters it" if seen else ""
            try:
                more = {**overrides, "allow_seen_patients": seen}
                old = self._score(run, more, current.weights, "evaluation_of_current", store)
            except AppError as error:
                note = str(error)
        if overrides.get("keep_best") or overrides.get("early_stopping"):
            note += f"{'; ' if note else ''}its epoch was chosen on the same patients, which flatters the new one"
        if scored is None:
            chosen, reason = False, f"not chosen: it could not be scored: {problem}"
        else:
            chosen, reason = decide(scored, old, current.name if current else None, note)
        compared = {"name": current.name, "score": old.value if old else None} if current else None
        record = {**known, "score": scored.value if scored else None, "held_out": scored.patients if scored else None,
                  "compared_with": compared, "chosen": chosen, "reason": reason}  # fmt: skip
        added = self.versions.add(run, record)
        record = self.versions.record(added.name)
        logger.info("version %s: %s", added.name, record["reason"])
        if problem is not None:
            raise RunFailed(f"version {added.name} is trained and kept, but not used: {problem}") from problem
        return {"version": added.name, **record}

    def _score(self, run: Path, overrides: Mapping[str, Any], weights: Path, name: str, store: Any) -> Score:
        settings = {"report": False, **self.setup.overrides(self.model, "evaluate")}
        own = ("dataset_dir", "datalist", "folds_file", "fold", "resume", "device", "allow_seen_patients")
        kept = {key: overrides[key] for key in own if key in overrides}
        part = {"weights": str(weights), "part": "validation"}
        configs = ("train.json", "evaluate.json")
        return read_score(self._bundle(configs, {**overrides, **settings, **kept, **part}, run, name, store))

    def _seen(self, current: Version, overrides: Mapping[str, Any]) -> bool:
        """Whether the version in use was trained on patients held out, as weights from elsewhere may have been."""
        folds = read_folds(Path(overrides["folds_file"]))
        held_out = [{"patient_id": name} for name, fold in folds.items() if fold == str(overrides["fold"])]
        try:
            check_unseen_patients(str(current.weights), held_out)
        except SeenPatients:
            return True
        except (OSError, ValueError) as error:
            logger.warning("the list of patients of version %s cannot be read: %s", current.name, error)
        return False
