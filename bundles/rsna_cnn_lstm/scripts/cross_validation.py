# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""All folds with one command: each is trained and evaluated by the bundle's own commands, one after the other, in the
folder of the run; then the predictions of all patients, each by the model that did not train on them, are pooled.

```
output_root/run_name/
  folds.csv          the folds of this run                fold_configs/   what the folds run with
  fold_0/            training run                         fold_0_scores/  its evaluation on fold 0
  predictions.csv, series_predictions.csv, solution.csv, metrics.json     of all patients
```
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from monai.bundle import ConfigParser
from workflow.datalist import read_folds, select_part
from workflow.guard import running_config
from workflow.run import write_atomically

from .datalist import datalist_solution
from .fold_file import FoldFile
from .labels import LabelTable
from .metrics import evaluate_patients
from .report import try_report
from .score import combine_series, frequency_baseline

__all__ = ["CrossValidation", "CrossValidationError"]

logger = logging.getLogger(__name__)

# what a config says for itself alone, never for the folds
PER_RUN = {"_meta_", "initialize", "run", "finalize", "resume", "folds", "folds_file", "cross_validation"}
# what may differ when a cross-validation is resumed: where things are, how fast they go, and the report
FREE = {"_desc_", "bundle_root", "cache_dir", "dataset_dir", "device", "fold", "num_workers", "output_root", "report"}


class CrossValidationError(RuntimeError):
    """Folds that failed, or a resumption that does not fit what was begun."""


