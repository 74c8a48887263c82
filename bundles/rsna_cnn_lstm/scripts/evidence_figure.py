# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The evidence strip: a row a group, its slices along z at the left, the top slices with heat maps beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

__all__ = ["EvidencePicture", "GroupStrip", "draw_evidence"]

FOR, AGAINST, NEUTRAL = "#c1272d", "#3a6ea5", "#8a8a8a"
SMALLEST_SCALE = 0.1  # log-odds; smaller changes look small
RANKS = "①②③④⑤⑥⑦⑧⑨⑩"
CAVEAT = (
    "Bars: change of the log-odds of injury by this slice (red: for, blue: against). Red title: injury above 0.5."
    " Heat: GradCAM, scaled to the maximum of each row.\nEvidence describes the network, not the patient: it is no"
    " proof of where an injury is. Research only, not for diagnosis."
)
# transparent to opaque, so that the image shows where nothing is hot
HEAT = ListedColormap(
    np.column_stack([np.ones(256), np.linspace(0.9, 0.15, 256), np.zeros(256), np.linspace(0, 0.65, 256)])
)


@dataclass(frozen=True)
class GroupStrip:
    """One row: what a group's decision rested on."""

    name: str
    probabilities: Mapping[str, float]  # by class, the healthy one first
    change: np.ndarray  # [S]
    top: np.ndarray  # [K] slice indices
    images: np.ndarray  # [K, X, Y] in 0..255
    heat: np.ndarray  # [K, X, Y] in 0..255


@dataclass(frozen=True)
class EvidencePicture:
    """All that a picture shows of one series."""

    title: str
    z: np.ndarray  # [S] mm, ascending
    pixel_size: tuple[float, float]  # mm along x and y
    attention: np.ndarray | None  # [S]
    groups: list[GroupStrip]


def draw_evidence(picture: EvidencePicture, dpi: int = 90) -> bytes:
    """The picture as PNG. Slices are upright: anterior up, the patient's right at the left."""
    count = max(len(group.top) for group in picture.groups)
    figure = Figure(figsize=(6.2 + 1.9 * count, 0.9 + 1.95 * len(picture.groups)), layout="constrained", dpi=dpi)
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.05)
    figure.suptitle(picture.title, fontsize=13, fontweight="bold")
    figure.supxlabel(CAVEAT, fontsize=8, color="#444444")
    axes = figure.subplots(
        len(picture.groups), 1 + count, squeeze=False, gridspec_kw={"width_ratios": [3.0] + [1.0] * count}
    )
    for row, group in zip(axes, picture.groups, strict=True):
        _draw_strip(row[0], group, picture)
        for axis in row[1:]:
            axis.set_axis_off()
        for rank, axis in enumerate(row[1 : 1 + len(group.top)]):
            _draw_slice(axis, group, picture, rank)
    axes[-1, 0].set_xlabel("z in mm (inferior → superior)", fontsize=8)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", pil_kwargs={"optimize": True})
    return buffer.getvalue()


def _draw_strip(axis: Axes, group: GroupStrip, picture: EvidencePicture) -> None:
    """The bars of one group; numbers mark the slices that are shown."""
    z, change = picture.z, group.change
    width = 0.85 * float(np.median(np.diff(z))) if len(z) > 1 else 1.0
    low, high = 1.1 * min(change.min(), -SMALLEST_SCALE), 1.35 * max(change.max(), SMALLEST_SCALE)
    if picture.attention is not None:
        share = picture.attention / picture.attention.max()
        axis.fill_between(z, low, low + (high - low) * share, step="mid", color="#dddddd", label="attention")
        axis.legend(loc="upper right", fontsize=7, frameon=False)
    axis.bar(z, change, width=max(width, 1e-3), color=np.where(change >= 0, FOR, AGAINST))
    axis.axhline(0, color=NEUTRAL, linewidth=0.6)
    for rank, k in enumerate(group.top):
        axis.annotate(
            RANKS[rank], (z[k], max(change[k], 0.0)), (0, 1), textcoords="offset points", ha="center", fontsize=9
        )
    axis.set_ylim(low, high)
    axis.margins(x=0.01)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=7)
    healthy, *injured = group.probabilities.items()
    parts = [f"{name} {value:.2f}" for name, value in injured]
    injury = 1.0 - healthy[1]
    axis.set_title(f"{group.name}: {', '.join(parts)}  ({healthy[0]} {healthy[1]:.2f})", loc="left", fontsize=10,
                   fontweight="bold", color=FOR if injury > 0.5 else "black")  # fmt: skip
    axis.set_ylabel("change of log-odds", fontsize=7)


def _draw_slice(axis: Axes, group: GroupStrip, picture: EvidencePicture, rank: int) -> None:
    """One of the top slices with its heat map."""
    k = group.top[rank]
    dx, dy = picture.pixel_size
    options = {"aspect": dy / dx, "vmin": 0, "vmax": 255}
    axis.imshow(_upright(group.images[rank]), cmap="gray", interpolation="nearest", **options)
    axis.imshow(_upright(group.heat[rank]), cmap=HEAT, interpolation="bilinear", **options)
    axis.set_title(f"{RANKS[rank]} z {picture.z[k]:.0f} mm ({group.change[k]:+.2f})", fontsize=8)
    axis.text(0.02, 0.5, "R", transform=axis.transAxes, color="white", fontsize=7, va="center")
    axis.text(0.98, 0.5, "L", transform=axis.transAxes, color="white", fontsize=7, va="center", ha="right")


def _upright(image: np.ndarray) -> np.ndarray:
    """[X, Y] in RAS -> [rows, columns]: anterior up, the patient's right at the left."""
    return image.T[::-1, ::-1]
