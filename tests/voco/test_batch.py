# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""From the loader's batch to the network: order of crops, scale, any number of dimensions."""

from __future__ import annotations

import pytest
import torch
from transforms import RandVoCoCrop
from workflow.dataset import collate_plain

from bundles.voco2d_pretrain.scripts.batch import PrepareCrops


@pytest.mark.parametrize(("grid", "crop"), [((2, 3), (4, 5)), ((2, 1, 3), (2, 4, 3))])
def test_random_crops_come_first_then_base_crops_in_the_order_of_the_labels(grid, crop):
    shape = tuple(g * c for g, c in zip(grid, crop, strict=True))
    slices = 3 if len(grid) == 2 else 1
    items = []
    for seed in range(2):
        image = torch.randint(
            0, 256, (slices, 1, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )
        cut = RandVoCoCrop(grid_size=grid, crop_size=crop, num_random_crops=2)
        cut.set_random_state(seed=seed)
        items.append((image, cut(image)))
    batch = collate_plain(
        [{"random_crops": c.random_crops, "base_crops": c.base_crops, "overlap": c.overlap} for _, c in items]
    )
    crops, overlap = PrepareCrops()(batch, "cpu", non_blocking=True)
    bases = torch.Size(grid).numel()
    assert crops.shape == (2, 2 + bases, slices, 1, *crop)
    assert crops.dtype == torch.float32
    assert overlap.shape == (2, 2, bases)
    for b, (image, cut) in enumerate(items):
        assert torch.equal(overlap[b], torch.as_tensor(cut.overlap))
        for r in range(2):
            torch.testing.assert_close(crops[b, r], cut.random_crops[r].float() / 255)
        for k in range(bases):
            index, window = torch.unravel_index(torch.tensor(k), grid), image
            for axis, (i, size) in enumerate(zip(index, crop, strict=True)):
                window = window.narrow(2 + axis, int(i) * size, size)
            torch.testing.assert_close(crops[b, 2 + k], window.float() / 255)


def test_bytes_become_zero_to_one_and_floats_stay():
    batch = {
        "random_crops": torch.tensor([0, 51, 255, 102], dtype=torch.uint8).reshape(1, 1, 1, 1, 2, 2),
        "base_crops": torch.full((1, 1, 1, 1, 1, 2, 2), 255, dtype=torch.uint8),
        "overlap": torch.ones(1, 1, 1),
    }
    crops, _ = PrepareCrops()(batch)
    assert crops.unique().tolist() == pytest.approx([0.0, 0.2, 0.4, 1.0])
    batch |= {name: batch[name].float() for name in ("random_crops", "base_crops")}
    assert PrepareCrops()(batch)[0].max() == 255.0
