# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""How a cost grows: the exponent of a power, and the slope of a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


class Fit(NamedTuple):
    """Least squares: slope with its 95 % interval (infinite for two points, which any line meets), and intercept."""

    slope: float
    low: float
    high: float
    intercept: float


def line(x: Sequence[float], y: Sequence[float]) -> Fit:
    """``y = intercept + slope * x``, interval by Student's t."""
    found = stats.linregress(x, y)
    degrees = len(x) - 2
    margin = found.stderr * stats.t.ppf((1 + CONFIDENCE) / 2, degrees) if degrees else math.inf
    return Fit(float(found.slope), float(found.slope - margin), float(found.slope + margin), float(found.intercept))


def exponent(rows: Sequence[dict[str, Any]]) -> Fit:
    """p of ``seconds = c * x^p`` over every run of these rows, as a line of the logarithms."""
    points = [(row["x"], seconds) for row in rows for seconds in row["runs"]]
    x, y = np.log(points).T
    return line(x, y)


def last_exponent(rows: Sequence[dict[str, Any]]) -> float:
    """p between the two largest x, where a part that does not grow weighs least."""
    small, large = sorted(rows, key=lambda row: row["x"])[-2:]
    growth = large["seconds"]["median"] / small["seconds"]["median"]
    return math.log(growth) / math.log(large["x"] / small["x"])


def memory_slope(rows: Sequence[dict[str, Any]]) -> Fit:
    """Peak MB a unit of x."""
    return line([row["x"] for row in rows], [row["peak_mb"]["median"] for row in rows])
