# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What an evaluator has predicted, series by series, gathered over the processes of a distributed run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.data import decollate_batch
from monai.utils import convert_to_tensor
from workflow.gather import in_rank_order

from .datalist import datalist_solution
from .labels import MISSING, LabelTable, first_few

__all__ = ["SeriesPredictions", "series_solution"]


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
        return bool(in_rank_order(self._keys))

    def gather(self) -> tuple[pd.DataFrame, np.ndarray]:
        """All series of all processes, sorted by id so that the number of processes leaves no trace.

        Returns:
            Frame of ``patient_id``, ``series_id`` and the P probabilities, and the labels [N, G] int64.

        Raises:
            ValueError: nothing was predicted, or a series occurs twice.
        """
        keys = in_rank_order(self._keys)
        if not keys:
            raise ValueError("no series was predicted: the data list is empty")
        rows = torch.stack(in_rank_order(self._rows))
        positions = {key: position for position, key in enumerate(keys)}
        if len(positions) < len(keys):
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


def series_solution(series: pd.DataFrame, labels: np.ndarray, table: LabelTable) -> pd.DataFrame:
    """Truth of the patients, one row each, from the class indices [N, G] of their series."""
    items = (
        {"patient_id": patient, "label": label} for patient, label in zip(series["patient_id"], labels, strict=True)
    )
    return datalist_solution(items, table)


def _as_items(data: Any) -> Iterable[Mapping[str, Any]]:
    """A decollated list as it is, a dictionary of batches decollated."""
    return decollate_batch(data) if isinstance(data, Mapping) else data
