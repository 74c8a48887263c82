# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The figures of the report, by matplotlib without a display. Colours are Okabe and Ito's: told apart by colour-blind
readers, and in grey by their lightness."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay

from .curves import GRID, CurveBand

__all__ = [
    "calibration_figure",
    "confusion_figure",
    "curves_figure",
    "learning_figure",
    "runs_figure",
    "slices_figure",
    "terms_figure",
]

BLUE, ORANGE, GREEN, GREY, INK = "#0072b2", "#d55e00", "#009e73", "#7a828c", "#1f2933"
STYLE = {
    "font.family": "sans-serif", "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": "#52606d", "ytick.color": "#52606d", "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#e4e7eb", "grid.linewidth": 0.8, "lines.linewidth": 1.8,
    "lines.markersize": 5, "legend.frameon": False, "figure.constrained_layout.use": True, "svg.hashsalt": "report",
}  # fmt: skip
WIDTH = 9.6  # inches

P = ParamSpec("P")


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draws with this module's style and leaves that of the process alone."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def _panels(count: int, height: float, columns: int = 3) -> tuple[Figure, list[Axes]]:
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, height * rows))
    figure.get_layout_engine().set(h_pad=0.12)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.remove()
    return figure, list(axes[:count])


def _title(name: str) -> str:
    return name.replace("_", " ")


def _name_rows(axis: Axes, names: Sequence[str], what: str) -> None:
    """A row for each name from the top down; `what` lies along them."""
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(what)


def _interval(axis: Axes, figure: Mapping[str, Any], height: float, colour: str, label: str | None = None) -> None:
    """A point with its interval, as a row of a dot plot."""
    if figure["low"] is not None:
        axis.plot([figure["low"], figure["high"]], [height, height], color=colour, solid_capstyle="butt")
    axis.plot([figure["value"]], [height], "o", color=colour, label=label, zorder=3)


@_styled
def terms_figure(metrics: Mapping[str, Any]) -> Figure:
    """The score and its terms with intervals, beside those of predicting frequencies."""
    rows = {"score": (metrics["score"], metrics["baseline"]["score"])}
    rows |= {name: (value, metrics["baseline"]["score_terms"][name]) for name, value in metrics["score_terms"].items()}
    rows = {name: pair for name, pair in rows.items() if pair[0]["value"] is not None}
    figure = Figure(figsize=(WIDTH, 0.9 + 0.36 * len(rows)))
    axis = figure.subplots()
    for height, (name, (value, base)) in enumerate(rows.items()):
        first = name == "score"
        axis.plot([base], [height], "D", color=GREY, label="weighted class frequencies" if first else None, zorder=2)
        _interval(axis, value, height, BLUE, "this run, 95 % interval" if first else None)
    axis.axhline(0.5, color="#9aa5b1", linewidth=0.8)
    _name_rows(axis, [_title(name) for name in rows], "weighted log loss (lower is better)")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=2)
    return figure


@_styled
def runs_figure(rows: Sequence[tuple[str, Mapping[str, Any]]], baseline: float) -> Figure:
    """Scores of several runs (name, value with interval), the first being this one, and the line of the baseline."""
    figure = Figure(figsize=(WIDTH, 0.9 + 0.36 * len(rows)))
    axis = figure.subplots()
    for height, (_, value) in enumerate(rows):
        _interval(axis, value, height, GREY if height else BLUE)
    axis.axvline(baseline, color=ORANGE, linestyle="--", linewidth=1.2, label="weighted class frequencies")
    _name_rows(axis, [name for name, _ in rows], "score (lower is better)")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=1)
    return figure


@_styled
def curves_figure(bands: Mapping[str, CurveBand | None], kind: str, captions: Mapping[str, str],
                  prevalence: Mapping[str, float]) -> Figure:  # fmt: skip
    """ROC or precision-recall curves with their bands, a panel a group.

    Args:
        bands: group -> curve, ``None`` where it is not defined.
        kind: ``"roc"`` or ``"precision_recall"``.
        captions: text of the figure in each panel, such as the AUC with its interval.
        prevalence: share of positives: the precision that guessing has.
    """
    figure, axes = _panels(len(bands), 3.1)
    labels = ("1 − specificity", "sensitivity") if kind == "roc" else ("recall", "precision")
    for axis, (name, band) in zip(axes, bands.items(), strict=True):
        axis.set(title=_title(name), xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axis.set_xlabel(labels[0])
        axis.set_ylabel(labels[1])
        if band is None:
            axis.text(0.5, 0.5, "undefined", ha="center", va="center", color=GREY)
            continue
        chance = GRID if kind == "roc" else np.full(len(GRID), prevalence[name])
        axis.plot(GRID, chance, color=GREY, linestyle="--", linewidth=1)
        if band.low is not None:
            axis.fill_between(GRID, band.low, band.high, color=BLUE, alpha=0.18, linewidth=0)
        axis.plot(band.x, band.y, color=BLUE, drawstyle="default" if kind == "roc" else "steps-post")
        low_left = kind == "precision_recall" and prevalence[name] > 0.3
        place = (0.04, 0.05, "left") if low_left else (0.97, 0.05 if kind == "roc" else 0.93, "right")
        axis.text(*place[:2], captions[name], transform=axis.transAxes, ha=place[2], fontsize=8.5,
                  bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5})  # fmt: skip
    return figure


