# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Calibrated probabilities: a temperature for each group, a factor for each injured class, or both, from a file.

For the probabilities p of a group's classes c::

    p'_c = f_c * p_c^(1/T) / sum_k f_k * p_k^(1/T)

with T the group's temperature and f_c the factor of the class, 1 for the healthy one. They are fitted in
`scripts.calibrate` and applied to each series, before series become patients.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .labels import LabelTable, first_few
from .score import group_probabilities

__all__ = ["METHODS", "WEIGHTINGS", "Calibration", "GroupCalibration"]

METHODS = ("temperature", "factor", "vector")
# what is fitted: the plain log loss, so that a probability means what it says, or the weighted one of the score, which
# wants injuries overstated by about their weights
WEIGHTINGS = ("none", "score")


@dataclass(frozen=True)
class GroupCalibration:
    """Parameters of one group.

    Attributes:
        factors: one a class, the healthy one's is 1.
        temperature: above 1 for less certain probabilities, below 1 for more certain ones.
        note: why it was left as it is, or what else a reader must know.
    """

    factors: tuple[float, ...]
    temperature: float = 1.0
    note: str = ""

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        """[..., C] -> [..., C] float64; the last axis sums to 1."""
        raised = np.asarray(probabilities, dtype=np.float64) ** (1.0 / self.temperature) * np.asarray(self.factors)
        return raised / raised.sum(axis=-1, keepdims=True)


@dataclass(frozen=True)
class Calibration:
    """Parameters of every group of a label table.

    Attributes:
        table: the label table they belong to.
        method: one of `METHODS`.
        combine: how series became patients when they were fitted, ``"max"`` or ``"mean"``.
        groups: name -> parameters.
        weighting: one of `WEIGHTINGS`: what they were fitted for.
    """

    table: LabelTable
    method: str
    combine: str
    groups: Mapping[str, GroupCalibration]
    weighting: str = "none"

    def apply(self, frame: pd.DataFrame) -> pd.DataFrame:
        """A copy of the frame with calibrated class columns. Raises ValueError as `group_probabilities`."""
        blocks = group_probabilities(frame, self.table, "predictions")
        columns = list(self.table.columns)
        calibrated = [
            self.groups[name].apply(block) for name, block in zip(self.table.group_names, blocks, strict=True)
        ]
        return frame.assign(**dict(zip(columns, np.concatenate(calibrated, axis=1).T, strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """As :meth:`from_file` reads it."""
        groups = {
            group.name: {
                "classes": [item.name for item in group.classes],
                "score_weights": list(group.score_weights),
                "temperature": self.groups[group.name].temperature,
                "factors": list(self.groups[group.name].factors),
                "note": self.groups[group.name].note,
            }
            for group in self.table.groups
        }
        return {"method": self.method, "weighting": self.weighting, "combine": self.combine, "groups": groups}

    @classmethod
    def from_file(cls, path: str | Path, table: LabelTable) -> Calibration:
        """Reads ``calibration.json``; other keys than those of :meth:`to_dict` are passed over.

        Raises:
            ValueError: naming the file: it is no calibration, or was fitted for other groups, classes or weights.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"calibration {path}: expected a calibration.json, got {error}") from error
        try:
            found, method, combine = content["groups"], str(content["method"]), str(content["combine"])
            weighting = str(content["weighting"])
            groups = {name: _group(name, part) for name, part in found.items()}
            fitted_for = [(name, list(part["classes"]), list(part["score_weights"])) for name, part in found.items()]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"calibration {path}: not as calibrate.json's run writes it: {error!r}") from error
        except ValueError as error:
            raise ValueError(f"calibration {path}: {error}") from error
        wanted = [(g.name, [item.name for item in g.classes], list(g.score_weights)) for g in table.groups]
        if fitted_for != wanted:
            differing = [part for part in fitted_for if part not in wanted] + [p for p in wanted if p not in fitted_for]
            raise ValueError(
                f"calibration {path}: fitted for {', '.join(found)}, the label table has {', '.join(table.group_names)}"
                f"; differing (group, classes, score weights): {first_few(differing)}"
            )
        return cls(table, method, combine, groups, weighting)


def _group(name: str, content: Mapping[str, Any]) -> GroupCalibration:
    numbers = [content["temperature"], *content["factors"]]
    if len(numbers) != len(content["classes"]) + 1 or not all(_is_positive(number) for number in numbers):
        raise ValueError(f"group '{name}' needs a positive temperature and a positive factor a class, got {numbers}")
    return GroupCalibration(tuple(numbers[1:]), numbers[0], str(content.get("note", "")))


def _is_positive(number: Any) -> bool:
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    return is_number and math.isfinite(number) and number > 0
