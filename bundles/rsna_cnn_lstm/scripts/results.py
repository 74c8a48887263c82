# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What an evaluation has left in its folder, read back for the report, and the pieces that a page is made of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .labels import LabelTable
from .metrics import BinaryTask, binary_tasks
from .score import PatientArrays, align_patients, term_losses

__all__ = [
    "BASELINE",
    "FOOTNOTE",
    "Card",
    "Picture",
    "Results",
    "Section",
    "Table",
    "number",
    "with_interval",
    "with_marked_interval",
]

FEW_POSITIVES, FEW_RESAMPLES = 5, 0.95  # below these an interval says little
FOOTNOTE = (
    f"* few positives: the interval is unreliable (fewer than {FEW_POSITIVES} patients, or fewer than "
    f"{FEW_RESAMPLES:.0%} of the resamples define the figure)."
)
BASELINE = "weighted class frequencies"  # as `score.frequency_baseline` gives them


@dataclass
class Table:
    """A table of the page: texts, the first column being the row's name; `folded` shows it on a click only."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


@dataclass
class Picture:
    """A figure with its file name (without suffix) and what it shows in words; `raster` for photographs."""

    name: str
    caption: str
    figure: Figure
    raster: bool = False


@dataclass
class Card:
    """A box of its own, such as one patient."""

    title: str
    text: str
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


@dataclass
class Section:
    """A section of the page."""

    id: str
    title: str
    text: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)


@dataclass(frozen=True)
class Results:
    """The files of an evaluation.

    Attributes:
        folder: where they lie.
        table: the label table.
        metrics: content of metrics.json.
        manifest: content of run.json, empty without that file.
        patients: truth and probabilities in one order.
        tasks: the yes-no questions about them.
        num_series: rows of series_predictions.csv, ``None`` without that file.
    """

    folder: Path
    table: LabelTable
    metrics: Mapping[str, Any]
    manifest: Mapping[str, Any]
    patients: PatientArrays
    tasks: Sequence[BinaryTask]
    num_series: int | None

    @classmethod
    def from_folder(cls, folder: str | Path, table: LabelTable) -> Results:
        """Reads a folder with ``predictions.csv``, ``solution.csv`` and ``metrics.json``.

        Raises:
            FileNotFoundError: one of the three is absent.
            ValueError: they do not fit each other or the table.
        """
        folder = Path(folder).absolute()
        absent = [n for n in ("predictions.csv", "solution.csv", "metrics.json") if not (folder / n).is_file()]
        if absent:
            raise FileNotFoundError(
                f"{folder}: a report needs {', '.join(absent)}, which an evaluation with labels writes"
            )
        frames = [pd.read_csv(folder / name, dtype={"patient_id": str}) for name in ("solution.csv", "predictions.csv")]
        patients = align_patients(*frames, table)
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        if metrics["patients"] != len(patients.ids):
            raise ValueError(
                f"{folder}: metrics.json is of {metrics['patients']} patients, the tables of {len(patients.ids)}"
            )
        manifest, series = folder / "run.json", folder / "series_predictions.csv"
        return cls(
            folder, table, metrics,
            json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {},
            patients, binary_tasks(patients, table),
            len(pd.read_csv(series, usecols=[0])) if series.is_file() else None,
        )  # fmt: skip

    @property
    def groups(self) -> dict[str, BinaryTask]:
        """Injured or healthy: a question a group, and any injury."""
        return {task.name: task for task in self.tasks if task.kind == "group"}

    @property
    def resampling(self) -> tuple[int, int]:
        """Resamples and seed of the bootstrap."""
        return self.metrics["bootstrap"]["n_resamples"], self.metrics["bootstrap"]["seed"]

    def contributions(self) -> np.ndarray:
        """[N, T] what each patient adds to the score by each term; the sum over all is the score."""
        losses, weights = term_losses(self.patients, self.table)
        defined = weights.sum(axis=0) > 0
        parts = np.zeros_like(losses)
        parts[:, defined] = (losses * weights)[:, defined] / weights[:, defined].sum(axis=0)
        return parts / defined.sum()


def number(value: float | None, digits: int = 3) -> str:
    """A figure as the page shows it; ``None`` is "undefined"."""
    return "undefined" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def with_interval(figure: Mapping[str, Any]) -> str:
    """``0.512 [0.480, 0.561]`` of a figure of metrics.json."""
    return _interval(figure["value"], figure["low"], figure["high"])


def with_marked_interval(figure: Mapping[str, Any], positives: int, n_resamples: int) -> str:
    """The same, with the mark that `FOOTNOTE` explains where the interval is unreliable."""
    text = with_interval(figure)
    few = positives < FEW_POSITIVES or figure.get("resamples", n_resamples) < FEW_RESAMPLES * n_resamples
    return f"{text} *" if few and "[" in text else text


def intervals(values: Iterable[float], low: Iterable[float] | None, high: Iterable[float] | None) -> list[str]:
    """The same for points of a curve."""
    values = list(values)
    none = [None] * len(values)
    return [_interval(*point) for point in zip(values, low if low is not None else none,
                                               high if high is not None else none, strict=True)]  # fmt: skip


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None or low is None or high is None:
        return number(value)
    return f"{number(value)} [{number(low)}, {number(high)}]"
