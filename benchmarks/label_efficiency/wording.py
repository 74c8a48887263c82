# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""How the report names things and writes figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .pretexts import CONTROL

NAMES = {
    "scratch": "scratch",
    "v1": "VoCo v1",
    "v2": "VoCo v2",
    CONTROL: "instance contrast (control)",
    "momentum_ramp": "teacher momentum 0.99 to 0.999",
    "one_sided_reg": "one-sided regulariser",
    "hard_clamp": "hard clamp",
    "intensity": "intensity augmentation of random crops",
    "slices_4": "4 slices a step",
    "slice_height": "slice-height term added",
}
MODES = {"full": "all weights", "last": "last blocks", "frozen": "frozen backbone"}


def name_of(pretext: str) -> str:
    """What a reader calls it."""
    return NAMES.get(pretext, pretext)


def with_interval(value: Mapping[str, Any], signed: bool = False) -> str:
    """``0.512 (0.498 to 0.526)``; no interval where one seed gives none."""
    sign = "+" if signed else ""
    text = f"{value['mean']:{sign}.3f}"
    return text if value["low"] is None else f"{text} ({value['low']:{sign}.3f} to {value['high']:{sign}.3f})"


def each(values: Sequence[float], signed: bool = False) -> str:
    """The seeds' own values."""
    return ", ".join(f"{value:{'+' if signed else ''}.3f}" for value in values)


def comparison_cells(comparison: Mapping[str, Any]) -> tuple[str, ...]:
    seeds, low, high = comparison["test_mAP"], *comparison["patients"]
    p = "-" if seeds["p"] is None else f"{seeds['p']:.3f}"
    return (
        with_interval(seeds, signed=True),
        p,
        f"{low:+.3f} to {high:+.3f}",
        each(seeds["values"], signed=True),
        with_interval(comparison["test_score"], signed=True),
    )


COMPARED = ("mAP: difference (interval over seeds)", "p", "interval over patients", "each seed", "score: difference")
