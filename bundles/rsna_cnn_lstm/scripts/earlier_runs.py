# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Results of other runs in the same output_root, to stand beside those of this one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from workflow.privacy import pseudonym

__all__ = ["EarlierRuns", "find_earlier_runs"]


@dataclass
class EarlierRuns:
    """What was found beside a run folder.

    Attributes:
        comparable: (run name, content of its metrics.json) of evaluations of the same patients with the same truth,
            oldest first.
        others: names of runs that evaluated other patients, other groups or another truth.
        unreadable: (run name, reason).
    """

    comparable: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def find_earlier_runs(folder: str | Path) -> EarlierRuns:
    """Looks through the folders beside `folder` for other evaluations.

    A score compares only on the same patients: an evaluation counts when its ``solution.csv`` says what this one's
    does. Patients may go by their names in one and by their pseudonyms in the other.

    Args:
        folder: a run folder with ``solution.csv``.
    """
    folder = Path(folder).absolute()
    truth = _truths(folder)
    found = EarlierRuns()
    paths = [path for path in folder.parent.glob("*/metrics.json") if path.parent != folder]
    for path in sorted(paths, key=lambda path: (path.stat().st_mtime, path)):
        name = path.parent.name
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
            same = any(one.equals(other) for one in truth for other in _truths(path.parent))
            if same:
                _check(metrics)
        except (OSError, ValueError, KeyError, TypeError) as error:
            found.unreadable.append((name, f"{type(error).__name__}: {error}"))
            continue
        if same:
            found.comparable.append((name, metrics))
        else:
            found.others.append(name)
    return found


def _truths(folder: Path) -> list[pd.DataFrame]:
    """solution.csv by patient, sorted, and the same by the patients' pseudonyms."""
    frame = pd.read_csv(folder / "solution.csv", dtype={"patient_id": str}).set_index("patient_id").sort_index(axis=1)
    frame = frame.astype("float64")
    return [frame.sort_index(), frame.rename(index=pseudonym).sort_index()]


def _check(metrics: dict[str, Any]) -> None:
    """Raises KeyError or TypeError where the figures that are shown are absent."""
    for name in ("score", "mAP"):
        _ = metrics[name]["value"]
    _ = {name: figure["value"] for name, figure in metrics["score_terms"].items()}
