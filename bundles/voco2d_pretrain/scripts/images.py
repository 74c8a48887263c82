# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What the network sees, in TensorBoard: the middle slice with its grid, and the random crops with their labels."""

from __future__ import annotations

import numpy as np
from ignite.engine import Engine, Events
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

__all__ = ["CropImages", "crops_figure"]


def upright(image: np.ndarray) -> np.ndarray:
    """[X, Y] in RAS -> rows and columns as radiologists look at an axial slice: anterior up, patient's right at the
    left."""
    return image.T[::-1, ::-1]


def crops_figure(random_crops: Tensor, base_crops: Tensor, overlap: Tensor) -> Figure:
    """A figure of one volume's crops at its middle slice.

    Args:
        random_crops: [R, S, C, h, w]. base_crops: [gy, gx, S, C, h, w]. overlap: [R, gy*gx].
    """
    middle = random_crops.shape[1] // 2
    base = base_crops[:, :, middle, 0].cpu().numpy()  # (gy, gx, h, w)
    rows, columns, height, width = base.shape
    whole = base.transpose(0, 2, 1, 3).reshape(rows * height, columns * width)
    figure = Figure(figsize=(3.2 * (1 + len(random_crops)), 4.2), layout="constrained")
    axes = figure.subplots(1, 1 + len(random_crops), squeeze=False)[0]
    axes[0].imshow(upright(whole), cmap="gray", interpolation="nearest")
    axes[0].set_title("base crops")
    # grid lines are drawn in the upright picture: its columns run along the first spatial axis, backwards
    for k in range(1, rows):
        axes[0].axvline(rows * height - k * height - 0.5, color="tab:orange", linewidth=0.8)
    for k in range(1, columns):
        axes[0].axhline(columns * width - k * width - 0.5, color="tab:orange", linewidth=0.8)
    for axis, crop, label in zip(
        axes[1:], random_crops[:, middle, 0].cpu().numpy(), overlap.cpu().numpy(), strict=True
    ):
        axis.imshow(upright(crop), cmap="gray", interpolation="nearest")
        shares = upright(label.reshape(rows, columns))
        axis.set_title(
            "\n".join(" ".join(f"{share:.2f}" for share in row) for row in shares), family="monospace", fontsize=8
        )
    for axis in axes:
        axis.set_axis_off()
    return figure


class CropImages:
    """Handler that adds `crops_figure` of the batch's first volumes to TensorBoard: once in the first iteration, then
    each epoch.

    3D crops are not drawn.

    Args:
        log_dir: TensorBoard's folder.
        interval: epochs between two figures.
        number: volumes of a figure each.
    """

    def __init__(self, log_dir: str, interval: int = 1, number: int = 2) -> None:
        self.log_dir, self.interval, self.number = log_dir, interval, number
        self.writer: SummaryWriter | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self)
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self)

    def __call__(self, engine: Engine) -> None:
        batch = engine.state.batch
        if batch["random_crops"].ndim != 6:  # [B, R, S, C, h, w]
            return
        self.writer = self.writer or SummaryWriter(self.log_dir)
        for i in range(min(self.number, len(batch["overlap"]))):
            figure = crops_figure(batch["random_crops"][i], batch["base_crops"][i], batch["overlap"][i])
            FigureCanvasAgg(figure)  # add_figure renders with the figure's own canvas: no display is needed
            self.writer.add_figure(f"crops/volume_{i}", figure, engine.state.iteration)
        self.writer.flush()
