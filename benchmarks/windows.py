# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What position accuracy is without looking at a crop: the baselines of the very windows that were measured."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

TIE = 1e-6  # as the bundle's PositionAccuracy: a tie counts for either


def position_baselines(overlap: np.ndarray) -> dict[str, float]:
    """Position accuracy of guesses that see no pixel.

    Windows start uniformly over the image, so that the centre of the grid holds the largest share of more of them than
    a corner does: "always the centre" is what a network has to beat, not one in K.

    Args:
        overlap: [..., K] shares, K base crops of an odd grid in row-major order.

    Returns:
        ``chance``: a base crop at random; ``centre``: always the middle one; ``windows``: how many there are.
    """
    flat = np.asarray(overlap).reshape(-1, overlap.shape[-1])
    largest = flat >= flat.max(axis=1, keepdims=True) - TIE
    middle = flat.shape[1] // 2
    return {"chance": float(largest.mean()), "centre": float(largest[:, middle].mean()), "windows": len(flat)}


def baselines_text(found: Mapping[str, float]) -> str:
    """Both as a clause."""
    return f"a base crop at random scores {found['chance']:.2f}, always the centre {found['centre']:.2f}"