@_styled
def calibration_figure(bins: Mapping[str, pd.DataFrame | None]) -> Figure:
    """Reliability curves: observed share against predicted probability, with Wilson intervals, a panel a group."""
    figure, axes = _panels(len(bins), 3.1)
    for axis, (name, frame) in zip(axes, bins.items(), strict=True):
        axis.set(title=_title(name), xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axis.set_xlabel("predicted probability")
        axis.set_ylabel("observed share")
        axis.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        if frame is None:
            axis.text(0.5, 0.5, "undefined", ha="center", va="center", color=GREY)
            continue
        error = np.abs(np.stack((frame["observed"] - frame["low"], frame["high"] - frame["observed"])))
        axis.errorbar(frame["predicted"], frame["observed"], error, fmt="o-", color=BLUE, elinewidth=1, linewidth=1.2)
    return figure


@_styled
def confusion_figure(matrices: Mapping[str, tuple[np.ndarray, Sequence[str]]]) -> Figure:
    """Confusion matrices of patients (rows: truth), coloured by the share of the row, a panel a group.

    Args:
        matrices: group -> counts [C, C] and the names of the classes.
    """
    figure, axes = _panels(len(matrices), 2.9)
    for axis, (name, (counts, classes)) in zip(axes, matrices.items(), strict=True):
        display = ConfusionMatrixDisplay(counts, display_labels=list(classes))
        display.plot(ax=axis, cmap="Blues", colorbar=False, values_format="d", im_kw={"vmin": 0})
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        display.im_.set_data(share)
        display.im_.set_clim(0, 1)
        for text, value in zip(display.text_.ravel(), share.ravel(), strict=True):
            text.set_color("white" if value > 0.5 else INK)
        axis.set(title=_title(name), xlabel="predicted", ylabel="truth")
        axis.grid(visible=False)
    return figure


@_styled
def learning_figure(epochs: pd.DataFrame, iterations: pd.Series | None) -> Figure:
    """Training loss and validation score by epoch.

    Args:
        epochs: table of `learning_curves.by_epoch`.
        iterations: loss of each step, drawn thin behind the means of the epochs.
    """
    figure = Figure(figsize=(WIDTH, 3.2))
    loss, score = figure.subplots(1, 2)
    loss.set(title="training loss", xlabel="epoch", ylabel="loss")
    if "loss" in epochs:
        means = epochs["loss"].dropna()
        if iterations is not None and len(means):
            steps = iterations.index.to_numpy() * (means.index.max() / iterations.index.max())
            loss.plot(steps, iterations, color=BLUE, alpha=0.25, linewidth=0.8, label="each step")
        loss.plot(means.index, means, "o-", color=BLUE, label="mean of the epoch")
        loss.legend()
    score.set(title="validation score (lower is better)", xlabel="epoch", ylabel="score")
    if "validation score" in epochs:
        values = epochs["validation score"].dropna()
        score.plot(values.index, values, "o-", color=GREEN)
        score.plot([values.idxmin()], [values.min()], "*", color=ORANGE, markersize=11, label="best: the weights kept")
        score.legend()
    for axis in (loss, score):
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def slices_figure(volume: np.ndarray, spacing: Sequence[float], count: int = 10, columns: int = 5) -> Figure:
    """Axial slices of a prepared volume from top to bottom, the patient's right on the left.

    Args:
        volume: [X, Y, Z] in RAS.
        spacing: of its voxels, mm.
        count: number of slices, evenly spaced over the middle nine tenths.
        columns: slices in a row.
    """
    size_x, size_y, size_z = volume.shape
    limits = (0, 255) if volume.dtype == np.uint8 else (float(volume.min()), float(volume.max()))
    heights = np.linspace(0.95, 0.05, min(count, size_z)) * (size_z - 1)
    rows = math.ceil(len(heights) / columns)
    tall = size_y * spacing[1] / (size_x * spacing[0])
    figure = Figure(figsize=(WIDTH, rows * WIDTH / columns * tall), facecolor="black")
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0.02, "hspace": 0.02}).ravel()
    figure.subplots_adjust(0, 0, 1, 1)
    for axis in axes:
        axis.set_axis_off()
    for axis, z in zip(axes, heights.round().astype(int), strict=False):
        axis.imshow(volume[::-1, ::-1, z].T, cmap="gray", clim=limits, aspect=spacing[1] / spacing[0])
    return figure