class CrossValidation:
    """Trains, evaluates and pools; what is finished already is not done again.

    Args:
        folder: of the run.
        bundle_root: the bundle, whose ``train.json`` and ``evaluate.json`` the folds run.
        folds: writes ``folds.csv`` of the run folder where `folds_file` is None.
        folds_file: fold file to use, copied into the run folder; its test patients are left out.
        labels: the label table.
        combine: series to patient, see `combine_series`.
        n_resamples: bootstrap resamples of the intervals. seed: of the bootstrap.
        report: write ``report.html`` of the pooled predictions, see `scripts.report`.

    Attributes:
        failed: (path, reason) of the series that the folds left out, and of a report that failed.
    """

    def __init__(
        self,
        folder: Path,
        bundle_root: str,
        folds: FoldFile,
        folds_file: str | None,
        labels: LabelTable,
        *,
        combine: str = "max",
        n_resamples: int = 1000,
        seed: int = 0,
        report: bool = True,
    ) -> None:
        self.folder, self.configs = Path(folder), Path(bundle_root).expanduser() / "configs"
        self.folds, self.folds_file, self.labels = folds, folds_file, labels
        self.combine, self.n_resamples, self.seed = combine, n_resamples, seed
        self.report = report
        self.failed: list[tuple[str, str]] = []

    def run(self) -> None:
        """The whole cross-validation.

        Raises:
            CrossValidationError: naming each fold that failed, after all others have been done; or see `_share`.
        """
        shared = self._share(running_config() or {})
        folds = self._write_folds()
        broken = []
        with self._locked():
            for number, fold in enumerate(folds, start=1):
                logger.info("fold %d (%d of %d)", fold, number, len(folds))
                error = self._run_fold(fold, shared)
                if error:
                    logger.error("%s", error)
                    broken.append(error)
        if broken:
            raise CrossValidationError(
                f"{len(broken)} of {len(folds)} folds failed: {'; '.join(broken)} (--resume latest does what is left)"
            )
        self._pool(folds)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """A lock that the folds' processes inherit: one that outlived us still holds it when we are started again."""
        with (self.folder / "fold_configs" / "lock").open("w") as self._lock:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CrossValidationError(f"{self.folder}: another process is still working on its folds") from error
            yield

    def _share(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The executed config without what is this run's alone: overrides of any kind reach every fold by it.

        Raises:
            CrossValidationError: on several processes, when told to resume from one checkpoint, or when resumed with
                other values than it was begun with.
        """
        if content.get("resume") not in (None, "latest"):
            raise CrossValidationError(
                f"resume: expected 'latest' or nothing, each fold has its own: {content['resume']}"
            )
        if "distributed" in content:
            raise CrossValidationError("cross_validate.json runs one process a fold: leave out multi_gpu_train.json")
        own = {key: value for key, value in content.items() if key not in PER_RUN}
        shared = json.loads(json.dumps(own, default=str))  # as it is read back
        file = self.folder / "fold_configs" / "begun_with.json"
        if file.is_file():
            begun = json.loads(file.read_text(encoding="utf-8"))
            names = (set(shared) | set(begun)) - FREE
            other = sorted(name for name in names if begun.get(name) != shared.get(name))
            if other:
                raise CrossValidationError(f"{self.folder} was begun with other values of {', '.join(other)}")
        else:
            write_atomically(file, json.dumps(shared, indent=4) + "\n")
        return shared

    def _write_folds(self) -> list[int]:
        """The folds of the run's own fold file, which is written at its start."""
        own = self.folds.path
        if self.folds_file is not None:
            given = Path(self.folds_file).expanduser()
            if not own.exists():
                write_atomically(own, given.read_text(encoding="utf-8"))
            elif own.read_bytes() != given.read_bytes():
                raise CrossValidationError(f"{self.folder} was begun with other folds than those of {given}")
        elif not own.exists():
            self.folds.run()
        return sorted({int(name) for name in read_folds(own).values() if name != "test"})

    def _run_fold(self, fold: int, shared: Mapping[str, Any]) -> str | None:
        """What went wrong, if anything."""
        train, scores = self.folder / f"fold_{fold}", self.folder / f"fold_{fold}_scores"
        common = {**shared, "fold": fold, "folds_file": str(self.folds.path)}
        error = self._run_bundle(train, ["train.json"], common)
        if error is None:
            # evaluate.json's own names, where this run has them: train.json says nothing of them
            plain = ConfigParser.load_config_files(str(self.configs / "train.json"))
            names = ConfigParser.load_config_file(str(self.configs / "evaluate.json"))
            later = {name: shared[name] for name in names if name in shared and name not in plain}
            later |= {"weights": str(train / "model.pt"), "part": "validation"}
            error = self._run_bundle(scores, ["train.json", "evaluate.json"], common, later)
        return error

    def _run_bundle(
        self, folder: Path, configs: list[str], common: Mapping[str, Any], later: Mapping[str, Any] | None = None
    ) -> str | None:
        """`python -m monai.bundle run` into a folder of its own, unless that is finished. What went wrong, if anything.

        The files are merged in this order: the bundle's train.json, the run's content over it, further files of the
        bundle, and at last what is this command's alone. The first one tells MONAI where the bundle is.
        """
        if not _is_finished(folder):
            resume = "latest" if folder.is_dir() and any(folder.iterdir()) else None
            own = {**(later or {}), "resume": resume, "run_name": folder.name}
            own |= {"run_folder#output_root": str(self.folder), "run_folder#run_name": folder.name}
            files = [str(self.configs / configs[0]), self._write(f"{folder.name}_content.json", common)]
            files += [str(self.configs / name) for name in configs[1:]] + [self._write(f"{folder.name}.json", own)]
            command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(files)]
            done = subprocess.run(command, check=False, pass_fds=(self._lock.fileno(),))  # its output is ours
            if not _is_finished(folder):
                status = f"ended with exit status {done.returncode}"
                return f"{folder.name} {status} (its error stands above, its log in {folder})"
        if (folder / "failed.csv").is_file():
            rows = pd.read_csv(folder / "failed.csv", dtype=str).itertuples(index=False, name=None)
            self.failed += [row for row in rows if row not in self.failed]
        return None

    def _write(self, name: str, content: Mapping[str, Any]) -> str:
        write_atomically(self.folder / "fold_configs" / name, json.dumps(content, indent=4) + "\n")
        return str(self.folder / "fold_configs" / name)

    def _pool(self, folds: list[int]) -> None:
        """Out-of-fold predictions of all folds, and their figures beside those of each fold's training frequencies."""
        series, solutions, baselines = [], [], []
        cohort = self.folds.read_cohort(self.labels)
        for fold in folds:
            scores = self.folder / f"fold_{fold}_scores"
            rows = _read(scores / "series_predictions.csv", self.labels)
            rows["json_file"] = [f"{scores.name}/{name}" for name in rows["json_file"]]
            series.append(rows.assign(fold=fold))
            solutions.append(_read(scores / "solution.csv", self.labels))
            training = select_part(
                cohort, "training", folds_file=str(self.folds.path), fold=fold, val_fraction=0, seed=0
            )
            known = datalist_solution(training, self.labels)
            baselines.append(frequency_baseline(known, list(solutions[-1]["patient_id"]), self.labels))
        pooled = pd.concat(series).sort_values(["patient_id", "series_id"], ignore_index=True)
        patients = combine_series(pooled, self.labels, self.combine)
        solution = pd.concat(solutions, ignore_index=True).sort_values("patient_id", ignore_index=True)
        baseline = pd.concat(baselines, ignore_index=True)
        metrics = evaluate_patients(solution, patients, self.labels, self.n_resamples, self.seed, baseline=baseline)
        for name, frame in (("series_predictions", pooled), ("predictions", patients), ("solution", solution)):
            write_atomically(self.folder / f"{name}.csv", frame.to_csv(index=False))
        write_atomically(self.folder / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
        if self.report:
            self.failed += try_report(self.folder, self.labels, dataset_dir=self.folds.dataset_dir, failed=self.failed)
        score = metrics["score"]
        interval = f"{score['low']:.4f} to {score['high']:.4f}" if score["low"] is not None else "undefined"
        logger.info("pooled score of %d patients, each by the model that did not see them: %.4f (95 %% interval %s), "
                    "of the class frequencies %.4f", len(patients), score["value"], interval,
                    metrics["baseline"]["score"])  # fmt: skip


def _is_finished(folder: Path) -> bool:
    """Whether the run in a folder has come to its end, with or without series that it had to leave out."""
    manifest = folder / "run.json"
    if not manifest.is_file():
        return False
    return str(json.loads(manifest.read_text(encoding="utf-8"))["result"]).startswith("completed")


def _read(path: Path, labels: LabelTable) -> pd.DataFrame:
    """A table of ours as it was written: ids as text, probabilities to the last bit."""
    frame = pd.read_csv(path, dtype=str)
    for column in labels.columns:
        frame[column] = frame[column].map(float)
    return frame
