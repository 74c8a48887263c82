# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Handlers of an evaluator that turn logits of series into files and figures of patients.

Items of the data list carry ``patient_id`` and ``series_id``; with a ``label`` the predictions are also evaluated.
File names are running numbers: nothing of a DICOM header, and no id, gets into one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ignite import distributed as idist
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced
from monai.data import decollate_batch
from monai.utils import convert_to_tensor, evenly_divisible_all_gather, string_list_all_gather

from workflow.run import write_atomically

from .datalist import datalist_solution
from .labels import MISSING, LabelTable, first_few
from .metrics import evaluate_patients
from .score import combine_series, frequency_baseline, rsna_score

__all__ = ["PatientScore", "PredictionWriter", "SeriesPredictions"]


class SeriesPredictions:
    """Logits and labels of the series that an evaluator has seen, gathered over the processes of a distributed run.

    Args:
        labels_file: path of the label table, or the table.
        pred_key: key of the logits in the engine's output.
    """

    def __init__(self, labels_file: str | Path | LabelTable, pred_key: str = "pred") -> None:
        self.table = labels_file if isinstance(labels_file, LabelTable) else LabelTable.from_file(labels_file)
        self.pred_key = pred_key
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._keys: list[str] = []
        self._rows: list[torch.Tensor] = []  # [L + G] float64: logits, then class indices
        self.failed: list[tuple[str, str]] = []  # (source, reason) of items that hold no volume

    def update(self, batch: Any, output: Any) -> None:
        """Adds one iteration.

        Args:
            batch: ``engine.state.batch``, and
            output: ``engine.state.output``: lists of dictionaries (decollated, as MONAI's engines do) or dictionaries
                of batches.

        Raises:
            ValueError: an item lacks an id or the logits, or its sizes do not fit the label table.
        """
        width = len(self.table.groups)
        for item, result in zip(_as_items(batch), _as_items(output), strict=True):
            merged = {**item, **result}
            if merged.get("failed"):
                self.failed.append((str(merged.get("source")), str(merged["failed"])))
                continue
            absent = [key for key in ("patient_id", "series_id", self.pred_key) if merged.get(key) is None]
            if absent:
                raise ValueError(
                    f"a predicted item lacks {first_few(absent)}; the data list must give patient_id and series_id"
                )
            logits = convert_to_tensor(merged[self.pred_key], track_meta=False).detach().cpu().double().flatten()
            label = merged.get("label")
            label = torch.full((width,), MISSING) if label is None else convert_to_tensor(label, track_meta=False).cpu()
            if len(logits) != self.table.num_logits or label.numel() != width:
                wanted, got = (self.table.num_logits, width), (len(logits), label.numel())
                raise ValueError(f"expected {wanted} logits and labels an item, got {got}")
            self._keys.append(json.dumps([str(merged["patient_id"]), str(merged["series_id"])]))
            self._rows.append(torch.cat((logits, label.double().flatten())))

    def found_any(self) -> bool:
        """Whether any process has predicted a series."""
        return idist.all_reduce(len(self._keys)) > 0

    def gather(self) -> tuple[pd.DataFrame, np.ndarray]:
        """All series of all processes, sorted by id so that the number of processes leaves no trace.

        Returns:
            Frame of ``patient_id``, ``series_id`` and the P probabilities, and the labels [N, G] int64.

        Raises:
            ValueError: nothing was predicted, or a series occurs twice (a distributed sampler's padding is dropped).
        """
        keys, rows = (
            self._keys,
            torch.stack(self._rows) if self._rows else torch.zeros(0, self._width, dtype=torch.double),
        )
        distributed = idist.get_world_size() > 1
        if distributed:
            rows = evenly_divisible_all_gather(rows.to(idist.device()), concat=True).cpu()
            keys = string_list_all_gather(keys)
        if not keys:
            raise ValueError("no series was predicted: the data list is empty")
        positions = {key: position for position, key in enumerate(keys)}
        if len(positions) < len(keys) and not distributed:
            twice = len(keys) - len(positions)
            raise ValueError(
                f"{twice} series were predicted more than once; the data list repeats patient_id, series_id"
            )
        ids = sorted((*json.loads(key), position) for key, position in positions.items())
        rows = rows[[position for *_, position in ids]]
        frame = pd.DataFrame([key[:2] for key in ids], columns=["patient_id", "series_id"])
        probabilities = self.table.probabilities(rows[:, : self.table.num_logits]).numpy()
        frame = pd.concat([frame, pd.DataFrame(probabilities, columns=list(self.table.columns))], axis=1)
        return frame, rows[:, self.table.num_logits :].long().numpy()

    @property
    def _width(self) -> int:
        return self.table.num_logits + len(self.table.groups)


