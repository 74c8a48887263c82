# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Label-efficiency curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .pretexts import CONTROL

STYLES = {"scratch": ("black", "o"), "v1": ("tab:orange", "s"), "v2": ("tab:blue", "^"), CONTROL: ("tab:green", "D")}
TITLES = {"full": "all weights", "last": "last blocks", "frozen": "frozen backbone"}
NUDGE = 0.012  # of the logarithm of the number of labels, so that ranges do not hide each other


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """One file a level: test mAP against labelled patients, a panel for each way of fine-tuning."""
    plan = results["plan"]
    folder.mkdir(parents=True, exist_ok=True)
    for level, modes in plan["grid"].items():
        figure = Figure(figsize=(3.4 * len(modes) + 1.2, 3.4), layout="constrained")
        axes = figure.subplots(1, len(modes), squeeze=False, sharey=True)[0]
        for axis, mode in zip(axes, modes, strict=True):
            axis.set_xscale("log")  # first: it takes the ticks away
            for place, pretext in enumerate(plan["pretexts"]):
                _curve(axis, results, level, mode, pretext, place - (len(plan["pretexts"]) - 1) / 2)
            axis.axhline(results["frequencies"][level]["mAP"], color="grey", linestyle=":", label="chance")
            axis.set_title(f"{level}, {TITLES[mode]}", fontsize=9)
            axis.set_xlabel("labelled patients (synthetic)")
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("test mAP, seeds' mean and range")
        axes[0].legend(fontsize=7)
        figure.savefig(folder / f"label_efficiency_{level}.png", dpi=80)


def _curve(axis: Any, results: Mapping[str, Any], level: str, mode: str, pretext: str, place: float) -> None:
    own = [run for run in results["runs"] if (run["level"], run["mode"], run["pretext"]) == (level, mode, pretext)]
    labels = sorted({run["labels"] for run in own})
    values = [[run["test"]["mAP"] for run in own if run["labels"] == number] for number in labels]
    means = np.array([np.mean(one) for one in values])
    ranges = np.stack([means - [min(one) for one in values], [max(one) for one in values] - means])
    colour, marker = STYLES.get(pretext, ("tab:red", "x"))
    nudged = np.array(labels) * 10 ** (place * NUDGE)
    options = {"color": colour, "marker": marker, "markersize": 4, "capsize": 2, "linewidth": 1.2}
    axis.errorbar(nudged, means, yerr=ranges, label=pretext.replace("_", " "), **options)
    axis.set_xticks(labels, [str(number) for number in labels])
    axis.minorticks_off()
