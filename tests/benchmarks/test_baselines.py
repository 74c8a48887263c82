# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What all reports share: position accuracy without looking, and the revisions of runs."""

from __future__ import annotations

import numpy as np
import pytest
from transforms.voco import RandVoCoCrop, overlap_labels

from benchmarks.provenance import revision_note
from benchmarks.windows import baselines_text, position_baselines


@pytest.mark.parametrize(("grid", "crop"), [((3, 3), (4, 4)), ((3, 3, 1), (4, 4, 5))])
def test_always_the_centre_beats_one_in_nine(grid: tuple[int, ...], crop: tuple[int, ...]) -> None:
    span = [range((g - 1) * c + 1) for g, c in zip(grid, crop, strict=True)]
    windows = np.array([[x, y, *([0] * (len(grid) - 2))] for x in span[0] for y in span[1]])  # every start once
    found = position_baselines(overlap_labels(windows, grid, crop).numpy())
    # along an axis of nine starts the middle crop holds the most, or as much, from 2 to 6
    assert found["centre"] == pytest.approx((5 / 9) ** 2)
    assert found["windows"] == 81
    assert 1 / 9 <= found["chance"] < found["centre"]


def test_baselines_are_of_the_windows_given() -> None:
    crop = RandVoCoCrop(grid_size=3, crop_size=32, num_random_crops=4000).set_random_state(0)
    crop.randomize((96, 96))
    found = position_baselines(overlap_labels(crop.windows, (3, 3), (32, 32)).numpy())
    assert found["centre"] == pytest.approx((33 / 65) ** 2, abs=0.02)
    assert baselines_text(found).startswith("a base crop at random scores 0.1")
    corner = position_baselines(overlap_labels(np.zeros((1, 2), int), (3, 3), (32, 32)).numpy())
    assert (corner["chance"], corner["centre"]) == (pytest.approx(1 / 9), 0.0)


def test_mixed_or_unclean_revisions_are_told_loudly() -> None:
    assert revision_note({"abc": 3}) == "All runs by revision: `abc` (3)."
    mixed = revision_note({"def": 1, "abc": 3})
    assert "WARNING: 2 revisions were mixed; runs by revision: `abc` (3), `def` (1)" in mixed
    assert "WARNING: files differed" in revision_note({"abc-dirty": 1})
    assert "WARNING" in revision_note({"unknown": 1})
    with pytest.raises(ValueError, match="found none"):
        revision_note({})