class PredictionWriter:
    """Handler that writes the predictions of an evaluator when its run completes.

    Files in ``output_dir``, each written to a temporary name and renamed:

    - ``predictions.csv``: ``patient_id`` and the class columns, one row a patient: RSNA's submission.
    - ``series_predictions.csv``: the same by series, with ``series_id`` and the name of its JSON file.
    - ``series/000001.json`` ...: probabilities by group, the any-injury probability, and the true classes where known.
    - ``solution.csv`` and ``metrics.json``: the truth in the columns of ``predictions.csv``, and
      :func:`evaluate_patients`, if any item has a label.

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
    ) -> None:
        if combine not in ("max", "mean"):
            raise ValueError(f"combine must be 'max' or 'mean', got {combine!r}")
        self.output_dir = Path(output_dir)
        self.predictions = SeriesPredictions(labels_file, pred_key)
        self.table = self.predictions.table
        self.combine = combine
        self.n_resamples, self.seed, self.threshold = n_resamples, seed, threshold
        self.train_datalist = train_datalist
        self.save_rank = save_rank
        self.metrics: dict[str, Any] | None = None
        self.series: pd.DataFrame | None = None
        self.logger = logging.getLogger(__name__)

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
        if self.save_rank >= idist.get_world_size():
            raise ValueError(f"save_rank {self.save_rank} does not exist among {idist.get_world_size()} processes")
        if self.failed and not self.predictions.found_any():
            self.logger.error("none of the series could be read: no predictions are written")
            return
        series, labels = self.predictions.gather()
        self.series = series
        if idist.get_rank() != self.save_rank:
            return
        patients = combine_series(series, self.table, self.combine)
        self._write_series(series, labels)
        write_atomically(self.output_dir / "predictions.csv", patients.to_csv(index=False))
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

    def _series_content(self, row: Mapping[str, Any], label: np.ndarray) -> dict[str, Any]:
        groups = {
            group.name: {item.name: float(row[f"{group.name}_{item.name}"]) for item in group.classes}
            for group in self.table.groups
        }
        content: dict[str, Any] = {
            "patient_id": row["patient_id"],
            "series_id": row["series_id"],
            "probabilities": groups,
        }
        if self.table.any_injury is not None:
            content[self.table.any_injury.name] = max(1.0 - float(row[group.columns[0]]) for group in self.table.groups)
        known = zip(self.table.groups, label.tolist(), strict=True)
        truth = {group.name: group.classes[index].name for group, index in known if index != MISSING}
        return {**content, "truth": truth} if truth else content

    def _evaluate(self, series: pd.DataFrame, labels: np.ndarray, patients: pd.DataFrame) -> None:
        solution = _solution(series, labels, self.table)
        baseline = None
        if self.train_datalist is not None:
            train = datalist_solution(self.train_datalist, self.table)
            baseline = frequency_baseline(train, list(solution["patient_id"]), self.table)
        self.metrics = evaluate_patients(
            solution, patients, self.table, self.n_resamples, self.seed, self.threshold, baseline
        )
        write_atomically(self.output_dir / "solution.csv", solution.to_csv(index=False))
        write_atomically(self.output_dir / "metrics.json", json.dumps(self.metrics, indent=2, allow_nan=False) + "\n")


class PatientScore(Metric):
    """Ignite metric: the score over the patients of an epoch, for ``key_val_metric``.

    Args:
        labels_file: path of the label table, or the table.
        combine: as in :class:`PredictionWriter`.
        term: ``"score"``, or the name of a term.
        negate: ``True`` returns minus the score, for engines and early stopping that look for a maximum.
        pred_key: key of the logits in the engine's output.
    """

    def __init__(
        self,
        labels_file: str | Path | LabelTable,
        combine: str = "max",
        term: str = "score",
        negate: bool = False,
        pred_key: str = "pred",
    ) -> None:
        self.predictions = SeriesPredictions(labels_file, pred_key)
        self.combine, self.term, self.sign = combine, term, -1.0 if negate else 1.0
        super().__init__()

    @reinit__is_reduced
    def reset(self) -> None:
        self.predictions.reset()

    @reinit__is_reduced
    def update(self, output: tuple[Any, Any]) -> None:
        self.predictions.update(*output)

    def iteration_completed(self, engine: Engine) -> None:
        """Feeds the batch along with the output: the ids are in the batch only."""
        self.update((engine.state.batch, engine.state.output))

    def compute(self) -> float:
        """The figure over all patients. Raises ValueError where the labels do not define it."""
        series, labels = self.predictions.gather()
        table = self.predictions.table
        score = rsna_score(_solution(series, labels, table), combine_series(series, table, self.combine), table)
        value = score.get(self.term)
        if value is None:
            raise ValueError(f"the term '{self.term}' is not defined by these patients; there are {score}")
        return self.sign * value


def _solution(series: pd.DataFrame, labels: np.ndarray, table: LabelTable) -> pd.DataFrame:
    items = (
        {"patient_id": patient, "label": label} for patient, label in zip(series["patient_id"], labels, strict=True)
    )
    return datalist_solution(items, table)


def _as_items(data: Any) -> Iterable[Mapping[str, Any]]:
    """A decollated list as it is, a dictionary of batches decollated."""
    return decollate_batch(data) if isinstance(data, Mapping) else data
