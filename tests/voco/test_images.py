# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The figure for TensorBoard: upright, grid lines between the crops, labels where the crops are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from matplotlib.backends.backend_agg import FigureCanvasAgg
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transforms import RandVoCoCrop

from bundles.voco2d_pretrain.scripts.images import CropImages, crops_figure

GRID, CROP, SLICES = (3, 2), (4, 5), 3
SHAPE = (12, 10)


def cut(image: torch.Tensor, windows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    crop = RandVoCoCrop(grid_size=GRID, crop_size=CROP, num_random_crops=len(windows))
    crop.windows = np.array(windows)
    found = crop(image, randomize=False)
    return found.random_crops, found.base_crops, torch.as_tensor(found.overlap)


def marked(x: int, y: int) -> torch.Tensor:
    """Slices of a RAS volume (x to the right, y to anterior) with one bright pixel in the middle slice."""
    image = torch.zeros(SLICES, 1, *SHAPE)
    image[1, 0, x, y] = 1.0
    return image


def shares(axis: object) -> np.ndarray:
    return np.array([[float(word) for word in line.split()] for line in axis.get_title().splitlines()])


@pytest.mark.parametrize(
    ("x", "y", "row", "column"),
    [
        (11, 9, 0, 0),  # the patient's right, anterior: up and to the left
        (0, 9, 0, 11),  # left, anterior
        (11, 0, 9, 0),  # right, posterior: down
        (3, 7, 2, 8),
    ],
)
def test_the_picture_is_upright_with_the_patients_right_at_the_left(x, y, row, column):
    figure = crops_figure(*cut(marked(x, y), [[0, 0]]))
    picture = np.asarray(figure.axes[0].images[0].get_array())
    assert picture.shape == (SHAPE[1], SHAPE[0])
    assert np.argwhere(picture).tolist() == [[row, column]]
    assert figure.axes[0].get_title() == "base crops"


def test_a_random_crop_is_shown_as_it_lies_in_the_slice():
    image = torch.arange(float(np.prod(SHAPE))).reshape(SHAPE).expand(SLICES, 1, *SHAPE).contiguous()
    random_crops, base_crops, overlap = cut(image, [[5, 3], [0, 0]])
    figure = crops_figure(random_crops, base_crops, overlap)
    whole = np.asarray(figure.axes[0].images[0].get_array())
    shown = np.asarray(figure.axes[1].images[0].get_array())
    assert shown.shape == (5, 4)
    row, column = np.argwhere(whole == shown[0, 0])[0]
    np.testing.assert_array_equal(whole[row : row + 5, column : column + 4], shown)
    assert len(figure.axes) == 3


def test_grid_lines_lie_between_the_base_crops():
    # each base crop has a grey value of its own: it changes exactly where a line is
    value = torch.arange(6.0).reshape(GRID).repeat_interleave(CROP[0], 0).repeat_interleave(CROP[1], 1)
    figure = crops_figure(*cut(value.expand(SLICES, 1, *SHAPE).contiguous(), [[0, 0]]))
    picture = np.asarray(figure.axes[0].images[0].get_array())
    upright = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_xdata()[0] == line.get_xdata()[1]]
    flat = [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_ydata()[0] == line.get_ydata()[1]]
    assert sorted(upright) == (np.flatnonzero(np.diff(picture[0])) + 0.5).tolist()
    assert sorted(flat) == (np.flatnonzero(np.diff(picture[:, 0])) + 0.5).tolist()
    assert (len(upright), len(flat)) == (GRID[0] - 1, GRID[1] - 1)


@pytest.mark.parametrize("i", range(GRID[0]))
@pytest.mark.parametrize("j", range(GRID[1]))
def test_a_label_stands_where_its_base_crop_is_in_the_picture(i, j):
    x, y = i * CROP[0], j * CROP[1]
    figure = crops_figure(*cut(marked(x + 1, y + 1), [[x, y]]))  # the window is base crop (i, j)
    table = shares(figure.axes[1])
    assert table.shape == (GRID[1], GRID[0])
    assert table.sum() == 1.0
    row, column = np.argwhere(np.asarray(figure.axes[0].images[0].get_array()))[0]
    assert table[row // CROP[1], column // CROP[0]] == 1.0


def test_the_labels_are_the_shares_of_the_window():
    figure = crops_figure(*cut(torch.zeros(SLICES, 1, *SHAPE), [[2, 0]]))  # half in base crop (0, 0), half in (1, 0)
    np.testing.assert_array_equal(shares(figure.axes[1]), [[0, 0, 0], [0, 0.5, 0.5]])


def test_the_figure_can_be_drawn_without_a_display():
    figure = crops_figure(*cut(torch.rand(SLICES, 1, *SHAPE), [[0, 0], [2, 2]]))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert np.asarray(canvas.buffer_rgba()).std() > 10


def batch(volumes: int, dims: int = 2) -> dict[str, torch.Tensor]:
    spatial = (4,) * dims
    return {
        "random_crops": torch.randint(0, 255, (volumes, 1, 2, 1, *spatial), dtype=torch.uint8),
        "base_crops": torch.randint(0, 255, (volumes, *(2,) * dims, 2, 1, *spatial), dtype=torch.uint8),
        "overlap": torch.rand(volumes, 1, 2**dims),
    }


def steps(folder: object) -> dict[str, list[int]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}


def test_figures_come_with_the_first_iteration_and_each_interval(tmp_path):
    engine = Engine(lambda *_: None)
    CropImages(str(tmp_path), interval=2).attach(engine)
    engine.run([batch(3)] * 4, max_epochs=4)
    assert steps(tmp_path) == {f"crops/volume_{i}": [1, 8, 16] for i in range(2)}


def test_fewer_volumes_than_figures_and_3d_crops_are_no_error(tmp_path):
    engine = Engine(lambda *_: None)
    CropImages(str(tmp_path / "a"), number=5).attach(engine)
    engine.run([batch(1)], max_epochs=1)
    assert list(steps(tmp_path / "a")) == ["crops/volume_0"]
    engine = Engine(lambda *_: None)
    CropImages(str(tmp_path / "b")).attach(engine)
    engine.run([batch(1, dims=3)], max_epochs=1)
    assert not (tmp_path / "b").exists()
