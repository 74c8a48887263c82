# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The lines at the top of the report: what was evaluated, and what was left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from workflow.dataset import SlabDataset

from .results import Results

__all__ = ["facts"]


def facts(
    results: Results, dataset: SlabDataset | None = None, failed: Sequence[tuple[str, str]] | None = None
) -> list[tuple[str, str]]:
    """(name, value) of each line.

    Args:
        results: the files of the evaluation; ``config.json`` beside them, where there is one, says how they were made.
        dataset: knows the series that failed, and the patients who are left without any.
        failed: (path, reason) of the series left out; ``None`` takes the dataset's, or else ``failed.csv``.
    """
    found = []
    if "started" in results.manifest:
        found.append(("Date", results.manifest["started"].replace("T", " ")))
    found += _pooled(results.folder) or _setting(results.folder)
    found.append(("Calibration", str(results.metrics.get("calibration") or "none")))
    found.append(("Patients", str(len(results.patients.ids))))
    if results.num_series is not None:
        found.append(("Series", str(results.num_series)))
    left_out = _left_out(results.folder, dataset, failed)
    if left_out:
        found.append(("Left out", f"{left_out} series"))
    if dataset is not None and dataset.lost_patients:
        found.append(("Patients without a readable series", str(dataset.lost_patients)))
    resamples, seed = results.resampling
    return [*found, ("Intervals", f"95 %, {resamples} bootstrap resamples of the patients, seed {seed}")]


def _pooled(folder: Path) -> list[tuple[str, str]]:
    """Says so if the predictions are those of several folds."""
    path = folder / "series_predictions.csv"
    if not path.is_file() or "fold" not in pd.read_csv(path, nrows=0).columns:
        return []
    count = pd.read_csv(path, usecols=["fold"])["fold"].nunique()
    return [("Predictions", f"pooled over {count} folds, each by the model that did not see the patient"),
            *_setting(folder, ("combine", "tta"))]  # fmt: skip


def _setting(
    folder: Path, names: Sequence[str] = ("weights", "part", "fold", "combine", "tta")
) -> list[tuple[str, str]]:
    """What config.json says in plain values; expressions are passed over."""
    path = folder / "config.json"
    config: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    shown = {
        "weights": ("Weights", _weights), "part": ("Part", str), "fold": ("Fold", str),
        "combine": ("Series to patient", str), "tta": ("Flips", lambda flips: ", ".join(flips) or "none"),
    }  # fmt: skip
    values = {name: config[name] for name in names if config.get(name) is not None and _is_plain(config[name])}
    return [(shown[name][0], shown[name][1](value)) for name, value in values.items()]


def _weights(value: str | Sequence[str]) -> str:
    paths = [value] if isinstance(value, str) else list(value)
    return "/".join(Path(paths[0]).parts[-2:]) if len(paths) == 1 else f"ensemble of {len(paths)}"


def _is_plain(value: Any) -> bool:
    return all(not str(part).startswith(("$", "@", "%")) for part in (value if isinstance(value, list) else [value]))


def _left_out(folder: Path, dataset: SlabDataset | None, failed: Sequence[tuple[str, str]] | None) -> int:
    if failed is None and dataset is not None:
        failed = dataset.failed
    if failed is None:
        path = folder / "failed.csv"
        failed = list(pd.read_csv(path, dtype=str).itertuples(index=False, name=None)) if path.is_file() else []
    return sum(not str(path).endswith("report.html") for path, _ in failed)
