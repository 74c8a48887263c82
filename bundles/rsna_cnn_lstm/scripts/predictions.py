# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Handler of an evaluator that turns logits of series into files and figures of patients.

Items of the data list carry ``patient_id`` and ``series_id``; with a ``label`` the predictions are also evaluated.
File names are running numbers: nothing of a DICOM header, and no id, gets into one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ignite.engine import Engine, Events
from workflow.gather import ranks
from workflow.privacy import pseudonym
from workflow.run import write_atomically

from .calibration import Calibration
from .cohort import with_series_table
from .datalist import datalist_solution
from .labels import MISSING, LabelTable
from .metrics import evaluate_patients
from .patient_score import PatientScore
from .score import combine_series, frequency_baseline
from .series_predictions import SeriesPredictions, series_solution
from .submission import kaggle_submission

__all__ = ["PatientScore", "PredictionWriter", "SeriesPredictions"]


class PredictionWriter:
    """Handler that writes the predictions of an evaluator when its run completes.

    Files in ``output_dir``, each written to a temporary name and renamed:

    - ``predictions.csv``: ``patient_id`` and the class columns, one row a patient.
    - ``submission.csv``: the same as Kaggle takes it, if the label table is RSNA's, see :func:`kaggle_submission`; not
      with pseudonyms, which Kaggle does not know.
    - ``series_predictions.csv``: the same by series, with ``series_id`` and the name of its JSON file, and where
      ``datalist`` knows them ``aortic_hu`` and ``incomplete_organ``.
    - ``series/000001.json`` ...: probabilities by group, the any-injury probability, and the true classes where known.
    - ``solution.csv`` and ``metrics.json``: the truth in the columns of ``predictions.csv``, and
      :func:`evaluate_patients`, if any item has a label.
    - ``calibration.json``: the calibration that was applied, if one was.

    Args:
        output_dir: folder of the run; made if absent.
        labels_file: path of the label table, or the table.
        combine: how series become patients, ``"max"`` or ``"mean"``, see :func:`combine_series`.
        n_resamples: bootstrap resamples of the intervals.
        seed: of the bootstrap.
        threshold: for precision, recall and F1; ``None`` takes the most probable class.
        train_datalist: labelled items of the training patients, whose weighted frequencies are the baseline; ``None``
            takes the best constant in hindsight, see :func:`evaluate_patients`.
        pred_key: key of the logits in the engine's output.
        save_rank: the process that writes.
        datalist: items of the series that are predicted.
        calibration: path of a ``calibration.json`` (see `scripts.calibrate`), applied to each series before series
            become patients; ``None`` for the network's own probabilities.
        anonymise: write `workflow.privacy.pseudonym` of each patient and series id.

    Attributes:
        metrics: the latest result of :func:`evaluate_patients`, ``None`` without labels.
        series: frame of ids and probabilities of the series of the last run, in the order of their running numbers (row
            0 is ``series/000001.json``); ``None`` before its end. Handlers attached after this one name files by it.
    """

    def __init__(
        self,
        output_dir: str | Path,
        labels_file: str | Path | LabelTable,
        combine: str = "max",
        n_resamples: int = 1000,
        seed: int = 0,
        threshold: float | None = None,
        train_datalist: Sequence[Mapping[str, Any]] | None = None,
        pred_key: str = "pred",
        save_rank: int = 0,
        datalist: Sequence[Mapping[str, Any]] = (),
        calibration: str | Path | None = None,
        anonymise: bool = False,
    ) -> None:
        if combine not in ("max", "mean"):
            raise ValueError(f"combine must be 'max' or 'mean', got {combine!r}")
        self.output_dir = Path(output_dir)
        self.predictions = SeriesPredictions(labels_file, pred_key)
        self.table = self.predictions.table
        self.combine = combine
        self.n_resamples, self.seed, self.threshold = n_resamples, seed, threshold
        self.train_datalist = train_datalist
        self.save_rank, self.datalist = save_rank, datalist
        self.calibration = None if calibration is None else Calibration.from_file(calibration, self.table)
        self.anonymise = anonymise
        self.metrics: dict[str, Any] | None = None
        self.series: pd.DataFrame | None = None
        self.logger = logging.getLogger(__name__)
        if self.calibration is not None and self.calibration.combine != combine:
            raise ValueError(
                f"calibration {calibration}: fitted for combine {self.calibration.combine!r}, this run has {combine!r}"
            )

    @property
    def failed(self) -> list[tuple[str, str]]:
        """(path, reason) of each series that could not be read, see `workflow.dataset.SeriesDataset`."""
        return self.predictions.failed

    def attach(self, engine: Engine) -> None:
        """Registers the handler; to be attached once to each evaluator."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def __call__(self, engine: Engine) -> None:
        """Collects the iteration that has completed."""
        self.predictions.update(engine.state.batch, engine.state.output)

    def _started(self, _engine: Engine) -> None:
        self.predictions.reset()
        self.metrics = self.series = None

    def _finish(self, _engine: Engine) -> None:
        if self.save_rank >= ranks()[1]:
            raise ValueError(f"save_rank {self.save_rank} does not exist among {ranks()[1]} processes")
        if self.failed and not self.predictions.found_any():
            self.logger.error("none of the series could be read: no predictions are written")
            return
        series, labels = self.predictions.gather()
        if self.calibration is not None:
            series = self.calibration.apply(series)
        if self.anonymise:  # the order of the ids would tell them apart
            order = np.lexsort([series[key].map(pseudonym).to_numpy(str) for key in ("series_id", "patient_id")])
            series, labels = series.iloc[order].reset_index(drop=True), labels[order]
        self.series = series
        if ranks()[0] != self.save_rank:
            return
        series = with_series_table(series, self.datalist)
        if self.anonymise:
            series = series.assign(**{key: series[key].map(pseudonym) for key in ("patient_id", "series_id")})
        if self.calibration is not None:
            content = json.dumps(self.calibration.to_dict(), indent=2) + "\n"
            write_atomically(self.output_dir / "calibration.json", content)
        patients = combine_series(series, self.table, self.combine)
        self._write_series(series, labels)
        write_atomically(self.output_dir / "predictions.csv", patients.to_csv(index=False))
        self._write_submission(patients)
        if (labels != MISSING).any():
            self._evaluate(series, labels, patients)
        self.logger.info(
            "Wrote predictions of %d series, %d patients to %s", len(series), len(patients), self.output_dir
        )

    def _write_series(self, series: pd.DataFrame, labels: np.ndarray) -> None:
        names = [f"series/{number:06d}.json" for number in range(1, len(series) + 1)]
        for name, row, label in zip(names, series.to_dict("records"), labels, strict=True):
            content = json.dumps(self._series_content(row, label), indent=2) + "\n"
            write_atomically(self.output_dir / name, content)
        series = series.assign(json_file=names)
        write_atomically(self.output_dir / "series_predictions.csv", series.to_csv(index=False))

    def _write_submission(self, patients: pd.DataFrame) -> None:
        submission = kaggle_submission(patients, self.table)
        if submission is None:
            return
        if self.anonymise:
            self.logger.info("no submission.csv: Kaggle does not know the patients' pseudonyms")
            return
        write_atomically(self.output_dir / "submission.csv", submission.to_csv(index=False))
        if self.failed:
            self.logger.error("submission.csv has no row for a patient none of whose series could be read")

    def _series_content(self, row: Mapping[str, Any], label: np.ndarray) -> dict[str, Any]:
        groups = {
            group.name: {item.name: float(row[f"{group.name}_{item.name}"]) for item in group.classes}
            for group in self.table.groups
        }
        content: dict[str, Any] = {
            "patient_id": row["patient_id"],
            "series_id": row["series_id"],
            "calibration": None if self.calibration is None else self.calibration.method,
            "probabilities": groups,
        }
        if self.table.any_injury is not None:
            content[self.table.any_injury.name] = max(1.0 - float(row[group.columns[0]]) for group in self.table.groups)
        known = zip(self.table.groups, label.tolist(), strict=True)
        truth = {group.name: group.classes[index].name for group, index in known if index != MISSING}
        return {**content, "truth": truth} if truth else content

    def _evaluate(self, series: pd.DataFrame, labels: np.ndarray, patients: pd.DataFrame) -> None:
        solution = series_solution(series, labels, self.table)
        baseline = None
        if self.train_datalist is not None:
            train = datalist_solution(self.train_datalist, self.table)
            baseline = frequency_baseline(train, list(solution["patient_id"]), self.table)
        figures = evaluate_patients(
            solution, patients, self.table, self.n_resamples, self.seed, self.threshold, baseline
        )
        self.metrics = {**figures, "calibration": None if self.calibration is None else self.calibration.method}
        write_atomically(self.output_dir / "solution.csv", solution.to_csv(index=False))
        write_atomically(self.output_dir / "metrics.json", json.dumps(self.metrics, indent=2, allow_nan=False) + "\n")
