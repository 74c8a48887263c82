# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The same tables for a run on a GPU at 2D-VoCo's sizes."""

from __future__ import annotations

from .report import headline, plots, section

__all__ = ["COMMAND", "TITLE", "headline", "plots", "section"]

TITLE = "What 2D saves over 3D, on a GPU at 2D-VoCo's sizes"
COMMAND = (
    "python -m benchmarks.two_vs_three_d --size paper --device cuda --seconds 60 --seeds 3"
    " --out benchmarks/results/two_vs_three_d_gpu.json"
)
