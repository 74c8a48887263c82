# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The score over the patients of an epoch, as a figure of a MONAI engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ignite.engine import Engine
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced

from .labels import LabelTable
from .score import combine_series, rsna_score
from .series_predictions import SeriesPredictions, series_solution

__all__ = ["PatientScore"]


class PatientScore(Metric):
    """Ignite metric: the score over the patients of an epoch, for ``key_val_metric``.

    Args:
        labels_file: path of the label table, or the table.
        combine: as in `scripts.predictions.PredictionWriter`.
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
        score = rsna_score(series_solution(series, labels, table), combine_series(series, table, self.combine), table)
        value = score.get(self.term)
        if value is None:
            raise ValueError(f"the term '{self.term}' is not defined by these patients; there are {score}")
        return self.sign * value
